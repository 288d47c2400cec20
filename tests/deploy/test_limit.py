"""What is said of the network that `max_drop` found."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deploy import cli
from deploy.folder import CampaignFolder
from deploy.limit import _bracket, _reason


def row(compression: float, drop: float) -> dict[str, Any]:
    return {"compression": compression, "drop": drop}


def test_the_smallest_that_holds_is_the_one_though_it_overshot_its_target() -> None:
    """Peers take more than was asked: what counts is what a network lacks, then its accuracy."""

    def facts(target: float, compression: float, accuracy: float) -> dict[str, Any]:
        return {"target": target, "compression": compression, "validation": {"accuracy": accuracy}}

    rows = [
        facts(0.5, 0.5001, 0.90), facts(0.5, 0.5002, 0.89), facts(0.5, 0.53, 0.895),  # the last a peer's
        facts(0.8, 0.8, 0.85), facts(0.8, 0.81, 0.84),
    ]  # fmt: skip
    recovery: Any = SimpleNamespace(
        facts=lambda: rows,
        drop=lambda row: 100 * (0.9 - row["validation"]["accuracy"]),
        config=SimpleNamespace(max_drop=1.0),
    )
    assert _bracket(recovery) == (rows[2], rows[3])
    rows.pop(2)
    assert _bracket(recovery) == (rows[0], rows[2])  # as small within the resolution, and better


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (row(0.5, -3.59), row(0.6, 4.0), "50.00% removed gains 3.59 points, 60.00% loses 4.00"),
        (row(0.5, 0.0), row(0.6, -0.5), "50.00% removed loses 0.00 points, 60.00% gains 0.50"),
        (None, row(0.6, 4.0), "nothing but the baseline holds, 60.00% loses 4.00"),
    ],
)
def test_a_gain_is_not_told_as_a_loss(low: dict[str, Any] | None, high: dict[str, Any], said: str) -> None:
    recovery: Any = SimpleNamespace(drop=lambda facts: facts["drop"])
    assert _reason(recovery, low, high, stuck=False) == said


def test_the_network_that_was_found_stands_in_the_table(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def point(target: float, accuracy: float) -> dict[str, Any]:
        sizes = {"parameters": 100, "macs": 200, "val_accuracy": accuracy, "test_accuracy": accuracy}
        return {"target": target, "group": "taylor", "policy": "taylor", "compression": target, **sizes}

    found = point(0.62, 0.875)
    result = {
        "baseline": point(0.0, 0.9), "measure": "parameters", "comparison": [point(0.5, 0.89), point(0.75, 0.7)],
        "points": [found], "max_drop": 3.0, "limit": "62.00% removed loses 2.50 points, 75.00% loses 20.00",
    }  # fmt: skip
    cli._print_result(Console(width=200), CampaignFolder(tmp_path), result)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "taylor (taylor)" in line]
    assert ["*" in line for line in rows] == [False, True, False]
    assert "62.00%" in rows[1]
    assert "87.50%" in rows[1]
    assert any(line.startswith("* chosen: 62.00% removed, 100 parameters, test -2.50 points") for line in lines)
