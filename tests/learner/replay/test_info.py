"""What a look into the replay shows, and that it costs no more for a large one."""

from typing import Any

import numpy as np
import pytest
import redis

from learner.replay.info import QUANTILES
from learner.replay.replay import Item, Replay, ReplayConfig
from learner.replay.shards import ShardedReplay, open_replay


@pytest.fixture
def make(client: redis.Redis, prefix: str) -> Any:
    def make(**more: Any) -> Replay | ShardedReplay:
        config = ReplayConfig(**{"min_sequences": 1, "replay_ratio": 1e9, **more})
        return open_replay([client], prefix, config, np.random.default_rng(0))

    return make


def _items(start: int, end: int) -> list[Item]:
    return [Item(f"s{i}", b"payload", float(i % 11)) for i in range(start, end)]


def test_ages_are_counted_in_sequences_inserted_since(make: Any) -> None:
    replay = make(capacity_sequences=101)
    replay.insert(_items(0, 301))
    assert QUANTILES == (0.0, 0.1, 0.5, 0.9, 1.0)
    assert replay.info().ages == (0.0, 10.0, 50.0, 90.0, 100.0)


def test_priorities_are_those_inserted(make: Any) -> None:
    replay = make()
    replay.insert(_items(1, 11))
    least, _, median, _, most = replay.info().priorities
    assert (least, most) == (pytest.approx(1.0), pytest.approx(10.0))
    assert median == pytest.approx(5.5, abs=1.0)


def test_without_prioritization_there_are_no_priorities_to_show(make: Any) -> None:
    replay = make(priority_exponent=0.0)
    replay.insert(_items(0, 9))
    assert replay.info().priorities == ()


@pytest.mark.parametrize("shards", [1, 3])
def test_an_empty_replay_has_no_quantiles(make: Any, shards: int) -> None:
    info = make(shards=shards).info()
    assert (info.ages, info.priorities) == ((), ())
    assert info.stats.size == 0
    assert info.stats.learner_waiting


def test_of_shards_the_ages_are_those_of_the_whole(make: Any) -> None:
    replay = make(shards=3, capacity_sequences=300)
    replay.insert(_items(0, 900))
    info = replay.info()
    assert (info.stats.size, info.stats.inserted) == (300, 900)
    np.testing.assert_allclose(info.ages, (0, 30, 150, 270, 297), atol=25)
    assert info.priorities[-1] == pytest.approx(10.0)


def test_a_damaged_weight_is_left_to_the_next_sample(make: Any, client: redis.Redis, prefix: str) -> None:
    replay = make()
    replay.insert(_items(1, 5))
    client.hset(f"{{{prefix}}}:replay:weight", "1:s1", "?")
    assert replay.info().priorities[0] == pytest.approx(2.0)


def test_a_look_asks_for_no_more_when_the_replay_is_large(make: Any, client: redis.Redis) -> None:
    def calls_of_a_look() -> int:
        before = client.info("stats")["total_commands_processed"]
        replay.info()
        return int(client.info("stats")["total_commands_processed"]) - before

    replay = make(capacity_sequences=100_000)
    replay.insert(_items(0, 200))
    few = calls_of_a_look()
    replay.insert(_items(200, 20_000))
    assert calls_of_a_look() == few
