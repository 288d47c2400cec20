"""The page and the figures of benchmarks/tables.py: every arm at every size, beside what others have published."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paired import difference, spread
from deploy.published import PUBLISHED, Published

__all__ = ["TARGETS", "page", "write_page"]

Row = Mapping[str, Any]
OURS = "controller"
_NEAR = 0.006  # of two compressions that are compared
_ALIKE = ("network", "width", "data", "epochs", "asked")  # what rows of one table share
#: What tells networks of one seed apart that two machines have trained.
_START = ("baseline_validation", "baseline_test")
#: Okabe and Ito's colours, which colour-blind readers tell apart, twice: full and dashed lines.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_HEAD = """\
Test accuracy in per cent, mean over seeds (standard deviation); of each campaign the test split was opened once, after
everything in it was decided on validation. Change: in points, from the same seed's network before it was pruned.
Controller less this: of the changes, paired by seed (seeds won, p of a paired t test, two-sided, each for itself: of
many, some fall below 0.05 by chance). Removed: of the parameters, counted on the compact network; of the MACs beside
it. Images: retrained on in the search, in thousands. **A campaign's are for all of its sizes together; Torch-Pruning's
and uniform's are for this size alone.** Not counted are the epochs after a replacement, and those of the source's agent
after it was given convolutions. The Controller that comes with Zeroout was taught on other networks before, by episodes
that are not counted either. Only the row that says so was recovered by distillation; any arm could be. Minutes: of the
whole arm (a peer's: of this size; by distillation: of the recoveries alone), with other work on the same cores or card,
and of what was resumed only since then: what was spent, and no comparison. What is empty has not been measured."""
_FIGURE = """\
Bars are one standard deviation over seeds. Points of one size stand side by side to be told apart. The axis goes on by
equal steps where what is left is halved."""
_ORIGIN = """\
Theirs on the official CIFAR-10; ours on the JPEG copy. The source's, CACP's, HRank's and LPF's as the source's report
gives them (HRank, Lin et al. 2020, counts filters without the next layer's inputs); CORING's (Pham et al. 2024),
DECORE's (Alwani et al. 2022; nobody else has reproduced it), CLR-RNF's (Lin et al. 2022) and OTO/HESSO's as their
authors do. Ours is the nearest size that was measured, within 0.6 points of theirs."""
#: Sizes of the source and the field: what is made by default, and shown at full width whether it was measured or not.
TARGETS = (0.70, 0.83, 0.87, 0.92, 0.93, 0.95, 0.9752, 0.983)


def write_page(rows: Sequence[Row], arms: Mapping[str, str], folder: Path, command: str) -> str:
    """Write tables.md and a picture of each table into `folder`; returns the page. `arms` are their names in words."""
    folder.mkdir(parents=True, exist_ok=True)
    text = page(rows, arms, command)
    (folder / "tables.md").write_text(text)
    for table in _tables(rows):
        _draw(table, arms, folder / f"{_name(table)}.png")
    return text


def page(rows: Sequence[Row], arms: Mapping[str, str], command: str) -> str:
    """The page. Of the same seed, arm and target the last row counts."""
    lines = ["# Accuracy at each size", "", f"`{command}` (`--help` says what the arms are)", "", _HEAD, ""]
    lines += ["## Full width, against the source and the field", "", *_against_others(rows), ""]
    for table in _tables(rows):
        lines += [*_heading(table), "", f"![accuracy against compression]({_name(table)}.png)", "", _FIGURE, ""]
        for target in _targets(table):
            lines += [f"### {100 * target:g} % of the parameters removed", ""]
            lines += [*_of_target(table, arms, target), ""]
    return "\n".join(lines)


def _tables(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that compare, largest networks first; of the same seed, arm and target the last."""
    found: dict[tuple[str, ...], dict[tuple[int, str, float], Row]] = {}
    for row in rows:
        key = tuple(str(row.get(name)) for name in _ALIKE)
        found.setdefault(key, {})[row["seed"], row["arm"], row["target"]] = row
    tables = [list(table.values()) for table in found.values()]
    return sorted(tables, key=lambda table: (-table[0]["width"], table[0]["network"] != "vgg16", table[0]["network"]))


def _targets(table: Sequence[Row]) -> list[float]:
    """The sizes of a table, and those that are asked for and not there."""
    asked = {target for row in table for target in row["asked"]}
    return sorted({row["target"] for row in table} | asked | set(TARGETS if table[0]["width"] == 1.0 else ()))


def _name(table: Sequence[Row]) -> str:
    return f"tables-{table[0]['network']}-{table[0]['width']:g}"


def _heading(table: Sequence[Row]) -> list[str]:
    first, (alike, apart) = table[0], _by_start(table)
    seeds = _given(alike)
    training, recovery = first["epochs"]
    torch = ", ".join(sorted({row["torch"] for row in table}))
    lines = [
        f"## {first['network']}, width {first['width']:g}: {first['data']}",
        "",
        f"Before pruning {spread(seeds)} on test, n {len(seeds)}. {training} epochs of training, {recovery} of",
        f"recovery. On {_devices(alike)}; torch {torch}.",
        "",
        f"`{_command(table)}`, by versions {', '.join(dict.fromkeys(_version(row) for row in table))}.",
    ]
    if others := _before_pruning(apart):
        lines += [
            "",
            f"Arms with a * were made, for some seeds, on {_devices(apart)},",
            f"from networks that were trained there, too, not alike to the bit ({spread(others)} before pruning):",
            "their pairs are of two networks of a seed, and their minutes do not compare.",
        ]
    if widened := _before_pruning(table, more_layers=True):
        lines += [
            "",
            "The source's agent prunes a network with a convolution on each identity skip, trained on with them",
            f"({spread(widened)} before pruning): its change is from there.",
        ]
    return lines


def _command(table: Sequence[Row]) -> str:
    """What makes these rows again."""
    first, seeds = table[0], sorted({row["seed"] for row in table})
    arms = dict.fromkeys(row["arm"] for row in table)
    return (
        f"python -m benchmarks.tables --network {first['network']} --width {first['width']:g} "
        f"--seeds {' '.join(map(str, seeds))} --targets {','.join(f'{target:g}' for target in first['asked'])} "
        f"--arms {' '.join(arms)}"
    )


def _version(row: Row) -> str:
    return str(row["commit"]).removesuffix("-dirty")


def _before_pruning(rows: Sequence[Row], *, more_layers: bool = False) -> dict[int, float]:
    """By seed, the test accuracy in per cent of the networks as given, or of those that were given more layers."""
    return {row["seed"]: 100 * row["baseline_test"] for row in rows if _has_more_layers(row) is more_layers}


def _given(alike: Sequence[Row]) -> dict[int, float]:
    """The same of the networks as given; where there is only the arm that adds layers, of its own."""
    return _before_pruning(alike) or _before_pruning(alike, more_layers=True)


def _has_more_layers(row: Row) -> bool:
    """Whether the network was given layers before it was pruned, so that it is not the others'."""
    return row["arm"] == "source" and row["network"].startswith("resnet")


def _devices(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row["device"] for row in rows}))


