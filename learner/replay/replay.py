"""Prioritized sampling of sequences on the Redis server: an exponential race.

Every sequence i carries a clock that rings at the rate w_i = priority_i ** priority_exponent; its score in a sorted
set is the time of its next ring, `now + Exp(1) / w_i`. To sample is to take the next ring, make its time `now`,
and wind that clock again. The exponential has no memory, so successive rings are independent draws with
probability w_i / sum(w), and a new priority or a new sequence is one new score. This is the prioritized replay of
R2D2 (Kapturowski et al. 2019, section 2.3; Schaul et al. 2016) in O(log n), for any number of processes at once.

Called by the actors (`insert`) and the learner (`sample`, `update`). All random numbers come from the generator
that is passed in and travel as arguments, so a seeded run repeats exactly. Every call may be repeated after a lost
reply. A `Replay` is one race; more of them, each under a prefix of its own, stand side by side in shards.py.

In Redis, under `{prefix}:replay:`, where a *key* is `generation:id` and a generation is never used twice:

    clock   sorted set  key -> time of the next ring       data    hash  key -> payload
    age     sorted set  key -> generation                  weight  hash  key -> "w bytes"
    state   hash        counters, now, total weight        ids     hash  id -> generation
    last:*  string      a caller's last request and its result, for a while

A server is shared, so any value may be foreign or damaged. A sequence that is not whole is removed and counted as
rejected, and the rest goes on; a key of the wrong type, or a counter that is no number, is the user's to mend.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import redis
from redis.exceptions import ResponseError

from learner.replay.codec import PayloadError, decode
from learner.replay.info import ReplayInfo, look
from learner.replay.race import Counts, Race

__all__ = [
    "MAX_BATCH",
    "Item",
    "Replay",
    "ReplayConfig",
    "ReplayStats",
    "Sample",
    "WaitingLog",
    "importance_weights",
    "stats_of",
]

_log = logging.getLogger(__name__)

# A weight of 0 would never be drawn and never be mended; beyond 1e12 the sum has no digits left for the others.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-12, 1e12
MAX_BATCH = 2048  # Lua's `unpack` ends at 8000 values
_NAMED = 3  # sequences of a batch that are named when they do not decode
# Of one script. While the server adds one lot the client makes the next, and a small one is still in the CPU's cache.
_INSERT_SEQUENCES, _INSERT_BYTES = 24, 4 << 20


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """What the replay holds and how it is sampled; equal in all processes of a campaign."""

    capacity_sequences: int = 10_000
    """Sequences held; the oldest beyond them are evicted."""
    capacity_bytes: int = 0
    """Payload bytes held; 0 is unlimited."""
    priority_exponent: float = 0.9
    """w = priority ** priority_exponent (R2D2, section 2.3); 0 samples uniformly."""
    importance_sampling_exponent: float = 0.6
    """beta of the weights (N p) ** -beta; 0 switches the correction off."""
    replay_ratio: float = 64.0
    """Sequences sampled per sequence inserted. The paper has 0.8; a step here is dear, it retrains a network."""
    replay_ratio_tolerance: float = 256.0
    """How many sampled sequences the ratio may be off to either side before one side has to wait."""
    min_sequences: int = 0
    """Sequences inserted before the first one is sampled; 0, in a campaign, as many as the teachers play."""
    shards: int = 1
    """Races side by side that share the capacity; more than one pays where Redis is what all wait for."""

    def __post_init__(self) -> None:
        """Check all ranges; ValueError with the value."""
        _at_least("capacity_sequences", self.capacity_sequences, 1)
        _at_least("capacity_bytes", self.capacity_bytes, 0)
        _at_least("priority_exponent", self.priority_exponent, 0)
        _at_least("importance_sampling_exponent", self.importance_sampling_exponent, 0)
        if not self.replay_ratio_tolerance >= 0:  # infinite: nobody ever waits
            raise ValueError(f"replay_ratio_tolerance must be >= 0, got {self.replay_ratio_tolerance}")
        _at_least("min_sequences", self.min_sequences, 0)
        _at_least("shards", self.shards, 1)
        if not (math.isfinite(self.replay_ratio) and self.replay_ratio > 0):
            raise ValueError(f"replay_ratio must be finite and > 0, got {self.replay_ratio}")
        if self.min_sequences > self.capacity_sequences:
            raise ValueError(
                f"min_sequences must be <= capacity_sequences={self.capacity_sequences}, got {self.min_sequences}"
            )


@dataclass(frozen=True, slots=True)
class Item:
    """A sequence to insert."""

    sequence_id: str
    """Names the sequence in the whole campaign; inserted again it changes nothing."""
    payload: bytes
    """What `codec.encode` made."""
    priority: float
    """Finite, >= 0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """B sequences, drawn independently and with replacement."""

    keys: list[str]
    """[B] `generation:id`, to be handed back to `Replay.update`."""
    probabilities: npt.NDArray[np.float64]
    """[B] probability of each draw, in (0, 1]."""
    weights: npt.NDArray[np.float32]
    """[B] (N p) ** -beta divided by its maximum over the batch, in (0, 1]."""
    arrays: list[dict[str, npt.NDArray[Any]]]
    """[B] the decoded payloads."""


