import io
import logging
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import OutOfMemoryError
from replay_state import assert_consistent, chosen_server, weights_of

from deploy.redis_server import EmbeddedServer
from learner.replay.codec import encode
from learner.replay.connection import connect
from learner.replay.ledger import Ledger
from learner.replay.replay import Item, Replay, ReplayConfig, Sample, importance_weights

# Quantiles of the chi-square distribution at 1 - 1e-5: with fixed seeds a test passes or fails for good, and a
# wrong sampler fails by far more.
_CHI_SQUARE = {1: 19.5, 2: 23.0, 4: 28.5, 8: 37.3}  # by degrees of freedom


def _free(**more: Any) -> ReplayConfig:
    """A configuration whose limiter never holds anybody back."""
    return ReplayConfig(**{"min_sequences": 1, "replay_ratio": 1e9, **more})


def _payload(number: int) -> bytes:
    return encode({"number": np.array(number, np.int64)})


def _items(priorities: dict[int, float]) -> list[Item]:
    return [Item(f"s{i}", _payload(i), priority) for i, priority in priorities.items()]


def _numbers(sample: Sample | None) -> list[int]:
    assert sample is not None
    return [int(arrays["number"]) for arrays in sample.arrays]


def _chi_square(counts: Counter[int], probabilities: dict[int, float]) -> float:
    draws = counts.total()
    return sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in probabilities.items())


def _shares(weights: dict[int, float]) -> dict[int, float]:
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


@pytest.fixture
def redis_url(each_url: str) -> str:
    return each_url


@pytest.fixture
def make(client: redis.Redis, prefix: str) -> Any:
    def make(config: ReplayConfig, seed: int = 0) -> Replay:
        return Replay(client, prefix, config, np.random.default_rng(seed))

    return make


def test_a_sample_carries_what_was_inserted_with_its_probability_and_weight(make: Any) -> None:
    replay = make(_free(priority_exponent=0.5, importance_sampling_exponent=1.0))
    assert replay.insert(_items({7: 9.0, 5: 1.0})) == 2  # weights 3 and 1
    sample = replay.sample(64)
    for key, p, weight, number in zip(sample.keys, sample.probabilities, sample.weights, _numbers(sample), strict=True):
        assert key == {7: "1:s7", 5: "2:s5"}[number]
        assert p == pytest.approx({7: 0.75, 5: 0.25}[number], abs=1e-12)
        assert weight == pytest.approx({7: 1 / 3, 5: 1.0}[number])
    assert sample.probabilities.dtype == np.float64
    assert sample.weights.dtype == np.float32


def test_all_that_is_held_comes_out_the_oldest_first(make: Any) -> None:
    replay = make(_free(capacity_sequences=40))
    replay.insert(_items(dict.fromkeys(range(50), 1.0)))
    assert list(replay.held()) == [(f"s{i}", _payload(i)) for i in range(10, 50)]


def test_importance_weights_are_the_papers() -> None:
    n, p = 4, np.array([0.5, 0.25, 0.125])
    raw = (n * p) ** -0.6
    np.testing.assert_allclose(importance_weights(p, 0.6), raw / raw.max(), rtol=1e-6)
    np.testing.assert_array_equal(importance_weights(p, 0.0), np.ones(3))


def test_frequencies_follow_the_priorities(make: Any) -> None:
    priorities = {3: 0.1, 1: 1.0, 4: 2.0, 0: 5.0, 2: 0.7}
    replay = make(_free(), seed=5)
    replay.insert(_items(priorities))
    counts = Counter(number for _ in range(40) for number in _numbers(replay.sample(250)))
    assert _chi_square(counts, _shares({i: p**0.9 for i, p in priorities.items()})) < _CHI_SQUARE[4]


def test_successive_draws_are_independent(make: Any) -> None:
    weights = {0: 1.0, 1: 2.0, 2: 3.0}
    replay = make(_free(priority_exponent=1.0), seed=3)
    replay.insert(_items(weights))
    drawn = [number for _ in range(20) for number in _numbers(replay.sample(500))]
    pairs = Counter(3 * first + second for first, second in zip(drawn[::2], drawn[1::2], strict=True))
    share = _shares(weights)
    expected = {3 * i + j: share[i] * share[j] for i in share for j in share}
    assert _chi_square(pairs, expected) < _CHI_SQUARE[8]


