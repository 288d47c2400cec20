"""A look into a replay, for people: how old its sequences are, and what their priorities are.

Called by `Replay.info` and `ShardedReplay.info`. It reads a fixed number of values however many sequences there are:
ages by rank, in O(log n) each, and the weights of some sequences drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from learner.replay.race import Counts, Race

if TYPE_CHECKING:
    from learner.replay.replay import ReplayConfig, ReplayStats

__all__ = ["QUANTILES", "ReplayInfo", "look"]

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)

_RANKS = 101  # of all shards together
_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class ReplayInfo:
    """What `zeroout replay-info` shows."""

    stats: "ReplayStats"
    ages: tuple[float, ...]
    """By QUANTILES, in sequences inserted since, 0 for the newest; none for an empty replay."""
    priorities: tuple[float, ...]
    """By QUANTILES; none for an empty replay, and where priority_exponent=0 has made all weights 1."""


def look(races: Sequence[tuple[Race, Counts]], config: "ReplayConfig", stats: "ReplayStats") -> ReplayInfo:
    """Return the info of races whose counters were just read as `stats`.

    What was inserted or evicted since is in no counter; a quantile is right to the width of such a change.
    """
    size = sum(counts["size"] for _, counts in races)
    ages: list[float] = []
    weights: list[float] = []
    for race, counts in races:
        share = counts["size"] / size if size else 0.0
        # One sequence here has come with as many elsewhere as the shards hold beside it.
        scale = stats.inserted / counts["inserted"] if counts["inserted"] else 1.0
        found_ages, found_weights = _looked(race, counts, round(share * _RANKS), round(share * _DRAWS))
        ages += [scale * age for age in found_ages]
        weights += found_weights
    exponent = config.priority_exponent
    priorities = [weight ** (1 / exponent) for weight in weights] if exponent else []
    return ReplayInfo(stats, _quantiles(ages), _quantiles(priorities))


def _looked(race: Race, counts: Counts, ranks: int, draws: int) -> tuple[list[float], list[float]]:
    """Return the ages at evenly spaced ranks and the weights of sequences drawn with replacement."""
    if not counts["size"]:
        return [], []
    with race.client.pipeline(transaction=False) as pipeline:
        for rank in np.linspace(0, counts["size"] - 1, max(1, ranks)).round().astype(int).tolist():
            pipeline.zrange(race.age, rank, rank, withscores=True)
        pipeline.hrandfield(race.weight, -max(1, draws), withvalues=True)
        *found, drawn = pipeline.execute()
    ages = [max(0.0, counts["generation"] - generation) for entry in found for _, generation in entry]
    return ages, [weight for record in drawn[1::2] for weight in _weight(record)]


def _weight(record: Any) -> list[float]:
    """Return the weight in a record, or nothing where it is damaged: the next sample removes it."""
    try:
        return [float(record.split()[0])]
    except (ValueError, IndexError):
        return []


def _quantiles(values: list[float]) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILES).tolist()) if values else ()
