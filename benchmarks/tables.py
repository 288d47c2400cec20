"""How much accuracy is left at each size? The Controller beside the others, the source and the field.

`python -m benchmarks.tables --help` says what is compared and how.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.campaigns import (
    WORK,
    baseline,
    beside,
    campaign,
    commit,
    digest,
    ended_as_a_command,
    fingerprint,
    images_of,
    require_all,
    run,
    seconds_of,
)
from benchmarks.ledger import Ledger, Row
from benchmarks.search import LEARNING
from benchmarks.step import cpu_name
from benchmarks.tables_page import TARGETS, write_page
from deploy.config import CampaignConfig, dump, parse
from deploy.folder import CampaignFolder, read_json, versions, write_atomic

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("vgg16", "resnet18", "resnet34")
_QUICK_TARGETS = (0.5, 0.8)
_LOOK_S = 1.0  # between two looks whether a search has ended


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to a smaller network."""

    about: str  # in the table
    sets: tuple[str, ...] = ()
    learns: bool = False  # on Ray; a CPU it has for itself
    taught: bool = False  # begins with the Controller that comes with Zeroout
    peer: bool = False  # no campaign of ours: benchmarks/search_methods/peers.py, a run for each target
    of: str = ""  # the arm whose search this is, recovered otherwise


#: In the order in which they are made, so that a slice of time ends with what is wanted first.
ARMS: Mapping[str, Arm] = {
    "controller": Arm(about="Controller", learns=True, taught=True),
    "distilled": Arm(about="the same, recovered by distillation", sets=("recovery.distillation=0.5",), of="controller"),
    "frozen": Arm(about="Controller, its learner off", sets=('search.method="untrained"',), taught=True),
    "taylor": Arm(about="Taylor repeated", sets=('search.method="taylor"',)),
    "untrained": Arm(about="the agent untaught, learner off", sets=('search.method="untrained"',)),
    "gamma": Arm(about="gamma repeated", sets=('search.method="gamma"',)),
    "random": Arm(about="random search", sets=('search.method="random"',)),
    "torch-pruning": Arm(about="Torch-Pruning, best of five", peer=True),
    "uniform": Arm(about="uniform, from scratch", peer=True),
    "hrank": Arm(about="HRank repeated", sets=('search.method="hrank"',)),
    "hrank-1": Arm(about="HRank after replacement 1", sets=('search.method="hrank"', 'replacement.how="1"')),
    "hrank-2": Arm(about="HRank after replacement 2", sets=('search.method="hrank"', 'replacement.how="2"')),
    "source": Arm(
        about="the source's agent",
        learns=True,
        sets=(
            'controller.observation="mask"',
            'episode.reward="accuracy"',
            "search.sigma=0.0",
            "search.epsilon_base=0.4",
            "learner.discount=0.997",
        ),
    ),
}

EPILOG = """\
Each seed has one network, trained from scratch, from which every arm starts. An arm's campaign has equally many
episodes with the same retraining; the best network on validation at each target is recovered alike, and judged once
on the test split. Compression is counted on the compact network, against the network before anything was done to it.

  controller       `zeroout run`: begins with what other networks have taught it, on VGG16 and ResNet18; elsewhere with
                   nothing. At width 0.25, seeds 0 to 4 taught it or chose it
  distilled        the networks of controller, recovered with half of the loss from the baseline's outputs
  frozen           the same agent, its learner off: what it has been taught before, alone
  untrained        the agent untaught, its learner off; it explores wider, as one does that knows nothing
  taylor, gamma, hrank
                   a rule, repeated with fresh minibatches; hrank is the mean rank of feature maps
  hrank-1, hrank-2 the same after the source's filter replacement 1 or 2, with epochs of training of its own
  random           a random share of each layer, L1 within
  torch-pruning    the best on validation of five criteria, each at once and in ten steps
  uniform          all widths multiplied alike, trained from scratch as long as the baseline
  source           the source's agent: mask observation, reward by accuracy, a convolution on each identity skip

How long everything lasts is a protocol: `gpu` (100 epochs, 50 of recovery, bfloat16) or `cpu` (8 and 3), by what this
machine has. A run that is stopped, or that ends by itself because its minutes are over, goes on where it was: campaigns
lie under --work, and a row for each network in --results/tables.jsonl with a fingerprint of its configuration. Delete
the rows to make them again. The page and the figures are made of all rows there are.

examples:
  python -m benchmarks.tables --network vgg16 --width 0.25 --seeds 5 6 7 --targets 0.9,0.95,0.975
  python -m benchmarks.tables --network vgg16 --minutes 9                  full width: a slice of a night on a GPU
  python -m benchmarks.tables --network vgg16 --arms controller taylor --seeds 0
  python -m benchmarks.tables --page                                       the page again, of the rows there are
  python -m benchmarks.tables --quick                                      digits, a minute or two; writes to .search/
"""

