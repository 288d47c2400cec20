"""The way to the server: clients, outages that outlast redis-py's own retries, and the check at the start.

Called by everything that holds a `redis.Redis`; the rest of `learner/replay/` takes a client and shares the two
helpers at the end (names under one hash tag, scripts from this package).
"""

import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from importlib import resources
from typing import Any, Self, TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.commands.core import Script
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from env.errors import UserError

__all__ = [
    "Command",
    "check_server",
    "connect",
    "memory_bytes",
    "namespace",
    "redact",
    "retrying",
    "script",
    "streamed",
]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# OutOfMemoryError is back-pressure: it ends when something is deleted. BusyLoadingError ends by itself.
_PASSING = (redis.ConnectionError, redis.TimeoutError, BusyLoadingError, OutOfMemoryError)
_REPEATED = (redis.ConnectionError, redis.TimeoutError, BusyLoadingError, ResponseError)  # by redis-py, see `_Retry`
# redis-py derives these two from ConnectionError, but no waiting mends them.
_LASTING = (AuthenticationError, AuthorizationError)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_PAUSE_CAP_S, _LEAST_REPEATED = 0.5, 2  # of redis-py's own repetitions

Command = tuple[Any, ...]
"""A command's name and arguments."""


class _Retry(Retry):
    """redis-py's retries up to a deadline, and of what passes only.

    A full or busy server is waited for, a refused password is not offered again and again.
    """

    def __init__(self, patience_s: float) -> None:
        backoff = ExponentialWithJitterBackoff(base=_FIRST_PAUSE_S, cap=_PAUSE_CAP_S)
        super().__init__(backoff, -1, _REPEATED)  # as often as the deadline allows
        self._patience_s = patience_s

    def __deepcopy__(self, memo: Any) -> "_Retry":
        return _Retry(self._patience_s)

    def call_with_retry(
        self,
        do: Callable[[], _T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> _T:
        start, failures = time.monotonic(), 0

        def passing(error: Exception) -> bool:
            nonlocal failures
            failures += 1
            over = time.monotonic() - start > self._patience_s and failures > _LEAST_REPEATED
            if over or isinstance(error, _LASTING) or not (isinstance(error, _PASSING) or _is_busy(error)):
                return False
            return is_retryable is None or is_retryable(error)

        return super().call_with_retry(do, fail, passing, with_failure_count)


def connect(url: str, *, patience_s: float = 2.0) -> redis.Redis:
    """Return a client of bytes for redis://, rediss:// or unix:// (lazy: nothing is sent yet).

    It waits 5 s for a connection and 10 s for an answer, and repeats a failed command for about `patience_s`, so
    whatever is sent must be idempotent. Raises UserError when the URL is not one.
    """
    try:
        return redis.Redis.from_url(
            url, socket_connect_timeout=5, socket_timeout=10, health_check_interval=30, retry=_Retry(patience_s)
        )
    except (ValueError, TypeError):  # what they say may be a part of the password: "secret" as a port
        raise _no_url(url) from None


def redact(url: str) -> str:
    """Return the URL with its passwords, wherever redis-py takes one, replaced by `***`.

    Also of what is no URL, where somebody forgot the scheme or the user's colon.
    """
    url = re.sub(r"(://)([^:@/?\s]*:|).*@" if "://" in url else r"^()([^:@/?\s]*:|).*@", r"\1\2***@", url)
    return re.sub(r"([?&][^=&\s]*password=)[^&\s]*", r"\1***", url)


def retrying(call: Callable[[], _T], deadline_s: float, *, url: str) -> _T:
    """Return `call()`, repeated with growing pauses while the server is away, loading, busy or full.

    `call` must be idempotent. Raises UserError with the redacted URL when it still fails `deadline_s` seconds
    after the start or the server refuses the password; every other error of `call` passes through.
    """
    start, pause_s, failures = time.monotonic(), _FIRST_PAUSE_S, 0
    while True:
        try:
            result = call()
        except _LASTING as error:
            raise _refused(url, error) from error
        except RedisError as error:
            if not isinstance(error, _PASSING) and not _is_busy(error):
                raise
            failures += 1
            waited_s = time.monotonic() - start
            if waited_s + pause_s > deadline_s:
                raise _lost(url, error, waited_s) from error
            if failures == 1:
                _log.warning("Redis at %s: %s; trying again for %.0f s", redact(url), error, deadline_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        else:
            if failures:
                _log.warning("Redis at %s answers again after %.1f s", redact(url), time.monotonic() - start)
            return result


def streamed(
    client: redis.Redis, commands: Iterable[Command], again: Callable[[Command], Any], *, ahead: int
) -> Generator[Any, None, None]:
    """Yield the answers to `commands`, in order, while up to `ahead` of them are on their way.

    So the server works while the client makes the next command or uses the last answer, and neither has much in hand at
    once. At the first error, of the server or the connection, what is not yet answered is asked for again, one command
    after the other by `again`, and so is all that follows: commands must be idempotent.
    """
    waiting: deque[Command] = deque()
    with _Stream(client) as stream:
        for command in commands:
            stream.send(command, first=not waiting)
            waiting.append(command)
            if len(waiting) >= ahead:
                yield stream.answer(waiting.popleft(), again)
        while waiting:
            yield stream.answer(waiting.popleft(), again)


class _Stream:
    """A connection on which commands are sent before the answers to earlier ones are read; none after an error."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._connection: Any = None  # None, too, when it is lost
        self._unanswered = 0

    def __enter__(self) -> Self:
        with contextlib.suppress(redis.RedisError):
            self._connection = self._pool.get_connection()
        return self

    def __exit__(self, *_: object) -> None:
        if self._unanswered:  # nobody else may read those answers
            self._give_up()
        elif self._connection is not None:
            self._pool.release(self._connection)

    def send(self, command: Command, *, first: bool) -> None:
        """Send a command; a health check may go before it where it is the `first` on its way."""
        if self._connection is None:
            return
        try:
            self._connection.send_command(*command, check_health=first)
            self._unanswered += 1
        except redis.RedisError:
            self._give_up()

    def answer(self, command: Command, again: Callable[[Command], Any]) -> Any:
        """Return the answer to the oldest command on its way, which is `command`."""
        if self._connection is not None:
            try:
                answer = self._connection.read_response()
                self._unanswered -= 1
                return answer
            except redis.RedisError:
                self._give_up()
        return again(command)

    def _give_up(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._pool.release(self._connection)
        self._connection, self._unanswered = None, 0


def check_server(client: redis.Redis, url: str) -> None:
    """Raise UserError unless the server answers, takes the password, and never evicts keys by itself.

    `url` is only for the message. A user who may not read the policy is trusted, with a warning in the log.
    """
    try:
        client.ping()
        policy = _eviction_policy(client)
    except _LASTING as error:
        raise _refused(url, error) from error
    except RedisError as error:
        raise _refused(url, error) if "NOAUTH" in str(error) else _lost(url, error, 0.0) from error
    if policy is None:
        _log.warning("Redis at %s: may not read maxmemory-policy; it must be noeviction", redact(url))
    elif policy != "noeviction":
        raise UserError(
            f"Redis at {redact(url)}",
            expected="maxmemory-policy noeviction",
            got=policy,
            remedy="it may drop episodes: CONFIG SET maxmemory-policy noeviction, or give another --redis",
        )


def memory_bytes(client: redis.Redis) -> tuple[int, int] | None:
    """Return (in use, allowed) of the server's memory, 0 allowed for no limit; None where it does not say.

    A server that is away is no error here: it is asked for those who watch.
    """
    try:
        found = client.info("memory")
        return int(found["used_memory"]), int(found["maxmemory"])
    except (RedisError, KeyError, ValueError):
        return None


def namespace(prefix: str) -> str:
    """Return `{prefix}`: all keys of a campaign carry this hash tag, so that one script may touch them all."""
    if not prefix or set(prefix) & set("{} \n\r\t"):
        raise UserError(
            "the Redis prefix",
            expected="a name without braces or blanks",
            got=repr(prefix),
            remedy="give another prefix",
        )
    return f"{{{prefix}}}"


def script(client: redis.Redis, *names: str) -> Script:
    """Return the Lua files `names` of this package, joined in that order, as one script (sent once, then by hash)."""
    folder = resources.files(__package__)
    return client.register_script("\n".join((folder / name).read_text("utf-8") for name in names))


def _is_busy(error: Exception) -> bool:
    """Whether the server is in the middle of a long script: a large replay being mended, or somebody else's."""
    return isinstance(error, ResponseError) and str(error).startswith("BUSY ")


def _eviction_policy(client: redis.Redis) -> str | None:
    """Return maxmemory-policy, or None where the user may ask neither way (both are "dangerous" to ACLs)."""
    try:
        return str(client.info("memory")["maxmemory_policy"])
    except (NoPermissionError, KeyError):
        pass
    try:
        answer = client.config_get("maxmemory-policy")
    except (NoPermissionError, ResponseError):
        return None
    policy = next(iter(answer.values()), None)
    return policy.decode() if isinstance(policy, bytes) else policy


def _no_url(url: str) -> UserError:
    return UserError(
        "the Redis URL",
        expected="redis://, rediss:// or unix://, with / : @ ? # in its password written as %2F %3A %40 %3F %23",
        got=repr(redact(url)),
        remedy="give --redis redis://HOST:PORT/0",
    )


def _refused(url: str, error: Exception) -> UserError:
    return UserError(
        f"Redis at {redact(url)}",
        expected="that it accepts the user and password",
        got=_one_line(error),
        remedy="give --redis redis://USER:PASSWORD@HOST:PORT/0",
    )


def _lost(url: str, error: Exception, waited_s: float) -> UserError:
    after = f" for {waited_s:.0f} s" if waited_s >= 1 else ""
    return UserError(
        f"Redis at {redact(url)}",
        expected="a server that answers and has memory left",
        got=f"{_one_line(error)}{after}",
        remedy="start it or make room, then resume the campaign",
    )


def _one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split())) or type(error).__name__
