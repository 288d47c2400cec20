"""Several races as one replay, so that more than one server, or core of one, shares the work.

Called by `actors/player.py` through `open_replay`. A sequence belongs to the shard that the crc32 of its id names, so
an insert repeated by anybody meets the first one. A batch is split over the shards by a multinomial draw with their
total weights, and drawn from each race; a probability is the share used for that split times the one within the race,
so importance weights are right even where a total has moved in between.

A shard that is empty or damaged is passed over; a server that does not answer raises redis-py's error, as of a single
`Replay`, for `connection.retrying` to wait or to give up.
"""

import dataclasses
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import redis

from env.errors import UserError
from learner.replay.info import ReplayInfo, look
from learner.replay.race import Counts
from learner.replay.replay import (
    MAX_BATCH,
    Item,
    Replay,
    ReplayConfig,
    ReplayStats,
    Sample,
    WaitingLog,
    importance_weights,
    stats_of,
)

__all__ = ["ShardedReplay", "open_replay"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def open_replay(
    clients: Sequence[redis.Redis], prefix: str, config: ReplayConfig, rng: np.random.Generator
) -> "Replay | ShardedReplay":
    """Return the replay of the campaign `prefix`, with `config.shards` races in turn on the servers of `clients`."""
    if config.shards == 1:
        return Replay(clients[0], prefix, config, rng)
    part = _of_one_shard(config)
    replays = [
        Replay(clients[i % len(clients)], f"{prefix}:shard{i}", part, generator)
        for i, generator in enumerate(rng.spawn(config.shards))
    ]
    return ShardedReplay(replays, config, rng)


class ShardedReplay:
    """The races of `replays` as one replay with the interface of `Replay`; one instance for each thread.

    Args:
        replays: the shards, in the same order in every process; their own limiters are off.
        config: of the whole.
        rng: draws how many sequences come from each shard.

    """

    def __init__(self, replays: Sequence[Replay], config: ReplayConfig, rng: np.random.Generator) -> None:
        self._replays, self._config, self._rng = list(replays), config, rng
        self._left_out: set[int] = set()
        self._waiting = WaitingLog(config.replay_ratio)

    def insert(self, items: Iterable[Item]) -> int:
        """Add the items whose ids are new; those of a damaged shard are left out.

        As `Replay.insert`, but all items are taken before the first is added, shard by shard: where one of them raises
        ValueError, what belongs to a shard after its own is not added, and what belongs to one before is.
        """
        parts: dict[int, list[Item]] = {}
        for item in items:
            parts.setdefault(zlib.crc32(item.sequence_id.encode()) % len(self._replays), []).append(item)
        return sum(self._of_shard(i, partial(self._replays[i].insert, parts[i])) or 0 for i in sorted(parts))

    def check(self, items: Sequence[Item]) -> list[float]:
        """Return the weights of items that `insert` would take, as `Replay.check`."""
        return self._replays[0].check(items)

    def sample(self, batch_size: int) -> Sample | None:
        """Draw `batch_size` sequences, or None when the learner must wait, as `Replay.sample`.

        The limiter looks at the sums over all shards, which are read before the draw: with several learners, each of
        them may pass its bound by one batch.
        """
        if not 1 <= batch_size <= MAX_BATCH:
            raise ValueError(f"batch_size must be 1 to {MAX_BATCH}, got {batch_size}")
        parts: list[tuple[int, dict[int, float], Sample]] = []
        passed_over: set[int] = set()
        while (missing := batch_size - sum(len(part.keys) for _, _, part in parts)) > 0:
            totals = self._totals(missing, batch_size, passed_over)
            if not totals:
                break
            shares = np.array(list(totals.values())) / sum(totals.values())
            for i, count in zip(totals, self._rng.multinomial(missing, shares).tolist(), strict=True):
                part = self._of_shard(i, partial(self._replays[i].draw, count, asked=batch_size)) if count else None
                if part is not None:
                    parts.append((i, totals, part))
                elif count:
                    passed_over.add(i)
        return self._joined(parts, passed_over) if parts else None

    def _joined(self, parts: list[tuple[int, dict[int, float], Sample]], passed_over: set[int]) -> Sample:
        """Return the parts (shard, totals of all shards when it was drawn, sample) as one sample.

        What a shard that was passed over did not give has been drawn from the others: the shares are among those.
        """
        shares = [
            totals[i] / sum(w for n, w in totals.items() if n == i or n not in passed_over) for i, totals, _ in parts
        ]
        p = np.concatenate([share * part.probabilities for share, (_, _, part) in zip(shares, parts, strict=True)])
        return Sample(
            [f"{i}/{key}" for i, _, part in parts for key in part.keys],
            p,
            importance_weights(p, self._config.importance_sampling_exponent),
            [arrays for _, _, part in parts for arrays in part.arrays],
        )

    def update(self, keys: Sequence[str], priorities: Sequence[float] | npt.NDArray[Any]) -> int:
        """Give the sampled `keys` [B] new `priorities` [B], as `Replay.update`."""
        values = np.asarray(priorities, np.float64)
        if values.shape != (len(keys),):
            raise ValueError(f"priorities must have the shape of keys ({len(keys)},), got {values.shape}")
        found = 0
        for i, places in _by_shard(keys):
            names = [keys[place].partition("/")[2] for place in places]
            found += self._of_shard(i, partial(self._replays[i].update, names, values[places])) or 0
        return found

    def reject(self, keys: Sequence[str]) -> int:
        """Remove sampled `keys`, as `Replay.reject`."""
        removed = 0
        for i, places in _by_shard(keys):
            names = [keys[place].partition("/")[2] for place in places]
            removed += self._of_shard(i, partial(self._replays[i].reject, names)) or 0
        return removed

    def held(self) -> Iterator[tuple[str, bytes]]:
        """Yield (id, payload) of every sequence, shard by shard, as `Replay.held`."""
        for replay in self._replays:
            yield from replay.held()

    def stats(self) -> ReplayStats:
        """Return the counters summed over all shards that can be read; may be called from any thread."""
        return stats_of(self._config, _sum_of(self._counts()))

    def info(self) -> ReplayInfo:
        """Return the counters with ages and priorities of all shards, as `Replay.info`."""
        counts = self._counts()
        races = [(self._replays[i].race, found) for i, found in counts.items()]
        return look(races, self._config, stats_of(self._config, _sum_of(counts)))

    def _totals(self, count: int, asked: int, passed_over: set[int]) -> dict[int, float]:
        """Return the total weight of every shard to draw from; none when there is none, or the limiter refuses.

        `count` is what is left to draw of a batch of `asked`.
        """
        counts = self._counts()
        refused = self._refuses(_sum_of(counts), count)
        self._waiting.note(_sum_of(counts) if refused else None)
        if refused:
            first = min(counts)
            self._of_shard(first, partial(self._replays[first].refuse, asked))
            return {}
        return {i: found["total"] for i, found in counts.items() if found["size"] and i not in passed_over}

    def _refuses(self, counts: Counts, count: int) -> bool:
        config = self._config
        bound = counts["inserted"] * config.replay_ratio + config.replay_ratio_tolerance
        return not counts["size"] or counts["inserted"] < config.min_sequences or counts["sampled"] + count > bound

    def _counts(self) -> dict[int, Counts]:
        """Return the counters of every shard that can be read, in one round trip for each client."""
        found: dict[int, Counts] = {}
        for client in {id(replay.client): replay.client for replay in self._replays}.values():
            here = {i: replay.race for i, replay in enumerate(self._replays) if replay.client is client}
            with client.pipeline(transaction=False) as pipeline:
                for race in here.values():
                    pipeline.hgetall(race.state)
                answers = pipeline.execute(raise_on_error=False)
            for (i, race), answer in zip(here.items(), answers, strict=True):
                try:
                    found[i] = race.counts(answer)
                except UserError as error:
                    self._leave_out(i, error)
        return found

    def _of_shard(self, i: int, call: Callable[[], _T]) -> _T | None:
        """Return `call()`, which is about shard `i`; None when that one is damaged."""
        try:
            result = call()
        except UserError as error:
            self._leave_out(i, error)
            return None
        self._left_out.discard(i)
        return result

    def _leave_out(self, i: int, error: UserError) -> None:
        """Log the damage of shard `i` once; raise it when no shard is left."""
        if i not in self._left_out:
            _log.warning("replay: shard %d is left out: %s", i, error)
        self._left_out.add(i)
        if len(self._left_out) == len(self._replays):
            self._left_out.clear()  # each may have been mended when the next call comes
            raise error


def _by_shard(keys: Sequence[str]) -> list[tuple[int, list[int]]]:
    """Return (shard, places in `keys` of those that are there), by shard."""
    parts: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        parts.setdefault(int(key.partition("/")[0]), []).append(place)
    return sorted(parts.items())


def _of_one_shard(config: ReplayConfig) -> ReplayConfig:
    """Return the configuration of one shard of `config`: a part of the capacity, and a limiter that never refuses."""
    return dataclasses.replace(
        config,
        shards=1,
        capacity_sequences=math.ceil(config.capacity_sequences / config.shards),
        capacity_bytes=math.ceil(config.capacity_bytes / config.shards),
        min_sequences=0,
        replay_ratio_tolerance=math.inf,
    )


def _sum_of(counts: dict[int, Counts]) -> Counts:
    """Return the sums over the shards; of "batch", which each notes for the whole batch, the largest."""
    names = next(iter(counts.values()))
    return {name: (max if name == "batch" else sum)(found[name] for found in counts.values()) for name in names}
