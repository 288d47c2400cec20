"""The campaign's episodes, each recorded exactly once, whoever dies.

An episode is pending, leased to an owner, or done. `claim` leases the lowest one that is free; a lease that is not
renewed runs out by the server's clock, and the episode is free again. The first completion counts, from anybody;
the record and the candidates for the best masks enter in one script, so there is never one without the other.

Beside a lease lies the newest snapshot of its episode, opaque here, from which the next owner goes on. There is at most
one an episode in flight, none above `MAX_SNAPSHOT_BYTES`, and the script that records the episode deletes it.

Called by the actors (`claim`, `renew`, `save`, `snapshot`, `complete`, `beat`) and the campaign (`open`, `records`,
`restore`, `request_stop`). Every call may be repeated after a lost reply, and `complete` also works on a full server.
"""

import json
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from env.errors import UserError
from learner.replay.connection import namespace, script

__all__ = ["MAX_SNAPSHOT_BYTES", "Candidate", "Ledger"]

MAX_SNAPSHOT_BYTES = 256 << 20

_SCRIPTS = ("open", "claim", "renew", "save", "release", "complete", "restore", "best", "remaining")
# In the order in which ledger.lua names them.
_KEYS = (
    "meta", "pending", "leases", "owners", "claims", "done", "records",
    "best_score", "best_payload", "best_meta", "snapshots",
)  # fmt: skip
_RESTORE_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mask that could be the best of its slot."""

    slot: str
    """What it competes for, e.g. one target compression."""
    score: float
    """Finite; higher is better, and the first of equals stays."""
    payload: bytes
    meta: str
    """Kept beside the payload; JSON by convention."""


class Ledger:
    """The ledger of the campaign `prefix`; any number of processes share it."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        tag = namespace(prefix)
        self._client = client
        self._keys = [f"{tag}:ledger:{name}" for name in _KEYS]
        self._stop, self._beats = f"{tag}:ledger:stop", f"{tag}:ledger:beats"
        self._scripts = {name: script(client, "ledger.lua", f"ledger_{name}.lua") for name in _SCRIPTS}

    def open(self, fingerprint: str, episodes: int) -> None:
        """Make the episodes 0 to `episodes` - 1 known; again with more adds the new ones.

        With fewer, those above that nobody plays are withdrawn. `fingerprint` names the configuration: raises
        UserError when the ledger was opened with another one.
        """
        if episodes < 0:
            raise ValueError(f"episodes must be >= 0, got {episodes}")
        found = self._run("open", fingerprint, episodes).decode()
        if found != fingerprint:
            raise UserError(
                f"the campaign's state in Redis ({self._keys[0]})",
                expected=f"the configuration {fingerprint}",
                got=f"another campaign's, {found}",
                remedy="give another prefix, or resume that campaign",
            )

    def claim(self, owner: str, lease_s: float) -> int | None:
        """Lease the lowest free episode to `owner` for `lease_s` seconds; None when there is none now.

        None is not the end: `remaining()` says whether a lease may still run out. `owner` must be unique among
        what runs at the same time.
        """
        episode = self._run("claim", owner, _ms(lease_s), secrets.token_hex(8))
        return None if episode is None else int(episode)

    def renew(self, episode: int, owner: str, lease_s: float) -> bool:
        """Extend the lease to `lease_s` seconds from now; False when the episode is no longer the owner's."""
        return bool(self._run("renew", episode, owner, _ms(lease_s)))

    def save(self, episode: int, owner: str, snapshot: bytes) -> bool:
        """Keep `snapshot` in place of the episode's earlier one.

        False, and the earlier one stays, where the episode is no longer the owner's, the server is full, or the
        snapshot is above `MAX_SNAPSHOT_BYTES`.
        """
        return len(snapshot) <= MAX_SNAPSHOT_BYTES and bool(self._run("save", episode, owner, snapshot))

    def snapshot(self, episode: int) -> bytes | None:
        """Return the newest snapshot of an episode that nobody has recorded, or None."""
        found: Any = self._client.hget(self._keys[10], str(episode))
        return None if found is None else bytes(found)

    def release(self, episode: int, owner: str) -> bool:
        """Give the episode back, its snapshot with it; False when it is no longer the owner's."""
        return bool(self._run("release", episode, owner))

    def complete(self, episode: int, record: str, candidates: Sequence[Candidate] = ()) -> bool:
        """Record the episode and let the candidates compete for their slots; True if nobody had recorded it.

        `record` is a JSON object whose "id" is `episode`. A second completion changes nothing. Raises ValueError
        for another record or a score that is not finite.
        """
        if _id_of(record) != episode:
            raise ValueError(f'record must have "id": {episode}, got {_id_of(record)}')
        args: list[Any] = []
        for candidate in candidates:
            if not math.isfinite(candidate.score):
                raise ValueError(f"score of slot {candidate.slot!r} must be finite, got {candidate.score}")
            args += [candidate.slot, float(candidate.score), candidate.payload, candidate.meta]
        return bool(self._run("complete", episode, secrets.token_hex(8), record, *args))

    def records(self, start: int = 0) -> list[str]:
        """Return the records from the `start`-th on, in the order of completion."""
        found: Any = self._client.lrange(self._keys[6], start, -1)
        return [record.decode() for record in found]

    def restore(self, records: Iterable[str]) -> int:
        """Add the records, by their "id", of episodes that have none: what a crashed server had lost.

        Returns how many were added. Call it after `open`. Raises ValueError for a record without an int "id".
        """
        pairs = [(_id_of(record), record) for record in records]
        added = 0
        for start in range(0, len(pairs), _RESTORE_AT_ONCE):
            chunk = pairs[start : start + _RESTORE_AT_ONCE]
            added += int(self._run("restore", *(value for pair in chunk for value in pair)))
        return added

    def remaining(self) -> int:
        """Return the number of episodes that are pending or leased."""
        return int(self._run("remaining"))

    def in_flight(self) -> list[tuple[int, str]]:
        """Return (id, owner) of every lease that nobody has taken over, by id."""
        owners: Any = self._client.hgetall(self._keys[3])
        return sorted((int(episode), owner.decode()) for episode, owner in owners.items())

    def request_stop(self) -> None:
        """Ask all actors to end after their episode."""
        self._client.set(self._stop, 1)

    def stop_requested(self) -> bool:
        """Return whether `request_stop` was called since the last `clear_stop`."""
        return bool(self._client.exists(self._stop))

    def clear_stop(self) -> None:
        """Take the request back: a resumed campaign goes on."""
        self._client.delete(self._stop)

    def best(self, slot: str) -> Candidate | None:
        """Return the best candidate completed for `slot`, or None."""
        found = self._run("best", slot)
        return None if found is None else Candidate(slot, float(found[0]), found[1], found[2].decode())

    def best_score(self, slot: str) -> float | None:
        """Return the score of `best(slot)` without its payload, or None: what is no better need not be sent."""
        found: Any = self._client.hget(self._keys[7], slot)
        return None if found is None else float(found)

    def slots(self) -> list[str]:
        """Return the slots that have a candidate, sorted."""
        found: Any = self._client.hkeys(self._keys[7])
        return sorted(slot.decode() for slot in found)

    def beat(self, worker: str, fields: str) -> None:
        """Store the newest heartbeat of `worker`, a JSON text."""
        self._client.hset(self._beats, worker, fields)

    def beats(self) -> dict[str, str]:
        """Return the newest heartbeat of every worker."""
        found: Any = self._client.hgetall(self._beats)
        return {worker.decode(): fields.decode() for worker, fields in found.items()}

    def _run(self, name: str, *args: Any) -> Any:
        return self._scripts[name](keys=self._keys, args=args)


def _ms(lease_s: float) -> int:
    if not (math.isfinite(lease_s) and lease_s > 0):
        raise ValueError(f"lease_s must be finite and > 0, got {lease_s}")
    return math.ceil(lease_s * 1000)


def _id_of(record: str) -> int:
    try:
        found = json.loads(record)
    except ValueError as error:
        raise ValueError(f"record must be JSON, got {record[:80]!r}: {error}") from error
    episode = found.get("id") if isinstance(found, dict) else None
    if not isinstance(episode, int) or isinstance(episode, bool) or episode < 0:
        raise ValueError(f'record must be an object with an int "id" >= 0, got {record[:80]!r}')
    return episode
