"""Campaigns beside each other as numbers: everything that is said of them, for scripts and in the terminal.

Called by `zeroout compare` and deploy/compare_page.py. Numbers are result.json's own; deploy/compare.py gathers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.comparability import differences, network_name, reservations
from deploy.compare import Series, over_seeds, rows
from deploy.figures import change, count, percent, spread
from deploy.finished import Campaign

__all__ = ["ROW_HEADINGS", "Comparison", "compared", "render", "row_cells", "seed_cells"]

Record = dict[str, Any]

ROW_HEADINGS = (
    "campaign", "decided by", "network", "seed", "removed", "parameters", "MACs", "validation", "test", "change",
)  # fmt: skip
_WIDE = 100  # characters of a terminal that has room for all of them


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Campaigns, and all that is to be said of them together."""

    campaigns: Sequence[Campaign]
    unfinished: Sequence[str]  # names of those that were passed over
    series: Sequence[Series]
    rows: Sequence[Record]
    reservations: Sequence[str]
    differences: dict[str, dict[str, Any]]

    @property
    def repeated(self) -> list[Series]:
        """The series of more than one seed."""
        return [series for series in self.series if len(series.campaigns) > 1]

    @property
    def several_measures(self) -> bool:
        """Whether compression is not a share of the same in all of them."""
        return len({campaign.measure for campaign in self.campaigns}) > 1

    @property
    def notes(self) -> list[str]:
        """A sentence for whatever a reader would miss in the table."""
        passed_over = f"Not finished, passed over: {', '.join(self.unfinished)}." if self.unfinished else ""
        without = [
            f"{campaign.name} gave no network back: {campaign.result.get('limit', 'it has no points')}."
            for campaign in self.campaigns
            if not campaign.result["points"]
        ]
        return [*([passed_over] if passed_over else []), *without]

    def as_json(self) -> Record:
        """Everything, fit for JSON."""
        return {
            "rows": list(self.rows),
            "seeds": [_series_json(series) for series in self.repeated],
            "reservations": list(self.reservations),
            "differences": self.differences,
            "unfinished": list(self.unfinished),
        }


def compared(campaigns: Sequence[Campaign], unfinished: Sequence[str]) -> Comparison:
    """Put campaigns beside each other; `unfinished` are the names of others that have no result yet."""
    series = over_seeds(campaigns)
    return Comparison(
        campaigns=campaigns,
        unfinished=unfinished,
        series=series,
        rows=rows(campaigns),
        reservations=reservations(campaigns, series),
        differences=differences(campaigns),
    )


def render(comparison: Comparison, console: Console) -> None:
    """Print the table, the seeds summed up, and what does not compare."""
    wide = console.width >= _WIDE
    console.print(_rows_table(comparison, wide=wide))
    if comparison.repeated:
        console.print(_seeds_table(comparison.repeated))
    lines = [*comparison.reservations, *comparison.notes]
    if not wide:
        lines.append(f"Validation accuracies are shown where the terminal has {_WIDE} columns, by --json and by --out.")
    if comparison.differences:
        lines.append(f"Settings that differ: {', '.join(comparison.differences)}.")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def row_cells(row: Record, *, name_measure: bool) -> list[str]:
    """Return a row of `compare.rows` under ROW_HEADINGS; with `name_measure` compression says what it is a share of."""
    removed = percent(row["compression"])
    return [
        row["campaign"],
        _decided_by(row["method"], [row["policy"]]),
        network_name(row),
        str(row["seed"]),
        f"{removed} of {row['measure']}" if name_measure else removed,
        count(row["parameters"]),
        count(row["macs"]),
        percent(row["val_accuracy"]),
        percent(row["test_accuracy"]),
        change(row["test_accuracy"], row["baseline"]["test_accuracy"]),
    ]


def seed_cells(series: Series, point: Record) -> list[str]:
    """Return series, who decided, network, seeds, n, removed, parameters, MACs, validation, test, change."""
    first = series.campaigns[0]
    network = {"network": first.network, "width": first.width, "skips": first.settings["network.skips"]}
    return [
        series.name,
        _decided_by(first.settings["search.method"], point["policies"]),
        network_name(network),
        ", ".join(str(campaign.seed) for campaign in series.campaigns),
        str(point["n"]),
        _share(point["compression"]),
        _spread(point["parameters"], ",.0f"),
        _spread(point["macs"], ",.0f"),
        _share(point["val_accuracy"]),
        _share(point["test_accuracy"]),
        _spread(point["change"], "+.2f"),
    ]


def _share(values: Record) -> str:
    """A mean fraction with its standard deviation, in percent."""
    return _spread({key: None if value is None else 100 * value for key, value in values.items()}, ".2f") + " %"


def _spread(values: Record, form: str) -> str:
    """A mean with its standard deviation, where there is one; `form` is how a number is written."""
    deviation = "" if values["sd"] is None else format(values["sd"], form.lstrip("+"))
    return spread(format(values["mean"], form), deviation)


def _decided_by(method: str, policies: Sequence[str]) -> str:
    """The method, and who decided in the end where that was somebody else: one of its teachers or controls."""
    others = [policy for policy in policies if policy and policy != method]
    return f"{method}: {', '.join(policies)}" if others else method


def _series_json(series: Series) -> Record:
    return {
        "name": series.name,
        "campaigns": [campaign.name for campaign in series.campaigns],
        "seeds": [campaign.seed for campaign in series.campaigns],
        "points": list(series.points),
    }


def _rows_table(comparison: Comparison, *, wide: bool) -> Table:
    left_out = None if wide else ROW_HEADINGS.index("validation")
    rows_shown = [row_cells(row, name_measure=comparison.several_measures) for row in comparison.rows]
    return _table(*(_without(cells, left_out) for cells in (ROW_HEADINGS, *rows_shown)))


def _seeds_table(repeated: Sequence[Series]) -> Table:
    headings = ("over seeds", "decided by", "network", "n", "removed", "test", "change")
    cells = [seed_cells(series, point) for series in repeated for point in series.points]
    return _table(headings, *([*of_one[:3], *of_one[4:6], *of_one[-2:]] for of_one in cells))


def _table(headings: Sequence[str], *cells: Sequence[str]) -> Table:
    """A table whose first three columns are names, which may be folded, and the others numbers, which may not."""
    shown = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        is_name = place < 3
        shown.add_column(
            heading,
            justify="left" if is_name else "right",
            overflow="fold" if is_name else "ellipsis",
            no_wrap=not is_name,
        )
    for row in cells:
        # as Text, for a name may hold what rich reads as a style
        shown.add_row(*(Text(cell.replace(" %", "%")) for cell in row))
    return shown


def _without(cells: Sequence[str], place: int | None) -> list[str]:
    return [cell for number, cell in enumerate(cells) if number != place]
