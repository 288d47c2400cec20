"""What all pictures of a report have in common: colours, sizes, the frame, the legend, the PNG.

Called by deploy/charts.py. Drawn with matplotlib's Agg canvas and no pyplot, so that no window system and no global
state is touched. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

__all__ = ["PLAIN", "Form", "Theme", "legend", "new_figure", "png"]

_DPI = 150


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours on light or on dark paper, as #rrggbb."""

    paper: str
    ink: str
    grid: str
    groups: dict[str, str]
    other: str  # for a group that is not ours

    def colour(self, group: str) -> str:
        """Return the colour of a group of episodes."""
        return self.groups.get(group, self.other)

    def nth(self, index: int) -> str:
        """Return a colour for the index-th of things that have no colour of their own."""
        colours = [*self.groups.values(), self.other]
        return colours[index % len(colours)]


_LIGHT = Theme(
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
_DARK = Theme(
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


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which of its four forms a picture takes: on light or dark paper, for a desk or for a phone."""

    dark: bool = False
    narrow: bool = False  # so small that its letters can be read at the width of a phone

    @property
    def theme(self) -> Theme:
        """The colours."""
        return _DARK if self.dark else _LIGHT

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height."""
        return (4.6, 5.4) if self.narrow else (9.0, 5.6)

    @property
    def columns(self) -> int:
        """Columns of the legend."""
        return 2 if self.narrow else 4


PLAIN = Form()


def new_figure(form: Form) -> tuple[Figure, Axes]:
    """Return an empty figure with its axes."""
    theme = form.theme
    figure = Figure(
        figsize=form.inches, dpi=_DPI, facecolor=theme.paper, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.12)
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, length=0, labelsize=10)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.grid)
    return figure, axes


def legend(axes: Axes, handles: Sequence[Any], form: Form) -> None:
    """Put the legend below the axes, where it covers no point; without handles say that there is nothing yet."""
    if not handles:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=form.theme.ink, fontsize=13)
        return
    axes.figure.legend(
        handles=list(handles), loc="outside lower center", ncols=min(form.columns, len(handles)),
        frameon=False, labelcolor=form.theme.ink, fontsize=8.5 if form.narrow else 10, columnspacing=1.2,
    )  # fmt: skip


def png(figure: Figure, form: Form) -> bytes:
    """Return the drawn figure as PNG of 256 colours: a report holds a dozen, each a third as large as with all."""
    drawn, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=figure.get_facecolor())
    with Image.open(drawn) as image:
        indexed = image.convert("RGB").quantize(palette=_palette(form.theme), dither=Image.Dither.NONE)
    indexed.save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def _palette(theme: Theme) -> Image.Image:
    """The theme's colours and their blends with the paper: the rest is fainter lines and the edges of letters."""
    colours = np.array([_rgb(colour) for colour in (theme.ink, theme.grid, *theme.groups.values(), theme.other)])
    paper, steps = np.array(_rgb(theme.paper)), 256 // len(colours)
    share = np.linspace(0.0, 1.0, steps)[:, None, None]
    blends = np.rint(share * colours + (1.0 - share) * paper).astype(np.uint8)
    image = Image.new("P", (1, 1))
    image.putpalette(blends.tobytes())
    return image


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
