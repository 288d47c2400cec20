"""The simulation of many actors, as the real command with tiny numbers, and its arithmetic by hand."""

import math
import subprocess
import sys
from typing import Any

import pytest
from tiny_campaign import ROOT, environment

from benchmarks.scale import SHARED, episodes_per_s, housing, is_full, largest_free, needed, of_linear
from benchmarks.scale_workers import Clock, Sample, Work
from env.compression import EpisodeConfig


def point(**changes: Any) -> dict[str, Any]:
    """A row with figures that are easy to reckon with."""
    cores = {"actors": 0.5, "learner": 0.25, "redis": 0.05, "others": 0.2}
    return {
        "actors": 4,
        "episodes_per_s": 0.4,
        "steps_per_episode": 10.0,
        "cpu_ms": {"median": 4.0, "low": 4.0, "high": 4.0},
        "idle": 0.5,
        "waited_share": 0.0,
        "cores": cores,
        "redis_per_step": {"cpu_ms": 0.5, "in": 20_000.0, "out": 5_000.0, "commands": 6.0},
        "sequences_per_episode": 2.0,
        "cpu_ms_per_update": 50.0,
        "replay_ratio": 8.0,
        "batch_size": 16,
        **changes,
    }


@pytest.mark.slow
def test_the_real_command_with_tiny_numbers_prints_its_page() -> None:
    words = ["--quick", "--actors", "1", "5", "--step-seconds", "0.01", "--width", "0.1", "--replay-ratio", "4"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    page = ended.stdout.partition("# Scale, by simulation\n")[2]
    table = page.partition("## Replay ratio 4\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "actors" not in line]
    assert [row[0] for row in rows] == ["| 1", "| 5"]
    # an actor's episode sleeps a quarter of a second
    assert all(0 < float(row[2]) < 4 * actors for actors, row in zip((1, 5), rows, strict=True))
    assert "decide" in page
    side_by_side = page.partition("## A thread beside a process\n")[2].partition("\n## ")[0]
    assert "| 5 | " in side_by_side
    assert "## What 1,000 GPUs would need" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--actors", "4", "2"], "--actors are rising numbers of at least 1, got 4 2"),
        (["--actors", "0"], "--actors are rising numbers of at least 1, got 0"),
        (["--replay-ratio", "0"], "--replay-ratio must be above 0, got 0.0"),
        (["--step-seconds", "nan"], "--step-seconds must be above 0, got nan"),
    ],
)
def test_numbers_that_make_no_sense_are_told(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.scale import arguments

    monkeypatch.setattr(sys, "argv", ["scale", *words])
    with pytest.raises(SystemExit) as ended:
        arguments()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_rates_of_actors_add_up() -> None:
    assert episodes_per_s([[2.0, 2.0], [4.0]], 3, 100.0) == pytest.approx(0.5 + 0.25)


def test_where_an_actor_ended_nothing_what_all_ended_counts() -> None:
    assert episodes_per_s([[2.0], []], 30, 10.0) == 3.0


def test_the_first_two_actors_live_alone_and_the_others_four_by_four_in_shared_processes() -> None:
    assert [housing(actor) for actor in range(7)] == [0, 1, 2, 2, 2, 2, 3]
    assert [housing(2 + 4 * turn) for turn in (SHARED - 1, SHARED, SHARED + 1)] == [1 + SHARED, 2, 3]


def test_linear_is_by_the_first_point() -> None:
    assert of_linear(point(actors=8, episodes_per_s=0.6), point()) == pytest.approx(0.75)


def test_cores_are_full_with_what_others_use_and_the_learner_where_actors_wait_for_it() -> None:
    first = point()
    assert is_full(point(), first, 2) == ""
    assert is_full(point(), first, 1) == "cores"
    assert is_full(point(idle=0.01), first, 2) == ""
    assert is_full(point(waited_share=0.1), first, 2) == "learner"
    assert is_full(point(waited_share=0.1), first, 1) == "cores, learner"


def test_cores_that_could_not_carry_a_linear_rate_are_full() -> None:
    first = point()
    used = sum(first["cores"].values())
    slower = point(episodes_per_s=0.5 * first["episodes_per_s"])  # at the whole rate it would use twice as much
    assert is_full(slower, first, math.ceil(2 * used / 0.95) - 1) == "cores"
    assert is_full(slower, first, math.ceil(2 * used / 0.95) + 1) == ""


def test_what_more_would_need_is_said_by_the_largest_point_at_which_nothing_is_full() -> None:
    points = [point(), point(actors=2, episodes_per_s=0.2), point(actors=3, waited_share=0.5)]
    assert largest_free(points, 2) is points[1]
    assert largest_free(points[2:], 2) is points[2]


def test_what_a_thousand_actors_need_by_hand() -> None:
    need = needed(point(), point(), gpus=1000, step_s=0.5)
    assert need == pytest.approx(
        {
            "step_s": 0.5,
            "steps_per_s": 2000.0,
            "episodes_per_s": 200.0,
            "redis_cores": 1.0,
            "redis_in_mb_per_s": 40.0,
            "redis_out_mb_per_s": 10.0,
            "updates_per_s": 200.0,  # 200 episodes x 2 sequences x 8 / 16
            "learner_cores": 10.0,
            "actor_cores": 8.0,
        }
    )


def test_an_episode_of_sleeps_adds_up() -> None:
    work = Work(minibatch_s=0.5, image_s=0.001, score_s=0.25)
    config = EpisodeConfig(waypoints=3, step_minibatches=4, step_images=100, recovery_minibatches=10)
    assert work.step_s(config) == pytest.approx(2.0 + 0.1 + 0.25)
    assert work.episode_s(config) == pytest.approx(3 * 2.35 - 0.25 + 5.0 + 2.5)


def test_what_is_neither_sleep_nor_waiting_is_overhead() -> None:
    clock = Clock(slept=4.0, late=1.0, waited=2.0, parts={"compact": [1.0, 0.5, 2.0]})
    sample = Sample(actor=0, begun=10.0, ended=20.0, cpu=1.5, steps=2, clock=clock, record={})
    assert sample.overhead_s == 1.5
    assert sample.orchestration_s(0) == 1.0
    assert sample.orchestration_s(1) == 0.5


def test_a_clock_counts_calls_by_part_and_begins_anew() -> None:
    class Thing:
        def double(self, number: int) -> int:
            return 2 * number

    clock, thing = Clock(), Thing()
    clock.timed(thing, "doubling", "double")
    assert [thing.double(number) for number in (1, 2)] == [2, 4]
    assert clock.taken().parts["doubling"][2] == 2
    assert clock.parts == {}
