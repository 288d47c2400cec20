"""The picture of several campaigns: test accuracy against compression, one colour for each series.

Called by deploy/compare_page.py. A series of several seeds is drawn as its mean, with a band and bars of one standard
deviation and a dot for each seed; baselines are lines.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from deploy.canvas import PLAIN, Form, legend, new_figure, place, png, scale_compression
from deploy.compare import Series
from deploy.finished import Campaign

__all__ = ["comparison_image"]

_Floats = npt.NDArray[np.float64]

#: Not as many as there are colours, so that a colour that comes again has another marker.
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "<", "h", ">")
_NAMED = 14  # a legend of more is longer than the picture
_LONGEST = {False: 36, True: 26}  # letters of a name in a legend, by whether the form is narrow
_ROOM = {False: 100, True: 58}  # letters of a line of the legend
_MARGINS = (0.3, 0.15)  # left and right of the points, in decades of what is left


def comparison_image(series: Sequence[Series], *, form: Form = PLAIN) -> bytes:
    """Return a PNG; `series` as deploy.compare.over_seeds gives them."""
    figure, axes = new_figure(form)
    handles = [_draw(axes, one, index, form) for index, one in enumerate(series)]
    if len(handles) > _NAMED:
        rest = len(handles) - _NAMED + 1
        handles = [*handles[: _NAMED - 1], Line2D([], [], linestyle="none", label=f"and {rest} more")]
    handles.append(_draw_baselines(axes, series, form))
    _scale(axes, series, form)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("test accuracy", color=form.theme.ink)
    axes.set_xlabel(f"{_measure(series)} (logarithmic in what is left)", color=form.theme.ink)
    legend(axes, handles, form, columns=_columns(handles, form))
    return png(figure, form)


def _draw(axes: Axes, series: Series, index: int, form: Form) -> Line2D:
    """Draw the index-th series; returns its entry in the legend."""
    style: dict[str, Any] = {"color": form.theme.nth(index), "marker": _MARKERS[index % len(_MARKERS)]}
    x = np.array([place(point["compression"]["mean"]) for point in series.points])
    y = np.array([point["test_accuracy"]["mean"] for point in series.points])
    axes.plot(x, y, linewidth=1.4, markersize=8, markeredgecolor=axes.get_facecolor(), zorder=5, **style)
    if len(series.campaigns) > 1:
        _draw_spread(axes, series, x, y, style["color"])
    return Line2D([], [], markersize=7, label=_label(series.name, form), **style)


def _draw_spread(axes: Axes, series: Series, x: _Floats, y: _Floats, colour: str) -> None:
    sd = np.array([point["test_accuracy"]["sd"] or 0.0 for point in series.points])
    axes.fill_between(x, y - sd, y + sd, color=colour, alpha=0.15, linewidth=0, zorder=1)
    axes.errorbar(x, y, sd, fmt="none", ecolor=colour, elinewidth=1.4, capsize=5, zorder=4)
    dots = [point for campaign in series.campaigns for point in campaign.result["points"]]
    axes.plot(
        [place(dot["compression"]) for dot in dots], [dot["test_accuracy"] for dot in dots], ".",
        color=colour, alpha=0.55, markersize=6, markeredgewidth=0, zorder=3,
    )  # fmt: skip


def _draw_baselines(axes: Axes, series: Sequence[Series], form: Form) -> Line2D:
    """Draw one line where all baselines are alike, else each series' mean in its colour; returns the legend's entry."""
    ink, dashes = form.theme.ink, (0, (7, 3))
    heights = [[c.result["baseline"]["test_accuracy"] for c in one.campaigns] for one in series]
    is_one = len({height for members in heights for height in members}) == 1
    for index, members in enumerate(heights[:1] if is_one else heights):
        colour = ink if is_one else form.theme.nth(index)
        axes.axhline(fmean(members), color=colour, linewidth=1.1, linestyle=dashes, alpha=0.8, zorder=2)
    label = "baseline" if is_one else "baselines, by colour"
    return Line2D([], [], color=ink, linestyle=(0, (5, 2)), linewidth=1.1, label=label)


def _scale(axes: Axes, series: Sequence[Series], form: Form) -> None:
    places = [place(point["compression"]) for campaign in _all(series) for point in campaign.result["points"]]
    left, right = min(places, default=0.0), max(places, default=1.0)
    scale_compression(axes, max(-0.02, left - _MARGINS[0]), right + _MARGINS[1], form)


def _measure(series: Sequence[Series]) -> str:
    measures = {campaign.measure for campaign in _all(series)}
    return f"{measures.pop()} removed" if len(measures) == 1 else "removed, of different measures"


def _all(series: Sequence[Series]) -> list[Campaign]:
    return [campaign for one in series for campaign in one.campaigns]


def _label(name: str, form: Form) -> str:
    longest = _LONGEST[form.narrow]
    cut = name if len(name) <= longest else f"{name[: longest // 2]}…{name[-(longest // 2) + 1 :]}"
    # A dollar would begin a formula, and matplotlib hides what begins with an underscore.
    escaped = cut.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _columns(handles: Sequence[Line2D], form: Form) -> int:
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(form.columns, _ROOM[form.narrow] // (longest + 5)))
