"""Does filter replacement help a network that moves to new classes with few images? All treatments side by side.

`python -m benchmarks.transfer --help` says what is compared and how.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaigns import WORK, campaign, commit, ended_as_a_command, fingerprint
from benchmarks.ledger import Ledger, Row
from benchmarks.step import cpu_name
from benchmarks.transfer_page import page
from deploy.config import CampaignConfig, parse
from deploy.folder import read_json
from env.transfer import HOWS

RESULTS = Path(__file__).parent / "results"
SCRATCH = "scratch"
ARMS = (*HOWS, SCRATCH)
_SPLIT = 5  # classes that the source network is trained on; the others are those it moves to

EPILOG = """\
One source network a seed: a quarter-width VGG16 trained on the first five classes of CIFAR-10 by name, on 2,000 images
of each for 8 epochs (1,248 minibatches of 64). It moves to the other five with 10, 50 or 250 images of each. The arms:
  none             its weights with a new last layer, trained on the new classes: transfer alone
  prune            the weakest tenth of each layer's filters removed first
  reinit           given fresh weights first
  noise            given noise, as large as the layer's weights vary, first (only where it is asked for)
  1, 2, 3          replaced first: by the strongest, once each; by the single strongest; in proportion to importance
  scratch          no transfer: the few images alone
Weak and strong is by the rank of feature maps (HRank) on the new images. Every arm has the same images, the same seed,
the same rates and 300 minibatches of 25, however many images there are; then 90 % of its parameters are removed by
Taylor in 8 steps with 4 minibatches each, and 150 minibatches of recovery follow. Test accuracy is that of 5,000
images, before and after the removal. Nothing is chosen: an arm has one network, and validation decides nothing.

Each run is a campaign in a folder of its own under .search/, so that one that is stopped goes on where
it was; its row is written to benchmarks/results/transfer.jsonl with a fingerprint of its configuration, and is not made
again while that stays the same. Delete the row to make it again.

examples:
  python -m benchmarks.transfer --data .data --seeds 0 1 2 3 4 --images 10 50 250 --jobs 2
  python -m benchmarks.transfer --data .data --seeds 0 --images 10 --arms none 1 scratch --minutes 10
  python -m benchmarks.transfer --quick                      digits, a minute or two; writes to .search/quick/
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained for how long; counts are of minibatches."""

    network: str
    classes: tuple[str, ...]  # of all images, sorted by name
    source: str  # TOML of the source network's campaign
    target: str  # TOML of an arm's campaign
    batch_size: int
    updates: int
    recovery_updates: int


FULL = Setting(
    network='name = "vgg16"\nwidth = 0.25',
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    source="""
[data]
source = "folder"
flip = true
shift_pixels = 4
train_per_class = 2000
[baseline]
epochs = 8
batch_size = 64
learning_rate = 0.1
[recovery]
epochs = 1
distillation = 0.0
""",
    # few validation images: they are looked at after every epoch, of which small data have many, and decide nothing
    target="""
[data]
source = "folder"
flip = true
shift_pixels = 4
validation_share = 0.004
[baseline]
learning_rate = 0.02
[episode]
targets = [0.9]
waypoints = 8
step_minibatches = 4
step_learning_rate = 0.02
recovery_minibatches = 1
score_images = 250
step_images = 250
[recovery]
learning_rate = 0.02
distillation = 0.0
""",
    batch_size=25,
    updates=300,
    recovery_updates=150,
)
QUICK = Setting(
    network='name = "small"\nwidth = 0.5',
    classes=tuple("0123456789"),
    source="""
[baseline]
epochs = 5
batch_size = 64
[recovery]
epochs = 1
batch_size = 64
distillation = 0.0
""",
    target="""
[data]
shift_pixels = 1
[baseline]
learning_rate = 0.02
[episode]
waypoints = 4
step_minibatches = 2
recovery_minibatches = 1
[recovery]
learning_rate = 0.02
distillation = 0.0
""",
    batch_size=25,
    updates=40,
    recovery_updates=20,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: an arm on so many images of each class."""

    seed: int
    images: int
    arm: str


