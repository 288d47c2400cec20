"""What `zeroout export` prints: the rows of `export/table.json` (deploy/latency.py) for people."""

from collections.abc import Iterator, Sequence
from typing import Any

import rich.box
from rich.table import Table

from deploy.formats import INT8
from deploy.latency import ACCURACIES, BATCHES, RUNTIMES

__all__ = ["render_int8", "render_table"]

Record = dict[str, Any]


def render_table(table: Record) -> Table:
    """The float networks: sizes, median milliseconds with quartiles, speed-up, n."""
    shown = _table("runtime", ["parameters", "MACs", "bytes"], timed=table["repeats"], caption=_caption(table))
    for row in table["rows"]:
        if not _is_int8(row):
            sizes = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f} M", f"{row['bytes']:,}"]
            shown.add_row(row["network"], row["runtime"], *sizes, *_timings(row))
    return shown


def render_int8(table: Record) -> Table:
    """The ONNX files, each network in float and in int8: bytes, accuracies, and times as above."""
    caption = (
        "accuracy in %: of int8 measured on the file, of float as the campaign has judged; change: of test, in points "
        "from the first that is known; x: how much quicker than the original in float"
    )
    shown = _table("numbers", ["bytes", "validation", "test", "change"], timed=table["repeats"], caption=caption)
    rows = [row for row in table["rows"] if row["runtime"] == RUNTIMES["onnx"] or _is_int8(row)]
    first = next((row["test_accuracy"] for row in rows if row["test_accuracy"] is not None), None)
    for row in rows:
        numbers = "int8" if _is_int8(row) else "float32"
        shown.add_row(row["network"], numbers, f"{row['bytes']:,}", *_accuracies(row, first), *_timings(row))
    return shown


def _is_int8(row: Record) -> bool:
    return bool(row["runtime"] == RUNTIMES[INT8])


def _table(second: str, headings: Sequence[str], *, timed: int, caption: str) -> Table:
    """An empty table: network, `second`, these headings, and those of the times where there are any."""
    shown = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for heading in ("network", second):
        shown.add_column(heading, no_wrap=True)
    times = [*(heading for batch in BATCHES for heading in (f"batch {batch}", "quartiles", "")), "n"] if timed else []
    for heading in (*headings, *times):
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def _accuracies(row: Record, first: float | None) -> tuple[str, str, str]:
    """Validation, test, and points of test from `first`; empty where nobody knows."""
    validation, test = (row[key] for key in ACCURACIES)
    change = "" if test is None or first is None else f"{100 * (test - first):+.2f}"
    return _percent(validation), _percent(test), change


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _timings(row: Record) -> Iterator[str]:
    """The row's cells for each batch size, and how often was measured."""
    if "latency" not in row:
        return
    is_reference = row["network"] == "original" and not _is_int8(row)
    for batch in map(str, BATCHES):
        known = row["latency"][batch]
        yield f"{known['median_ms']:.3g}"
        yield f"{known['quartile1_ms']:.3g}-{known['quartile3_ms']:.3g}"
        yield "" if is_reference else f"{row['speedup'][batch]:.2f}x"
    yield "/".join(dict.fromkeys(str(known["n"]) for known in row["latency"].values()))


def _caption(table: Record) -> str:
    machine, known = table["machine"], table["versions"]
    where = f"{machine['processor']}, {machine['cores']} cores, torch {known['torch']}, "
    how = (
        "median milliseconds of n calls, one thread, all networks by turns in one run; x: how much quicker than the "
        "original in the same runtime"
    )
    return f"{where}onnxruntime {known['onnxruntime']}; {how if table['repeats'] else 'latency not measured'}"