@dataclass(frozen=True, slots=True)
class ReplayStats:
    """Where the replay stands; counts are of sequences since it was created."""

    size: int
    bytes: int
    inserted: int
    sampled: int
    evicted: int
    rejected: int
    """Removed because they were damaged: their payload did not decode, or something belonging to them was missing."""
    total_weight: float
    learner_waits: int
    """Sample requests that were refused so far."""
    learner_waiting: bool
    """A further sample of the size asked for last would be refused."""
    actors_waiting: bool
    """The actors should hold back: the learner is behind by more than the tolerance and one batch."""


class Replay:
    """The replay of the campaign `prefix`; one instance for each thread, as the generator is not shared.

    Attributes:
        client: the server's.
        race: the keys and scripts there.

    """

    def __init__(self, client: redis.Redis, prefix: str, config: ReplayConfig, rng: np.random.Generator) -> None:
        self._config, self._rng = config, rng
        self.client = client
        self.race = Race(client, prefix)
        self._waiting = WaitingLog(config.replay_ratio)

    def insert(self, items: Iterable[Item]) -> int:
        """Add the items whose ids are new, evicting the oldest sequences beyond the capacity.

        Items that are made as they are asked for, by a generator, are made while the server adds the ones before; to
        repeat the call, as after a lost connection, give the same items again, which a generator cannot. Returns how
        many of the ids the replay holds afterwards. Never waits (`stats().actors_waiting` asks for it). Raises
        ValueError for a priority that is not finite or negative, an empty id, or a payload above `capacity_bytes`: that
        item and all after it are not added, of the hundred before it some may not be, and all others are.
        """
        ids: list[str] = []
        lots = [int(held) for held in self.race.run_each("insert", (self._insertion(lot, ids) for lot in _lots(items)))]
        return sum(lots) if len(lots) < 2 else self.race.holding(ids)  # a lot may have evicted those before it

    def _insertion(self, lot: list[Item], ids: list[str]) -> list[Any]:
        """Return the arguments of one insertion, and add its ids to `ids`."""
        ids += [item.sequence_id for item in lot]
        weights = self.check(lot)
        waits = self._rng.standard_exponential(len(lot)).tolist()
        args: list[Any] = [self._config.capacity_sequences, self._config.capacity_bytes]
        for item, weight, wait in zip(lot, weights, waits, strict=True):
            args += [item.sequence_id, weight, wait, item.payload]
        return args

    def check(self, items: Sequence[Item]) -> list[float]:
        """Return the weights of items that `insert` would take, ValueError where it would not; asks no server."""
        for item in items:
            self._check(item)
        return self._weights_of([item.priority for item in items], [item.sequence_id for item in items])

    def sample(self, batch_size: int) -> Sample | None:
        """Draw `batch_size` sequences (1 to 2048), or None when the learner must wait.

        It must wait until `min_sequences` were inserted, and while `batch_size` more would lift the sampled above
        `inserted * replay_ratio + replay_ratio_tolerance`. A payload that does not decode is removed, logged and
        drawn anew; only if the limiter refuses that, the sample is shorter than asked for.
        """
        return self.draw(batch_size, asked=batch_size)

    def draw(self, count: int, *, asked: int) -> Sample | None:
        """Draw `count` sequences (1 to 2048) of a batch of `asked`, of which other shards give the rest.

        Returns None when the limiter refuses, and where there is nothing to draw.
        """
        if not 1 <= count <= MAX_BATCH:
            raise ValueError(f"batch_size must be 1 to {MAX_BATCH}, got {count}")
        keys: list[str] = []
        probabilities: list[float] = []
        arrays: list[dict[str, npt.NDArray[Any]]] = []
        while len(keys) < count:
            drawn = self._drawn(count - len(keys), asked)
            if drawn is None:
                break
            for key, probability, decoded in self._decoded(*drawn):
                keys.append(key)
                probabilities.append(probability)
                arrays.append(decoded)
        if not keys:
            return None
        p = np.array(probabilities, np.float64)
        return Sample(keys, p, importance_weights(p, self._config.importance_sampling_exponent), arrays)

    def update(self, keys: Sequence[str], priorities: Sequence[float] | npt.NDArray[Any]) -> int:
        """Give the sampled `keys` [B] new `priorities` [B]; of a key given twice the last one holds.

        A key that was evicted is passed over, also when its id is in use again. Returns how many were found.
        Raises ValueError for a priority that is not finite or negative, with nothing changed.
        """
        values = np.asarray(priorities, np.float64)
        if values.shape != (len(keys),):
            raise ValueError(f"priorities must have the shape of keys ({len(keys)},), got {values.shape}")
        weights = self._weights_of(values.tolist(), keys)
        waits = self._rng.standard_exponential(len(keys)).tolist()
        found = 0
        for start in range(0, len(keys), MAX_BATCH):
            args: list[Any] = []
            for i in range(start, min(start + MAX_BATCH, len(keys))):
                args += [keys[i], weights[i], waits[i]]
            found += int(self.race.run("update", *args))
        return found

    def reject(self, keys: Sequence[str]) -> int:
        """Remove sampled `keys` that turned out to be of no use, and count them as rejected; returns how many."""
        times = Counter(keys)
        return int(self.race.run("reject", *(value for pair in times.items() for value in pair))) if times else 0

    def held(self) -> Iterator[tuple[str, bytes]]:
        """Yield (id, payload) of every sequence, the oldest first; what is evicted meanwhile is passed over."""
        keys: Any = self.client.zrange(self.race.age, 0, -1)
        for start in range(0, len(keys), _INSERT_SEQUENCES):
            some = keys[start : start + _INSERT_SEQUENCES]
            for key, payload in zip(some, self.race.payloads(some), strict=True):
                if payload is not None:
                    yield key.decode(errors="replace").partition(":")[2], payload

    def stats(self) -> ReplayStats:
        """Return the counters, all of one moment; may be called from any thread."""
        return stats_of(self._config, self.counts())

    def info(self) -> ReplayInfo:
        """Return the counters with ages and priorities; cheap at any size, and may be called from any thread."""
        counts = self.counts()
        return look([(self.race, counts)], self._config, stats_of(self._config, counts))

    def counts(self) -> Counts:
        """Return the raw counters; UserError when they cannot be read."""
        try:
            fields: Any = self.race.client.hgetall(self.race.state)
        except ResponseError as error:
            fields = error
        return self.race.counts(fields)

    def refuse(self, asked: int) -> None:
        """Count a refused sample of `asked` sequences, where the limiter of several shards refused it."""
        self.race.run("sample", 1, asked, math.inf, 1.0, 0.0, 1.0)  # more sequences than will ever be inserted

    def _drawn(self, count: int, asked: int) -> tuple[list[bytes], list[bytes], list[bytes | None]] | None:
        """Return (keys, probabilities as text, payloads), or None when the limiter refuses."""
        config = self._config
        limits = (config.min_sequences, config.replay_ratio, config.replay_ratio_tolerance)
        waits = self._rng.standard_exponential(count).tolist()
        granted, first, second = self.race.run("sample", count, asked, *limits, *waits)
        self._waiting.note(None if granted else {"inserted": first, "sampled": second})
        return (first, second, self.race.payloads(first)) if granted else None

    def _decoded(
        self, keys: list[bytes], probabilities: list[bytes], payloads: list[bytes | None]
    ) -> Iterator[tuple[str, float, dict[str, npt.NDArray[Any]]]]:
        """Yield (key, probability, arrays) of what decodes, and take the other draws back."""
        taken_back: Counter[bytes] = Counter()
        damaged: dict[bytes, Exception] = {}
        for name, probability, payload in zip(keys, probabilities, payloads, strict=True):
            if payload is None:  # evicted since it was drawn
                taken_back[name] += 1
                continue
            try:
                key, arrays = name.decode(), decode(payload)
            except (PayloadError, UnicodeDecodeError) as error:
                damaged[name] = error
                taken_back[name] += 1
            else:
                yield key, float(probability), arrays
        for name, problem in list(damaged.items())[:_NAMED]:
            shown = name.decode(errors="backslashreplace")
            _log.warning("replay: sequence %s does not decode and is removed: %s", shown, problem)
        if len(damaged) > _NAMED:
            _log.warning("replay: %d more sequences do not decode and are removed", len(damaged) - _NAMED)
        if taken_back:
            self.race.run("reject", *(value for pair in taken_back.items() for value in pair))

    def _check(self, item: Item) -> None:
        if not item.sequence_id:
            raise ValueError("sequence_id must not be empty")
        capacity = self._config.capacity_bytes
        if capacity and len(item.payload) > capacity:
            raise ValueError(
                f"payload of {item.sequence_id} must fit into capacity_bytes={capacity}, got {len(item.payload)}"
            )

    def _weights_of(self, priorities: list[float], names: Sequence[str]) -> list[float]:
        values = np.array(priorities, np.float64)
        if not (len(values) == 0 or (values.min() >= 0 and values.max() < math.inf)):  # NaN is neither
            i = next(i for i, value in enumerate(priorities) if not 0 <= value < math.inf)
            raise ValueError(f"priorities must be finite and >= 0, got {priorities[i]} for {names[i]}")
        # What overflows is cut off as well.
        with np.errstate(over="ignore"):
            powers = values**self._config.priority_exponent
        weights: list[float] = np.minimum(np.maximum(powers, _MIN_WEIGHT), _MAX_WEIGHT).tolist()
        return weights


