"""benchmarks.tables as the real command on digits: arms of three kinds, and again without making anything twice."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import benchmarks.tables
from benchmarks.ledger import Ledger
from benchmarks.tables import QUICK, Bench, side_by_side

ROOT = Path(__file__).parent.parent
KINDS = ("controller", "distilled", "uniform")  # what learns, what shares a search, what is no campaign


def tables(work: Path, *arguments: str) -> str:
    """Run the command; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--quick", "--work", str(work), *arguments],
        cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_in(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "quick" / "tables.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("gpu", "jobs", "turns"),
    [
        (False, 2, [["controller"], ["distilled", "taylor", "uniform"], ["source"]]),
        (True, 1, [["controller"], ["distilled", "taylor", "uniform"], ["source"]]),
        (True, 4, [["controller", "distilled", "taylor", "uniform", "source"]]),
    ],
)
def test_who_learns_has_a_cpu_for_itself_and_shares_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, jobs: int, turns: list[list[str]]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert side_by_side(["controller", "distilled", "taylor", "uniform", "source"], jobs) == turns


@pytest.mark.parametrize("ends", ["search", "whole"])
def test_who_shares_a_search_begins_when_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The recovery beside the other's; not before the search has ended, and not at all where it never does."""
    monkeypatch.setattr(benchmarks.tables, "_LOOK_S", 0.01)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    bench = Bench(
        protocol=QUICK, network="small", width=1.0, data="digits", targets=(0.5,),
        ledger=Ledger(tmp_path / "tables.jsonl"), work=tmp_path, deadline_s=math.inf,
    )  # fmt: skip
    begun, second = [], threading.Event()

    def campaign(_config: object, out: Path, what: str, **_: object) -> None:
        begun.append(what)
        if what.startswith("controller"):
            out.mkdir()
            (out / "episodes.jsonl").write_text("{}")
            if ends == "search":
                (out / "recovered").mkdir()
                assert second.wait(60)  # still recovering
        else:
            assert (out / "episodes.jsonl").read_text() == "{}"
            second.set()

    monkeypatch.setattr(benchmarks.tables, "baseline", lambda *_: tmp_path / "weights")
    monkeypatch.setattr(benchmarks.tables, "campaign", campaign)
    bench.run([0], ["controller", "distilled"], 2)
    assert begun == ["controller, seed 0", "distilled, seed 0"][: 2 if ends == "search" else 1]


@pytest.mark.slow
def test_the_whole_command_on_digits(tmp_path: Path) -> None:
    nothing = tables(tmp_path, "--arms", "taylor", "--minutes", "0")
    assert "the minutes are over; the same command goes on with taylor, seed 0" in nothing
    assert not (tmp_path / "quick" / "tables.jsonl").exists()
    first = tables(tmp_path, "--arms", *KINDS)
    rows = rows_in(tmp_path)
    assert sorted((row["arm"], row["target"]) for row in rows) == sorted((arm, t) for arm in KINDS for t in (0.5, 0.8))
    by_arm = {(row["arm"], row["target"]): row for row in rows}
    assert all(abs(row["compression"] - row["target"]) < 0.01 and 0.5 < row["test"] <= 1 for row in rows)
    for target in (0.5, 0.8):  # the same networks, recovered in two ways
        one, other = by_arm["controller", target], by_arm["distilled", target]
        assert (one["compression"], one["macs_removed"]) == (other["compression"], other["macs_removed"])
        assert one["fingerprint"] != other["fingerprint"]
    assert len({row["baseline_test"] for row in rows}) == 1  # all from one network
    assert "## small, width 1: digits" in first
    assert (tmp_path / "quick" / "tables-small-1.png").read_bytes().startswith(b"\x89PNG")
    again = tables(tmp_path, "--arms", *KINDS)
    assert rows_in(tmp_path) == rows
    assert "seed 0: test" in first
    assert "seed 0: test" not in again


@pytest.mark.slow
@pytest.mark.parametrize("module", ["benchmarks.tables", "benchmarks.search"])
def test_a_campaign_that_fails_is_named_and_makes_the_command_fail(tmp_path: Path, module: str) -> None:
    chosen = ["--arms", "taylor"] if module == "benchmarks.tables" else ["--methods", "taylor"]
    wrong = ["--set", "recovery.batch_size=100000"]  # more than there are images, which only the campaign notices
    done = subprocess.run(
        [sys.executable, "-m", module, "--quick", "--work", str(tmp_path), *chosen, *wrong],
        cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing came of" in done.stderr
    assert "taylor, seed 0" in done.stderr
    assert "Traceback" not in done.stderr