def test_frequencies_follow_while_priorities_change_and_sequences_come_and_go(make: Any) -> None:
    replay = make(_free(capacity_sequences=6, priority_exponent=1.0), seed=11)
    replay.insert(_items(dict.fromkeys(range(6), 1.0)))
    rng, weights = np.random.default_rng(1), dict.fromkeys(range(6), 1.0)
    observed, expected, variance = np.zeros(6), np.zeros(6), np.zeros(6)
    for step in range(600):
        if step % 40 == 39:
            number = max(weights) + 1
            weights.pop(min(weights))
            weights[number] = 3.0
            replay.insert(_items({number: 3.0}))
        sample = replay.sample(16)
        share = _shares(weights)
        np.testing.assert_allclose(sample.probabilities, [share[i] for i in _numbers(sample)], rtol=1e-9)
        for i, p in share.items():  # by age, so that the cells stay the same while the sequences change
            observed[i - min(weights)] += _numbers(sample).count(i)
            expected[i - min(weights)] += 16 * p
            variance[i - min(weights)] += 16 * p * (1 - p)
        new = rng.choice([0.25, 1.0, 4.0], 16)
        replay.update(sample.keys, new)
        weights |= dict(zip(_numbers(sample), new.tolist(), strict=True))
    assert np.abs((observed - expected) / np.sqrt(variance)).max() < 4.5
    assert replay.stats().total_weight == pytest.approx(sum(weights.values()))


def test_a_seeded_run_repeats_exactly(client: redis.Redis, prefix: str) -> None:
    def run(name: str) -> list[tuple[list[str], list[float]]]:
        replay = Replay(client, f"{prefix}-{name}", _free(capacity_sequences=20), np.random.default_rng(42))
        results = []
        for step in range(10):
            replay.insert(_items({7 * step + i: 0.1 + i for i in range(7)}))
            sample = replay.sample(9)
            assert sample is not None
            replay.update(sample.keys, np.arange(9.0))
            results.append((sample.keys, sample.probabilities.tolist()))
        return results

    assert run("a") == run("b")


def test_an_id_inserted_twice_changes_nothing_and_answers_as_the_first(make: Any) -> None:
    replay = make(_free())
    assert replay.insert([Item("x", _payload(1), 1.0)]) == 1
    assert replay.insert([Item("x", _payload(2), 5.0)]) == 1
    stats = replay.stats()
    assert (stats.size, stats.inserted, stats.total_weight) == (1, 1, 1.0)
    assert _numbers(replay.sample(1)) == [1]


def test_the_oldest_are_evicted_with_all_that_belongs_to_them(make: Any, client: redis.Redis, prefix: str) -> None:
    replay = make(_free(capacity_sequences=3, priority_exponent=1.0))
    assert replay.insert(_items({i: 1.0 + i for i in range(5)})) == 3
    stats = replay.stats()
    assert (stats.size, stats.inserted, stats.evicted, stats.total_weight) == (3, 5, 2, 12.0)
    assert stats.bytes == 3 * len(_payload(0))
    tag = f"{{{prefix}}}:replay:"
    for name in ("data", "weight", "ids"):
        assert client.hlen(tag + name) == 3
    for name in ("clock", "age"):
        assert client.zcard(tag + name) == 3
    assert set(_numbers(replay.sample(100))) == {2, 3, 4}


def test_the_capacity_may_be_in_bytes(make: Any) -> None:
    one = len(_payload(0))
    replay = make(_free(capacity_bytes=2 * one + 1))
    replay.insert(_items(dict.fromkeys(range(3), 1.0)))
    assert (replay.stats().size, replay.stats().bytes) == (2, 2 * one)
    with pytest.raises(ValueError, match=f"must fit into capacity_bytes={2 * one + 1}"):
        replay.insert([Item("big", b"x" * (2 * one + 2), 1.0)])


def test_a_late_update_of_an_evicted_or_reused_id_is_dropped(make: Any) -> None:
    replay = make(_free(capacity_sequences=1, priority_exponent=1.0))
    replay.insert(_items({1: 1.0}))
    old = replay.sample(1).keys
    replay.insert(_items({2: 2.0}))
    assert replay.update(old, [50.0]) == 0
    replay.insert(_items({1: 1.0}))  # the same id again, of another generation
    assert replay.update(old, [50.0]) == 0
    assert replay.stats().total_weight == 1.0
    assert replay.update(replay.sample(1).keys, [50.0]) == 1
    assert replay.stats().total_weight == 50.0


