"""benchmarks.search on digits: what teaches, what it is on the way, and what a page says of both."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_campaign import ROOT, wait_until

from actors.schedule import TAUGHT_SIGMA, ScheduleConfig
from agents.controller import TAUGHT
from benchmarks import search
from benchmarks.ledger import Ledger
from benchmarks.search_methods.greedy import write_curve
from benchmarks.search_methods.page import write_page
from deploy.config import load
from env.compact_file import network_from_file


def bench(work: Path, **changes: Any) -> search.Bench:
    cell = search.Cell(**{
        "network": "small", "width": 0.5, "target": 0.8, "episodes": 2, "data": "digits",
        "extra": ("baseline.epochs=2", "episode.waypoints=4"), **changes,
    })  # fmt: skip
    return search.Bench(cell, Ledger(work / "results" / f"{cell.name}.jsonl"), work, math.inf)


@pytest.mark.slow
def test_each_campaign_begins_with_what_those_before_have_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "TEACHING", ("episode.recovery_minibatches=4", "recovery.epochs=1"))
    ours = bench(tmp_path)
    stages = ours.teach([0, 1])
    assert [stage.episodes for stage in stages] == [0, 2, 4]
    (second,) = tmp_path.glob(f"{ours.cell.name}-1-teach-*.toml")
    assert load(second).controller.weights == str(stages[1].weights)
    played = ours.played([1], [stages[0], stages[-1]], jobs=1)
    assert [row["learned"] for row in played] == [0, 4]
    assert len({row["fingerprint"] for row in played}) == 2
    assert all(-2 * math.log(10) <= row["return"] < 0.5 for row in played)
    wider = bench(tmp_path, width=1.0)  # what was taught fits other networks, too
    assert len(wider.played([1], [stages[-1]], jobs=1)) == 1
    said = capsys.readouterr().out
    assert said.count("taught by seed") == 2
    assert f"taught by 4 episodes: {stages[2].weights}" in said
    again = bench(tmp_path)  # all of it is there
    assert again.greedy(1, again.teach([0, 1])[-1]) == played[-1]
    assert "greedy" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_has_the_widths_that_the_controller_plays_on_the_first_network(tmp_path: Path) -> None:
    ours = bench(tmp_path)
    ours.run([1], ["profile"], jobs=1)
    row = ours.row(1, "profile")
    assert row is not None
    assert [episode[0] for episode in row["episodes"]] == ["uniform-l1"] * 2
    like, (config,) = ours.profile(), tmp_path.glob(f"{ours.cell.name}-1-profile-*.toml")
    assert like is not None
    assert load(config).search.like == str(like)
    made = [
        network_from_file(str(file))
        for file in (like, config.with_suffix("") / "recovered" / "uniform-l1-0.8.safetensors")
    ]
    first, second = ([len(weights) for weights in network.parameters()] for network in made)
    assert max(abs(one - other) for one, other in zip(first, second, strict=True)) <= 2  # to land on 0.8 all the same


def test_a_page_compares_the_others_with_ours_on_test_and_by_the_later_half_of_the_episodes_by_hand(
    tmp_path: Path,
) -> None:
    def row(method: str, seed: int, test: float, *returns: float) -> dict[str, Any]:
        episodes = [[method, 0.0, value, 0] for value in returns]
        return {
            "method": method, "seed": seed, "test": test, "validation": 0.7, "baseline_validation": 0.8, "images": 9,
            "macs": 6_100_000 + 100_000 * seed, "seconds": 1.0, "machine": "one", "episodes": episodes,
        }  # fmt: skip

    rows = [
        row("fresh", 0, 0.75, -0.9, -0.8, -0.3, -0.1), row("untrained", 0, 0.74, -0.9, -0.8, -0.5, -0.3),
        row("fresh", 1, 0.77, -0.9, -0.8, -0.2, -0.2), row("untrained", 1, 0.74, -0.9, -0.8, -0.4, -0.2),
        row("uniform", 0, 0.70),
    ]  # fmt: skip
    page = write_page("cell", rows, tmp_path, "command")
    # on test 1 and 3 points apart: mean 2, standard error 1, t = 2 with one degree of freedom
    theirs = "74.00 (0.00) | 70.00 (0.00) | -10.00 | +2.00 (2 of 2 seeds) | 0.295"
    assert f"| untrained | 2 | {theirs} | 6.2 | 9 | 1 |\n" in page
    assert "| fresh | 2 | 76.00 (1.41) | 70.00 (0.00) | -10.00 | - | - | 6.2 | 9 | 1 |" in page
    # the later halves: -0.2 and -0.2 against -0.4 and -0.3; t = 3
    assert "| untrained | -0.350 (0.071) | +0.150 (2 of 2 seeds) | 0.205 |" in page
    assert "| uniform | -" not in page.split("later half")[1]
    assert (tmp_path / "cell.png").is_file()
    alone = write_page("alone", [rows[1]], tmp_path, "command")
    assert "Ours" not in alone


def test_what_is_taught_explores_less_and_is_told_apart(tmp_path: Path) -> None:
    ours = bench(tmp_path)
    configs = {method: ours.cell.config(5, method, None) for method in search.METHODS if method not in search.PEERS}
    taught, fresh = (configs["controller"], configs["frozen"]), (configs["fresh"], configs["untrained"])
    assert {(one.controller.weights, one.search.sigma) for one in taught} == {("taught", ScheduleConfig().sigma)}
    assert {(one.controller.weights, one.search.sigma) for one in fresh} == {("", search.UNTAUGHT_SIGMA)}
    vgg16 = bench(tmp_path, network="vgg16").cell
    assert vgg16.config(5, "controller", None).schedule.exploration == TAUGHT_SIGMA < search.UNTAUGHT_SIGMA
    assert configs["frozen"].search.method == configs["untrained"].search.method == "untrained"
    assert len({ours.fingerprint(5, method) for method in configs}) == len(configs)
    assert bench(tmp_path, episodes=4).fingerprint(5, "taylor") != ours.fingerprint(5, "taylor")
    assert bench(tmp_path, episodes=4).cell.name == "small-0.5-0.8-4"
    short = bench(tmp_path, episodes=4, epochs=3)
    assert short.cell.name == "small-0.5-0.8-4-3-epochs"
    assert short.cell.config(5, "taylor", None).recovery.epochs == 3
    assert short.fingerprint(5, "taylor") != bench(tmp_path, episodes=4).fingerprint(5, "taylor")


def test_the_curve_by_hand(tmp_path: Path) -> None:
    def row(learned: int, seed: int, value: float) -> dict[str, Any]:
        return {"learned": learned, "seed": seed, "return": value, "macs": 6_000_000 + learned, "machine": "a machine"}

    rows = [
        row(0, 5, -0.20),
        row(0, 6, -0.30),
        row(0, 7, -0.25),
        row(12, 5, -0.19),
        row(12, 6, -0.27),
        row(12, 7, -0.23),
    ]
    said = write_curve("cell", rows, tmp_path, "command")
    assert "One episode without exploration on each of\n3 networks" in said
    assert "| 0 | 3 | -0.250 (0.050) | 6.00 (0.00) | - | - |" in said
    # gains 0.01, 0.03, 0.02: mean 0.02, standard error 0.01 / sqrt(3), t = 3.464 with 2 degrees of freedom
    assert "| 12 | 3 | -0.230 (0.040) | 6.00 (0.00) | +0.020 (3 of 3) | 0.074 |" in said
    assert (tmp_path / "cell-greedy.md").read_text() == said
    assert (tmp_path / "cell-greedy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--set", "search.nope=3"], "key search.nope: expected one of"),
        (
            ["--set", "controller.weights=none.safetensors"],
            "controller.weights none.safetensors: expected the controller.safetensors of a campaign",
        ),
        (["--targets", "1.5"], "episode.targets: expected shares inside"),
    ],
)
def test_a_wrong_value_is_said_in_a_line_before_anything_is_trained(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["search", "--data", "digits", *places, *given])
    with pytest.raises(SystemExit) as ended:
        search.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"zeroout: {said}")
    assert not (tmp_path / "work").exists()


def test_a_controller_that_is_named_is_told_apart_from_none(tmp_path: Path) -> None:
    plain, named = bench(tmp_path), bench(tmp_path, extra=(f'controller.weights="{TAUGHT["vgg16"]}"',))
    assert named.fingerprint(5, "fresh") != plain.fingerprint(5, "fresh")
    assert search.begun_with(plain.cell.config(5, "fresh", None)) == ""


@pytest.mark.parametrize(
    "work",
    [
        "[one(name) for name in ('first', 'second')]",
        "with ThreadPoolExecutor(1) as pool: list(pool.map(one, ['first', 'second']))",
        "with ThreadPoolExecutor(1) as pool: pool.submit(lambda: [one('first'), one('second')]).result()",
    ],
    ids=["in the main thread", "in a pool", "one after another in a thread"],
)
def test_who_is_told_to_end_ends_the_campaigns_that_run_first(tmp_path: Path, work: str) -> None:
    program = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\n"
        "from benchmarks.campaigns import ended_as_a_command, process\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "sleep = 'import os, pathlib, sys, time;'\n"
        "sleep += 'pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)'\n"
        "def one(name): process(['-c', sleep, str(folder / name)], folder / name, name)\n"
        f"with ended_as_a_command():\n    {work}\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        first = tmp_path / "first"
        wait_until(lambda: first.is_file() and first.read_text(), "the first has begun")
        child = int(first.read_text())
        parent.terminate()
        assert parent.wait(60) == 130
    finally:
        parent.kill()
        parent.wait()
    assert not Path(f"/proc/{child}").exists()
    assert not (tmp_path / "second").exists()  # nothing new is begun
