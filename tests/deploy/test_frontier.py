"""What the episodes say, worked by hand."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from deploy.frontier import compare, frontier, groups_of, groups_table, learning_curve, targets_of


def episode(
    id: int, group: str, cross_entropy: float | None, *, accuracy: float = 0.5, policy: str = "", **other: Any
) -> dict[str, Any]:
    point = {
        "target": 0.9,
        "compression": 0.9003,
        "parameters": 1000 + id,
        "macs": 5000,
        "accuracy": accuracy,
        "cross_entropy": cross_entropy,
        "keep_bits": "AAE=",
    }
    record = {
        "id": id, "group": group, "actor": "actor-0", "policy": policy or group, "seed": 100 + id, "steps": 8,
        "seconds": 10.0 + id, "return": -1.0, "curve": [[0.0, 0.8], [0.9, accuracy]], "targets": [point],
    }  # fmt: skip
    return record | other


def test_the_frontier_holds_the_lowest_cross_entropy_over_all_and_per_group() -> None:
    records = [episode(0, "search", 1.4), episode(1, "taylor", 1.3), episode(2, "search", 1.35)]
    (entry,) = frontier(records, [0.9])
    assert entry["target"] == 0.9
    assert entry["best"]["episode"] == 1
    assert {group: point["episode"] for group, point in entry["groups"].items()} == {"search": 2, "taylor": 1}
    assert entry["best"] == {
        "episode": 1, "group": "taylor", "policy": "taylor", "seed": 101, "target": 0.9, "compression": 0.9003,
        "parameters": 1001, "macs": 5000, "accuracy": 0.5, "cross_entropy": 1.3, "keep_bits": "AAE=",
    }  # fmt: skip


def test_ties_go_to_the_higher_accuracy_then_to_the_lower_id() -> None:
    records = [
        episode(5, "search", 1.3, accuracy=0.50),
        episode(4, "search", 1.3, accuracy=0.52),
        episode(3, "search", 1.3, accuracy=0.52),
    ]
    assert frontier(records, [0.9])[0]["best"]["episode"] == 3
    assert frontier(records[::-1], [0.9])[0]["best"]["episode"] == 3


@pytest.mark.parametrize("worst", [None, math.nan, math.inf])
def test_a_collapsed_network_never_is_the_best(worst: float | None) -> None:
    records = [episode(0, "search", worst), episode(1, "search", 9.0, accuracy=0.1)]
    assert frontier(records, [0.9])[0]["best"]["episode"] == 1


def test_a_target_that_nobody_reached_has_no_best() -> None:
    assert frontier([episode(0, "search", 1.0)], [0.95]) == [{"target": 0.95, "best": None, "groups": {}}]
    assert frontier([], [0.95])[0]["best"] is None


def test_targets_and_groups_are_found_in_the_records() -> None:
    records = [episode(0, "zebra", 1.0), episode(1, "random", 1.0), episode(2, "search", 1.0)]
    assert targets_of(records) == [0.9]
    assert groups_of(records) == ["search", "random", "zebra"]


def test_the_table_gives_best_mean_and_deviation() -> None:
    records = [
        episode(0, "search", 1.0, accuracy=0.6, policy="controller"),
        episode(1, "search", 2.0, accuracy=0.4, policy="teacher"),
        episode(2, "search", 3.0, accuracy=0.5, policy="controller", targets=[]),
        episode(3, "taylor", None, accuracy=0.1),
    ]
    rows = groups_table(records, 0.9)
    assert [(row["group"], row["policy"]) for row in rows] == [
        ("search", None),
        ("search", "controller"),
        ("search", "teacher"),
        ("taylor", None),
    ]
    search, taylor = rows[0], rows[3]
    assert (search["episodes"], search["reached"]) == (3, 2)
    assert search["cross_entropy"] == pytest.approx({"best": 1.0, "mean": 1.5, "sd": math.sqrt(0.5)})
    assert search["accuracy"] == pytest.approx({"best": 0.6, "mean": 0.5, "sd": math.sqrt(0.02)})
    assert search["seconds"] == pytest.approx(11.0)
    assert taylor["cross_entropy"] == {"best": None, "mean": None, "sd": None}
    assert taylor["accuracy"] == {"best": 0.1, "mean": 0.1, "sd": None}


def test_the_learning_curve_follows_the_ids() -> None:
    records = [
        episode(7, "search", 1.0, **{"return": -2.0}),
        episode(2, "search", 1.0, **{"return": -4.0}),
        episode(3, "taylor", 1.0, **{"return": 50.0}),
        episode(5, "search", 1.0, **{"return": None}),
        episode(9, "search", 1.0, **{"return": -3.0}),
    ]
    assert learning_curve(records, "search", window=2) == [
        {"episode": 1, "id": 2, "return": -4.0, "mean": -4.0, "best": -4.0},
        {"episode": 3, "id": 7, "return": -2.0, "mean": -3.0, "best": -2.0},
        {"episode": 4, "id": 9, "return": -3.0, "mean": -2.5, "best": -2.0},
    ]


def arms(search: Sequence[float], taylor: Sequence[float], random: Sequence[float] = ()) -> list[dict[str, Any]]:
    named = [("search", search), ("taylor", taylor), ("random", random)]
    pairs = [(group, value) for group, values in named for value in values]
    return [episode(i, group, value) for i, (group, value) in enumerate(pairs)]


TAYLOR = [1.50, 1.45, 1.55, 1.48, 1.52]


def test_groups_are_compared_at_equal_number_of_episodes() -> None:
    # The search's best came sixth, where Taylor had played five: it does not count.
    comparison = compare(arms([1.6, 1.7, 1.6, 1.7, 1.6, 0.5], TAYLOR), 0.9)
    assert comparison is not None
    assert comparison.episodes == 5
    assert comparison.best == {"search": 1.6, "taylor": 1.45}
    assert comparison.ahead == pytest.approx(-0.15)
    assert comparison.noise == pytest.approx(statistics.stdev(TAYLOR))
    assert comparison.verdict == "lost"


@pytest.mark.parametrize(("best", "verdict"), [(1.30, "won"), (1.40, "noise"), (1.50, "noise"), (1.60, "lost")])
def test_a_lead_within_twice_the_noise_is_no_victory(best: float, verdict: str) -> None:
    comparison = compare(arms([2.0, 2.0, best, 2.0, 2.0], TAYLOR), 0.9)
    assert comparison is not None
    assert comparison.verdict == verdict


def test_the_rival_is_the_best_control() -> None:
    comparison = compare(arms([1.3] * 5, TAYLOR, [1.2] * 5), 0.9)
    assert comparison is not None
    assert comparison.rival == "random"


def test_the_policy_that_chose_the_searchs_best_is_named() -> None:
    records = [
        episode(0, "search", 1.4, policy="controller"),
        episode(1, "search", 1.2, policy="teacher"),
        episode(2, "taylor", 1.3),
        episode(3, "taylor", 1.3),
    ]
    comparison = compare(records, 0.9)
    assert comparison is not None
    assert comparison.policy == "teacher"


def test_few_episodes_tell_nothing() -> None:
    comparison = compare(arms([1.0, 1.1], [2.0, 2.1]), 0.9)
    assert comparison is not None
    assert comparison.verdict == "unknown"


@pytest.mark.parametrize("records", [[], arms([1.0], []), arms([], [1.0])])
def test_there_is_no_comparison_without_both_sides(records: list[dict[str, Any]]) -> None:
    assert compare(records, 0.9) is None
