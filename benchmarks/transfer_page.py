"""The page of benchmarks/transfer.py: accuracies by arm and images, and differences from transfer alone by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paired import SURE, Difference, difference, spread

__all__ = ["page", "verdict"]

Row = Mapping[str, Any]
ALONE = "none"  # what every other arm is compared with
COPIES = ("1", "2", "3")
_ORDER = (ALONE, *COPIES, "prune", "reinit", "noise", "scratch")
_KINDS = {"test": "before compression", "test_compressed": "compressed"}


def verdict(rows: Sequence[Row]) -> str:
    """One plain sentence on whether replacement helps, over all images and the three replacements."""
    found: list[tuple[str, Difference]] = []
    for images in _images(rows):
        for arm in COPIES:
            for kind, when in _KINDS.items():
                apart = _less_alone(rows, images, arm, kind)
                if apart is not None and not math.isnan(apart.p):
                    found.append((f"replacement {arm} at {images} images a class, {when}", apart))
    if not found:
        return "Whether replacement helps cannot be said yet: that needs two seeds of `none` and of a replacement."
    sure = [(f"{name} ({apart.mean:+.2f}, p {apart.p_text})", apart.mean > 0) for name, apart in found if apart.sure]
    if not sure:
        return f"Replacement shows no difference from transfer alone in any of {len(found)} comparisons."
    helps, harms = ([name for name, better in sure if better is wanted] for wanted in (True, False))
    parts = [f"{word} in {'; '.join(names)}" for word, names in (("helps", helps), ("harms", harms)) if names]
    chance = f"of {len(found)} comparisons, {SURE * len(found):.1f} would look so by chance"
    return f"Against transfer alone, replacement {' and '.join(parts)}; {chance}."


def page(rows: Sequence[Row], command: str) -> str:
    """A table for each number of images, and what they say of the claim."""
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
        "per cent: mean (standard deviation) over seeds, with one source network a seed. Less none: in points, paired",
        "by seed (seeds won, p of a paired t test, two-sided, not corrected for how many there are). Minibatches of",
        f"training, and of recovery after compression: {', '.join(f'{one} and {other}' for one, other in updates)}.",
        "",
    ]
    for images in _images(rows):
        lines += [f"## {images} images a class", "", *_table(rows, images), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row], images: int) -> list[str]:
    head = [
        "| arm | n | parameters | test | less none | removed | compressed, test | less none |",
        "|---|---|---|---|---|---|---|---|",
    ]
    arms = {row["arm"] for row in rows if row["images"] == images}
    return [*head, *(_line(rows, images, arm) for arm in _ORDER if arm in arms)]


def _line(rows: Sequence[Row], images: int, arm: str) -> str:
    mine = [row for row in rows if (row["images"], row["arm"]) == (images, arm)]
    cells = [arm, str(len(mine)), f"{statistics.fmean(row['parameters'] for row in mine):,.0f}"]
    for kind in _KINDS:
        if kind == "test_compressed":
            cells.append(f"{statistics.fmean(row['compression'] for row in mine):.2%}")
        apart = None if arm == ALONE else _less_alone(rows, images, arm, kind)
        cells += [spread(_by_seed(rows, images, arm, kind)), str(apart or "-")]
    return f"| {' | '.join(cells)} |"


def _less_alone(rows: Sequence[Row], images: int, arm: str, kind: str) -> Difference | None:
    """An arm less transfer alone, in points; None where they share no seed."""
    return difference(_by_seed(rows, images, arm, kind), _by_seed(rows, images, ALONE, kind))


def _by_seed(rows: Sequence[Row], images: int, arm: str, kind: str) -> dict[int, float]:
    """Per cent."""
    return {row["seed"]: 100 * row[kind] for row in rows if (row["images"], row["arm"]) == (images, arm)}


def _images(rows: Sequence[Row]) -> list[int]:
    return sorted({row["images"] for row in rows})
