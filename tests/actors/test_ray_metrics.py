"""How we speak to Ray's metrics; what comes out on /metrics is seen in tests/deploy/test_watching.py."""

import time
from typing import Any

import pytest

import actors.ray_metrics
from actors.metrics import PLAYER_ACCURACY, PLAYER_SECONDS, PLAYER_STEPS
from actors.ray_metrics import RayMetrics

CALLS: list[tuple[str, float, dict[str, str]]] = []


class Recorded:
    """Stands for Ray's Counter and Gauge, whose values cannot be read where they are set."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        CALLS.append((f"make {name}", len(tag_keys), {}))

    def set_default_tags(self, tags: dict[str, str]) -> "Recorded":
        self.tags = tags
        return self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray raises ValueError
        self.set(value, tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert {*self.tags, *tags} == set(self.tag_keys)
        CALLS.append((self.name, value, {**self.tags, **tags}))


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    CALLS.clear()
    monkeypatch.setattr(actors.ray_metrics, "Counter", Recorded)
    monkeypatch.setattr(actors.ray_metrics, "Gauge", Recorded)
    return CALLS


def test_what_is_told_carries_the_processs_labels_and_its_own(calls: list[Any]) -> None:
    with RayMetrics(campaign="demo-1234", actor="actor-0") as metrics:
        metrics.add(PLAYER_STEPS)
        metrics.add(PLAYER_SECONDS, 2.5, phase="retrain")
        metrics.add(PLAYER_SECONDS, 0.0, phase="score")
        metrics.add(PLAYER_SECONDS, 1.0, phase="wait")
    both = {"campaign": "demo-1234", "actor": "actor-0"}
    assert calls == [
        ("make zeroout_env_steps", 2, {}),
        ("zeroout_env_steps", 1.0, both),
        ("make zeroout_phase_seconds", 3, {}),
        ("zeroout_phase_seconds", 2.5, {**both, "phase": "retrain"}),
        ("zeroout_phase_seconds", 1.0, {**both, "phase": "wait"}),
    ]


def test_a_gauge_is_repeated_until_it_is_closed_and_a_counter_is_not(calls: list[Any]) -> None:
    with RayMetrics(campaign="demo-1234", repeat_s=0.01) as metrics:
        metrics.add(PLAYER_STEPS)
        metrics.set(PLAYER_ACCURACY, 0.25)
        metrics.set(PLAYER_ACCURACY, 0.75)
        deadline = time.monotonic() + 60
        while len(calls) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
    told = [value for name, value, _ in calls if name == "zeroout_accuracy_ratio"]
    assert told[:2] == [0.25, 0.75]
    assert set(told[2:]) == {0.75}
    assert len(told) >= 5
    assert [name for name, *_ in calls].count("zeroout_env_steps") == 1
    after = len(calls)
    time.sleep(0.05)
    assert len(calls) == after
