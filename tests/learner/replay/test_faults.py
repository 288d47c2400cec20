"""The replay on real servers when everything that can go wrong does: each fault, and what must hold after it.

Foreign and damaged values under our keys are in test_race.py.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from flaky_proxy import FlakyProxy
from replay_state import assert_consistent, chosen_server, weights_of
from replay_worker import BATCH, BATCHES, UPDATES, WRITERS

from deploy.redis_server import EmbeddedServer
from env.errors import UserError
from learner.replay.codec import FORMAT_VERSION, encode
from learner.replay.connection import connect, retrying
from learner.replay.ledger import Ledger
from learner.replay.replay import Item, Replay, ReplayConfig

_ROOT = Path(__file__).resolve().parents[3]
_CHI_SQUARE_9 = 39.0  # quantile at 1 - 1e-5 for 9 degrees of freedom; see test_replay.py
_CONFIG = ReplayConfig(capacity_sequences=100_000, min_sequences=1, replay_ratio=1e9, priority_exponent=1.0)


@pytest.fixture
def redis_url(each_url: str) -> str:
    return each_url


@pytest.fixture
def own(program: str, tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of either program that the test may kill or fill."""
    with chosen_server(program), EmbeddedServer(tmp_path) as server:
        yield server


def _replay(client: redis.Redis, prefix: str, seed: int, config: ReplayConfig = _CONFIG) -> Replay:
    return Replay(client, prefix, config, np.random.default_rng(seed))


def _payload(size: int = 2000) -> bytes:
    return encode({"x": np.zeros(size, np.uint8)})


