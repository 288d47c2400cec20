"""Event files are read back with TensorBoard's own record format, and what it would show of them is checked."""

import logging
from pathlib import Path
from typing import Any

import pytest
from event_records import events, shown

from deploy.event_files import EventFiles


def record(number: int, group: str = "search") -> dict[str, Any]:
    targets = [{"target": 0.9, "accuracy": 0.25 + number / 100, "cross_entropy": 1.5, "compression": 0.9002}]
    return {
        "id": number, "group": group, "return": -1.0 - number, "seconds": 4.0, "phases": {"retrain": 2.5},
        "finished": 1e9 + number, "targets": targets,
    }  # fmt: skip


def beat(updates: int, loss: float = 0.5) -> dict[str, float]:
    return {"updates": updates, "replay": 7, "loss": loss, "mean_priority": 2.0}


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_group_is_a_run_whose_steps_count_its_episodes(tmp_path: Path) -> None:
    with EventFiles(tmp_path / "new", [record(0), record(9, "taylor")]) as files:
        files.episodes([record(1), record(2)])
        # flushed already: a driver that is killed loses nothing
        assert shown(tmp_path / "new" / "search")["return"] == [(1, -1.0), (2, -2.0), (3, -3.0)]
    assert shown(tmp_path / "new" / "taylor") == {
        "return": [(1, -10.0)], "seconds/episode": [(1, 4.0)], "seconds/retrain": [(1, 2.5)],
        "accuracy/0.9": [(1, 0.34)], "cross_entropy/0.9": [(1, 1.5)], "compression/0.9": [(1, 0.9002)],
    }  # fmt: skip
    assert [event.wall_time for event in events(tmp_path / "new" / "taylor")][1:] == [1e9 + 9] * 6


def test_resuming_leaves_nothing_out_and_nothing_twice(tmp_path: Path) -> None:
    with EventFiles(tmp_path, []) as files:
        files.episodes([record(0), record(1)])
    # episode 2 was recorded, and the driver killed before its events were written
    with EventFiles(tmp_path, [record(0), record(1), record(2)]) as files:
        files.episodes([record(3)])
    assert [step for step, _ in shown(tmp_path / "search")["return"]] == [1, 2, 3, 4]
    assert len(list((tmp_path / "search").iterdir())) == 1


def test_the_learners_points_stand_apart_and_the_last_one_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    with EventFiles(tmp_path, [], clock=clock) as files:
        files.learner({"updates": 0, "replay": 0})  # it has not learned yet
        for clock.now, updates in ((1.0, 5), (2.0, 6), (10.9, 40), (11.1, 41), (12.0, 50), (30.0, 50)):
            files.learner(beat(updates))
    found = shown(tmp_path / "learner")
    assert found["loss"] == [(5, 0.5), (41, 0.5), (50, 0.5)]
    assert found["replay_sequences"] == [(5, 7.0), (41, 7.0), (50, 7.0)]
    assert "delta_q/first" not in found


def test_a_learner_that_falls_back_to_a_checkpoint_takes_back_what_came_after_it(tmp_path: Path) -> None:
    clock = Clock()
    for life in range(2):  # within one driver, and after it was resumed
        with EventFiles(tmp_path, [], clock=clock) as files:
            for updates in (50, 60, 52, 70):
                clock.now += 10.0
                files.learner(beat(updates, loss=life))
    assert shown(tmp_path / "learner")["loss"] == [(50, 1.0), (52, 1.0), (70, 1.0)]


def test_a_disk_that_does_not_take_them_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").touch()
    with EventFiles(tmp_path / "file" / "below", [record(0)]) as files:
        files.episodes([record(1)])
        files.learner(beat(5))
    assert len(caplog.records) == 1
    assert "TensorBoard" in caplog.text


def test_a_collapsed_episode_is_shown_as_far_as_it_got(tmp_path: Path) -> None:
    collapsed = record(0) | {"targets": [], "return": None}  # null in the file, as no number stands for it
    with EventFiles(tmp_path, [collapsed]):
        pass
    assert set(shown(tmp_path / "search")) == {"seconds/episode", "seconds/retrain"}
