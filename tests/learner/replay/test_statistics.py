"""Statistics of the replay, plain and sharded, with the tolerance of each: a test passes or fails for good."""

from typing import Any

import numpy as np
import pytest
import redis
from replay_state import weights_of

from learner.replay.codec import encode
from learner.replay.replay import Item, ReplayConfig, Sample
from learner.replay.shards import open_replay

_DEVIATIONS = 4.5  # of the standard error: 7e-6 of all right samplers would fail, and the seeds are fixed
_CLASSES = (0.25, 1.0, 3.0, 4.0)


def _config(shards: int, **more: Any) -> ReplayConfig:
    return ReplayConfig(**{"min_sequences": 1, "replay_ratio": 1e9, "priority_exponent": 1.0, "shards": shards, **more})


def _items(weights: dict[int, float]) -> list[Item]:
    return [Item(f"s{i}", encode({"number": np.array(i, np.int64)}), weight) for i, weight in weights.items()]


def _numbers(sample: Sample) -> list[int]:
    return [int(arrays["number"]) for arrays in sample.arrays]


@pytest.mark.parametrize("shards", [1, 3])
def test_importance_weights_are_unbiased_on_a_known_sum(client: redis.Redis, prefix: str, shards: int) -> None:
    n, draws, rng = 12, 20_000, np.random.default_rng(8)
    f = rng.normal(3.0, 2.0, n)
    replay = open_replay([client], prefix, _config(shards, importance_sampling_exponent=1.0), np.random.default_rng(1))
    replay.insert(_items(dict.fromkeys(range(n), 1.0)))
    estimates: list[float] = []
    variance = 0.0
    for step in range(draws // 500):
        sample = replay.sample(500)
        assert sample is not None
        numbers, p = _numbers(sample), sample.probabilities
        estimates += (f[numbers] / (n * p)).tolist()
        held = dict(zip(numbers, p, strict=True))
        variance += 500 * (sum(f[i] ** 2 / (n * n * held[i]) for i in held) - f.mean() ** 2)
        # The weights are these factors, divided by the largest of the batch.
        np.testing.assert_allclose(sample.weights * (1 / p).max(), 1 / p, rtol=1e-6)
        if step % 4 == 0:  # the sum stays the same whatever the priorities
            replay.update(sample.keys, rng.choice([0.3, 1.0, 3.0], 500))
    assert abs(np.mean(estimates) - f.mean()) < _DEVIATIONS * np.sqrt(variance) / draws


@pytest.mark.parametrize("shards", [1, 3])
def test_frequencies_follow_with_several_samplers_while_sequences_change_come_and_go(
    client: redis.Redis, prefix: str, shards: int
) -> None:
    config = _config(shards, capacity_sequences=24)
    replays = [open_replay([client], prefix, config, np.random.default_rng(seed)) for seed in range(3)]
    replays[0].insert(_items(dict.fromkeys(range(24), 1.0)))
    rng, new = np.random.default_rng(2), 24
    observed, expected, variance = np.zeros(4), np.zeros(4), np.zeros(4)
    for step in range(400):
        if step % 10 == 9:
            replays[step % 3].insert(_items({new: 3.0, new + 1: 3.0}))
            new += 2
        held = _held(client, prefix, shards)
        sample = replays[step % 3].sample(16)
        assert sample is not None
        drawn = [held[key] for key in sample.keys]
        np.testing.assert_allclose(sample.probabilities, np.array(drawn) / sum(held.values()), rtol=1e-12)
        for c, weight in enumerate(_CLASSES):
            p = weight * list(held.values()).count(weight) / sum(held.values())
            observed[c] += drawn.count(weight)
            expected[c] += 16 * p
            variance[c] += 16 * p * (1 - p)
        replays[(step + 1) % 3].update(sample.keys, rng.choice([0.25, 1.0, 4.0], 16))
    assert np.abs((observed - expected) / np.sqrt(variance)).max() < _DEVIATIONS


def _held(client: redis.Redis, prefix: str, shards: int) -> dict[str, float]:
    """Return key -> weight as the replay itself names its keys."""
    if shards == 1:
        return weights_of(client, prefix)
    return {
        f"{i}/{key}": weight for i in range(shards) for key, weight in weights_of(client, f"{prefix}:shard{i}").items()
    }
