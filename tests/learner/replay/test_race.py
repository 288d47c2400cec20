"""The scripts of the race against slow and plain Python, the sums they keep, and foreign values under their keys."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from replay_state import assert_consistent, weights_of

from env.errors import UserError
from learner.replay.codec import encode
from learner.replay.replay import Item, Replay, ReplayConfig

_PAYLOAD = encode({"x": np.zeros(3, np.uint8)})


class SlowRace:
    """The race one draw after the other, over all clocks, as its definition says."""

    def __init__(self, now: float, clocks: dict[str, float], weights: dict[str, float]) -> None:
        self.now, self.clocks, self.weights = now, clocks, weights

    def draw(self, exponential: float) -> tuple[str, float]:
        """Return the sequence that rings next and the probability that it does."""
        key = min(self.clocks, key=self.clocks.__getitem__)
        self.now = self.clocks[key]
        self.clocks[key] = self.now + exponential / self.weights[key]
        return key, self.weights[key] / math.fsum(self.weights.values())


@pytest.fixture
def redis_url(each_url: str) -> str:
    return each_url


@pytest.fixture
def under(client: redis.Redis, prefix: str) -> Any:
    """Return the name of one of the replay's keys."""
    return lambda name: f"{{{prefix}}}:replay:{name}"


@pytest.fixture
def make(client: redis.Redis, prefix: str) -> Any:
    def make(seed: int = 0, **more: Any) -> Replay:
        config = ReplayConfig(**{"min_sequences": 1, "replay_ratio": 1e9, "priority_exponent": 1.0, **more})
        return Replay(client, prefix, config, np.random.default_rng(seed))

    return make


def _items(priorities: dict[int, float]) -> list[Item]:
    return [Item(f"s{i}", _PAYLOAD, priority) for i, priority in priorities.items()]


def _cases() -> Iterator[tuple[int, list[float], int]]:
    """Seeds, weights and batch sizes: unequal, so that some ring often in a batch, and fewer sequences than draws."""
    rng = np.random.default_rng(6)
    for seed in range(40):
        n = int(rng.integers(1, 9))
        yield seed, np.exp(rng.normal(0, 4, n)).tolist(), int(rng.choice([1, 2, 3, 5, 7, 33]))


@pytest.mark.parametrize(("seed", "weights", "batch"), list(_cases()))
def test_every_draw_is_that_of_the_slow_race(
    make: Any, client: redis.Redis, under: Any, prefix: str, seed: int, weights: list[float], batch: int
) -> None:
    replay = make(seed)
    replay.insert(_items(dict(enumerate(weights))))
    clocks = {key.decode(): time for key, time in client.zrange(under("clock"), 0, -1, withscores=True)}
    slow = SlowRace(0.0, clocks, weights_of(client, prefix))
    generator = np.random.default_rng(seed)
    generator.standard_exponential(len(weights))  # those of the insert
    for _ in range(4):
        sample = replay.sample(batch)
        expected = [slow.draw(exponential) for exponential in generator.standard_exponential(batch)]
        assert list(zip(sample.keys, sample.probabilities.tolist(), strict=True)) == expected
        assert dict(client.zrange(under("clock"), 0, -1, withscores=True)) == {
            key.encode(): time for key, time in slow.clocks.items()
        }
    assert float(client.hget(under("state"), "now")) == slow.now


def test_the_total_is_the_exact_sum_after_thousands_of_changes(
    make: Any, client: redis.Redis, under: Any, prefix: str
) -> None:
    replay, rng, number = make(capacity_sequences=40), np.random.default_rng(2), 0
    keys: list[str] = []
    for step in range(800):
        if step % 4 == 0:
            replay.insert(_items({number + i: float(np.exp(rng.normal(0, 8))) for i in range(7)}))
            number += 7
        keys = [*keys[-60:], *replay.sample(5).keys]
        replay.update(rng.choice(keys, 9).tolist(), np.exp(rng.normal(0, 8, 9)))
        if step % 50 == 0:
            assert_consistent(client, prefix)
    assert_consistent(client, prefix)