GPU = f"""
[data]
source = "folder"
validation_share = 0.05
flip = true
shift_pixels = 4
[baseline]
epochs = 100
batch_size = 256
learning_rate = 0.2
norm_weight_decay = 5e-4
schedule = "cosine"
warmup_share = 0.1
precision = "bfloat16"
[replacement]
share = 0.2
[replacement_training]
epochs = 10
batch_size = 256
learning_rate = 0.05
precision = "bfloat16"
[episode]
waypoints = 16
batch_size = 128
step_minibatches = 8
recovery_minibatches = 300
recovery_learning_rate = 0.05
precision = "bfloat16"
[recovery]
epochs = 50
batch_size = 512
learning_rate = 0.15
norm_weight_decay = 5e-4
schedule = "cosine"
precision = "bfloat16"
distillation = 0.0
{LEARNING}
[search]
episodes = 12
actors = 4
[cluster]
gpus_per_actor = 0.25
dashboard = false
"""
CPU = f"""
[data]
source = "folder"
validation_share = 0.05
[baseline]
epochs = 8
[replacement]
share = 0.2
images = 160
[replacement_training]
epochs = 2
learning_rate = 0.05
[episode]
waypoints = 8
step_minibatches = 4
recovery_minibatches = 400
recovery_learning_rate = 0.05
step_images = 250
score_images = 128
rank_images = 160
[recovery]
epochs = 3
learning_rate = 0.05
distillation = 0.0
{LEARNING}
[search]
episodes = 4
[cluster]
dashboard = false
"""
QUICK = f"""
[network]
name = "small"
[baseline]
epochs = 5
[replacement]
images = 100
[replacement_training]
epochs = 1
[episode]
waypoints = 4
step_minibatches = 2
recovery_minibatches = 4
rank_images = 100
[recovery]
epochs = 2
distillation = 0.0
{LEARNING}
[search]
episodes = 4
[cluster]
dashboard = false
"""
PROTOCOLS = {"gpu": GPU, "cpu": CPU}
_IMAGES = {"folder": "CIFAR-10, JPEG copy", "digits": "digits", "cifar10": "CIFAR-10"}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All arms of one network."""

    protocol: str  # TOML
    network: str
    width: float
    data: str  # a folder of images, or digits
    targets: tuple[float, ...]
    ledger: Ledger
    work: Path
    deadline_s: float
    extra: tuple[str, ...] = ()

    def run(self, seeds: Sequence[int], arms: Sequence[str], jobs: int) -> None:
        """Make what is missing, in order: the baselines, and seed by seed the arms, as many at a time as may be."""
        with ThreadPoolExecutor(jobs) as pool:
            wanted = [seed for seed in seeds if any(self.missing(seed, arm) for arm in arms)]
            weights = dict(zip(wanted, pool.map(self.baseline, wanted), strict=True))
            for seed in [seed for seed in wanted if weights[seed] is not None]:
                of_seed = [arm for arm in ARMS if arm in arms and self.missing(seed, arm)]
                for together in side_by_side(of_seed, jobs):
                    begun: dict[str, Future[None]] = {}
                    for arm in sorted(together, key=lambda name: bool(ARMS[name].of)):  # who waits for another, last
                        begun[arm] = pool.submit(self.make, seed, arm, weights[seed], begun.get(ARMS[arm].of))
                    for made in begun.values():
                        made.result()

    def missing(self, seed: int, arm: str) -> bool:
        """Whether a network of this arm is not in the table."""
        return any(self.lacks(config, arm) for config in self.configs(seed, arm, None))

    def lacks(self, config: CampaignConfig, arm: str) -> bool:
        """Whether a network of this campaign is not in the table."""
        mark = self.mark(config, arm)
        return any(self.ledger.row(mark, target=target) is None for target in config.episode.targets)

    def baseline(self, seed: int) -> Path | None:
        """The network that the arms of a seed start from; None where time is over."""
        return baseline(self.config(seed, "", self.targets, None), self.work, self.deadline_s)

    def configs(self, seed: int, arm: str, weights: Path | None) -> Iterator[CampaignConfig]:
        """The campaigns of an arm: one, but a peer has a run for each target."""
        for targets in [(target,) for target in self.targets] if ARMS[arm].peer else [self.targets]:
            yield self.config(seed, arm, targets, weights)

    def config(self, seed: int, arm: str, targets: Sequence[float], weights: Path | None) -> CampaignConfig:
        """A campaign of an arm; of the baseline where there is no arm."""
        how = ARMS.get(arm, Arm(about=""))
        first = ARMS.get(how.of, how)
        digits = self.data == "digits"
        overrides = [
            f"seed={seed}",
            f"network.width={self.width}",
            f"network.weights={json.dumps(str(weights or ''))}",
            f"episode.targets={list(targets)}",
            *([] if digits else [f'network.name="{self.network}"', f"data.path={json.dumps(self.data)}"]),
            *dict.fromkeys((*first.sets, *how.sets)),
            *(['network.skips="convolution"'] if arm == "source" and self.network.startswith("resnet") else []),
            *([] if first.taught else ['controller.weights=""']),
            *self.extra,
        ]
        return parse(self.protocol, overrides, name="benchmarks.tables")

    def mark(self, config: CampaignConfig, arm: str) -> str:
        """What tells a campaign apart, wherever things lie."""
        start = config.controller_start
        beyond = {"taught": digest(start)} if start else {}
        peer = {"peer": arm} if ARMS[arm].peer else {}
        return fingerprint(config, beyond={**beyond, **peer})

    def folder(self, seed: int, arm: str, config: CampaignConfig) -> Path:
        """Where a campaign lies."""
        return self.work / f"tables-{self.network}-{self.width:g}-{seed}-{arm}-{self.mark(config, arm)}"

    def make(self, seed: int, arm: str, weights: Path | None, first: Future[None] | None = None) -> None:
        """Run the campaigns of an arm and keep their rows; `first` makes the arm whose search this one shares."""
        for config in self.configs(seed, arm, weights):
            out, what = self.folder(seed, arm, config), f"{arm}, seed {seed}"
            if time.time() > self.deadline_s or not self.lacks(config, arm):
                continue
            if ARMS[arm].of and not self.share_search(seed, arm, config, out, weights, first):
                continue
            if ARMS[arm].peer:
                run(["benchmarks.search_methods.peers", arm], config, out, what, self.deadline_s)
            else:
                campaign(config, out, what, deliver=False, deadline_s=self.deadline_s)
            if (out / "result.json").is_file():
                self.keep(seed, arm, config, out)

    def share_search(
        self, seed: int, arm: str, config: CampaignConfig, out: Path, weights: Path | None, first: Future[None] | None
    ) -> bool:
        """Begin `out` with the search of the arm that it shares, so that only the recovery is left; whether it has."""
        if out.exists():
            return True
        (other,) = self.configs(seed, ARMS[arm].of, weights)
        found = self.folder(seed, ARMS[arm].of, other)
        ended = CampaignFolder(found).recovered  # made when the search has
        while first is not None and not first.done() and not ended.is_dir():
            time.sleep(_LOOK_S)
        if not ended.is_dir():
            print(f"{arm}, seed {seed}: needs the search of {ARMS[arm].of}, which is not there yet", flush=True)
            return False
        begun = beside(out, ".copy")
        shutil.rmtree(begun, ignore_errors=True)
        shutil.copytree(found, begun, ignore=shutil.ignore_patterns("recovered", "result.json", "*.png", "redis*"))
        write_atomic(begun / "campaign.toml", dump(config))
        begun.rename(out)
        return True

    def keep(self, seed: int, arm: str, config: CampaignConfig, out: Path) -> None:
        """Add a row for each network of a finished campaign."""
        common = {
            "network": self.network,
            "width": self.width,
            "data": _IMAGES[config.data.source],
            "seed": seed,
            "arm": arm,
            "epochs": [config.baseline.epochs, config.recovery.epochs],
            "asked": list(self.targets),
            "fingerprint": self.mark(config, arm),
            "device": device(),
            "commit": commit(),
            "wall_s": seconds_of(out),
            **{name: version for name, version in versions().items() if name in ("python", "torch")},
        }
        rows = [{**common, **found} for found in networks_of(out, config)]
        self.ledger.add(rows)
        found = ", ".join(f"{row['target']:.2%} {row['test']:.4f}" for row in rows)
        print(f"{self.network}, {arm}, seed {seed}: test {found}", flush=True)


def networks_of(out: Path, config: CampaignConfig) -> list[Row]:
    """What a finished campaign, or peer, has shown of each network."""
    result = read_json(out / "result.json")
    given = result["baseline"]
    searched = result.get("images", images_of(CampaignFolder(out).read_episodes(), config))
    return [
        {
            "target": point["target"],
            "policy": point["policy"],
            "compression": point["compression"],
            "macs_removed": 1.0 - point["macs"] / given["macs"],
            "validation": point["val_accuracy"],
            "test": point["test_accuracy"],
            "baseline_validation": given["val_accuracy"],
            "baseline_test": given["test_accuracy"],
            "images": searched,  # of the whole search, before the recovery
        }
        for point in result["points"]
    ]


def device() -> str:
    """What networks are trained on here."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def side_by_side(arms: Sequence[str], jobs: int) -> list[list[str]]:
    """The arms in turns, within each of which `jobs` run at a time.

    A GPU is shared by whatever there is; on a CPU who learns is alone.
    """
    if torch.cuda.is_available() and jobs > 1:
        return [list(arms)]
    # neighbours of the same key run together
    return [list(turn) for _, turn in itertools.groupby(arms, lambda arm: arm if ARMS[arm].learns else "")]