def _in_threads(works: list[Callable[[], None]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def _assert_proportional(client: redis.Redis, prefix: str) -> None:
    """Draws follow the weights: chi-square over ten groups of sequences."""
    weights = weights_of(client, prefix)
    replay = _replay(client, prefix, seed=99)
    drawn = Counter(int(key.split(":")[0]) % 10 for _ in range(10) for key in _keys(replay, 1000))
    share = Counter[int]()
    for key, weight in weights.items():
        share[int(key.split(":")[0]) % 10] += weight / sum(weights.values())  # type: ignore[assignment]
    assert sum((drawn[i] - 10_000 * p) ** 2 / (10_000 * p) for i, p in share.items()) < _CHI_SQUARE_9


def _keys(replay: Replay, batch_size: int) -> list[str]:
    sample = replay.sample(batch_size)
    assert sample is not None
    return sample.keys


@pytest.mark.slow
def test_a_server_killed_again_and_again_has_lost_nothing_that_it_acknowledged(own: EmbeddedServer) -> None:
    acknowledged: dict[int, list[str]] = {0: [], 1: []}
    drawn: list[int] = []
    stop, failures = threading.Event(), list[Exception]()

    def guarded(work: Callable[[Replay], None], seed: int) -> None:
        try:
            with connect(own.url, patience_s=20.0) as client:
                replay = _replay(client, "p", seed)
                while not stop.is_set():
                    work(replay)
        except Exception as error:
            failures.append(error)

    def write(replay: Replay, number: int) -> None:
        at = len(acknowledged[number])
        ids = [f"{number}-{at + i}" for i in range(20)]
        assert replay.insert([Item(name, _payload(8000), 1.0 + i) for i, name in enumerate(ids)]) == 20
        acknowledged[number] += ids

    def learn(replay: Replay) -> None:
        sample = replay.sample(16)
        if sample is not None:
            drawn.append(len(sample.keys))
            assert replay.update(sample.keys, np.linspace(0.5, 4.0, 16)) == 16

    threads = _in_threads([
        lambda: guarded(lambda replay: write(replay, 0), 0),
        lambda: guarded(lambda replay: write(replay, 1), 1),
        lambda: guarded(learn, 2),
    ])  # fmt: skip
    pauses = np.random.default_rng(0).uniform(0.7, 1.5, 4)
    for pause in pauses:
        time.sleep(pause)
        os.kill(own.pid, signal.SIGKILL)
        time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    with connect(own.url) as client:
        held = client.hkeys("{p}:replay:ids")
        assert sorted(name.decode() for name in held) == sorted(acknowledged[0] + acknowledged[1])
        stats = _replay(client, "p", 3).stats()
        assert (stats.size, stats.inserted, stats.sampled) == (len(held), len(held), sum(drawn))
        assert_consistent(client, "p")
        _assert_proportional(client, "p")


def test_with_replies_lost_every_command_is_carried_out_once_and_answers_as_the_first(
    redis_url: str, prefix: str
) -> None:
    config = ReplayConfig(capacity_sequences=25, min_sequences=1, replay_ratio=1e9, priority_exponent=1.0)

    def run(url: str, name: str) -> list[object]:
        with connect(url, patience_s=30.0) as client:
            replay, ledger = _replay(client, name, 7, config), Ledger(client, name)
            ledger.open("f", 20)
            results: list[object] = []
            for step in range(20):
                count = 4 if step % 2 else 30  # more than it holds: the first are evicted by the call that brings them
                results.append(replay.insert([Item(f"{step}-{i}", _payload(), 1.0 + i) for i in range(count)]))
                sample = replay.sample(8)
                assert sample is not None
                results += [sample.keys, sample.probabilities.tolist()]
                results.append(replay.update(sample.keys, np.arange(1.0, 9.0)))
                episode = ledger.claim("me", 60.0)
                assert episode is not None
                results += [episode, ledger.complete(episode, json.dumps({"id": episode}))]
            return results

    with FlakyProxy(redis_url, one_in=8, seed=5) as proxy:
        with_losses = run(proxy.url, prefix)
        assert proxy.lost > 10
    assert with_losses == run(redis_url, f"{prefix}-undisturbed")
    with connect(redis_url) as client:
        stats = _replay(client, prefix, 0).stats()
        assert (stats.inserted, stats.evicted, stats.sampled) == (340, 315, 160)
        assert_consistent(client, prefix)


def test_a_full_server_holds_inserts_back_until_it_has_room_again(own: EmbeddedServer) -> None:
    with connect(own.url) as client, connect(own.url) as other:
        replay = _replay(client, "p", 0)
        replay.insert([Item(f"s{i}", _payload(), 1.0 + i) for i in range(10)])
        client.config_set("maxmemory", 1)
        held: list[int] = []
        writer = _replay(other, "p", 1)
        (thread,) = _in_threads([
            lambda: held.append(retrying(lambda: writer.insert([Item("new", _payload(), 3.0)]), 30.0, url=own.url))
        ])  # fmt: skip
        for _ in range(5):
            keys = _keys(replay, 16)
            assert replay.update(keys, np.full(16, 2.0)) == 16
        assert held == []
        assert replay.stats().inserted == 10
        client.config_set("maxmemory", 0)
        thread.join()
        assert held == [1]
        assert replay.stats().inserted == 11
        assert_consistent(client, "p")


def test_a_full_server_keeps_the_snapshot_it_has_and_records_the_episode(own: EmbeddedServer) -> None:
    with connect(own.url, patience_s=0.5) as client:
        ledger = Ledger(client, "p")
        ledger.open("f", 1)
        assert ledger.claim("me", 60.0) == 0
        assert ledger.save(0, "me", b"first")
        client.config_set("maxmemory", 1)
        assert not ledger.save(0, "me", b"second")
        assert ledger.snapshot(0) == b"first"
        assert ledger.complete(0, json.dumps({"id": 0}))
        assert ledger.snapshot(0) is None


def test_a_server_that_stays_full_is_one_clear_line(own: EmbeddedServer) -> None:
    with connect(own.url) as client:
        replay = _replay(client, "p", 0)
        client.config_set("maxmemory", 1)
        with pytest.raises(UserError, match="expected a server that answers and has memory left"):
            retrying(lambda: replay.insert([Item("s", _payload(), 1.0)]), 0.3, url=own.url)


def _worker(role: str, url: str, prefix: str, number: int) -> "subprocess.Popen[str]":
    script = _ROOT / "tests" / "support" / "replay_worker.py"
    return subprocess.Popen(
        [sys.executable, script, role, url, prefix, str(number)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_writer_killed_in_the_middle_of_a_batch_leaves_whole_batches(redis_url: str, prefix: str) -> None:
    pauses = np.random.default_rng(1).uniform(0.05, 0.3, 3)
    for number, pause in enumerate(pauses):
        with _worker("flood", redis_url, prefix, number) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "inserting\n"
            time.sleep(pause)
            process.kill()
    with connect(redis_url) as client:
        size = _replay(client, prefix, 0).stats().size
        assert size > 0
        assert size % BATCH == 0
        assert_consistent(client, prefix)


@pytest.mark.slow
def test_two_learners_and_eight_writers_lose_nothing(redis_url: str, prefix: str) -> None:
    writers = [_worker("write", redis_url, prefix, number) for number in range(WRITERS)]
    learners = [_worker("learn", redis_url, prefix, number) for number in range(2)]
    held = [json.loads(process.communicate()[0]) for process in writers]
    learned = [json.loads(process.communicate()[0]) for process in learners]
    assert [process.returncode for process in writers + learners] == [0] * 10
    assert held == [[BATCH] * BATCHES] * WRITERS
    with connect(redis_url) as client:
        stats = _replay(client, prefix, 0).stats()
        assert (stats.inserted, stats.sampled) == (WRITERS * BATCHES * BATCH, 2 * 16 * UPDATES)
        assert sum(len(found["drawn"]) for found in learned) == stats.sampled
        expected = dict.fromkeys(weights_of(client, prefix), 1.0)
        expected |= {key: 2.0 + number for number, found in enumerate(learned) for key in found["mine"]}
        assert weights_of(client, prefix) == expected
        assert_consistent(client, prefix)
        _assert_proportional(client, prefix)


@pytest.mark.parametrize(
    ("version", "words"),
    [(FORMAT_VERSION - 1, "an older Zeroout wrote it"), (FORMAT_VERSION + 1, "a newer Zeroout wrote it")],
)
def test_another_format_version_is_removed_with_a_clear_message(
    client: redis.Redis, prefix: str, version: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    replay = _replay(client, prefix, 0)
    other = bytearray(_payload())
    other[4:6] = struct.pack("<H", version)
    replay.insert([Item("ours", _payload(), 1.0), Item("other", bytes(other), 3.0)])
    assert set(_keys(replay, 50)) == {"1:ours"}
    found = f"payload's format version: expected {FORMAT_VERSION}, got {version}; {words}"
    assert f"sequence 2:other does not decode and is removed: {found}" in caplog.text
    assert replay.stats().rejected == 1
