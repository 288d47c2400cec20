"""Campaigns beside each other as one page and one picture, which need no other file and no network.

Called by `zeroout compare`. What stands there is deploy/compare_table.py's, the picture deploy/compare_chart.py's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.compare import Series
from deploy.compare_table import ROW_HEADINGS, Comparison, row_cells, seed_cells
from deploy.figures import percent
from deploy.folder import write_atomic
from deploy.page import page, picture, table, text
from deploy.report_pictures import forms
from env.errors import UserError

__all__ = ["check_file", "comparison_page", "write_page", "write_picture"]

_TITLE = "Campaigns beside each other"
_SORTED = (
    "Accuracies after recovery; changes in points from the campaign's own baseline. Rising by what was removed; of "
    "about the same, the best on the test images first."
)
_SUMMED = "Campaigns that differ in nothing but the seed: means, and the standard deviation of a sample of n seeds."


def check_file(option: str, path: Path | None, suffix: str) -> None:
    """UserError unless `path`, where one is given, can be a file of this kind."""
    if path is None:
        return
    for expected, holds, got in (
        # else a slip of the hand would write over a result.json
        (f"a name that ends in {suffix}", path.suffix == suffix, str(path)),
        ("a file", not path.is_dir(), f"{path}, a folder"),
        ("a file in a folder that is there", path.parent.is_dir(), f"{path}, whose folder is not"),
    ):
        if not holds:
            raise UserError(option, expected=expected, got=got, remedy=f"give e.g. {option} comparison{suffix}")


def write_page(path: Path, comparison: Comparison) -> None:
    """Write the page to `path`; UserError where the disk does not take it."""
    write_atomic(path, comparison_page(comparison))


def write_picture(path: Path, comparison: Comparison) -> None:
    """Write the picture as PNG to `path`; UserError where the disk does not take it."""
    from deploy.compare_chart import comparison_image  # matplotlib takes most of a second to import

    write_atomic(path, comparison_image(comparison.series))


def comparison_page(comparison: Comparison) -> str:
    """Return the page."""
    names = [campaign.name for campaign in comparison.campaigns]
    body = [
        f"<h1>{_TITLE}</h1><p class=dim>{len(names)} {'campaign' if len(names) == 1 else 'campaigns'}</p>",
        _notices([*comparison.reservations, *comparison.notes]),
        _picture(comparison.series),
        _rows_section(comparison),
        _seeds_section(comparison.repeated),
        _differences_section(comparison.differences, names),
    ]
    return page(_TITLE, body)


def _rows_section(comparison: Comparison) -> str:
    cells = [
        [
            *row_cells(row, name_measure=comparison.several_measures),
            percent(row["baseline"]["test_accuracy"]),
            str(row["model"] or ""),
        ]
        for row in comparison.rows
    ]
    header = (*ROW_HEADINGS, "baseline's test", "model")
    return f"<h2>Networks</h2>{table('Networks', header, cells)}<p class=dim>{text(_SORTED)}</p>"


def _seeds_section(repeated: Sequence[Series]) -> str:
    if not repeated:
        return ""
    header = (
        "campaigns", "decided by", "network", "seeds", "n", "removed", "parameters", "MACs", "validation", "test",
        "change",
    )  # fmt: skip
    cells = [seed_cells(series, point) for series in repeated for point in series.points]
    return f"<h2>Over seeds</h2>{table('Over seeds', header, cells)}<p class=dim>{text(_SUMMED)}</p>"


def _differences_section(found: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    if not found:
        return ""
    cells = [[key, *(_value(values[name]) for name in names)] for key, values in found.items()]
    return f"<h2>Settings that differ</h2>{table('Settings that differ', ('setting', *names), cells)}"


def _notices(lines: Sequence[str]) -> str:
    return "".join(f"<p class=notice>{text(line)}</p>" for line in lines)


def _picture(series: Sequence[Series]) -> str:
    from deploy.compare_chart import comparison_image

    title = "Test accuracy against compression"
    drawn = forms(lambda form: comparison_image(series, form=form))
    spreads = any(len(one.campaigns) > 1 for one in series)
    note = "Bands and bars: one standard deviation over seeds around their mean; dots: each seed." if spreads else ""
    description = f"{title}: {len(series)} series, as in the tables"
    return f"<h2>{title}</h2>{picture(description, drawn)}<p class=dim>{note}</p>"


def _value(value: Any) -> str:
    return "" if value is None else str(value)