def shares(text: str) -> tuple[float, ...]:
    """Targets as they are typed: 0.9,0.95."""
    return tuple(sorted(float(part) for part in text.split(",")))


def arguments() -> argparse.Namespace:
    """What was asked for; says what is wrong with it, and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=(__doc__ or "").splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--network", choices=NETWORKS, default="vgg16", help="default vgg16")
    parser.add_argument("--width", type=float, default=1.0, help="of the network as published (default 1.0)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 5 6 7, of --quick 0")
    parser.add_argument(
        "--targets",
        type=shares,
        help="shares of the parameters to remove (default 0.70,0.83,0.87,0.92,0.93,0.95,0.9752,0.983)",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: gpu where there is one, else cpu")
    parser.add_argument("--data", default=".data", help="CIFAR-10 as a folder of images (default .data)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of zeroout run")
    parser.add_argument(
        "--jobs", type=int, default=2, help="campaigns at the same time (default 2); on a GPU start MPS first"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="then save and stop")
    parser.add_argument("--page", action="store_true", help="make the page and the figures again, and nothing else")
    parser.add_argument("--quick", action="store_true", help="a small network on digits; writes to .search/ alone")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="where campaigns lie (default .search)")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    given.toml = PROTOCOLS[given.protocol or ("gpu" if gpu else "cpu")]
    given.data = str(Path(given.data).resolve())
    if given.quick:
        given.toml, given.network, given.data, given.results = QUICK, "small", "digits", given.work / "quick"
    given.seeds = given.seeds or ([0] if given.quick else [5, 6, 7])
    given.targets = given.targets or (_QUICK_TARGETS if given.quick else TARGETS)
    return given


def main() -> None:
    """The command."""
    given = arguments()
    ledger = Ledger(given.results / "tables.jsonl")
    bench = Bench(
        protocol=given.toml, network=given.network, width=given.width, data=given.data, targets=given.targets,
        ledger=ledger, work=given.work, deadline_s=time.time() + 60.0 * given.minutes, extra=tuple(given.set),
    )  # fmt: skip
    missing: list[str] = []
    if not given.page:
        with ended_as_a_command():
            bench.run(given.seeds, given.arms, given.jobs)
        missing = [f"{arm}, seed {seed}" for seed in given.seeds for arm in given.arms if bench.missing(seed, arm)]
    if ledger.rows:
        words = {name: arm.about for name, arm in ARMS.items()}
        print(write_page(ledger.rows, words, given.results, " ".join(["python -m benchmarks.tables", *sys.argv[1:]])))
    if missing and time.time() >= bench.deadline_s:
        print(f"the minutes are over; the same command goes on with {'; '.join(missing)}")
    else:
        require_all(missing)


if __name__ == "__main__":
    main()
