"""One race on one server: its keys, its scripts, and what is said when something foreign lies under its keys.

Called by `replay.py` only; the scripts are the .lua files beside this one. Every request has a name of its own, by
which a script knows a repetition whose first reply was lost, and answers it with the first result.
"""

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis
from redis.exceptions import ResponseError

from env.errors import UserError
from learner.replay.connection import Command, namespace, script, streamed

__all__ = ["Counts", "Race"]

_log = logging.getLogger(__name__)

_TYPES = {"clock": "zset", "data": "hash", "weight": "hash", "age": "zset", "ids": "hash", "state": "hash"}
_SCRIPTS = ("insert", "sample", "update", "reject")
_COUNTERS = ("size", "bytes", "inserted", "sampled", "evicted", "rejected", "waits", "batch", "generation", "total")
_KEEP_RESULT_S = 900  # far above the time for which a worker repeats a command
_AHEAD = 4  # requests on their way at once
_IDS = 4000  # asked for by one command


Counts = dict[str, float]
"""The counters of one moment, by the names in `_COUNTERS`."""


class Race:
    """The keys `{prefix}:replay:*` on the server of `client`; one instance for each thread.

    Attributes:
        clock, data, weight, age, ids, state: names of the keys, see replay.py.
        last: names of the keys of this caller's last results.

    """

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self.client, self._tag = client, namespace(prefix)
        names = [f"{self._tag}:replay:{name}" for name in _TYPES]
        self.clock, self.data, self.weight, self.age, self.ids, self.state = names
        self._keys = names
        self._scripts = {name: script(client, "race.lua", f"{name}.lua") for name in _SCRIPTS}
        self._by_sha = {loaded.sha: loaded for loaded in self._scripts.values()}
        self._begin()

    def _begin(self) -> None:
        """Take a name for this process: two must not take each other's results, so it is from no seed."""
        self._process, self._me, self._requests = os.getpid(), secrets.token_hex(8), 0
        self.last = [f"{self._tag}:replay:last:{self._me}:{place}" for place in range(_AHEAD)]
        self._loaded: set[str] = set()

    def run(self, name: str, *args: Any) -> Any:
        """Return the result of the script `name`.

        Raises UserError when a key is of the wrong type or a counter is no number: nothing was changed then.
        """
        return self._result(self._again(self._command(name, args)))

    def run_each(self, name: str, requests: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Yield the results of the script `name`, once for the arguments of each request, as `run`.

        The next requests are taken, and sent, while the server works on the ones before.
        """
        if name not in self._loaded:  # a server that learns of it on the way would refuse the first and take the next
            self.client.script_load(self._scripts[name].script)
            self._loaded.add(name)
        commands = (self._command(name, args) for args in requests)
        return map(self._result, streamed(self.client, commands, self._again, ahead=_AHEAD))

    def payloads(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the payloads of sequences just drawn; None for one that has been evicted since."""
        found: Any = self.client.hmget(self.data, keys)
        return list(found)

    def holding(self, ids: Sequence[str]) -> int:
        """Return how many of the ids are held."""
        parts = (ids[start : start + _IDS] for start in range(0, len(ids), _IDS))
        return sum(generation is not None for part in parts for generation in self.client.hmget(self.ids, part))

    def _command(self, name: str, args: Sequence[Any]) -> Command:
        """Return a new request of the script `name`; its result takes the place of that `_AHEAD` requests before."""
        if os.getpid() != self._process:
            self._begin()
        self._requests += 1
        keys = [*self._keys, self.last[self._requests % _AHEAD]]
        request = (f"{self._me}:{self._requests}", _KEEP_RESULT_S)
        return "EVALSHA", self._scripts[name].sha, len(keys), *keys, *request, *args

    def _again(self, command: Command) -> Any:
        """Return the answer to a script's command, which is loaded where the server does not know it."""
        _, sha, key_count, *rest = command
        try:
            return self._by_sha[sha](keys=rest[:key_count], args=rest[key_count:])
        except ResponseError as error:
            raise self.explained(error) from error

    def _result(self, answer: Any) -> Any:
        """Return a script's result; the damage that it has found is logged."""
        (damaged, *names), result = answer
        if damaged:
            _log.warning(
                "replay: %d damaged sequences are removed under %s (%s%s)", damaged, self.clock,
                ", ".join(key.decode(errors="replace") for key in names), ", ..." if damaged > len(names) else "",
            )  # fmt: skip
        return result

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
            expected_of = dict(zip(self._keys, _TYPES.values(), strict=True)) | dict.fromkeys(self.last, "string")
            for key, expected in expected_of.items():
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
