"""Does filter replacement before pruning help, as the source says? Three ways to replace, beside three controls.

`python -m benchmarks.replacement --help` says what is compared and how.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaigns import WORK, baseline, campaign, commit, ended_as_a_command, fingerprint
from benchmarks.ledger import Ledger, Row
from benchmarks.paired import Difference, difference, spread
from benchmarks.step import cpu_name
from deploy.config import CampaignConfig, parse
from deploy.folder import read_json

RESULTS = Path(__file__).parent / "results"
CONTROL = "none"
ARMS = (CONTROL, "1", "2", "3", "reinit", "noise")
NAMES = {
    "none": "no replacement",
    "1": "replacement 1",
    "2": "replacement 2",
    "3": "replacement 3",
    "reinit": "re-initialised",
    "noise": "noise",
}

EPILOG = """\
Each seed has one baseline, trained once, from which every arm starts. An arm treats the weakest filters of each layer
(by the mean rank of their feature maps), trains on, ranks again, and prunes by rank, the same share of every layer, in
one step to the first target, and in another, after four minibatches of retraining, to the second; the network of each
is recovered. The same images, rates, epochs and seeds for all arms.

  none     nothing is replaced: the same training only. What the source calls HRank alone
  1        the k strongest, once each, over the k weakest (the source's replacement 1)
  2        the single strongest over all of them (the source's replacement 2)
  3        as often as needed, in proportion to how far a rank is above those that go (what the source hopes for)
  reinit   the weakest get fresh weights instead
  noise    the weakest get noise as large as the layer's weights vary

`drop` is what pruning and recovery cost, in points of test accuracy: from the network right before it was pruned,
which is what the source counts, and from the baseline, which is what a user gets. Differences are paired by seed:
positive means that the arm drops less than `none`; p of a paired t test, two-sided, of each comparison for itself.

An arm is a campaign in a folder of its own under .search/, and its row lies in benchmarks/results/replacement.jsonl
with a fingerprint of its configuration: a run that is stopped goes on where it was. Delete the row to make it again.
The page shows all rows that are there.

examples:
  python -m benchmarks.replacement                                  quarter-width VGG16 and ResNet18, five seeds
  python -m benchmarks.replacement --networks vgg16 --minutes 30
  python -m benchmarks.replacement --quick                          digits, a minute or two; writes to .search/ alone
"""

#: Few images and epochs, so that sixty arms fit into two hours of two cores.
TEXT = """
[data]
source = "folder"
validation_share = 0.05
train_limit = 10000
flip = true
shift_pixels = 4
[baseline]
epochs = 10
[replacement]
share = 0.2
[replacement_training]
epochs = 3
learning_rate = 0.05
[search]
method = "hrank"
episodes = 1
[episode]
waypoints = 2
recovery_minibatches = 20
[recovery]
epochs = 6
distillation = 0.0
learning_rate = 0.05
"""
QUICK = """
[network]
name = "small"
[baseline]
epochs = 5
[replacement]
images = 100
[replacement_training]
epochs = 1
[search]
method = "hrank"
episodes = 1
[episode]
waypoints = 2
step_minibatches = 2
recovery_minibatches = 4
rank_images = 100
[recovery]
epochs = 2
distillation = 0.0
"""


@dataclass(frozen=True)
class Bench:
    """The arms of one network."""

    network: str
    width: float
    data: str
    targets: tuple[float, ...]
    ledger: Ledger  # rows of all networks
    work: Path
    deadline_s: float
    extra: Sequence[str] = ()

    def config(self, seed: int, arm: str, weights: Path | None) -> CampaignConfig:
        """The campaign of one arm; of the baseline where no weights are given."""
        digits = self.data == "digits"
        overrides = [
            f"seed={seed}",
            f"network.width={self.width}",
            f"network.weights={json.dumps(str(weights or ''))}",
            f"episode.targets={list(self.targets)}",
            *([] if digits else [f'network.name="{self.network}"', f"data.path={json.dumps(self.data)}"]),
            *([f'replacement.how="{arm}"'] if arm else []),
            *self.extra,
        ]
        return parse(QUICK if digits else TEXT, overrides, name="benchmarks.replacement")

    def run(self, seeds: Sequence[int], arms: Sequence[str], jobs: int) -> None:
        """Make what is missing, `jobs` campaigns at a time; the baselines first."""
        wanted = [(seed, arm) for seed in seeds for arm in arms if self.ledger.row(self.mark(seed, arm)) is None]
        needed = sorted({seed for seed, _ in wanted})
        with ThreadPoolExecutor(jobs) as pool:
            weights = dict(zip(needed, pool.map(self.baseline, needed), strict=True))
            list(pool.map(lambda one: self.make(*one, weights[one[0]]), wanted))

    def mark(self, seed: int, arm: str) -> str:
        """What tells an arm's configuration apart, wherever its images lie."""
        return fingerprint(self.config(seed, arm, None))

    def baseline(self, seed: int) -> Path | None:
        """The weights that the arms of a seed start from; None where time is over."""
        return baseline(self.config(seed, "", None), self.work, self.deadline_s)

    def make(self, seed: int, arm: str, weights: Path | None) -> None:
        """Run one arm and write its row."""
        if weights is None or time.time() > self.deadline_s:
            return
        mark, since = self.mark(seed, arm), time.perf_counter()
        out = self.work / f"replacement-{self.network}-{self.width:g}-{seed}-{arm}-{mark}"
        if not campaign(self.config(seed, arm, weights), out, f"{arm}, seed {seed}", deliver=False):
            return
        row = row_of(out, self.config(seed, arm, weights)) | {
            "network": self.network, "width": self.width, "seed": seed, "arm": arm, "fingerprint": mark,
            "machine": cpu_name(), "commit": commit(), "wall_s": round(time.perf_counter() - since, 1),
        }  # fmt: skip
        self.ledger.add([row])
        found = ", ".join(f"{target:.0%} {test:.4f}" for target, test in zip(row["targets"], row["test"], strict=True))
        print(f"{self.network}, {NAMES[arm]}, seed {seed}: test {row['replaced_test']:.4f}, {found}", flush=True)


def row_of(out: Path, config: CampaignConfig) -> Row:
    """What a finished arm has shown, and at what price."""
    result = read_json(out / "result.json")
    return {
        "images": config.data.train_limit,
        "share": config.replacement.share,
        "epochs": [config.baseline.epochs, config.replacement_training.epochs, config.recovery.epochs],
        "baseline_test": result["baseline"]["test_accuracy"],
        "baseline_validation": result["baseline"]["val_accuracy"],
        "replaced_test": result["replacement"]["test_accuracy"],
        "at_once_validation": read_json(out / "baseline" / "replaced.json")["validation_at_once"]["accuracy"],
        "targets": [point["target"] for point in result["points"]],
        "test": [point["test_accuracy"] for point in result["points"]],
        "validation": [point["val_accuracy"] for point in result["points"]],
    }


_HEAD = """CIFAR-10, the JPEG copy. Test accuracy in per cent, mean (standard deviation) over
seeds. Drop, in points: from the network right before it was pruned, as the source counts it, and from the baseline, as
a user does. Less than without: than `no replacement`, paired by seed (seeds won, p of a paired t test, two-sided, each
for itself; of twenty such tests one is below 0.05 by chance): positive is better."""


def page(rows: Sequence[Row], command: str) -> str:
    """The tables of all networks in `rows`, and what they say of the claim; of the same arm and seed the last row."""
    alike: dict[str, dict[tuple[int, str], Row]] = {}
    for row in rows:  # what differs in anything but arm and seed stands in tables of its own
        cost = json.dumps([row[key] for key in ("network", "width", "targets", "images", "share", "epochs")])
        alike.setdefault(cost, {})[row["seed"], row["arm"]] = row
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    lines = ["# Filter replacement before pruning", "", f"`{command}` (`--help` says what the arms are)", ""]
    lines += [f"machine: {machines}. {_HEAD}", ""]
    for found in alike.values():
        mine = list(found.values())
        images, share, (first, second, third) = (mine[0][key] for key in ("images", "share", "epochs"))
        price = (
            f"{images:,} training images, {first} epochs of baseline, {second} after the replacement of {share:.0%} of "
        )
        price += f"each layer, {third} of recovery."
        lines += [f"## {mine[0]['network']}, width {mine[0]['width']:g}", "", price, "", *_tables(mine), ""]
    return "\n".join(lines)


def _tables(rows: Sequence[Row]) -> list[str]:
    lines, verdicts = [], []
    for place, target in enumerate(rows[0]["targets"]):
        lines += [
            f"{target:.0%} of the parameters removed:",
            "",
            "| arm | n | before pruning | after recovery | drop | less than without | drop from the baseline | "
            "less than without |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for arm in [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]:
            before, after = _by_seed(rows, arm, "replaced_test"), _by_seed(rows, arm, "test", place)
            drops = [_less(_by_seed(rows, arm, start), after) for start in _STARTS]
            controls = [_drop(rows, place, start) for start in _STARTS]
            pairs = zip(controls, drops, strict=True)
            apart = [None if arm == CONTROL else difference(control, drop) for control, drop in pairs]
            cells = [NAMES[arm], len(after), spread(before), spread(after)]
            cells += [cell for drop, less in zip(drops, apart, strict=True) for cell in (spread(drop), less or "-")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            if arm in _REPLACED:
                verdicts.append(f"{NAMES[arm]} at {target:.0%}: {_verdict(apart)}")
        lines.append("")
    if verdicts:
        lines += ["Does the claim hold, that pruning costs less after replacement than without?", ""]
        lines += [f"- {verdict}" for verdict in verdicts]
    return lines


_STARTS = ("replaced_test", "baseline_test")  # what a drop is counted from
_REPLACED = ("1", "2", "3")


def _drop(rows: Sequence[Row], place: int, start: str) -> dict[int, float]:
    """What the control loses, in points by seed."""
    return _less(_by_seed(rows, CONTROL, start), _by_seed(rows, CONTROL, "test", place))


def _verdict(apart: Sequence[Difference | None]) -> str:
    """What is said of an arm, by the drop from right before pruning and by that from the baseline."""
    whole = {"right before pruning": apart[0], "the baseline": apart[1]}
    said = []
    for start, less in whole.items():
        if less is None or math.isnan(less.p):
            said.append(f"from {start}, too few seeds to say")
        elif not less.sure:
            said.append(f"from {start}, no difference is shown ({less.mean:+.2f}, p {less.p:.2f})")
        else:
            holds = "it holds" if less.mean > 0 else "it does not, the drop is larger"
            said.append(f"from {start}, {holds} ({less.mean:+.2f}, p {less.p_text})")
    return "; ".join(said) + "."


def _by_seed(rows: Sequence[Row], arm: str, key: str, place: int | None = None) -> dict[int, float]:
    """Per cent by seed."""
    found = {row["seed"]: row[key] for row in rows if row["arm"] == arm}
    return {seed: 100 * (value if place is None else value[place]) for seed, value in found.items()}


def _less(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours less theirs by seed."""
    return {seed: ours[seed] - theirs[seed] for seed in ours}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replacement",
        description=(__doc__ or "").splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", default=["vgg16", "resnet18"], help="default vgg16 resnet18")
    parser.add_argument("--width", type=float, default=0.25, help="default 0.25")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[0.7, 0.9], help="shares to remove (default 0.7 0.9)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default 0 1 2 3 4")
    parser.add_argument("--data", default=".data", help="a folder of images (default .data)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of zeroout run")
    parser.add_argument("--jobs", type=int, default=2, help="campaigns at the same time (default 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many minutes")
    parser.add_argument("--quick", action="store_true", help="digits, 2 seeds; writes to .search/ alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=WORK, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.networks, given.seeds, given.results, given.data = ["small"], [0, 1], given.work / "quick", "digits"
    data = given.data if given.data == "digits" else str(Path(given.data).resolve())
    deadline_s, ledger = time.time() + 60.0 * given.minutes, Ledger(given.results / "replacement.jsonl")
    for network in given.networks:
        bench = Bench(
            network, given.width, data, tuple(given.targets), ledger, given.work, deadline_s, tuple(given.set)
        )
        with ended_as_a_command():
            bench.run(given.seeds, given.arms, given.jobs)
    if ledger.rows:
        text = page(ledger.rows, " ".join(["python -m benchmarks.replacement", *sys.argv[1:]]))
        (given.results / "replacement.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
