"""The two pictures of a campaign: accuracy against compression, and return by episode.

Called by the report and the campaign. Drawn with matplotlib's Agg canvas and no pyplot, so that no window
system and no global state is touched. Each comes for light and for dark pages. Colours are Okabe and Ito's,
which colour-blind readers tell apart, and each group has a marker of its own besides.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from deploy.folder import write_atomic
from deploy.frontier import frontier, groups_of, learning_curve

__all__ = ["frontier_image", "frontier_png", "learning_image", "learning_png"]

Record = dict[str, Any]

_COLOURS = {
    "search": "#D55E00",
    "taylor": "#0072B2",
    "random": "#8A8A8A",
    "cem": "#009E73",
    "untrained": "#CC79A7",
}
_OTHER_COLOUR = "#E69F00"
_MARKERS = {"search": "o", "taylor": "s", "random": "v", "cem": "D", "untrained": "^"}
_LABELS = {"search": "search (Controller)"}
_DPI = 150
# More lines than this only blacken the picture; the newest are the ones that tell.
_CURVES_PER_GROUP = 300
_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def frontier_png(path: Path, records: Sequence[Record], result: Record | None) -> None:
    """Write the picture of accuracy against compression to `path`; `result` may be None or partial."""
    write_atomic(path, frontier_image(records, result))


def learning_png(path: Path, records: Sequence[Record]) -> None:
    """Write the picture of the return by episode to `path`."""
    write_atomic(path, learning_image(records))


def frontier_image(records: Sequence[Record], result: Record | None, *, dark: bool = False) -> bytes:
    """Return a PNG: every episode's curve faint behind, each group's best per target, the recovered networks.

    The horizontal axis is logarithmic in what is *left*, so that 90, 95 and 99 % stand apart.
    """
    figure, axes, ink = _figure(dark)
    result = result or {}
    right = _furthest(records, result)
    _draw_curves(axes, records, dark)
    _draw_group_bests(axes, records, ink)
    _draw_recovered(axes, result, ink)
    _draw_baseline(axes, result.get("baseline") or {}, ink)
    _scale_compression(axes, right)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy", color=ink)
    axes.set_xlabel("parameters removed (logarithmic in what is left)", color=ink)
    _legend(axes, _frontier_handles(records, result, ink), ink)
    return _png(figure)


def learning_image(records: Sequence[Record], *, dark: bool = False) -> bytes:
    """Return a PNG: the return of each episode as a dot and the mean of the last ten as a line, by group."""
    figure, axes, ink = _figure(dark)
    for group in groups_of(records):
        curve = learning_curve(records, group)
        episodes = [entry["episode"] for entry in curve]
        colour = _colour(group)
        axes.plot(
            episodes, [entry["return"] for entry in curve], _marker(group),
            color=colour, alpha=0.35, markersize=4, markeredgewidth=0,
        )  # fmt: skip
        axes.plot(
            episodes, [entry["mean"] for entry in curve], color=colour, linewidth=2.2, label=_label(group)
        )
    axes.set_xlabel("episode of the group", color=ink)
    axes.set_ylabel("return (dots), mean of the last ten (lines)", color=ink)
    handles, _ = axes.get_legend_handles_labels()
    _legend(axes, handles, ink)
    return _png(figure)


def _figure(dark: bool) -> tuple[Figure, Axes, str]:
    paper, ink, grid = ("#15181d", "#d7dbe0", "#2b3038") if dark else ("#ffffff", "#30343a", "#e6e8eb")
    figure = Figure(figsize=(9, 5.6), dpi=_DPI, facecolor=paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=paper)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, length=0, labelsize=10)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(grid)
    return figure, axes, ink


def _draw_curves(axes: Axes, records: Sequence[Record], dark: bool) -> None:
    for group in groups_of(records):
        curves = [record["curve"] for record in records if record["group"] == group][-_CURVES_PER_GROUP:]
        lines = [np.array([(_x(c), a) for c, a in curve if a is not None]) for curve in curves]
        lines = [line for line in lines if len(line) > 1]
        # Many curves one over the other: the more there are, the fainter each.
        alpha = float(np.clip(4.0 / max(1, len(lines)), 0.06, 0.35)) * (1.4 if dark else 1.0)
        axes.add_collection(LineCollection(lines, colors=_colour(group), alpha=alpha, linewidths=0.9))


def _draw_group_bests(axes: Axes, records: Sequence[Record], ink: str) -> None:
    for entry in frontier(records, _targets(records)):
        for group, point in entry["groups"].items():
            if point["accuracy"] is not None:
                axes.plot(
                    _x(point["compression"]), point["accuracy"], _marker(group),
                    color=_colour(group), markersize=7.5, markeredgecolor=axes.get_facecolor(),
                    markeredgewidth=1.0, zorder=4, alpha=0.95,
                )  # fmt: skip


def _draw_recovered(axes: Axes, result: Record, ink: str) -> None:
    for point in result.get("comparison") or []:
        _draw_one_recovered(axes, point, _colour(str(point.get("group", ""))), size=8.0, label=None, ink=ink)
    for point in sorted(result.get("points") or [], key=lambda point: float(point["compression"])):
        label = f"{point['test_accuracy']:.1%}" if point.get("test_accuracy") is not None else None
        _draw_one_recovered(axes, point, ink, size=15.0, label=label, ink=ink)


def _draw_one_recovered(
    axes: Axes, point: Record, colour: str, *, size: float, label: str | None, ink: str
) -> None:
    x = _x(point["compression"])
    if point.get("val_accuracy") is not None:
        axes.plot(
            x, point["val_accuracy"], "*", markersize=size, zorder=6,
            markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.2,
        )  # fmt: skip
    if point.get("test_accuracy") is not None:
        axes.plot(x, point["test_accuracy"], "*", markersize=size, color=colour, markeredgewidth=0, zorder=6)
    if label is not None:
        axes.annotate(
            label, (x, point["test_accuracy"]), xytext=(9, 7), textcoords="offset points",
            color=ink, fontsize=10, fontweight="bold", zorder=7,
        )  # fmt: skip


def _draw_baseline(axes: Axes, baseline: Record, ink: str) -> None:
    for key, style in (("val_accuracy", (0, (2, 3))), ("test_accuracy", (0, (7, 3)))):
        if baseline.get(key) is not None:
            axes.axhline(baseline[key], color=ink, linewidth=1.1, linestyle=style, alpha=0.8, zorder=3)


def _scale_compression(axes: Axes, right: float) -> None:
    ticks = [tick for tick in _TICKS if tick <= right]
    axes.set_xticks([_x(tick) for tick in ticks])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1 - 10**-x:.1%}".replace(".0%", "%")))
    axes.set_xlim(-0.02 * _x(right), _x(right) * 1.06)


def _x(compression: float) -> float:
    """Return -log10 of what is left: 0 for the whole network, 1 at 90 % removed, 2 at 99 %."""
    return float(-np.log10(max(1e-4, 1.0 - compression)))


def _furthest(records: Sequence[Record], result: Record) -> float:
    reached = [float(c) for record in records for c, _ in record["curve"]]
    recovered = [float(point["compression"]) for point in result.get("points") or []]
    return max([0.5, *reached, *recovered])


def _targets(records: Sequence[Record]) -> list[float]:
    return sorted({round(float(p["target"]), 6) for record in records for p in record.get("targets", [])})


def _frontier_handles(records: Sequence[Record], result: Record, ink: str) -> list[Line2D]:
    groups = groups_of(records)
    handles = [
        Line2D([], [], color=_colour(g), marker=_marker(g), markersize=7, linewidth=1.2, label=_label(g))
        for g in groups
    ]
    if result.get("points"):
        star = {"linestyle": "none", "marker": "*", "markersize": 12, "markeredgecolor": ink}
        handles.append(Line2D([], [], markerfacecolor=ink, label="recovered, test", **star))  # type: ignore[arg-type]
        handles.append(Line2D([], [], markerfacecolor="none", label="recovered, validation", **star))  # type: ignore[arg-type]
    baseline = result.get("baseline") or {}
    if baseline.get("test_accuracy") is not None:
        handles.append(
            Line2D([], [], color=ink, linestyle=(0, (5, 2)), linewidth=1.1, label="baseline, test")
        )
    if baseline.get("val_accuracy") is not None:
        label = "baseline, validation"
        handles.append(Line2D([], [], color=ink, linestyle=(0, (2, 2)), linewidth=1.1, label=label))
    return handles


def _legend(axes: Axes, handles: Sequence[Any], ink: str) -> None:
    if not handles:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=ink, fontsize=13)
        return
    # Below the axes, where it covers no point whatever the curves do.
    axes.figure.legend(
        handles=list(handles), loc="outside lower center", ncols=min(4, len(handles)),
        frameon=False, labelcolor=ink, fontsize=10,
    )  # fmt: skip


def _colour(group: str) -> str:
    return _COLOURS.get(group, _OTHER_COLOUR)


def _marker(group: str) -> str:
    return _MARKERS.get(group, "P")


def _label(group: str) -> str:
    return _LABELS.get(group, group)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