def stats_of(config: ReplayConfig, counts: Counts) -> ReplayStats:
    """Return what the counters mean under `config`; of several shards, counts are summed up first."""
    ahead = counts["inserted"] * config.replay_ratio - counts["sampled"]
    started = counts["inserted"] >= config.min_sequences and counts["size"] > 0
    tolerance, batch = config.replay_ratio_tolerance, counts["batch"]
    return ReplayStats(
        size=int(counts["size"]),
        bytes=int(counts["bytes"]),
        inserted=int(counts["inserted"]),
        sampled=int(counts["sampled"]),
        evicted=int(counts["evicted"]),
        rejected=int(counts["rejected"]),
        total_weight=counts["total"],
        learner_waits=int(counts["waits"]),
        learner_waiting=not started or ahead < batch - tolerance,
        # One batch above the learner's own bound: the two can never both wait.
        actors_waiting=started and ahead > batch + tolerance,
    )


class WaitingLog:
    """Logs the turns between waiting and going on only: a waiting learner asks many times a second."""

    def __init__(self, replay_ratio: float) -> None:
        self._replay_ratio, self._waits = replay_ratio, False

    def note(self, refused: Counts | None) -> None:
        """Note that the limiter granted a sample (None), or refused one at the counts "inserted" and "sampled"."""
        if refused is not None and not self._waits:
            _log.info(
                "replay: the learner waits for the actors (inserted %d, sampled %d, replay_ratio %g)",
                refused["inserted"], refused["sampled"], self._replay_ratio,
            )  # fmt: skip
        elif refused is None and self._waits:
            _log.info("replay: the learner goes on")
        self._waits = refused is not None


def importance_weights(probabilities: npt.NDArray[np.float64], exponent: float) -> npt.NDArray[np.float32]:
    """Return (N p) ** -exponent divided by its maximum: [B] -> [B], in (0, 1]; N cancels (Schaul 2016, 3.4)."""
    weights: npt.NDArray[np.float32] = ((probabilities.min() / probabilities) ** exponent).astype(np.float32)
    return weights


def _lots(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the items by as many as one script adds."""
    lot: list[Item] = []
    size = 0
    for item in items:
        if lot and (len(lot) >= _INSERT_SEQUENCES or size + len(item.payload) > _INSERT_BYTES):
            yield lot
            lot, size = [], 0
        lot.append(item)
        size += len(item.payload)
    if lot:
        yield lot


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be finite and >= {least}, got {value}")