def _by_start(table: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that began from the network which the Controller's of their seed did (or the first), and the others."""
    firsts: dict[int, Row] = {}
    for row in sorted(table, key=lambda row: row["arm"] != OURS):
        firsts.setdefault(row["seed"], row)
    alike, apart = [], []
    for row in table:
        (alike if _begin_alike(row, firsts[row["seed"]]) else apart).append(row)
    return alike, apart


def _begin_alike(row: Row, first: Row) -> bool:
    if _has_more_layers(row):
        return bool(row["device"] == first["device"])
    return all(row[name] == first[name] for name in _START)


def _marked(table: Sequence[Row], arms: Mapping[str, str]) -> dict[str, str]:
    """The arms in words, with a * where some began from another network than the Controller's of their seed."""
    apart = {row["arm"] for row in _by_start(table)[1]}
    return {arm: f"{words} *" if arm in apart else words for arm, words in arms.items()}


def _of_target(table: Sequence[Row], arms: Mapping[str, str], target: float) -> list[str]:
    head = "| arm | n | test | change | Controller less this | removed | MACs removed | validation | images | minutes |"
    ours = _changes([row for row in table if (row["arm"], row["target"]) == (OURS, target)])
    lines = [head, f"|{'---|' * 10}"]
    for arm, words in _marked(table, arms).items():
        mine = [row for row in table if (row["arm"], row["target"]) == (arm, target)]
        cells = _cells(mine, ours if arm != OURS else {}) if mine else [""] * 9
        lines.append(f"| {words if mine else arms[arm]} | {' | '.join(cells)} |")
    others = [known for known in _published(table[0]["network"]) if abs(known.compression - target) <= 0.015]
    if others:
        lines += ["", "Published, at full width on the official CIFAR-10: " + "; ".join(map(_told, others)) + "."]
    return lines


def _cells(mine: Sequence[Row], ours: Mapping[int, float]) -> list[str]:
    test, change = {row["seed"]: 100 * row["test"] for row in mine}, _changes(mine)

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in mine)

    return [
        str(len(mine)),
        spread(test),
        spread(change),
        str(difference(ours, change) or ""),
        f"{100 * mean('compression'):.2f}",
        f"{100 * mean('macs_removed'):.1f}",
        f"{100 * mean('validation'):.2f}",
        f"{mean('images') / 1000:,.0f}",
        f"{mean('wall_s') / 60:.1f}",
    ]


