"""What `zeroout doctor --redis` asks a server: does it answer, and is it set up to keep what it is given?

Only INFO and keys under `zeroout:` are used, which the user of deploy/users.acl may; what a server does not tell is
said and not held against it.
"""

import secrets
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.exceptions import NoPermissionError

from deploy.check import GIB, Check
from learner.replay.connection import connect, namespace, redact

__all__ = ["server_checks"]

_PATIENCE_S = 1.0
_OLDEST = (6, 2)  # GETEX-era scripts and HRANDFIELD, which the replay calls
_LEAST_FREE_BYTES = GIB  # a campaign's replay and networks
_LOOPBACK = ("", "localhost", "127.0.0.1", "::1")


def server_checks(url: str) -> Iterator[Check]:
    """Look at the server; the first line is wrong, and the only one, where it does not answer."""
    where = redact(url)
    try:
        with connect(url, patience_s=_PATIENCE_S) as client:
            client.ping()
            info: dict[str, Any] = client.info()
            can_write = _can_write(client)
    except redis.RedisError as error:
        refused = isinstance(error, redis.AuthenticationError | NoPermissionError) or "NOAUTH" in str(error)
        detail = f"{where} {'refused' if refused else 'gave no answer'} ({redact(str(error))})"
        correct = "correct the URL: rediss://USER:PASSWORD@HOST:PORT"
        remedy = f"{correct}, as its ACL has them" if refused else f"start that server, or {correct}"
        yield Check(name="redis server", ok=False, detail=detail, remedy=remedy)
        return
    yield _version(where, info)
    yield _eviction(info)
    yield _log(info)
    yield _memory(info)
    yield _way(url)
    yield can_write


def _version(where: str, info: dict[str, Any]) -> Check:
    product = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "of an untold version")
    compatible = tuple(int(part) for part in str(info.get("redis_version", "6.2")).split(".")[:2])
    ok = compatible >= _OLDEST
    remedy = "" if ok else "install Redis 6.2 or newer, or any Valkey"
    return Check(name="redis server", ok=ok, detail=f"{where} answers: {product} {version}", remedy=remedy)


def _eviction(info: dict[str, Any]) -> Check:
    policy = str(info.get("maxmemory_policy", "not told"))
    ok = policy in ("noeviction", "not told")
    remedy = "" if ok else "it may drop episodes: redis-cli CONFIG SET maxmemory-policy noeviction"
    return Check(name="redis eviction", ok=ok, detail=policy, remedy=remedy)


def _log(info: dict[str, Any]) -> Check:
    """Without the append-only file a server that is restarted has lost the replay."""
    told = info.get("aof_enabled")
    if told is None:
        return Check(name="redis log", ok=True, detail="not told whether there is an append-only file")
    failed = info.get("aof_last_write_status", "ok") != "ok"
    if failed:
        remedy = "make room on the server's disk: what it cannot write it will have lost after a restart"
        return Check(name="redis log", ok=False, detail="the last write to the append-only file failed", remedy=remedy)
    remedy = "" if told else "redis-cli CONFIG SET appendonly yes (and in its configuration: deploy/redis.conf)"
    detail = "append-only file" if told else "no append-only file: a restart loses replay and episodes in flight"
    return Check(name="redis log", ok=bool(told), detail=detail, remedy=remedy)


def _memory(info: dict[str, Any]) -> Check:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0) or info.get("total_system_memory", 0))
    if not most:
        return Check(name="redis memory", ok=True, detail=f"{used / GIB:.1f} GiB used, of what is not told")
    ok = most - used >= _LEAST_FREE_BYTES
    remedy = "" if ok else "redis-cli CONFIG SET maxmemory with a GiB more, or delete keys of old campaigns"
    detail = f"{used / GIB:.1f} GiB used of {most / GIB:.1f}"
    return Check(name="redis memory", ok=ok, detail=detail, remedy=remedy)


def _way(url: str) -> Check:
    """Over a network, the password and all data are to be read by nobody else."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or (parts.hostname or "") in _LOOPBACK:
        return Check(name="redis way", ok=True, detail="inside this machine")
    if parts.scheme != "rediss":
        remedy = "use rediss:// with a server that has TLS (deploy/redis.conf)"
        return Check(name="redis way", ok=False, detail="over a network without TLS", remedy=remedy)
    if not parts.password:
        remedy = "give the server users and this one a password (deploy/users.acl)"
        return Check(name="redis way", ok=False, detail="TLS without a password", remedy=remedy)
    return Check(name="redis way", ok=True, detail="TLS and a password")


def _can_write(client: redis.Redis) -> Check:
    """A key of ours, written by a script, read and deleted: what a user's ACL has to allow."""
    key, value = f"{namespace('zeroout:doctor')}:{secrets.token_hex(8)}", secrets.token_hex(8)
    try:
        client.register_script("return redis.call('SET', KEYS[1], ARGV[1])")(keys=[key], args=[value])
        found: Any = client.get(key)
        client.delete(key)
    except redis.RedisError as error:
        remedy = "allow it what deploy/users.acl does, and see that memory and disk are not full"
        return Check(name="redis rights", ok=False, detail=redact(str(error)), remedy=remedy)
    if found is None or found.decode() != value:
        remedy = "see whether another program deletes keys there"
        return Check(name="redis rights", ok=False, detail="what was written was not there after it", remedy=remedy)
    return Check(name="redis rights", ok=True, detail="keys under zeroout: can be written, read and deleted")
