"""What the benchmarks' pages say of their rows, by hand."""

import math
from typing import Any

import pytest

from benchmarks.campaigns import fingerprint
from benchmarks.paired import difference, spread
from benchmarks.replacement import ARMS, page
from deploy.config import parse


def test_a_difference_is_paired_by_the_seeds_that_both_have() -> None:
    found = difference({0: 3.0, 1: 5.0, 2: 4.0, 7: 100.0}, {0: 2.0, 1: 2.0, 2: 2.0, 8: -100.0})
    assert found is not None
    assert (found.mean, found.wins, found.n) == (2.0, 3, 3)
    # differences 1, 3, 2: mean 2, standard error 1 / sqrt(3), t = 3.464 with 2 degrees of freedom
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert not found.sure
    assert str(found) == "+2.00 (3 of 3, p 0.074)"


def test_what_cannot_be_tested_has_no_p() -> None:
    assert difference({0: 1.0}, {1: 1.0}) is None
    for ours in ({0: 1.5}, {0: 1.5, 1: 2.5}):
        found = difference(ours, {0: 1.0, 1: 2.0})
        assert found is not None
        assert math.isnan(found.p)
        assert not found.sure
    assert spread({0: 1.0}) == "1.00"
    assert spread({0: 1.0, 1: 3.0}) == "2.00 (1.41)"


def row(arm: str, seed: int, test: float, **changes: Any) -> dict[str, Any]:
    return {
        "network": "vgg16", "width": 0.25, "seed": seed, "arm": arm, "machine": "a machine", "targets": [0.9],
        "images": 1000, "share": 0.2, "epochs": [4, 2, 3],
        "baseline_test": 0.80, "replaced_test": 0.81, "test": [test], **changes,
    }  # fmt: skip


def test_the_page_says_whether_replacement_keeps_more() -> None:
    rows = [row(arm, seed, 0.70 + 0.001 * seed) for arm in ARMS for seed in range(4) if arm not in ("1", "2")]
    rows += [row("1", seed, 0.72 + 0.002 * seed) for seed in range(4)]
    rows += [row("2", seed, 0.70 + 0.01 * (-1) ** seed) for seed in range(4)]
    said = page([row("1", 0, 0.1), *rows], "command")  # the first is an older row of the same arm and seed
    assert "1,000 training images, 4 epochs of baseline, 2 after the replacement of 20% of each layer, 3 of" in said
    assert "| no replacement | 4 | 81.00 (0.00) | 70.15 (0.13) | 10.85 (0.13) | 9.85 (0.13) | - |" in said
    assert "replacement 1 at 90% keeps more (+2.15, p 0.000)" in said
    assert "replacement 2 at 90% shows no difference" in said


def test_a_fingerprint_is_of_what_was_changed_alone() -> None:
    plain = fingerprint(parse(""))
    assert fingerprint(parse("[episode]\nwaypoints = 16")) == plain  # the default
    assert fingerprint(parse("[episode]\nwaypoints = 8")) != plain
    assert fingerprint(parse("[cluster]\nlease_s = 8.0"), without=["cluster"]) == plain
    assert fingerprint(parse(""), beyond={"taught": "x"}) != plain