def _changes(rows: Sequence[Row]) -> dict[int, float]:
    """By seed, in points of test accuracy."""
    return {row["seed"]: 100 * (row["test"] - row["baseline_test"]) for row in rows}


def _published(network: str) -> Sequence[Published]:
    return PUBLISHED.get((network, "parameters"), ())


def _told(known: Published) -> str:
    said = [] if known.accuracy is None else [f"{100 * known.accuracy:.2f}"]
    said += [] if known.change is None else [f"{known.change:+.2f} points"]
    note = f" ({known.note})" if known.note else ""
    return f"{known.who} at {known.compression:.2%} {', '.join(said)}{note}"


def _against_others(rows: Sequence[Row]) -> list[str]:
    """What others have published, and the Controller at the same size of the same network."""
    lines = ["| network | removed | who | test | change | ours: test | change | n |", f"|{'---|' * 8}"]
    full = [row for table in _tables(rows) for row in table if row["width"] == 1.0 and row["arm"] == OURS]
    for network in ("vgg16", "resnet18", "resnet34"):
        for known in sorted(_published(network), key=lambda each: each.compression):
            near = [
                row for row in full if row["network"] == network and abs(row["target"] - known.compression) <= _NEAR
            ]
            closest = min((abs(row["target"] - known.compression) for row in near), default=math.inf)
            mine = [row for row in near if abs(row["target"] - known.compression) == closest]
            test = {row["seed"]: 100 * row["test"] for row in mine}
            ours = [spread(test), spread(_changes(mine)), str(len(mine))] if mine else ["", "", "0"]
            theirs = "" if known.accuracy is None else f"{100 * known.accuracy:.2f}"
            moved = "" if known.change is None else f"{known.change:+.2f}"
            who = f"{known.who}, {known.note}" if known.note else known.who
            cells = [network, f"{known.compression:.2%}", who, theirs, moved, *ours]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _ORIGIN]


def _draw(table: Sequence[Row], arms: Mapping[str, str], path: Path) -> None:
    """Test accuracy against what is removed: a line for each arm, bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    axes = figure.subplots()
    targets = sorted({row["target"] for row in table})
    for place, (arm, words) in enumerate(_marked(table, arms).items()):
        x, middle, deviation = [], [], []
        for target in targets:
            test = [100 * row["test"] for row in table if (row["arm"], row["target"]) == (arm, target)]
            if test:
                # side by side, so that bars can be told apart
                x.append(_odds(target) + 0.012 * (place - len(arms) / 2))
                middle.append(statistics.fmean(test))
                deviation.append(statistics.stdev(test) if len(test) > 1 else 0.0)
        if not x:
            continue
        axes.errorbar(
            x, middle, yerr=deviation, label=words, color=_COLOURS[place % len(_COLOURS)],
            linestyle="-" if place < len(_COLOURS) else "--", linewidth=2.2 if arm == OURS else 1.1,
            marker="o", markersize=3.5, elinewidth=0.7, capsize=1.5,
        )  # fmt: skip
    known = [each for each in _published(table[0]["network"]) if each.accuracy is not None]
    if known and table[0]["width"] == 1.0:
        axes.plot(
            [_odds(each.compression) for each in known], [100 * float(each.accuracy or 0) for each in known],
            "k*", label="published, by others and the source (official CIFAR-10)",
        )  # fmt: skip
    given = statistics.fmean(_given(_by_start(table)[0]).values())
    axes.axhline(given, color="#8A8A8A", linewidth=0.8, linestyle=":", label="before pruning")
    axes.set_xticks([_odds(target) for target in targets], [f"{100 * target:g}" for target in targets])
    axes.set(
        xlabel="parameters removed, %", ylabel="test accuracy, %",
        title=f"{table[0]['network']}, width {table[0]['width']:g}: {table[0]['data']}",
    )  # fmt: skip
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=110)


def _odds(share: float) -> float:
    """Where a share stands on the axis: each halving of what is left takes as much room."""
    return -math.log2(1.0 - share)