@dataclass
class Bench:
    """All runs of one setting, and the rows that are there."""

    setting: Setting
    data: str  # a folder of images, or digits
    ledger: Ledger
    work: Path
    deadline_s: float

    def run(self, jobs: Sequence[Job], at_once: int) -> None:
        """Make what is missing, so many runs at once: source networks first, then seed by seed."""
        missing = [job for job in jobs if self.row(job) is None]
        seeds = dict.fromkeys(job.seed for job in missing if job.arm != SCRATCH)
        with ThreadPoolExecutor(at_once) as pool:
            trained = dict(zip(seeds, pool.map(self.source, seeds), strict=True))
            ready = [job for job in missing if job.arm == SCRATCH or trained[job.seed]]
            list(pool.map(self.make, ready))

    def source_config(self, seed: int) -> CampaignConfig:
        """The cheapest whole campaign there is: its product here is the baseline."""
        sets = ['search.method="taylor"', "search.episodes=1", "episode.waypoints=1", "episode.recovery_minibatches=1"]
        return self._config(self.setting.source, seed, self.setting.classes[:_SPLIT], sets)

    def weights(self, seed: int) -> Path:
        """The source network of a seed; told from others by all that it was made with."""
        config = self.source_config(seed)
        return (
            self.work / f"transfer-source-{seed}-{fingerprint(config)}" / "baseline" / "model.safetensors"
        ).resolve()

    def source(self, seed: int) -> bool:
        """Train the source network of a seed where it is not there; whether it is there now."""
        out = self.weights(seed).parent.parent
        if (out / "result.json").is_file():
            return True
        return time.time() < self.deadline_s and campaign(
            self.source_config(seed), out, f"source, seed {seed}", deliver=False
        )

    def config(self, job: Job) -> CampaignConfig:
        """The campaign of one run."""
        setting = self.setting
        classes = setting.classes[_SPLIT:]
        minibatches = max(1, job.images * len(classes) // setting.batch_size)  # in an epoch
        sets = [
            f"data.train_per_class={job.images}",
            'search.method="taylor"',
            "search.episodes=1",
            f"baseline.epochs={max(1, round(setting.updates / minibatches))}",
            f"recovery.epochs={max(1, round(setting.recovery_updates / minibatches))}",
            *(f"{section}.batch_size={setting.batch_size}" for section in ("baseline", "episode", "recovery")),
        ]
        if job.arm != SCRATCH:
            weights = json.dumps(str(self.weights(job.seed)))
            sets += [f"network.weights={weights}", f"transfer.classes={_SPLIT}", f'transfer.how="{job.arm}"']
        return self._config(setting.target, job.seed, classes, sets)

    def _config(self, text: str, seed: int, classes: Sequence[str], sets: Sequence[str]) -> CampaignConfig:
        where = [f"data.path={json.dumps(self.data)}"] if self.data != "digits" else []
        given = [f"seed={seed}", f"data.split_seed={seed}", f'data.classes="{",".join(classes)}"', *where, *sets]
        return parse(f"[network]\n{self.setting.network}\n{text}", given, name="benchmarks.transfer")

    def fingerprint(self, job: Job) -> str:
        """Of what a run's result depends on: not where things lie."""
        config = self.config(job)
        beyond = {} if job.arm == SCRATCH else {"source": fingerprint(self.source_config(job.seed))}
        return fingerprint(config, beyond=beyond)

    def row(self, job: Job) -> Row | None:
        """The row of this very run."""
        return self.ledger.row(self.fingerprint(job))

    def make(self, job: Job) -> None:
        """Run one campaign and write its row."""
        if time.time() > self.deadline_s:
            return
        what, print_of = f"{job.arm}, {job.images} images, seed {job.seed}", self.fingerprint(job)
        out = self.work / f"transfer-{job.seed}-{job.images}-{job.arm}-{print_of}"
        since = time.perf_counter()
        if not campaign(self.config(job), out, what, deliver=False):
            return
        row = {
            **row_of(out, job, self.config(job)),
            "fingerprint": print_of,
            "machine": cpu_name(),
            "commit": commit(),
            "wall_s": round(time.perf_counter() - since, 1),
        }
        self.ledger.add([row])
        print(f"{what}: test {row['test']:.4f}, compressed {row['test_compressed']:.4f}", flush=True)


def row_of(out: Path, job: Job, config: CampaignConfig) -> Row:
    """What a finished campaign has shown."""
    result, known = read_json(out / "result.json"), read_json(out / "versions.json")
    point, images = result["points"][-1], job.images * len(config.data.chosen)
    return {
        "seed": job.seed,
        "images": job.images,
        "arm": job.arm,
        "test": result["baseline"]["test_accuracy"],
        "test_compressed": point["test_accuracy"],
        "compression": point["compression"],
        "parameters": result.get("transfer", result["baseline"])["parameters"],
        "updates": config.baseline.epochs * (images // config.baseline.batch_size),
        "recovery_updates": config.recovery.epochs * (images // config.recovery.batch_size),
        "versions": {name: known[name] for name in ("python", "torch")},
    }


def jobs_of(given: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, so that what is there when time is up can be compared."""
    for seed, images, arm in itertools.product(given.seeds, given.images, given.arms):
        yield Job(seed=seed, images=images, arm=arm)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = [arm for arm in ARMS if arm != "noise"]
    parser.add_argument("--data", default=".data", help="CIFAR-10 as a folder of images (default .data)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default 0 1 2 3 4")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 250], help="of a class (default 10 50 250)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=default, help=f"default {' '.join(default)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many minutes")
    parser.add_argument("--quick", action="store_true", help="digits, one seed, 10 images, three arms")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=WORK, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if min(given.images) < 1 or given.jobs < 1:
        parser.error("--images and --jobs are numbers of at least 1")
    data, setting = str(Path(given.data).resolve()), FULL
    if given.quick:
        data, setting, given.results, given.work = "digits", QUICK, given.work / "quick", given.work / "quick"
        given.seeds, given.images, given.arms = [0], [10], ["none", "1", SCRATCH]
    deadline_s = time.time() + 60.0 * given.minutes
    bench = Bench(setting, data, Ledger(given.results / "transfer.jsonl"), given.work, deadline_s)
    jobs = list(jobs_of(given))
    with ended_as_a_command():
        bench.run(jobs, given.jobs)
    rows = [row for job in jobs if (row := bench.row(job)) is not None]
    if rows:
        command = " ".join(["python -m benchmarks.transfer", *sys.argv[1:]])
        text = page(rows, command)
        (given.results / "transfer.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