def test_of_a_key_given_twice_the_last_priority_holds(make: Any) -> None:
    replay = make(_free(priority_exponent=1.0))
    replay.insert(_items({1: 1.0}))
    assert replay.update(replay.sample(2).keys, [5.0, 7.0]) == 2
    assert replay.stats().total_weight == 7.0


@pytest.mark.parametrize("priority", [math.nan, math.inf, -1e-9])
def test_a_priority_that_is_no_rate_is_an_error_and_changes_nothing(make: Any, priority: float) -> None:
    replay = make(_free(priority_exponent=1.0))
    replay.insert(_items({1: 1.0}))
    with pytest.raises(ValueError, match=f"priorities must be finite and >= 0, got {priority} for 1:s1"):
        replay.update(["1:s1", "1:s1"], [2.0, priority])
    with pytest.raises(ValueError, match="priorities must be finite"):
        replay.insert(_items({2: 1.0, 3: priority}))
    assert (replay.stats().size, replay.stats().total_weight) == (1, 1.0)
    with pytest.raises(ValueError, match=r"shape of keys \(1,\), got \(2,\)"):
        replay.update(["1:s1"], [1.0, 2.0])


def test_priority_0_is_hardly_drawn_but_never_locks_the_learner_out(make: Any) -> None:
    replay = make(_free())
    replay.insert(_items({1: 0.0, 2: 0.0}))
    assert set(_numbers(replay.sample(100))) == {1, 2}
    replay.insert(_items({3: 1.0}))
    assert set(_numbers(replay.sample(100))) == {3}


def test_huge_and_tiny_priorities_keep_their_digits(make: Any) -> None:
    replay = make(_free(priority_exponent=1.0))
    replay.insert(_items({1: 1e300, 2: 1e-300}))
    replay.sample(10)
    replay.update(["1:s1", "2:s2"], [3.0, 1.0])
    counts = Counter(number for _ in range(8) for number in _numbers(replay.sample(500)))
    assert _chi_square(counts, {1: 0.75, 2: 0.25}) < _CHI_SQUARE[1]
    assert replay.stats().total_weight == 4.0