def test_a_total_of_nothing_is_zero(make: Any, client: redis.Redis, under: Any) -> None:
    replay = make()
    replay.insert(_items({1: 1e12, 2: 0.1, 3: 1e-9}))
    for key in client.hkeys(under("data")):
        client.hset(under("data"), key, b"poison")
    assert replay.sample(50) is None
    stats = replay.stats()
    assert (stats.size, stats.bytes, stats.rejected, stats.total_weight) == (0, 0, 3, 0.0)


def test_clocks_are_turned_back_before_they_run_out_of_digits(make: Any, client: redis.Redis, under: Any) -> None:
    replay = make()
    replay.insert(_items({1: 1e-12, 2: 1e-12}))
    replay.sample(30)
    assert float(client.hget(under("state"), "now")) > 1e12
    replay.update(["1:s1", "2:s2"], [3.0, 1.0])  # the steps are now 1e12 times shorter
    assert float(client.hget(under("state"), "now")) == 0.0
    assert client.zrange(under("clock"), -1, -1, withscores=True)[0][1] < 50.0
    drawn = [key for _ in range(8) for key in replay.sample(500).keys]
    assert drawn.count("1:s1") / 4000 == pytest.approx(0.75, abs=0.03)  # 4.4 standard deviations
    client.hset(under("state"), "now", "1e10")
    replay.insert(_items({3: 4.0}))  # begins beside the others, neither far before nor far behind them
    assert float(client.hget(under("state"), "now")) == 0.0


def test_many_are_evicted_at_once_when_the_capacity_was_lowered(
    make: Any, client: redis.Redis, under: Any, prefix: str
) -> None:
    make(capacity_sequences=9000).insert(_items(dict.fromkeys(range(8500), 1.0)))
    assert make(capacity_sequences=5).insert(_items({9000: 1.0})) == 1
    assert client.zrange(under("age"), 0, -1) == [
        b"8497:s8496",
        b"8498:s8497",
        b"8499:s8498",
        b"8500:s8499",
        b"8501:s9000",
    ]
    assert_consistent(client, prefix)


def test_a_capacity_in_bytes_evicts_no_more_than_it_must(
    make: Any, client: redis.Redis, under: Any, prefix: str
) -> None:
    replay = make(capacity_bytes=1000)
    replay.insert([Item(f"small{i}", b"x" * 100, 1.0) for i in range(10)])
    replay.insert([Item("large", b"x" * 450, 1.0)])
    assert client.hgetall(under("ids")).keys() == {*(f"small{i}".encode() for i in range(5, 10)), b"large"}
    assert_consistent(client, prefix)


def test_an_id_given_twice_in_one_call_counts_once_and_its_first_payload_stays(
    make: Any, client: redis.Redis, under: Any, prefix: str
) -> None:
    assert make().insert([Item("x", b"first", 1.0), Item("y", b"other", 2.0), Item("x", b"second", 4.0)]) == 3
    assert client.hgetall(under("data")) == {b"1:x": b"first", b"2:y": b"other"}
    assert_consistent(client, prefix)


def test_ids_may_hold_any_characters(make: Any, client: redis.Redis, under: Any, prefix: str) -> None:
    replay = make(capacity_sequences=2)
    replay.insert([Item(name, _PAYLOAD, 1.0) for name in ("a:b", "\n ü%", "1:1:1")])
    assert set(replay.sample(20).keys) == {"2:\n ü%", "3:1:1:1"}
    assert_consistent(client, prefix)


