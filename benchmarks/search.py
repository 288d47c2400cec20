"""Who finds the better small network? The Controller beside everything it has to beat, at equal budget.

`python -m benchmarks.search --help` says what is compared and how.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from actors.schedule import UNTAUGHT_SIGMA
from agents.controller import TAUGHT
from benchmarks.campaigns import (
    WORK,
    baseline,
    campaign,
    commit,
    digest,
    ended_as_a_command,
    fingerprint,
    images_of,
    require_all,
    run,
)
from benchmarks.ledger import Ledger, Row
from benchmarks.search_methods.greedy import Taught, write_curve
from benchmarks.search_methods.page import write_page
from benchmarks.step import cpu_name
from deploy.candidates import candidate_path
from deploy.config import CampaignConfig, parse
from deploy.controller_file import read_controller
from deploy.folder import CampaignFolder, read_json
from deploy.teach import teach
from env.errors import UserError
from env.networks import NetworkConfig

RESULTS = Path(__file__).parent / "results" / "search"
#: Behind each of `agents.controller.TAUGHT`: campaigns of twelve.
TAUGHT_EPISODES = {"vgg16": 60, "resnet18": 108}
PEERS = ("torch-pruning", "uniform")
#: Those that learn, by whether they begin with what `--teach` has learned; and the same two with the learner off.
LEARNERS = {"controller": True, "fresh": False}
AGENTS = {"frozen": True, "untrained": False, **LEARNERS}
#: A rule by its score and by how much of each layer goes, as it was before it had a name, which its rows go by.
RULES = {"balanced-l1": ("uniform-l1", "balanced"), "profile": ("uniform-l1", "")}
METHODS = (*AGENTS, "cem", *RULES, "balanced", "taylor", "gamma", "random", *PEERS)
#: On whose network the Controller says which widths `profile` holds to; one that has taught it.
PROFILE_SEED = 0

EPILOG = """\
The methods; each seed has one baseline, trained once, and every method starts from it:
  controller       `zeroout run`: actors on Ray, replay in Redis, the learner; on VGG16 and ResNet18 it begins with what
                   campaigns on other seeds have taught (--teach), elsewhere it is the same as `fresh`
  fresh            the same, beginning with nothing
  frozen, untrained
                   these two agents with the learner off: the same exploration, the weights that they begin with
  cem              the cross-entropy method over one offset per layer on the log Taylor score
  taylor, balanced, gamma
                   a rule repeated with fresh minibatches; balanced is the Controller's prior alone
  balanced-l1      the same, but L1 says which filters of a layer go: what teaching came to prefer (trial 21)
  profile          L1 within layers whose widths are fixed: those that the Controller which comes with Zeroout plays
                   without exploration on the network of seed 0, to be told how much of it is one table of widths
  random           a random share of each layer, L1 within
  torch-pruning    the best on validation of five criteria, each at once and in ten steps
  uniform          all widths multiplied alike, trained from scratch as long as the baseline

All but the last two play equally many episodes, each with the same retraining; the network with the lowest
cross-entropy on validation is then recovered, with the same epochs and seed for every method, and judged once on test.
A method is a campaign in a folder of its own under .search/, so a run that is stopped goes on where it was; its row is
written to benchmarks/results/search/CELL.jsonl with a fingerprint of its configuration, and is not made again while
that stays the same, whatever happens to the code (the row names its commit). Delete the row to make it again.

