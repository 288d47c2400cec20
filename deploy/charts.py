"""The pictures of a campaign: accuracy against compression, return by episode, throughput by actor.

Called by the report and the campaign. Each is drawn in up to four forms (deploy/canvas.py): for light and dark pages,
for desks and phones. Each group has a marker of its own besides its colour.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deploy.canvas import PLAIN, Form, Theme, legend, new_figure, place, png, scale_compression
from deploy.folder import write_atomic
from deploy.frontier import frontier, groups_of, learning_curve, measure_name, targets_of
from deploy.published import Published

__all__ = ["frontier_image", "frontier_png", "learning_image", "learning_png", "throughput_image"]

Record = dict[str, Any]

_MARKERS = {
    "search": "o", "taylor": "s", "balanced": "X", "balanced-l1": "p", "random": "v", "cem": "D", "untrained": "^",
}  # fmt: skip
_LABELS = {"search": "search (Controller)"}
#: Heuristics that play within the search; hollow, since their episodes are the search's.
_TEACHER_MARKERS = {"taylor": "s", "gamma": "p", "uniform-l1": "<", "random-allocation": "v", "taylor-offsets": "h"}
# More lines than this only blacken the picture; the newest are the ones that tell.
_CURVES_PER_GROUP = 300
_ACTORS_NAMED = 10  # a legend of more of them is longer than the picture


def frontier_png(
    path: Path, records: Sequence[Record], result: Record | None, published: Sequence[Published] = ()
) -> None:
    """Write the picture of accuracy against compression to `path`; `result` may be None or partial."""
    write_atomic(path, frontier_image(records, result, published=published))


def learning_png(path: Path, records: Sequence[Record]) -> None:
    """Write the picture of the return by episode to `path`."""
    write_atomic(path, learning_image(records))


def frontier_image(
    records: Sequence[Record],
    result: Record | None,
    *,
    published: Sequence[Published] = (),
    form: Form = PLAIN,
) -> bytes:
    """Return a PNG: every episode's curve faint behind, each group's and heuristic's best per target, the results.

    The horizontal axis is logarithmic in what is *left*, so that 90, 95 and 99 % stand apart. `published` are test
    accuracies of others that are comparable.
    """
    figure, axes = new_figure(form)
    theme, result = form.theme, result or {}
    right = max([_furthest(records, result), *(point.compression for point in published)])
    _draw_curves(axes, records, form)
    _draw_group_bests(axes, records, theme)
    _draw_teachers(axes, records, theme)
    _draw_published(axes, published, result, form)
    _draw_recovered(axes, result, theme)
    _draw_baseline(axes, result.get("baseline") or {}, theme)
    scale_compression(axes, -0.02 * place(right), 1.09 * place(right), form)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy", color=theme.ink)
    axes.set_xlabel(f"{measure_name(result)} removed (logarithmic in what is left)", color=theme.ink)
    legend(axes, [*_frontier_handles(records, result, theme), *_published_handles(published, theme)], form)
    return png(figure, form)


def learning_image(records: Sequence[Record], *, form: Form = PLAIN) -> bytes:
    """Return a PNG: the return of each episode as a dot and the mean of the last ten as a line, by group."""
    figure, axes = new_figure(form)
    theme = form.theme
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
    legend(axes, handles, form)
    return png(figure, form)


def throughput_image(records: Sequence[Record], *, form: Form = PLAIN) -> bytes:
    """Return a PNG: for each actor the steps a minute of each of its episodes, in the order recorded."""
    figure, axes = new_figure(form)
    theme = form.theme
    for index, actor in enumerate(sorted({str(record["actor"]) for record in records})):
        played = [(n, r) for n, r in enumerate(records, start=1) if str(r["actor"]) == actor and r["seconds"] > 0]
        axes.plot(
            [n for n, _ in played], [60 * r["steps"] / r["seconds"] for _, r in played], ".-",
            color=theme.nth(index), markersize=6, linewidth=0.9, label=actor,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("episode, in the order recorded", color=theme.ink)
    axes.set_ylabel("steps a minute while playing", color=theme.ink)
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) <= _ACTORS_NAMED:
        legend(axes, handles, form)
    return png(figure, form)


def _draw_curves(axes: Axes, records: Sequence[Record], form: Form) -> None:
    for group in groups_of(records):
        curves = [record["curve"] for record in records if record["group"] == group][-_CURVES_PER_GROUP:]
        lines = [np.array([(place(c), a) for c, a in curve if a is not None]) for curve in curves]
        lines = [line for line in lines if len(line) > 1]
        # Many curves one over the other: the more there are, the fainter each.
        alpha = float(np.clip(4.0 / max(1, len(lines)), 0.06, 0.35)) * (1.4 if form.dark else 1.0)
        axes.add_collection(LineCollection(lines, colors=form.theme.colour(group), alpha=alpha, linewidths=0.9))


def _draw_group_bests(axes: Axes, records: Sequence[Record], theme: Theme) -> None:
    for entry in frontier(records, targets_of(records)):
        for group, point in entry["groups"].items():
            if point["accuracy"] is not None:
                axes.plot(
                    place(point["compression"]), point["accuracy"], _marker(group),
                    color=theme.colour(group), markersize=7.5, markeredgecolor=axes.get_facecolor(),
                    markeredgewidth=1.0, zorder=4, alpha=0.95,
                )  # fmt: skip


def _draw_teachers(axes: Axes, records: Sequence[Record], theme: Theme) -> None:
    for entry in frontier(_by_teacher(records), targets_of(records)):
        for policy, point in entry["groups"].items():
            if point["accuracy"] is not None:
                axes.plot(place(point["compression"]), point["accuracy"], zorder=4, **_teacher_style(policy, theme))


def _by_teacher(records: Sequence[Record]) -> list[Record]:
    """The episodes that heuristics played within the search, each in a group of the heuristic's name."""
    return [
        {**record, "group": record["policy"]}
        for record in records
        if record["group"] == "search" and record["policy"] in _TEACHER_MARKERS
    ]


