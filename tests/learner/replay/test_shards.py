"""Several races as one replay: the same statistics, and one shard's trouble is not the others'."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from deploy.redis_server import EmbeddedServer
from env.errors import UserError
from learner.replay.codec import encode
from learner.replay.connection import connect, retrying
from learner.replay.replay import Item, Replay, ReplayConfig, Sample
from learner.replay.shards import ShardedReplay, open_replay

# Quantiles of the chi-square distribution at 1 - 1e-5, by degrees of freedom; see test_replay.py.
_CHI_SQUARE = {4: 28.5, 8: 37.3, 11: 43.4}


def _config(**more: Any) -> ReplayConfig:
    return ReplayConfig(**{"min_sequences": 1, "replay_ratio": 1e9, "priority_exponent": 1.0, "shards": 3, **more})


def _items(priorities: dict[int, float]) -> list[Item]:
    return [Item(f"s{i}", encode({"number": np.array(i, np.int64)}), p) for i, p in priorities.items()]


def _numbers(sample: Sample | None) -> list[int]:
    assert sample is not None
    return [int(arrays["number"]) for arrays in sample.arrays]


def _chi_square(counts: Counter[int], weights: dict[int, float]) -> float:
    draws, total = counts.total(), sum(weights.values())
    return sum((counts[i] - draws * w / total) ** 2 / (draws * w / total) for i, w in weights.items())


@pytest.fixture
def make(client: redis.Redis, prefix: str) -> Any:
    def make(seed: int = 0, **more: Any) -> ShardedReplay:
        replay = open_replay([client], prefix, _config(**more), np.random.default_rng(seed))
        assert isinstance(replay, ShardedReplay)
        return replay

    return make


def test_one_shard_is_the_plain_replay_under_the_plain_prefix(client: redis.Redis, prefix: str) -> None:
    replay = open_replay([client], prefix, _config(shards=1), np.random.default_rng(0))
    assert isinstance(replay, Replay)
    replay.insert(_items({1: 1.0}))
    assert client.hkeys(f"{{{prefix}}}:replay:data") == [b"1:s1"]


def test_all_that_is_held_comes_out_of_every_shard(make: Any) -> None:
    replay = make()
    items = _items(dict.fromkeys(range(20), 1.0))
    replay.insert(items)
    assert sorted(replay.held()) == sorted((item.sequence_id, item.payload) for item in items)


def test_the_sequences_are_spread_and_their_number_is_shared(make: Any, client: redis.Redis, prefix: str) -> None:
    replay = make(capacity_sequences=30)
    assert replay.insert(_items(dict.fromkeys(range(300), 1.0))) == 30
    assert [client.zcard(f"{{{prefix}:shard{i}}}:replay:clock") for i in range(3)] == [10, 10, 10]
    assert (replay.stats().size, replay.stats().inserted, replay.stats().evicted) == (30, 300, 270)


def test_frequencies_and_probabilities_follow_the_priorities(make: Any) -> None:
    weights = {i: 0.2 + i * i for i in range(12)}
    replay = make(5)
    replay.insert(_items(weights))
    counts: Counter[int] = Counter()
    for _ in range(40):
        sample = replay.sample(250)
        counts.update(_numbers(sample))
        np.testing.assert_allclose(
            sample.probabilities, [weights[i] / sum(weights.values()) for i in _numbers(sample)], rtol=1e-12
        )
    assert _chi_square(counts, weights) < _CHI_SQUARE[11]


def test_frequencies_follow_while_several_learners_change_priorities(redis_url: str, prefix: str) -> None:
    weights, rng = dict.fromkeys(range(9), 1.0), np.random.default_rng(4)
    with connect(redis_url) as client:
        learners = [open_replay([client], prefix, _config(shards=2), np.random.default_rng(i)) for i in range(3)]
        learners[0].insert(_items(weights))
        observed, expected, variance = np.zeros(9), np.zeros(9), np.zeros(9)
        for step in range(300):
            sample = learners[step % 3].sample(16)
            share = np.array([weights[i] for i in range(9)]) / sum(weights.values())
            numbers = _numbers(sample)
            assert sample is not None
            np.testing.assert_allclose(sample.probabilities, share[numbers], rtol=1e-9)
            observed += np.bincount(numbers, minlength=9)
            expected, variance = expected + 16 * share, variance + 16 * share * (1 - share)
            new = rng.choice([0.25, 1.0, 4.0], 16)
            assert learners[(step + 1) % 3].update(sample.keys, new) == 16
            weights |= dict(zip(numbers, new.tolist(), strict=True))
    assert np.abs((observed - expected) / np.sqrt(variance)).max() < 4.5


def test_an_id_inserted_twice_changes_nothing_whoever_inserts_it(make: Any) -> None:
    items = _items(dict.fromkeys(range(40), 1.0))
    assert make(1).insert(items) == 40
    assert make(2).insert(items[::-1]) == 40
    assert (make(3).stats().size, make(3).stats().inserted) == (40, 40)


def test_a_seeded_run_repeats_exactly(client: redis.Redis, prefix: str) -> None:
    def run(name: str) -> list[tuple[list[str], list[float]]]:
        replay = open_replay([client], f"{prefix}-{name}", _config(), np.random.default_rng(42))
        results = []
        for step in range(8):
            replay.insert(_items({7 * step + i: 0.1 + i for i in range(7)}))
            sample = replay.sample(9)
            assert sample is not None
            replay.update(sample.keys, np.arange(9.0))
            results.append((sample.keys, sample.probabilities.tolist()))
        return results

    assert run("a") == run("b")


def test_the_limiter_looks_at_the_sums(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    replay = make(min_sequences=4, replay_ratio=2.0, replay_ratio_tolerance=3.0)
    replay.insert(_items({0: 1.0, 1: 1.0, 2: 1.0}))
    with caplog.at_level(logging.INFO):
        assert replay.sample(2) is None
        replay.insert(_items({3: 1.0}))
        assert [replay.sample(3) is None for _ in range(4)] == [False, False, False, True]  # 4 * 2 + 3 >= 9
        assert len(_numbers(replay.sample(2))) == 2  # 11
    stats = replay.stats()
    assert (stats.sampled, stats.learner_waits, stats.learner_waiting, stats.actors_waiting) == (11, 2, True, False)
    assert [record.message.split("(")[0] for record in caplog.records] == [
        "replay: the learner waits for the actors ",
        "replay: the learner goes on",
    ] * 2
    replay.insert(_items({10 + i: 1.0 for i in range(5)}))
    assert replay.stats().actors_waiting


def test_empty_shards_are_passed_over(make: Any) -> None:
    replay = make(shards=7)
    assert replay.sample(3) is None
    replay.insert(_items({1: 1.0, 2: 3.0}))
    assert set(_numbers(replay.sample(50))) == {1, 2}


def test_a_late_update_of_an_evicted_sequence_is_dropped_and_keys_find_their_shard(make: Any) -> None:
    replay = make(capacity_sequences=3)
    replay.insert(_items(dict.fromkeys(range(20), 1.0)))
    old = replay.sample(30).keys
    assert replay.update(old, np.full(30, 2.0)) == 30
    replay.insert(_items(dict.fromkeys(range(20, 60), 1.0)))
    assert replay.update(old, np.full(30, 5.0)) == 0
    assert replay.stats().total_weight == 3.0


def test_a_damaged_shard_is_left_out_with_one_warning_and_comes_back(
    make: Any, client: redis.Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    replay = make(shards=2)
    items = _items(dict.fromkeys(range(20), 1.0))
    replay.insert(items)
    mine = set(client.hkeys(f"{{{prefix}:shard0}}:replay:ids"))
    clock = f"{{{prefix}:shard1}}:replay:clock"
    client.rename(clock, clock + ":away")
    client.set(clock, "foreign")
    for _ in range(5):
        sample = replay.sample(30)
        assert {f"s{number}".encode() for number in _numbers(sample)} <= mine
        np.testing.assert_allclose(sample.probabilities, 1 / len(mine))
        assert replay.update([*sample.keys, "1/1:s1"], np.ones(31)) == 30
    assert replay.insert(items) == len(mine)
    assert replay.stats().size == 20
    assert caplog.text.count("shard 1 is left out: the Redis key") == 1
    client.rename(clock + ":away", clock)
    assert set(_numbers(replay.sample(400))) == set(range(20))


def test_where_every_shard_is_damaged_the_user_is_told(make: Any, client: redis.Redis, prefix: str) -> None:
    replay = make(shards=2)
    replay.insert(_items(dict.fromkeys(range(20), 1.0)))
    for i in range(2):
        client.hset(f"{{{prefix}:shard{i}}}:replay:state", "total", "?")
    with pytest.raises(UserError, match="expected a number in its field total"):
        replay.sample(4)
    with pytest.raises(UserError, match="expected a number in its field total"):
        replay.stats()


def test_a_poisoned_payload_is_drawn_anew_from_any_shard(make: Any, client: redis.Redis, prefix: str) -> None:
    replay = make(shards=2)
    replay.insert(_items(dict.fromkeys(range(20), 1.0)))
    shard = f"{{{prefix}:shard1}}:replay:"
    for key in client.hkeys(shard + "data"):
        client.hset(shard + "data", key, b"poison")
    assert len(_numbers(replay.sample(40))) == 40
    assert client.zcard(shard + "clock") == 0
    assert (replay.stats().sampled, replay.stats().rejected + replay.stats().size) == (40, 20)


def test_a_server_that_is_gone_is_a_clear_error_and_no_hang(tmp_path: Path, client: redis.Redis, prefix: str) -> None:
    with EmbeddedServer(tmp_path) as server, connect(server.url, patience_s=0.1) as other:
        url = server.url
        replay = open_replay([client, other], prefix, _config(shards=2), np.random.default_rng(0))
        replay.insert(_items(dict.fromkeys(range(20), 1.0)))
        assert set(_numbers(replay.sample(400))) == set(range(20))
        assert 0 < client.zcard(f"{{{prefix}:shard0}}:replay:clock") < 20
    for call in (lambda: replay.sample(8), replay.stats, lambda: replay.insert(_items(dict.fromkeys(range(9), 1.0)))):
        with pytest.raises(UserError, match="expected a server that answers"):
            retrying(call, 0.3, url=url)


def test_many_threads_may_insert_sample_and_update_at_once(redis_url: str, prefix: str) -> None:
    def work(number: int) -> None:
        with connect(redis_url) as client:
            replay = open_replay([client], prefix, _config(capacity_sequences=60), np.random.default_rng(number))
            for step in range(25):
                replay.insert([Item(f"{number}-{step}-{i}", encode({}), 1.0 + i) for i in range(6)])
                sample = replay.sample(4)
                assert sample is not None
                replay.update(sample.keys, np.arange(4.0))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))  # raises what one of them has raised
    with connect(redis_url) as client:
        stats = open_replay([client], prefix, _config(), np.random.default_rng(0)).stats()
    assert (stats.size, stats.inserted, stats.sampled, stats.evicted) == (60, 450, 300, 390)


def test_shapes_and_sizes_out_of_range_are_errors(make: Any) -> None:
    for size in (0, 2049):
        with pytest.raises(ValueError, match=f"batch_size must be 1 to 2048, got {size}"):
            make().sample(size)
    with pytest.raises(ValueError, match=r"shape of keys \(1,\), got \(2,\)"):
        make().update(["0/1:s1"], [1.0, 2.0])
    with pytest.raises(ValueError, match="shards must be finite and >= 1, got 0"):
        _config(shards=0)