_DAMAGE = {
    "a weight that is no number": lambda client, under: client.hset(under("weight"), "2:s2", "many"),
    "a weight without its length": lambda client, under: client.hset(under("weight"), "2:s2", "1.0"),
    "a weight of NaN": lambda client, under: client.hset(under("weight"), "2:s2", "nan 29"),
    "a negative weight": lambda client, under: client.hset(under("weight"), "2:s2", "-1 29"),
    "an infinite weight": lambda client, under: client.hset(under("weight"), "2:s2", "inf 29"),
    "no weight": lambda client, under: client.hdel(under("weight"), "2:s2"),
    "no payload": lambda client, under: client.hdel(under("data"), "2:s2"),
    "a foreign payload": lambda client, under: client.hset(under("data"), "2:s2", b"\x80\x05pickle"),
    "no clock": lambda client, under: client.zrem(under("clock"), "2:s2"),
    "a clock that never rings": lambda client, under: client.zadd(under("clock"), {"2:s2": math.inf}),
    "no age": lambda client, under: client.zrem(under("age"), "2:s2"),
    "no id": lambda client, under: client.hdel(under("ids"), "s2"),
    "another's clock in its place": lambda client, under: (
        client.zrem(under("clock"), "2:s2"), client.zadd(under("clock"), {"foreign": 0.0})
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGE)
def test_one_damaged_sequence_is_removed_and_named_and_the_rest_goes_on(
    make: Any, client: redis.Redis, under: Any, prefix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    replay = make()
    replay.insert(_items({1: 1.0, 2: 3.0, 3: 0.5}))
    _DAMAGE[damage](client, under)
    for _ in range(3):
        assert set(replay.sample(40).keys) == {"1:s1", "3:s3"}
    replay.update(["1:s1", "2:s2"], [2.0, 2.0])
    stats = replay.stats()
    assert (stats.size, stats.inserted, stats.total_weight) == (2, 3, 2.5)
    assert stats.rejected == (2 if damage.startswith("another's") else 1)
    assert "2:s2" in caplog.text
    assert replay.insert(_items({2: 1.0})) == 1
    assert_consistent(client, prefix)


@pytest.mark.parametrize("name", ["clock", "age", "data", "weight"])
def test_a_foreign_entry_is_removed_by_whoever_comes_first(
    make: Any, client: redis.Redis, under: Any, prefix: str, name: str
) -> None:
    replay = make(capacity_sequences=3)
    replay.insert(_items({1: 1.0, 2: 3.0, 3: 0.5}))
    if name in ("clock", "age"):
        client.zadd(under(name), {"foreign": -1.0})
    else:
        client.hset(under(name), "foreign", "?")
    assert replay.insert(_items({4: 1.0})) == 1
    assert_consistent(client, prefix)
    stats = replay.stats()
    assert (stats.size, stats.evicted, stats.rejected) == (3, 1, 1)


def test_an_update_that_meets_a_damaged_weight_removes_that_sequence(
    make: Any, client: redis.Redis, under: Any, prefix: str
) -> None:
    replay = make()
    replay.insert(_items({1: 1.0, 2: 3.0}))
    client.hset(under("weight"), "2:s2", "?")
    assert replay.update(["1:s1", "2:s2"], [4.0, 5.0]) == 1
    assert replay.stats().total_weight == 4.0
    assert_consistent(client, prefix)


def test_a_lost_state_is_counted_anew_and_no_generation_is_used_twice(
    make: Any, client: redis.Redis, under: Any, prefix: str
) -> None:
    replay = make()
    replay.insert(_items({1: 1.0, 2: 3.0}))
    client.delete(under("state"))
    replay.insert(_items({3: 1.0}))
    assert set(replay.sample(50).keys) == {"1:s1", "2:s2", "3:s3"}
    assert (replay.stats().inserted, replay.stats().total_weight) == (3, 5.0)
    assert_consistent(client, prefix)


def _actions(replay: Replay) -> list[Any]:
    return [
        lambda: replay.insert(_items({9: 1.0})),
        lambda: replay.sample(2),
        lambda: replay.update(["1:s1"], [2.0]),
        replay.stats,
    ]


@pytest.mark.parametrize("name", ["clock", "data", "weight", "age", "ids", "state"])
def test_a_key_of_the_wrong_type_is_one_clear_line_and_nothing_is_changed(
    make: Any, client: redis.Redis, under: Any, prefix: str, name: str
) -> None:
    replay = make()
    replay.insert(_items({1: 1.0, 2: 3.0}))
    client.delete(under(name))
    client.set(under(name), "foreign")
    others = [key for key in ("clock", "data", "weight", "age", "ids", "state") if key != name]
    before = [client.dump(under(key)) for key in others]
    for action in _actions(replay):
        if action == replay.stats and name != "state":
            continue  # it reads nothing else
        with pytest.raises(
            UserError, match=rf"the Redis key \{{.*:{name}: expected a value of type .*, got a string"
        ) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert [client.dump(under(key)) for key in others] == before
    client.delete(under(name))  # the remedy
    for action in _actions(replay):
        action()
    assert_consistent(client, prefix)


@pytest.mark.parametrize(("field", "value"), [("total", "much"), ("inserted", ""), ("now", "nan"), ("bytes", "inf")])
def test_a_counter_that_is_no_number_is_one_clear_line(
    make: Any, client: redis.Redis, under: Any, field: str, value: str
) -> None:
    replay = make()
    replay.insert(_items({1: 1.0}))
    client.hset(under("state"), field, value)
    for action in _actions(replay):
        if action == replay.stats and field == "now":
            continue  # it does not read it
        with pytest.raises(UserError, match=f"expected a number in its field {field}, got b'{value}'"):
            action()
    client.delete(under("state"))
    assert replay.sample(2) is not None


def test_a_thousand_damaged_sequences_are_one_line_in_the_log(
    make: Any, client: redis.Redis, under: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    replay = make()
    replay.insert(_items(dict.fromkeys(range(1200), 1.0)))
    client.hdel(under("weight"), *client.zrange(under("age"), 0, 999))
    with caplog.at_level(logging.WARNING):
        assert len(replay.sample(100).keys) == 100
    assert [record.message.split("under")[0] for record in caplog.records] == [
        "replay: 1000 damaged sequences are removed "
    ]
    assert replay.stats().rejected == 1000
    assert_consistent(client, prefix)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total", "-5"), ("total", "0"), ("total", "1e300"), ("total_low", "7"), ("sampled", "1e300"),
        ("inserted", "-1e300"), ("generation", "1e300"), ("bytes", "-1"), ("now", "-1e300"), ("now", "1e300"),
    ],
)  # fmt: skip
def test_a_counter_that_no_replay_can_have_is_summed_anew(
    make: Any, client: redis.Redis, under: Any, prefix: str, field: str, value: str
) -> None:
    replay = make(capacity_sequences=4)
    replay.insert(_items({1: 1.0, 2: 3.0, 3: 4.0}))
    client.hset(under("state"), field, value)
    for draw in range(3):
        sample = replay.sample(5)
        assert sample is not None
        assert {round(p, 12) for p in sample.probabilities.tolist()} <= {1 / 8, 3 / 8, 4 / 8}
        assert replay.update(sample.keys, [weights_of(client, prefix)[key] for key in sample.keys]) == 5
        assert replay.insert([Item("s1", _PAYLOAD, 1.0)]) == 1, draw
    replay.insert(_items({4: 1.0, 5: 1.0}))  # evicts one
    assert replay.stats().size == 4
    assert_consistent(client, prefix)


def test_a_foreign_sequence_whose_name_is_no_text_is_removed(make: Any, client: redis.Redis, under: Any) -> None:
    replay = make()
    replay.insert(_items({1: 1.0}))
    key = b"2:\xff\xfe"
    client.hset(under("data"), key, _PAYLOAD)
    client.hset(under("weight"), key, b"1000 %d" % len(_PAYLOAD))
    client.zadd(under("clock"), {key: 0.0})
    client.zadd(under("age"), {key: 2})
    client.hset(under("ids"), b"\xff\xfe", 2)
    client.hset(under("state"), mapping={"generation": 2, "inserted": 2, "total": 1001})
    sample = replay.sample(6)
    assert sample is not None
    assert set(sample.keys) == {"1:s1"}
    assert replay.stats().rejected == 1


def test_rejected_sequences_are_gone_and_counted(make: Any, client: redis.Redis, prefix: str) -> None:
    replay = make()
    replay.insert(_items({1: 1.0, 2: 1.0, 3: 1.0}))
    assert replay.reject([]) == 0
    assert replay.reject(["2:s2", "2:s2", "9:s9"]) == 1
    stats = replay.stats()
    assert (stats.size, stats.rejected) == (2, 1)
    assert_consistent(client, prefix)
