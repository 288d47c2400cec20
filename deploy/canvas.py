"""What all pictures of a report have in common: colours, sizes, frame, axis of compression, legend, PNG.

Called by deploy/charts.py and deploy/compare_chart.py. Drawn with matplotlib's Agg canvas and no pyplot, so that no
window system and no global state is touched. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter
from PIL import Image

__all__ = ["PLAIN", "Form", "Theme", "legend", "new_figure", "place", "png", "scale_compression"]

_Bytes = npt.NDArray[np.uint8]

_DPI = 150
_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_FEWER_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


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
        "balanced-l1": "#5E3C99",
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
        "balanced-l1": "#B9A0E8",
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


def place(compression: float) -> float:
    """Return where a compression stands on its axis: -log10 of what is left, 0 for all, 1 at 90 % removed."""
    return float(-np.log10(max(1e-4, 1.0 - compression)))


def scale_compression(axes: Axes, left: float, right: float, form: Form) -> None:
    """Make the horizontal axis one of compression, from `left` to `right` (as of `place`)."""
    places = [place(tick) for tick in (_FEWER_TICKS if form.narrow else _TICKS)]
    axes.set_xticks([x for x in places if left <= x <= right])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1 - 10**-x:.1%}".replace(".0%", "%")))
    axes.set_xlim(left, right)


def legend(axes: Axes, handles: Sequence[Any], form: Form, *, columns: int | None = None) -> None:
    """Put the legend below the axes, where it covers no point; without handles say that there is nothing yet.

    `columns` is for entries that are longer than the form's own number of columns allows.
    """
    if not handles:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=form.theme.ink, fontsize=13)
        return
    axes.figure.legend(
        handles=list(handles), loc="outside lower center", ncols=min(columns or form.columns, len(handles)),
        frameon=False, labelcolor=form.theme.ink, fontsize=8.5 if form.narrow else 10, columnspacing=1.2,
    )  # fmt: skip


def png(figure: Figure, form: Form) -> bytes:
    """Return the drawn figure as PNG of 256 colours: a report holds a dozen, each a third as large as with all."""
    drawn, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="rgba", facecolor=figure.get_facecolor())
    width, height = figure.canvas.get_width_height()
    pixels = np.frombuffer(drawn.getvalue(), np.uint8).reshape(height, width, 4)[:, :, :3]
    palette = _palette(form.theme)
    indexed = Image.fromarray(_nearest(pixels, palette))
    indexed.putpalette(palette.tobytes())
    indexed.save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def _palette(theme: Theme) -> _Bytes:
    """The theme's colours and their blends with the paper, uint8 [256, 3]: faint lines and the edges of letters."""
    colours = np.array([_rgb(colour) for colour in (theme.ink, *theme.groups.values(), theme.other)])
    paper, grid = np.array(_rgb(theme.paper)), np.array(_rgb(theme.grid))
    share = np.linspace(1.0, 0.0, 254 // len(colours), endpoint=False)[:, None, None]
    blends = (share * colours + (1.0 - share) * paper).reshape(-1, 3)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(blends) + 2] = np.rint([paper, grid, *blends])
    return palette


def _nearest(pixels: _Bytes, palette: _Bytes) -> _Bytes:
    """Index into `palette` of the colour that is nearest to each pixel, uint8 [H, W]."""
    height, width, _ = pixels.shape
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)  # an integer for each colour
    colours, places = np.unique(packed, return_inverse=True)
    rgb = np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], axis=1)
    distances = ((rgb[:, None].astype(np.float32) - palette) ** 2).sum(axis=2)
    nearest: _Bytes = distances.argmin(axis=1).astype(np.uint8)[places]
    return nearest.reshape(height, width)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