def test_the_learner_waits_for_enough_sequences_and_for_the_ratio(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    replay = make(ReplayConfig(min_sequences=4, replay_ratio=2.0, replay_ratio_tolerance=3.0))
    replay.insert(_items({0: 1.0, 1: 1.0, 2: 1.0}))
    with caplog.at_level(logging.INFO):
        assert replay.sample(2) is None
        assert replay.sample(2) is None
        replay.insert(_items({3: 1.0}))
        assert [replay.sample(3) is None for _ in range(4)] == [False, False, False, True]  # 4 * 2 + 3 >= 9
        assert len(_numbers(replay.sample(2))) == 2  # 11
    stats = replay.stats()
    assert (stats.sampled, stats.learner_waits, stats.learner_waiting, stats.actors_waiting) == (11, 3, True, False)
    assert [record.message.split("(")[0] for record in caplog.records] == [
        "replay: the learner waits for the actors ",
        "replay: the learner goes on",
    ] * 2


def test_the_actors_are_told_when_the_learner_is_behind_and_never_both_wait(make: Any) -> None:
    replay = make(ReplayConfig(min_sequences=1, replay_ratio=2.0, replay_ratio_tolerance=0.0))
    number = 0
    for _ in range(30):
        replay.insert(_items({number: 1.0}))
        number += 1
        before = replay.stats()
        while replay.sample(5) is not None:
            pass
        after = replay.stats()
        assert after.learner_waiting
        assert not after.actors_waiting
        assert not (before.learner_waiting and before.actors_waiting)
    replay.insert(_items({number + i: 1.0 for i in range(3)}))
    assert replay.stats().actors_waiting
    assert replay.stats().sampled == 60


def test_a_poisoned_payload_is_removed_counted_named_and_drawn_anew(
    make: Any, client: redis.Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    replay = make(_free(priority_exponent=1.0))
    replay.insert(_items({1: 1.0, 2: 5.0}))
    client.hset(f"{{{prefix}}}:replay:data", "2:s2", b"\x80\x05poison")
    sample = replay.sample(20)
    assert _numbers(sample) == [1] * 20
    stats = replay.stats()
    assert (stats.size, stats.rejected, stats.total_weight) == (1, 1, 1.0)
    assert caplog.text.count("sequence 2:s2 does not decode and is removed: payload") == 1
    client.hdel(f"{{{prefix}}}:replay:data", "1:s1")
    assert replay.sample(3) is None
    assert replay.stats().rejected == 2


def test_the_total_weight_keeps_all_digits(make: Any) -> None:
    replay = make(_free(priority_exponent=1.0))
    replay.insert(_items({1: 0.1, 2: 0.2}))
    assert replay.stats().total_weight == 0.1 + 0.2


def test_a_server_that_forgot_the_scripts_is_sent_them_again(make: Any, client: redis.Redis) -> None:
    replay = make(_free())
    replay.insert(_items({1: 1.0}))
    client.script_flush()
    assert replay.insert(_items({2: 1.0})) == 1
    assert len(_numbers(replay.sample(3))) == 3


class _LosesReplies(UnixDomainSocketConnection):
    """A connection that breaks after the server has answered, when armed."""

    armed = 0

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().read_response(*args, **kwargs)
        if _LosesReplies.armed:
            _LosesReplies.armed -= 1
            self.disconnect()
            raise redis.ConnectionError("the reply was lost")
        return answer


def test_a_lost_reply_samples_and_inserts_only_once(redis_url: str, prefix: str) -> None:
    with connect(redis_url) as client:
        client.connection_pool.connection_class = _LosesReplies
        replay = Replay(client, prefix, _free(), np.random.default_rng(0))
        replay.insert(_items({i: 1.0 + i for i in range(5)}))
        replay.sample(1)  # loads the script
        _LosesReplies.armed = 1
        assert replay.insert(_items({9: 1.0})) == 1
        _LosesReplies.armed = 1
        sample = replay.sample(7)
        assert sample is not None
        assert _LosesReplies.armed == 0
        stats = replay.stats()
        assert (stats.inserted, stats.sampled) == (6, 8)
        # The same draw: the keys are those of the result that was kept.
        results = [list(msgpack.Unpacker(io.BytesIO(value))) for value in client.mget(replay.race.last) if value]
        assert [1, sample.keys] in [result[:2] for _request, result in results if isinstance(result, list)]


@pytest.mark.parametrize("armed_before", [0, 30, 60, 90])
def test_a_reply_lost_among_several_inserts_each_sequence_once(redis_url: str, prefix: str, armed_before: int) -> None:
    def items() -> Iterator[Item]:
        for item in _items(dict.fromkeys(range(100), 1.0)):
            if item.sequence_id == f"s{armed_before}":
                _LosesReplies.armed = 1
            yield item

    with connect(redis_url) as client:
        client.connection_pool.connection_class = _LosesReplies
        replay = Replay(client, prefix, _free(), np.random.default_rng(0))
        replay.insert(_items({-1: 1.0}))  # loads the script
        assert replay.insert(items()) == 100
        assert _LosesReplies.armed == 0
        stats = replay.stats()
        assert (stats.size, stats.inserted) == (101, 101)
        assert_consistent(client, prefix)


def test_an_item_that_is_refused_leaves_those_long_before_it_inserted(client: redis.Redis, prefix: str) -> None:
    replay = Replay(client, prefix, _free(), np.random.default_rng(0))
    with pytest.raises(ValueError, match="priorities must be finite"):
        replay.insert(_items(dict.fromkeys(range(200), 1.0) | {200: math.nan} | dict.fromkeys(range(201, 300), 1.0)))
    assert 100 <= replay.stats().size <= 200
    assert replay.insert(_items({300: 1.0})) == 1
    assert_consistent(client, prefix)


def test_of_more_items_than_fit_the_last_are_held(client: redis.Redis, prefix: str) -> None:
    replay = Replay(client, prefix, _free(capacity_sequences=70), np.random.default_rng(0))
    items = _items(dict.fromkeys(range(200), 1.0))
    assert replay.insert(iter(items)) == 70
    assert sorted(client.hkeys(replay.race.ids)) == sorted(item.sequence_id.encode() for item in items[-70:])


def test_what_later_lots_of_a_call_have_evicted_is_not_counted(client: redis.Redis, prefix: str) -> None:
    large = Replay(client, prefix, _free(capacity_sequences=2), np.random.default_rng(0))
    assert large.insert([Item(f"s{i}", bytes(3 << 20), 1.0) for i in range(5)]) == 2
    small = Replay(client, f"{prefix}-small", _free(capacity_sequences=100), np.random.default_rng(0))
    small.insert(_items(dict.fromkeys(range(100), 1.0)))
    asked = [*range(24), *range(100, 176)]
    assert small.insert(_items(dict.fromkeys(asked, 1.0))) == 76


def test_a_script_that_another_client_loads_on_the_way_does_not_change_the_order(
    client: redis.Redis, redis_url: str, prefix: str
) -> None:
    replay = Replay(client, prefix, _free(capacity_sequences=48), np.random.default_rng(0))

    def items() -> Iterator[Item]:
        for item in _items(dict.fromkeys(range(72), 1.0)):
            if item.sequence_id == "s30":
                with connect(redis_url) as other:
                    other.script_load(replay.race._scripts["insert"].script)
            yield item

    client.script_flush()
    replay.insert(items())
    assert {int(name[1:]) for name in client.hkeys(replay.race.ids)} == set(range(24, 72))


def test_a_forked_process_does_not_take_its_parents_results(redis_url: str, prefix: str) -> None:
    with connect(redis_url) as client:
        replay = Replay(client, prefix, _free(), np.random.default_rng(0))
        replay.insert(_items({0: 1.0}))
        child = multiprocessing.get_context("fork").Process(target=replay.insert, args=(_items({1: 1.0}),))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert replay.insert(_items({2: 1.0})) == 1
        assert sorted(client.hkeys(replay.race.ids)) == [b"s0", b"s1", b"s2"]


def test_many_threads_may_insert_sample_and_update_at_once(redis_url: str, prefix: str) -> None:
    def work(number: int) -> None:
        with connect(redis_url) as client:
            replay = Replay(client, prefix, _free(capacity_sequences=50), np.random.default_rng(number))
            for step in range(40):
                replay.insert([Item(f"{number}-{step}-{i}", _payload(i), 1.0 + i) for i in range(3)])
                sample = replay.sample(4)
                assert sample is not None
                replay.update(sample.keys, np.arange(4.0))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))  # raises what one of them has raised
    with connect(redis_url) as client:
        replay = Replay(client, prefix, _free(), np.random.default_rng(0))
        stats = replay.stats()
        assert (stats.size, stats.inserted, stats.sampled, stats.evicted) == (50, 360, 480, 310)
        assert stats.total_weight == math.fsum(weights_of(client, prefix).values())