A Controller is taught once, by one campaign after the other, each on a seed of its own and beginning with what `zeroout
teach` learns from the episodes of those before it together: their recovery after an episode is longer than in the
comparison, and their seeds are not among its seeds. agents/taught-vgg16.safetensors, which campaigns on VGG16 begin
with, is what `zeroout teach` learns from those of VGG16 together; agents/taught-resnet18.safetensors from these and
four of ResNet18, of which the last two begin with what the others have taught, and recover for three epochs an episode.
--curve draws what a Controller plays without exploration: with --teach after each campaign, on that network or the one
that --on names; alone the one that comes with Zeroout (VGG16's where there is none), beside an untaught one.

examples:
  python -m benchmarks.search --data .data --teach --seeds 0 1 2 3 4
  zeroout teach .search/vgg16-*-teach-*/ --set replay.replay_ratio=64 --out agents/taught-vgg16.safetensors
                                                                        the Controller that the comparison begins with
  python -m benchmarks.search --data .data --network resnet18 --teach --seeds 3 \
    --set episode.recovery_minibatches=2226 --set controller.weights=FILE         one of those last two
  python -m benchmarks.search --data .data --network resnet18 --curve 0 1 2         what it plays on other seeds
  python -m benchmarks.search --data .data --teach --seeds 0 1 2 --curve 5 6        and what it plays by stages
  python -m benchmarks.search --data .data --episodes 4                 the first cell, seeds 5 to 9
  python -m benchmarks.search --data .data --episodes 4 --epochs 3      the same where little retraining can be paid
  python -m benchmarks.search --data .data --seeds 0 --methods controller cem --episodes 16
  python -m benchmarks.search --quick                                   digits, some minutes; writes to .search/
"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A network, how much of it is to go, and at what price."""

    network: str
    width: float
    target: float
    episodes: int
    data: str
    epochs: int = 0  # of recovery; 0: as long as usual
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the files of results."""
        name = f"{self.network}-{self.width:g}-{self.target:g}-{self.episodes}"
        return f"{name}-{self.epochs}-epochs" if self.epochs else name

    def config(self, seed: int, method: str, weights: Path | None) -> CampaignConfig:
        """The campaign of one method; of the baseline where no weights are given."""
        overrides = [
            f"seed={seed}",
            f'network.name="{self.network}"',
            f"network.width={self.width}",
            f"network.weights={json.dumps(str(weights) if weights else '')}",
            f"episode.targets=[{self.target}]",
            f"search.episodes={self.episodes}",
            *(["data.source='digits'"] if self.data == "digits" else [f"data.path={json.dumps(self.data)}"]),
            *([f"recovery.epochs={self.epochs}"] if self.epochs else []),
            *([] if AGENTS.get(method, True) else ['controller.weights=""', f"search.sigma={UNTAUGHT_SIGMA}"]),
            *self.extra,
        ]
        if method in RULES:
            score, allocation = RULES[method]
            overrides += [f'search.method="{score}"', f'search.allocation="{allocation}"']
        elif method not in (*LEARNERS, *PEERS):
            overrides.append(f'search.method="{"untrained" if method in AGENTS else method}"')
        text = QUICK if self.data == "digits" else FULL
        return parse(text, overrides, name="benchmarks.search")


#: How the Controller learns where a campaign has few episodes, beside the defaults (trials 10 to 14 of the search log).
LEARNING = """\
[sequence]
unroll_length = 8
[replay]
replay_ratio = 200.0"""
#: One episode costs about half a minute on one core, most of it the recovery: a shorter one does not see what a full
#: one will say (trials 7 and 9 of the search log), so that few episodes with a long one tell more.
FULL = f"""
[data]
source = "folder"
validation_share = 0.05
[baseline]
epochs = 8
[episode]
waypoints = 8
step_minibatches = 4
batch_size = 64
recovery_minibatches = 600
recovery_learning_rate = 0.05
step_images = 250
score_images = 128
[recovery]
epochs = 15
learning_rate = 0.05
distillation = 0.0
{LEARNING}
[cluster]
dashboard = false
"""
#: What sets the campaigns that teach apart: nothing they deliver is used. To look further ahead than twice as far does
#: not pay (trial 17).
TEACHING = ("episode.recovery_minibatches=1200", "recovery.epochs=1")
#: How often each episode is learned from where all are learned from together: longer only fits their noise (trial 23).
TOGETHER = ("replay.replay_ratio=64.0",)
QUICK = """
[baseline]
epochs = 5
learning_rate = 0.1
[episode]
waypoints = 8
step_minibatches = 2
recovery_minibatches = 10
[recovery]
epochs = 2
distillation = 0.0
[cluster]
dashboard = false
"""


@dataclass
class Bench:
    """One cell: its jobs, and the rows that are there."""

    cell: Cell
    ledger: Ledger
    work: Path
    deadline_s: float

    def run(self, seeds: list[int], methods: list[str], jobs: int) -> None:
        """Make what is missing, seed by seed; the Controller's campaign has the machine for itself."""
        for seed in seeds:
            missing = [method for method in methods if self.row(seed, method) is None]
            weights = self.baseline(seed) if missing else None
            if weights is None:
                continue
            alone = [method for method in missing if method not in LEARNERS]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda method, s=seed, w=weights: self.make(s, method, w), alone))
            for method in LEARNERS:
                if method in missing:
                    self.make(seed, method, weights)

    def teach(self, seeds: list[int]) -> list[Taught]:
        """Campaigns of the Controller, one after the other, each beginning with what those before have taught.

        Returns what is learned from the first n of them together, for each n, the untaught one first; not all where
        time was over.
        """
        cell = replace(self.cell, extra=(*TEACHING, *self.cell.extra))
        stages, folders, before = [Taught(0, None)], [], Taught(0, None)
        for seed in seeds:
            weights = self.baseline(seed)
            if weights is None:
                return stages
            config, begun = taught_by(cell.config(seed, "fresh", weights), before)
            out = self.work / f"{cell.name}-{seed}-teach-{fingerprint(config, beyond={'begun': begun})}"
            if not campaign(config, out, f"teaching, seed {seed}", deliver=False, deadline_s=self.deadline_s):
                return stages
            returns = row_of(out, config, "fresh")["episodes"]
            print(f"taught by seed {seed}: returns {' '.join(f'{episode[2]:.3f}' for episode in returns)}", flush=True)
            folders.append(out)
            before = Taught(before.episodes + len(returns), self.together(folders))
            stages.append(before)
        print(f"taught by {before.episodes} episodes: {before.weights}", flush=True)
        return stages

    def together(self, folders: list[Path]) -> Path:
        """The Controller that `zeroout teach` makes of these campaigns; kept under their names."""
        names = hashlib.sha256(" ".join([*(folder.name for folder in folders), *TOGETHER]).encode()).hexdigest()[:12]
        file = (self.work / f"{self.cell.name}-taught-{names}.safetensors").resolve()
        if not file.is_file():
            teach([CampaignFolder.open(folder) for folder in folders], file, overrides=TOGETHER)
        return file

    def played(self, seeds: list[int], stages: list[Taught], jobs: int) -> list[Row]:
        """The rows of what each of these Controllers plays without exploration on each seed."""
        pairs = [(seed, stage) for seed in seeds for stage in stages]
        with ThreadPoolExecutor(jobs) as pool:
            return [row for row in pool.map(lambda pair: self.greedy(*pair), pairs) if row is not None]

    def greedy(self, seed: int, taught: Taught) -> Row | None:
        """The row of what a Controller plays without exploration; made if it is missing and there is time."""
        _, mark = self.exploring_nothing(seed, taught)
        row = self.ledger.row(mark, seed=seed, method="greedy")
        out = self.play_greedily(seed, taught) if row is None else None
        for record in out.read_episodes() if out is not None else []:
            point = record["targets"][-1]
            row = {"method": "greedy", "seed": seed, "learned": taught.episodes, "fingerprint": mark,
                   "return": record["return"], "macs": point["macs"], "validation": point["accuracy"],
                   "machine": cpu_name(), "commit": commit()}  # fmt: skip
            self.ledger.add([row])
            print(f"greedy after {taught.episodes}, seed {seed}: return {row['return']:.4f}", flush=True)
        return row

    def exploring_nothing(self, seed: int, taught: Taught) -> tuple[CampaignConfig, str]:
        """The one episode that a Controller plays without exploration, and its fingerprint."""
        cell = replace(self.cell, episodes=1, extra=(*TEACHING, *self.cell.extra, "search.sigma=0.0"))
        config, begun = taught_by(cell.config(seed, "untrained", None), taught)
        return config, fingerprint(config, without=("sequence", "replay", "learner"), beyond={"begun": begun})

    def play_greedily(self, seed: int, taught: Taught) -> CampaignFolder | None:
        """Play that episode, once; None where time is over."""
        config, mark = self.exploring_nothing(seed, taught)
        weights = self.baseline(seed)
        if weights is None or time.time() > self.deadline_s:
            return None
        config = replace(config, network=replace(config.network, weights=str(weights)))
        out = self.work / f"{replace(self.cell, episodes=1).name}-{seed}-greedy-{mark}"
        what = f"greedy after {taught.episodes}, seed {seed}"
        run(["benchmarks.search_methods.greedy"], config, out, what, self.deadline_s)
        return CampaignFolder(out)

    def profile(self) -> Path | None:
        """The network whose widths `profile` holds to, of the Controller's one episode on `PROFILE_SEED`."""
        out = self.play_greedily(PROFILE_SEED, comes_with(self.cell.network))
        file = candidate_path(out, "untrained", self.cell.target) if out is not None else None
        return file if file is not None and file.is_file() else None

    def row(self, seed: int, method: str) -> Row | None:
        """The row of this very configuration."""
        return self.ledger.row(self.fingerprint(seed, method), seed=seed, method=method)

    def fingerprint(self, seed: int, method: str) -> str:
        """Of what the method's result depends on: not where things lie, nor how others learn."""
        config = self.cell.config(seed, method, None)
        taught = {"taught": begun_with(config)} if method in AGENTS and config.controller_start else {}
        if method == "profile":
            taught = {"profile": [PROFILE_SEED, digest(comes_with(self.cell.network).weights)]}
        # an episode is the same with snapshots and without
        config = replace(config, search=replace(config.search, snapshot_period=0))
        ignored = [] if method in AGENTS else ["controller", "sequence", "replay", "learner"]
        return fingerprint(config, without=ignored, beyond=taught)

    def baseline(self, seed: int) -> Path | None:
        """The weights that all methods of a seed start from; None where time is over."""
        return baseline(self.cell.config(seed, "taylor", None), self.work, self.deadline_s)

    def make(self, seed: int, method: str, weights: Path) -> None:
        """Run one method and write its row."""
        if time.time() > self.deadline_s:
            return
        config, print_of = self.cell.config(seed, method, weights), self.fingerprint(seed, method)
        if method == "profile":
            like = self.profile()
            if like is None:
                return
            config = replace(config, search=replace(config.search, like=str(like)))
        out = self.work / f"{self.cell.name}-{seed}-{method}-{print_of}"
        since = time.perf_counter()
        if method in PEERS:
            run(["benchmarks.search_methods.peers", method], config, out, f"{method}, seed {seed}")
        else:
            campaign(config, out, f"{method}, seed {seed}")
        if not (out / "result.json").is_file():
            return
        row = row_of(out, config, method) | {
            "seed": seed,
            "fingerprint": print_of,
            "machine": cpu_name(),
            "commit": commit(),
            "wall_s": round(time.perf_counter() - since, 1),
        }
        self.ledger.add([row])
        print(f"{method}, seed {seed}: test {row['test']:.4f}, validation {row['validation']:.4f}", flush=True)


