"""The page of benchmarks/transfer.py: accuracies by arm and images, and differences from transfer alone by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

__all__ = ["Paired", "paired", "verdict", "write_page"]

Row = Mapping[str, Any]
ALONE = "none"  # what every other arm is compared with
COPIES = ("1", "2", "3")
_SURE = 0.05  # of p, two-sided
_ORDER = ("none", "1", "2", "3", "prune", "reinit", "noise", "scratch")
_KINDS = {"test": "before compression", "test_compressed": "compressed"}


class Paired:
    """An arm less transfer alone, in points of test accuracy, over the seeds that both have.

    Attributes:
        n: seeds in common.
        wins: of them, where the arm is ahead.
        mean: NaN without any.
        p: of a paired t test, two-sided; NaN with fewer than two seeds or where all differences are equal.

    """

    def __init__(self, arm: Mapping[int, float], alone: Mapping[int, float]) -> None:
        seeds = sorted(set(arm) & set(alone))
        differences = [100 * (arm[seed] - alone[seed]) for seed in seeds]
        self.n, self.wins = len(seeds), sum(difference > 0 for difference in differences)
        self.mean = statistics.fmean(differences) if differences else math.nan
        self.p = math.nan
        if len(set(differences)) > 1:
            self.p = float(ttest_rel([arm[seed] for seed in seeds], [alone[seed] for seed in seeds]).pvalue)

    def __str__(self) -> str:
        if not self.n:
            return "- | -"
        p = "-" if math.isnan(self.p) else f"{self.p:.3f}"
        return f"{self.mean:+.2f} ({self.wins} of {self.n} seeds) | {p}"


def paired(rows: Sequence[Row], images: int, arm: str, kind: str) -> Paired:
    """An arm beside transfer alone at so many images of a class; `kind` is "test" or "test_compressed"."""
    return Paired(_by_seed(rows, images, arm, kind), _by_seed(rows, images, ALONE, kind))


def verdict(rows: Sequence[Row]) -> str:
    """One plain sentence on whether replacement helps, over all images and the three replacements."""
    found = []
    for images in _images(rows):
        for arm in COPIES:
            for kind, when in _KINDS.items():
                difference = paired(rows, images, arm, kind)
                if not math.isnan(difference.p):
                    found.append((difference, f"replacement {arm} at {images} images a class, {when}"))
    if not found:
        return "Whether replacement helps cannot be said yet: that needs two seeds of `none` and of a replacement."
    better = [f"{name} ({d.mean:+.2f}, p {d.p:.3f})" for d, name in found if d.p < _SURE and d.mean > 0]
    worse = [f"{name} ({d.mean:+.2f}, p {d.p:.3f})" for d, name in found if d.p < _SURE and d.mean < 0]
    chance = f"with {len(found)} comparisons, {_SURE * len(found):.1f} would look so by chance"
    if not (better or worse):
        return (
            f"Replacement neither helps nor harms beyond the noise of these seeds, in any of {len(found)} comparisons."
        )
    parts = [f"{word} in {'; '.join(names)}" for word, names in (("helps", better), ("harms", worse)) if names]
    return f"Against transfer alone, replacement {' and '.join(parts)}; {chance}."


def write_page(rows: Sequence[Row], path: Path, command: str) -> str:
    """Write the page to `path`; returns it."""
    versions = sorted({f"{name} {version}" for row in rows for name, version in row["versions"].items()})
    updates = sorted({(row["updates"], row["recovery_updates"]) for row in rows})
    lines = [
        "# Filter replacement when a network moves to new classes with few images",
        "",
        verdict(rows),
        "",
        f"`{command}` (`--help` says what the arms are)",
        "",
        f"machine: {', '.join(sorted({row['machine'] for row in rows}))}; {', '.join(versions)}. Test accuracies in",
        "per cent: mean over seeds (standard deviation); one source network a seed. Less none: paired by seed, in",
        "points; p of a paired t test, two-sided, not corrected for how many are made. Minibatches of training, and of",
        f"recovery after compression: {', '.join(f'{one} and {other}' for one, other in updates)}.",
        "",
    ]
    for images in _images(rows):
        lines += [f"## {images} images a class", "", *_table(rows, images), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    path.write_text(text)
    return text


def _table(rows: Sequence[Row], images: int) -> list[str]:
    head = [
        "| arm | n | parameters | test | less none | p | removed | compressed, test | less none | p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    arms = {row["arm"] for row in rows if row["images"] == images}
    return [*head, *(_line(rows, images, arm) for arm in _ORDER if arm in arms)]


def _line(rows: Sequence[Row], images: int, arm: str) -> str:
    mine = [row for row in rows if (row["images"], row["arm"]) == (images, arm)]
    cells = [arm, str(len(mine)), f"{statistics.fmean(row['parameters'] for row in mine):,.0f}"]
    for kind in _KINDS:
        if kind == "test_compressed":
            cells.append(f"{statistics.fmean(row['compression'] for row in mine):.2%}")
        values = [100 * row[kind] for row in mine]
        spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
        difference = "- | -" if arm == ALONE else str(paired(rows, images, arm, kind))
        cells += [f"{statistics.fmean(values):.2f}{spread}", difference]
    return f"| {' | '.join(cells)} |"


def _by_seed(rows: Sequence[Row], images: int, arm: str, kind: str) -> dict[int, float]:
    return {row["seed"]: row[kind] for row in rows if (row["images"], row["arm"]) == (images, arm)}


def _images(rows: Sequence[Row]) -> list[int]:
    return sorted({row["images"] for row in rows})
