"""The two pictures of a campaign: accuracy against compression, and return by episode.

Called by the report and the campaign. Drawn with matplotlib's Agg canvas and no pyplot, so that no window
system and no global state is touched. Each comes for light and for dark pages. Colours are Okabe and Ito's,
which colour-blind readers tell apart, and each group has a marker of its own besides.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from deploy.folder import write_atomic
from deploy.frontier import frontier, groups_of, learning_curve, measure_name, targets_of

__all__ = ["frontier_image", "frontier_png", "learning_image", "learning_png"]

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Theme:
    paper: str
    ink: str
    grid: str
    groups: dict[str, str]
    other: str  # for a group that is not ours

    def colour(self, group: str) -> str:
        return self.groups.get(group, self.other)


_LIGHT = _Theme(
    paper="#ffffff",
    ink="#30343a",
    grid="#e6e8eb",
    groups={
        "search": "#D55E00",
        "taylor": "#0072B2",
        "balanced": "#56B4E9",
        "random": "#8A8A8A",
        "cem": "#009E73",
        "untrained": "#CC79A7",
    },
    other="#E69F00",
)
_DARK = _Theme(
    paper="#15181d",
    ink="#d7dbe0",
    grid="#2b3038",
    groups={
        "search": "#F58A3C",
        "taylor": "#56B4E9",
        "balanced": "#9AD6F5",
        "random": "#A6A6A6",
        "cem": "#2FC59A",
        "untrained": "#E3A0C6",
    },
    other="#F0E442",
)
_MARKERS = {"search": "o", "taylor": "s", "balanced": "X", "random": "v", "cem": "D", "untrained": "^"}
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
    figure, axes, theme = _figure(dark)
    result = result or {}
    right = _furthest(records, result)
    _draw_curves(axes, records, theme)
    _draw_group_bests(axes, records, theme)
    _draw_recovered(axes, result, theme)
    _draw_baseline(axes, result.get("baseline") or {}, theme)
    _scale_compression(axes, right)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy", color=theme.ink)
    measure = measure_name(result)
    axes.set_xlabel(f"{measure} removed (logarithmic in what is left)", color=theme.ink)
    _legend(axes, _frontier_handles(records, result, theme), theme)
    return _png(figure)


def learning_image(records: Sequence[Record], *, dark: bool = False) -> bytes:
    """Return a PNG: the return of each episode as a dot and the mean of the last ten as a line, by group."""
    figure, axes, theme = _figure(dark)
    for group in groups_of(records):
        curve = learning_curve(records, group)
        episodes = [entry["episode"] for entry in curve]
        colour = theme.colour(group)
        axes.plot(
            episodes, [entry["return"] for entry in curve], _marker(group),
            color=colour, alpha=0.55, markersize=4.5, markeredgewidth=0,
        )  # fmt: skip
        axes.plot(episodes, [entry["mean"] for entry in curve], color=colour, linewidth=2.2, label=_label(group))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("episode of the group", color=theme.ink)
    axes.set_ylabel("return (dots), mean of the last ten (lines)", color=theme.ink)
    handles, _ = axes.get_legend_handles_labels()
    _legend(axes, handles, theme)
    return _png(figure)


def _figure(dark: bool) -> tuple[Figure, Axes, _Theme]:
    theme = _DARK if dark else _LIGHT
    figure = Figure(
        figsize=(9, 5.6), dpi=_DPI, facecolor=theme.paper, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.12)
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, length=0, labelsize=10)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.grid)
    return figure, axes, theme


def _draw_curves(axes: Axes, records: Sequence[Record], theme: _Theme) -> None:
    for group in groups_of(records):
        curves = [record["curve"] for record in records if record["group"] == group][-_CURVES_PER_GROUP:]
        lines = [np.array([(_x(c), a) for c, a in curve if a is not None]) for curve in curves]
        lines = [line for line in lines if len(line) > 1]
        # Many curves one over the other: the more there are, the fainter each.
        alpha = float(np.clip(4.0 / max(1, len(lines)), 0.06, 0.35)) * (1.4 if theme is _DARK else 1.0)
        axes.add_collection(LineCollection(lines, colors=theme.colour(group), alpha=alpha, linewidths=0.9))


def _draw_group_bests(axes: Axes, records: Sequence[Record], theme: _Theme) -> None:
    for entry in frontier(records, targets_of(records)):
        for group, point in entry["groups"].items():
            if point["accuracy"] is not None:
                axes.plot(
                    _x(point["compression"]), point["accuracy"], _marker(group),
                    color=theme.colour(group), markersize=7.5, markeredgecolor=axes.get_facecolor(),
                    markeredgewidth=1.0, zorder=4, alpha=0.95,
                )  # fmt: skip


def _draw_recovered(axes: Axes, result: Record, theme: _Theme) -> None:
    for point in result.get("comparison") or []:
        _draw_one_recovered(axes, point, theme.colour(str(point.get("group", ""))), size=8.0)
    for point in result.get("points") or []:
        _draw_one_recovered(axes, point, theme.ink, size=13.0)
        if point.get("test_accuracy") is not None:
            axes.annotate(
                f"{point['test_accuracy']:.1%}", (_x(point["compression"]), point["test_accuracy"]),
                xytext=(11, 0), textcoords="offset points", va="center",
                color=theme.ink, fontsize=10.5, fontweight="bold", zorder=7,
            )  # fmt: skip


def _draw_one_recovered(axes: Axes, point: Record, colour: str, *, size: float) -> None:
    x = _x(point["compression"])
    if point.get("val_accuracy") is not None:
        axes.plot(x, point["val_accuracy"], "_", markersize=size, color=colour, markeredgewidth=2, zorder=6)
    if point.get("test_accuracy") is not None:
        axes.plot(x, point["test_accuracy"], "*", markersize=size, color=colour, markeredgewidth=0, zorder=6)


def _draw_baseline(axes: Axes, baseline: Record, theme: _Theme) -> None:
    for key, style in (("val_accuracy", (0, (2, 3))), ("test_accuracy", (0, (7, 3)))):
        if baseline.get(key) is not None:
            axes.axhline(baseline[key], color=theme.ink, linewidth=1.1, linestyle=style, alpha=0.8, zorder=3)


def _scale_compression(axes: Axes, right: float) -> None:
    ticks = [tick for tick in _TICKS if tick <= right]
    axes.set_xticks([_x(tick) for tick in ticks])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1 - 10**-x:.1%}".replace(".0%", "%")))
    axes.set_xlim(-0.02 * _x(right), _x(right) * 1.09)


def _x(compression: float) -> float:
    """Return -log10 of what is left: 0 for the whole network, 1 at 90 % removed, 2 at 99 %."""
    return float(-np.log10(max(1e-4, 1.0 - compression)))


def _furthest(records: Sequence[Record], result: Record) -> float:
    reached = [float(c) for record in records for c, _ in record["curve"]]
    recovered = [float(point["compression"]) for point in result.get("points") or []]
    return max([0.5, *reached, *recovered])


def _frontier_handles(records: Sequence[Record], result: Record, theme: _Theme) -> list[Line2D]:
    groups = groups_of(records)
    handles = [
        Line2D([], [], color=theme.colour(g), marker=_marker(g), markersize=7, linewidth=1.2, label=_label(g))
        for g in groups
    ]
    if result.get("points"):
        handles += [
            Line2D([], [], color=theme.ink, marker=marker, linestyle="none", markersize=11, label=label)
            for marker, label in (("*", "recovered, test"), ("_", "recovered, validation"))
        ]
    baseline = result.get("baseline") or {}
    if baseline.get("test_accuracy") is not None:
        handles.append(Line2D([], [], color=theme.ink, linestyle=(0, (5, 2)), linewidth=1.1, label="baseline, test"))
    if baseline.get("val_accuracy") is not None:
        label = "baseline, validation"
        handles.append(Line2D([], [], color=theme.ink, linestyle=(0, (2, 2)), linewidth=1.1, label=label))
    return handles


def _legend(axes: Axes, handles: Sequence[Any], theme: _Theme) -> None:
    if not handles:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=theme.ink, fontsize=13)
        return
    # Below the axes, where it covers no point whatever the curves do.
    axes.figure.legend(
        handles=list(handles), loc="outside lower center", ncols=min(5, len(handles)),
        frameon=False, labelcolor=theme.ink, fontsize=10,
    )  # fmt: skip


def _marker(group: str) -> str:
    return _MARKERS.get(group, "P")


def _label(group: str) -> str:
    return _LABELS.get(group, group)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
