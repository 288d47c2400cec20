"""What `zeroout export` prints fits 120 columns and says what was measured, how often and where."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from deploy.export_table import render_int8, render_table

WHERE = {
    "machine": {"processor": "Some CPU", "cores": 2},
    "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
    "repeats": 50,
}


def test_the_table_says_sizes_median_quartiles_speed_up_n_and_where_it_was_measured() -> None:
    latency = {"median_ms": 1.234, "quartile1_ms": 1.1, "quartile3_ms": 1.5, "n": 50}
    slow = {**latency, "median_ms": 123.4, "n": 7}
    row = {
        "network": "0.9", "runtime": "onnxruntime", "parameters": 14_728_266, "macs": 313_200_000, "bytes": 58_900_001,
        "latency": {"1": latency, "32": slow}, "speedup": {"1": 2.5, "32": 0.75},
    }  # fmt: skip
    original = {**row, "network": "original", "speedup": {"1": 1.0, "32": 1.0}}
    table = {
        "machine": {"processor": "Some CPU", "cores": 2},
        "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
        "repeats": 50,
        "rows": [original, row],
    }
    text = printed(render_table(table))
    (line,) = (line for line in text.splitlines() if line.strip().startswith("0.9"))
    assert line.split() == [
        "0.9", "onnxruntime", "14,728,266", "313.2", "M", "58,900,001",
        "1.23", "1.1-1.5", "2.50x", "123", "1.1-1.5", "0.75x", "50/7",
    ]  # fmt: skip
    assert "1.00x" not in text
    assert "Some CPU, 2 cores, torch 2.13.0, onnxruntime 1.32.0; median milliseconds of n calls, one thread" in text


def onnx_rows() -> list[dict[str, Any]]:
    """An original and a network of a tenth, both in float and in int8, as large as they come."""
    latency = {"median_ms": 123.4, "quartile1_ms": 111.4, "quartile3_ms": 155.6, "n": 50}
    return [
        {
            "network": network, "runtime": runtime, "parameters": 14_728_266, "macs": 313_200_000, "bytes": size,
            "val_accuracy": validation, "test_accuracy": test,
            "latency": {"1": latency, "32": latency}, "speedup": {"1": speedup, "32": 2 * speedup},
        }
        for network, runtime, size, validation, test, speedup in (
            ("original", "onnxruntime", 58_900_001, 0.9, 0.875, 1.0),
            ("original", "onnxruntime, int8", 14_900_001, 0.8975, 0.8755, 2.5),
            ("0.9", "torch, eager", 5_900_003, 0.88, 0.85, 3.0),
            ("0.9", "onnxruntime", 5_900_001, 0.88, 0.85, 4.0),
            ("0.9", "onnxruntime, int8", 1_500_001, 0.8775, 0.845, 12.5),
        )
    ]  # fmt: skip


def test_int8_is_shown_beside_float_with_accuracies_and_times() -> None:
    text = printed(render_int8({**WHERE, "rows": onnx_rows()}))
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    lines = [line.split() for line in text.splitlines() if line.strip().startswith(("original ", "0.9 "))]
    times = ["123", "111-156"]
    assert lines == [
        ["original", "float32", "58,900,001", "90.00", "87.50", "+0.00", *times, *times, "50"],
        ["original", "int8", "14,900,001", "89.75", "87.55", "+0.05", *times, "2.50x", *times, "5.00x", "50"],
        ["0.9", "float32", "5,900,001", "88.00", "85.00", "-2.50", *times, "4.00x", *times, "8.00x", "50"],
        ["0.9", "int8", "1,500,001", "87.75", "84.50", "-3.00", *times, "12.50x", *times, "25.00x", "50"],
    ]


def test_an_accuracy_that_nobody_knows_is_left_empty() -> None:
    original, int8 = onnx_rows()[:2]
    original |= {"val_accuracy": None, "test_accuracy": None}
    text = printed(render_int8({**WHERE, "rows": [original, int8]}))
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("original ")]
    assert lines[0][2:4] == ["58,900,001", "123"]
    assert lines[1][3:6] == ["89.75", "87.55", "+0.00"]


def test_int8_is_not_among_the_float_networks() -> None:
    text = printed(render_table({**WHERE, "rows": onnx_rows()}))
    assert len([line for line in text.splitlines() if "onnxruntime  " in line]) == 2
    assert "int8" not in text


@pytest.mark.parametrize("render", [render_table, render_int8])
def test_without_times_there_are_no_columns_for_them(render: Any) -> None:
    rows = [{key: row[key] for key in row if key not in ("latency", "speedup")} for row in onnx_rows()]
    text = printed(render({**WHERE, "repeats": 0, "rows": rows}))
    assert "quartiles" not in text
    assert "batch" not in text
    assert render is render_int8 or "latency not measured" in text


def printed(table: Table) -> str:
    """What the command prints where its output is not a terminal."""
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