def taught_by(config: CampaignConfig, taught: Taught) -> tuple[CampaignConfig, str]:
    """`config`, beginning with a Controller, or as it says itself; and that one's digest, "" where it knows nothing."""
    if taught.weights is not None:
        config = replace(config, controller=replace(config.controller, weights=str(taught.weights)))
    return config, begun_with(config)


def begun_with(config: CampaignConfig) -> str:
    """The digest of what the Controller begins with, "" for nothing. UserError as `read_controller`."""
    start = config.controller_start
    read_controller(start)
    return digest(start) if start else ""


def comes_with(network: str) -> Taught:
    """The Controller that campaigns on a network begin with; VGG16's where there is none of its own."""
    name = network if network in TAUGHT else "vgg16"
    return Taught(TAUGHT_EPISODES[name], TAUGHT[name])


def row_of(out: Path, config: CampaignConfig, method: str) -> Row:
    """What a finished campaign, or peer, has shown."""
    result = read_json(out / "result.json")
    point, episodes = result["points"][-1], CampaignFolder(out).read_episodes()
    before = read_json(out / "baseline" / "baseline.json")
    return {
        "method": method,
        "policy": point["policy"],
        "compression": point["compression"],
        "macs": point["macs"],
        "validation": point["val_accuracy"],
        "test": point["test_accuracy"],
        "baseline_validation": before["validation"]["accuracy"],
        "images": result.get("images", images_of(episodes, config)),
        "seconds": round(sum(record["seconds"] for record in episodes), 1),
        "episodes": [
            [record["policy"], record["epsilon"], round(record["return"], 4), record["weights_version"]]
            for record in sorted(episodes, key=lambda record: int(record["id"]))
        ],
    }


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """A cell for each target."""
    for target in given.targets:
        yield Cell(
            network=given.network, width=given.width, target=target, episodes=given.episodes,
            data=given.data if given.data == "digits" else str(Path(given.data).resolve()),
            epochs=given.epochs, extra=tuple(given.set),
        )  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", default="vgg16", help="vgg16 (default), resnet18, ...")
    parser.add_argument("--width", type=float, default=0.25, help="default 0.25")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.95], help="shares to remove (default 0.95)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9], help="default 5 6 7 8 9")
    parser.add_argument("--episodes", type=int, default=12, help="of each method (default 12)")
    parser.add_argument("--epochs", type=int, default=0, help="of recovery, for every method (default 15; digits 2)")
    parser.add_argument("--data", default=".data", help="a folder of images, or digits (default .data)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of zeroout run")
    parser.add_argument("--jobs", type=int, default=2, help="methods at the same time (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many minutes")
    parser.add_argument("--teach", action="store_true", help="teach the Controller on these seeds instead")
    parser.add_argument("--on", metavar="NETWORK", help="of --curve, where it is not the one that is taught on")
    also = "draw what a Controller plays on these seeds without exploration"
    parser.add_argument("--curve", type=int, nargs="+", default=[], metavar="SEED", help=also)
    parser.add_argument("--quick", action="store_true", help="digits, 2 seeds, 12 episodes; writes to .search/ alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=WORK, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for option, name in {"--network": given.network, "--on": given.on}.items():
        try:
            NetworkConfig(name=name or given.network)
        except UserError as error:
            parser.error(f"{option}: {error}")
    if given.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {given.jobs}")
    if given.data != "digits" and not given.quick and not Path(given.data).is_dir():
        parser.error(f"--data: expected a folder of images or digits, got {given.data}, which is not there")
    with ended_as_a_command():
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Make what is missing of each cell, and its page or curve."""
    if given.quick:
        given.network, given.width, given.targets, given.data = "small", 1.0, [0.97], "digits"
        given.seeds, given.episodes, given.results = [0, 1], 12, given.work / "quick"
    command = " ".join(["python -m benchmarks.search", *sys.argv[1:]])
    chosen, failed = list(cells(given)), list[str]()
    for cell, method in itertools.product(chosen, METHODS):
        begun_with(cell.config(0, method, None))  # a wrong value is said before a baseline is trained
    for cell in chosen:
        ledger = Ledger(given.results / f"{cell.name}.jsonl")
        bench = Bench(cell, ledger, given.work, time.time() + 60.0 * given.minutes)
        if given.teach or given.curve:
            stages = bench.teach(given.seeds) if given.teach else [Taught(0, None), comes_with(cell.network)]
            there = replace(cell, network=given.on or cell.network)
            elsewhere = replace(bench, cell=there, ledger=Ledger(given.results / f"{there.name}.jsonl"))
            played = elsewhere.played(given.curve, stages, given.jobs)
            if played:
                came_from = f"-from-{cell.network}" if there != cell else ""
                print(write_curve(f"{there.name}{came_from}", played, given.results, command))
            continue
        bench.run(given.seeds, given.methods, given.jobs)
        found = {(s, m): bench.row(s, m) for s in given.seeds for m in given.methods}
        rows = [row for row in found.values() if row is not None]
        if rows:
            print(write_page(cell.name, rows, given.results, command))
        if time.time() < bench.deadline_s:
            failed += [f"{cell.name}, {m}, seed {s}" for (s, m), row in found.items() if row is None]
    require_all(failed)


if __name__ == "__main__":
    main()
