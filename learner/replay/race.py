"""One race on one server: its keys, its scripts, and what is said when something foreign lies under its keys.

Called by `replay.py` only; the scripts are the .lua files beside this one. Every request has a name of its own, by
which a script knows a repetition whose first reply was lost, and answers it with the first result.
"""

import contextlib
import logging
import math
import secrets
from collections.abc import Sequence
from typing import Any

import redis
from redis.exceptions import ResponseError

from env.errors import UserError
from learner.replay.connection import namespace, script

__all__ = ["Counts", "Race"]

_log = logging.getLogger(__name__)

_TYPES = {"clock": "zset", "data": "hash", "weight": "hash", "age": "zset", "ids": "hash", "state": "hash"}
_SCRIPTS = ("insert", "sample", "update", "reject")
_COUNTERS = ("size", "bytes", "inserted", "sampled", "evicted", "rejected", "waits", "batch", "generation", "total")
_KEEP_RESULT_S = 900  # far above the time for which a worker repeats a command


Counts = dict[str, float]
"""The counters of one moment, by the names in `_COUNTERS`."""


class Race:
    """The keys `{prefix}:replay:*` on the server of `client`; one instance for each thread.

    Attributes:
        clock, data, weight, age, ids, state: names of the keys, see replay.py.
        last: name of the key of this caller's last result.

    """

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self.client, tag = client, namespace(prefix)
        # Not from a seed: two processes with the same one must not take each other's results.
        self._me, self._requests = secrets.token_hex(8), 0
        names = [f"{tag}:replay:{name}" for name in _TYPES]
        self.clock, self.data, self.weight, self.age, self.ids, self.state = names
        self.last = f"{tag}:replay:last:{self._me}"
        self._keys = [*names, self.last]
        self._scripts = {name: script(client, "race.lua", f"{name}.lua") for name in _SCRIPTS}

    def run(self, name: str, *args: Any) -> Any:
        """Return the result of the script `name`.

        Raises UserError when a key is of the wrong type or a counter is no number: nothing was changed then.
        """
        self._requests += 1
        request: tuple[Any, ...] = (f"{self._me}:{self._requests}", _KEEP_RESULT_S)
        try:
            (damaged, *names), result = self._scripts[name](keys=self._keys, args=[*request, *args])
        except ResponseError as error:
            raise self.explained(error) from error
        if damaged:
            _log.warning(
                "replay: %d damaged sequences are removed under %s (%s%s)", damaged, self.clock,
                ", ".join(key.decode(errors="replace") for key in names), ", ..." if damaged > len(names) else "",
            )  # fmt: skip
        return result

    def payloads(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the payloads of sequences just drawn; None for one that has been evicted since."""
        found: Any = self.client.hmget(self.data, keys)
        return list(found)

    def counts(self, fields: Any) -> Counts:
        """Return the counters from what HGETALL of `state` has answered, an error included; UserError as in `run`."""
        if isinstance(fields, Exception):
            raise self.explained(fields) from fields
        return {name: self._number(name, fields.get(name.encode(), b"0")) for name in _COUNTERS}

    def _number(self, field: str, raw: bytes) -> float:
        with contextlib.suppress(ValueError):
            number = float(raw)
            if math.isfinite(number):
                return number
        raise _unreadable(self.state, field, raw)

    def explained(self, error: Exception) -> Exception:
        """Return the UserError that names the key when `error` is about a foreign value there, else `error`."""
        if "WRONGTYPE" in str(error):
            for key, expected in zip(self._keys, (*_TYPES.values(), "string"), strict=True):
                found: Any = self.client.type(key)
                if found.decode() not in (expected, "none"):
                    return _foreign(key, expected=f"a value of type {expected}", got=f"a {found.decode()}")
        if "UNREADABLE" in str(error):
            field = str(error).partition("UNREADABLE ")[2].split()[0]
            got: Any = self.client.hget(self.state, field)
            return _unreadable(self.state, field, got)
        return error


def _unreadable(key: str, field: str, raw: bytes | None) -> UserError:
    return _foreign(key, expected=f"a number in its field {field}", got=repr((raw or b"")[:40]))


def _foreign(key: str, *, expected: str, got: str) -> UserError:
    return UserError(
        f"the Redis key {key}",
        expected=expected,
        got=f"{got} that Zeroout did not write",
        remedy=f"remove it (DEL '{key}'); the replay mends the rest by itself",
    )