def _teacher_style(policy: str, theme: Theme) -> dict[str, Any]:
    return {
        "marker": _TEACHER_MARKERS[policy], "linestyle": "none", "markersize": 6.5, "markeredgewidth": 1.3,
        "color": theme.groups["search"], "markerfacecolor": theme.paper,
    }  # fmt: skip


def _draw_published(axes: Axes, published: Sequence[Published], result: Record, form: Form) -> None:
    baseline = (result.get("baseline") or {}).get("test_accuracy")
    drawn = [(point, place(point.compression), h) for point in published if (h := point.height(baseline)) is not None]
    for point, x, height in drawn:
        axes.plot(x, height, zorder=5, **_published_style(point, form.theme))
    others = {point.who: (x, height) for point, x, height in drawn if not point.is_source}  # the last of each
    for number, (who, at) in enumerate(others.items()):
        if not form.narrow:
            axes.annotate(
                who, at, xytext=(4, (-10, 4)[number % 2]), textcoords="offset points",
                color=form.theme.ink, fontsize=7.5,
            )  # fmt: skip


def _published_style(point: Published, theme: Theme) -> dict[str, Any]:
    marker, label = ("D", "published: the source") if point.is_source else ("+", "published: others")
    return {
        "marker": marker, "linestyle": "none", "markersize": 7, "markeredgewidth": 1.4, "color": theme.ink,
        "markerfacecolor": "none", "label": label,
    }  # fmt: skip


def _draw_recovered(axes: Axes, result: Record, theme: Theme) -> None:
    for point in result.get("comparison") or []:
        _draw_one_recovered(axes, point, theme.colour(str(point.get("group", ""))), size=8.0)
    for point in result.get("points") or []:
        _draw_one_recovered(axes, point, theme.ink, size=13.0)
        if point.get("test_accuracy") is not None:
            axes.annotate(
                f"{point['test_accuracy']:.1%}", (place(point["compression"]), point["test_accuracy"]),
                xytext=(11, 0), textcoords="offset points", va="center",
                color=theme.ink, fontsize=10.5, fontweight="bold", zorder=7,
            )  # fmt: skip


def _draw_one_recovered(axes: Axes, point: Record, colour: str, *, size: float) -> None:
    x = place(point["compression"])
    if point.get("val_accuracy") is not None:
        axes.plot(x, point["val_accuracy"], "_", markersize=size, color=colour, markeredgewidth=2, zorder=6)
    if point.get("test_accuracy") is not None:
        axes.plot(x, point["test_accuracy"], "*", markersize=size, color=colour, markeredgewidth=0, zorder=6)


def _draw_baseline(axes: Axes, baseline: Record, theme: Theme) -> None:
    for key, style in (("val_accuracy", (0, (2, 3))), ("test_accuracy", (0, (7, 3)))):
        if baseline.get(key) is not None:
            axes.axhline(baseline[key], color=theme.ink, linewidth=1.1, linestyle=style, alpha=0.8, zorder=3)


def _furthest(records: Sequence[Record], result: Record) -> float:
    reached = [float(c) for record in records for c, _ in record["curve"]]
    recovered = [float(point["compression"]) for point in result.get("points") or []]
    return max([0.5, *reached, *recovered])


def _frontier_handles(records: Sequence[Record], result: Record, theme: Theme) -> list[Line2D]:
    groups = groups_of(records)
    handles = [
        Line2D([], [], color=theme.colour(g), marker=_marker(g), markersize=7, linewidth=1.2, label=_label(g))
        for g in groups
    ]
    handles += [
        Line2D([], [], label=f"heuristic: {policy}", **_teacher_style(policy, theme))
        for policy in _TEACHER_MARKERS
        if any(record["policy"] == policy for record in _by_teacher(records))
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


def _published_handles(published: Sequence[Published], theme: Theme) -> list[Line2D]:
    styles = {style["label"]: style for style in (_published_style(point, theme) for point in published)}
    return [Line2D([], [], **style) for style in styles.values()]


def _marker(group: str) -> str:
    return _MARKERS.get(group, "P")


def _label(group: str) -> str:
    return _LABELS.get(group, group)
