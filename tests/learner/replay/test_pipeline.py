"""Samples fetched ahead and priorities written behind: order and counts, never times."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import redis

from learner.replay.codec import encode
from learner.replay.pipeline import PipelinedReplay
from learner.replay.replay import Item, Replay, ReplayConfig, ReplayStats, Sample

_B = 3


class ScriptedReplay:
    """A replay that notes its calls, and whose next call can be held back, refused or made to fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.samples = 0
        self.outcomes: dict[str, Exception | None] = {}
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.begun = threading.Semaphore(0)

    def _note(self, call: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.begun.release()
        assert self.may_go_on.wait(20)
        self.calls.append(call)
        error = self.outcomes.get(call)
        if error is not None:
            raise error

    def sample(self, batch_size: int) -> Sample | None:
        assert batch_size == _B
        name = f"S{self.samples}"
        self.samples += 1
        self._note(name)
        if name in self.outcomes:
            return None
        return Sample([name] * _B, np.ones(_B), np.ones(_B, np.float32), [{}] * _B)

    def check(self, items: Any) -> list[float]:
        return [1.0] * len(items)

    def insert(self, items: Any) -> int:
        self._note(f"I{','.join(item.sequence_id for item in items)}")
        return len(items)

    def update(self, keys: Any, priorities: Any) -> int:
        self._note(f"U{keys[0][1:]}={priorities[0]:g}")
        return len(keys)

    def stats(self) -> ReplayStats:
        return ReplayStats(7, 0, 7, 0, 0, 0, 1.0, 0, False, False)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Whatever the thread begins inside does not end before the end of the context."""
        self.may_go_on.clear()
        try:
            yield
        finally:
            self.may_go_on.set()

    def wait_for_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=20)


@pytest.fixture
def inner() -> ScriptedReplay:
    return ScriptedReplay()


def _name(sample: Sample | None) -> str:
    assert sample is not None
    return sample.keys[0]


@pytest.mark.parametrize(
    ("depth", "order"),
    [
        (1, "S0 S1 U0=0 S2 U1=1 S3 U2=2 S4 U3=3"),
        (3, "S0 S1 S2 S3 U0=0 S4 U1=1 S5 U2=2 S6 U3=3"),
    ],
)
def test_the_commands_come_in_an_order_that_no_timing_changes(inner: ScriptedReplay, depth: int, order: str) -> None:
    with PipelinedReplay(inner, _B, depth=depth) as replay:
        for number in range(4):
            sample = replay.sample(_B)
            assert _name(sample) == f"S{number}"
            replay.update(sample.keys, np.full(_B, number))
    assert " ".join(inner.calls) == order
    assert inner.threads == {"replay-pipeline"}


def test_the_next_sample_is_fetched_while_the_learner_computes(inner: ScriptedReplay) -> None:
    with PipelinedReplay(inner, _B) as replay:
        sample = replay.sample(_B)
        inner.wait_for_begun(2)  # S1 is begun though the learner has not asked for it
        with inner.held_back():
            assert replay.update(sample.keys, np.zeros(_B)) == _B  # does not wait for the server
        assert _name(replay.sample(_B)) == "S1"


def test_samples_are_prepared_ahead_by_the_thread_and_a_refused_one_is_not(inner: ScriptedReplay) -> None:
    prepared: list[str] = []

    def prepare(sample: Sample) -> str:
        prepared.append(f"{_name(sample)} by {threading.current_thread().name}")
        return _name(sample).lower()

    inner.outcomes = {"S1": None}
    with PipelinedReplay(inner, _B) as replay:
        replay.prepare = prepare
        assert [replay.sample(_B), replay.sample(_B)] == ["s0", "s2"]  # S1 was refused
    assert prepared[:2] == ["S0 by replay-pipeline", "S2 by replay-pipeline"]


def test_an_error_while_a_sample_is_prepared_comes_from_the_call_that_asks_for_it(inner: ScriptedReplay) -> None:
    def prepare(sample: Sample) -> Sample:
        if _name(sample) == "S1":
            raise MemoryError("a batch of S1")
        return sample

    with PipelinedReplay(inner, _B) as replay:
        replay.prepare = prepare
        assert _name(replay.sample(_B)) == "S0"
        with pytest.raises(MemoryError, match="a batch of S1"):
            replay.sample(_B)
        assert _name(replay.sample(_B)) == "S2"


def test_the_learners_memory_may_be_used_again(inner: ScriptedReplay) -> None:
    with PipelinedReplay(inner, _B) as replay:
        sample = replay.sample(_B)
        priorities = np.full(_B, 5.0)
        with inner.held_back():
            replay.update(sample.keys, priorities)
            priorities[:] = 9.0
    assert inner.calls[-1] == "U0=5"


def test_a_refused_sample_is_asked_for_anew(inner: ScriptedReplay) -> None:
    inner.outcomes = dict.fromkeys(("S0", "S1", "S3", "S4"))
    with PipelinedReplay(inner, _B) as replay:
        assert replay.sample(_B) is None
        assert replay.sample(_B) is None
        assert inner.calls == ["S0", "S1"]  # nothing is fetched ahead of what was refused
        assert _name(replay.sample(_B)) == "S2"
        assert replay.sample(_B) is None  # S3 was fetched ahead and refused; asked anew as S4
        assert _name(replay.sample(_B)) == "S5"


def test_a_failed_update_is_raised_once_as_it_is_and_the_rest_goes_on(inner: ScriptedReplay) -> None:
    inner.outcomes = {"U0=0": redis.ConnectionError("gone"), "U0=1": redis.TimeoutError("late")}
    with PipelinedReplay(inner, _B) as replay:
        sample = replay.sample(_B)
        with inner.held_back():
            replay.update(sample.keys, np.zeros(_B))
            replay.update(sample.keys, np.ones(_B))
            replay.update(sample.keys, np.full(_B, 2.0))
        with pytest.raises(redis.ConnectionError, match="gone"):
            replay.flush()
        assert inner.calls[-1] == "U0=2"
        replay.flush()
        assert _name(replay.sample(_B)) == "S1"


def test_a_failed_sample_is_raised_by_the_call_that_would_return_it(inner: ScriptedReplay) -> None:
    inner.outcomes = {"S1": redis.ConnectionError("gone")}
    with PipelinedReplay(inner, _B) as replay:
        assert _name(replay.sample(_B)) == "S0"
        with pytest.raises(redis.ConnectionError, match="gone"):
            replay.sample(_B)
        assert _name(replay.sample(_B)) == "S2"


def test_a_learner_far_ahead_waits_so_that_nothing_piles_up(inner: ScriptedReplay) -> None:
    replay = PipelinedReplay(inner, _B)
    written = threading.Event()

    def write_many() -> None:
        for number in range(40):
            replay.update(["S0"] * _B, np.full(_B, number))
        written.set()

    with replay:
        with inner.held_back():
            thread = threading.Thread(target=write_many)
            thread.start()
            inner.wait_for_begun(1)
            assert not written.wait(0.2)
            assert replay._commands.full()
        thread.join()
        replay.flush()
        assert inner.calls == [f"U0={number}" for number in range(40)]


def _items(*names: str) -> list[Item]:
    return [Item(name, b"payload", 1.0) for name in names]


def test_inserts_that_wait_go_together_and_nothing_overtakes_them(inner: ScriptedReplay) -> None:
    with PipelinedReplay(inner, _B) as replay:
        with inner.held_back():
            assert replay.insert(_items("a", "b")) == 2
            inner.wait_for_begun(1)  # it is being written: no more may join it
            for name in ("c", "d"):
                replay.insert(_items(name))
            replay.update(["S0"], [2.0])
            replay.insert(_items("e"))
            replay.insert([])
            replay.insert(_items("f"))
        replay.flush()
        assert inner.calls == ["Ia,b", "Ic,d", "U0=2", "Ie,f"]


def test_what_is_inserted_behind_is_there_after_a_flush_whoever_wrote_it_when(client: redis.Redis, prefix: str) -> None:
    config = ReplayConfig(min_sequences=1, replay_ratio=1e9)
    payload = encode({"x": np.arange(3, dtype=np.float32)})
    plain = Replay(client, prefix, config, np.random.default_rng(0))
    with PipelinedReplay(Replay(client, prefix, config, np.random.default_rng(1)), _B) as replay:
        for number in range(700):
            replay.insert([Item(f"s{number}", payload, 1.0)])
        replay.flush()
        assert plain.stats().size == 700
        replay.insert([Item("last", payload, 1.0)])
        with pytest.raises(ValueError, match="priorities must be finite"):
            replay.insert([Item("bad", payload, -1.0)])
    assert plain.stats().size == 701


def test_close_writes_what_is_left_and_an_error_of_the_context_is_not_hidden(inner: ScriptedReplay) -> None:
    inner.outcomes = {"U0=0": redis.ConnectionError("gone")}
    with pytest.raises(KeyError, match="the learner's"), PipelinedReplay(inner, _B) as replay:  # noqa: PT012
        replay.update(replay.sample(_B).keys, np.zeros(_B))
        raise KeyError("the learner's")
    assert inner.calls == ["S0", "S1", "U0=0"]
    replay.close()
    with pytest.raises(RuntimeError, match="the replay pipeline is closed"):
        replay.sample(_B)


def test_the_counters_may_be_asked_for_meanwhile(inner: ScriptedReplay) -> None:
    with PipelinedReplay(inner, _B) as replay, inner.held_back():
        thread = threading.Thread(target=lambda: replay.sample(_B))
        thread.start()
        inner.wait_for_begun(1)
        assert replay.stats().size == 7
        inner.may_go_on.set()
        thread.join()


def test_what_is_out_of_range_is_an_error(inner: ScriptedReplay) -> None:
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        PipelinedReplay(inner, _B, depth=0)
    with PipelinedReplay(inner, _B) as replay, pytest.raises(ValueError, match="the pipeline's 3, got 4"):
        replay.sample(4)


def test_on_a_real_server_a_seeded_run_repeats_exactly(client: redis.Redis, prefix: str) -> None:
    config = ReplayConfig(min_sequences=1, replay_ratio=1e9)

    def run(name: str) -> list[tuple[list[str], list[float]]]:
        inner = Replay(client, f"{prefix}-{name}", config, np.random.default_rng(3))
        inner.insert([Item(f"s{i}", encode({}), 0.1 + i) for i in range(9)])
        results = []
        with PipelinedReplay(inner, 5, depth=2) as replay:
            for step in range(20):
                sample = replay.sample(5)
                assert sample is not None
                results.append((sample.keys, sample.probabilities.tolist()))
                assert replay.update(sample.keys, np.arange(5.0) + step) == 5
            replay.flush()
            assert inner.stats().sampled == 5 * 22
        return results

    assert run("a") == run("b")