@pytest.fixture
def full(program: str, tmp_path: Path) -> Iterator[redis.Redis]:
    """A server of its own, whose memory the test may limit."""
    with chosen_server(program), EmbeddedServer(tmp_path) as server, connect(server.url) as client:
        yield client


def test_a_full_server_refuses_inserts_but_lets_the_learner_and_the_records_through(full: redis.Redis) -> None:
    replay, ledger = Replay(full, "p", _free(), np.random.default_rng(0)), Ledger(full, "p")
    ledger.open("f", 2)
    replay.insert(_items({1: 1.0, 2: 2.0}))
    replay.update([], [])
    replay.sample(1)
    full.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        replay.insert(_items({3: 1.0}))
    assert replay.stats().inserted == 2
    sample = replay.sample(5)
    assert sample is not None
    assert replay.update(sample.keys, [4.0] * 5) == 5
    assert ledger.complete(0, '{"id": 0}')
    assert ledger.remaining() == 1
    assert ledger.records() == ['{"id": 0}']


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"capacity_sequences": 0}, "capacity_sequences must be finite and >= 1, got 0"),
        ({"capacity_bytes": -1}, "capacity_bytes must be finite and >= 0, got -1"),
        ({"priority_exponent": math.nan}, "priority_exponent must be finite and >= 0, got nan"),
        ({"replay_ratio": 0.0}, "replay_ratio must be finite and > 0, got 0.0"),
        ({"min_sequences": 11, "capacity_sequences": 10}, "min_sequences must be <= capacity_sequences=10, got 11"),
    ],
)
def test_a_configuration_out_of_range_is_refused_with_its_value(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**wrong)  # type: ignore[arg-type]


def test_a_batch_or_id_out_of_range_is_an_error(make: Any) -> None:
    replay = make(_free())
    for size in (0, 2049):
        with pytest.raises(ValueError, match=f"batch_size must be 1 to 2048, got {size}"):
            replay.sample(size)
    with pytest.raises(ValueError, match="sequence_id must not be empty"):
        replay.insert([Item("", b"", 1.0)])
    replay.insert(_items(dict.fromkeys(range(600), 1.0)))  # more than one script takes
    assert len(_numbers(replay.sample(2048))) == 2048
    assert replay.stats().size == 600
