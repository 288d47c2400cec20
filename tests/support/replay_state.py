"""What must hold of a replay's keys in Redis whatever has happened, and the servers it must hold on."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from deploy import redis_server

__all__ = ["assert_consistent", "chosen_server", "weights_of"]


def weights_of(client: redis.Redis, prefix: str) -> dict[str, float]:
    """Return key -> weight of all sequences held."""
    records = client.hgetall(f"{{{prefix}}}:replay:weight")
    return {name.decode(): float(record.split()[0]) for name, record in records.items()}


def assert_consistent(client: redis.Redis, prefix: str) -> None:
    """Every sequence has each of its parts once, and the sums are the sums."""
    clock, data, weight, age, ids, state = (
        f"{{{prefix}}}:replay:{name}" for name in ("clock", "data", "weight", "age", "ids", "state")
    )
    keys = set(client.hkeys(data))
    assert keys == set(client.hkeys(weight)) == set(client.zrange(clock, 0, -1))
    assert keys == {b":".join([generation, name]) for name, generation in client.hgetall(ids).items()}
    ages = dict(client.zrange(age, 0, -1, withscores=True))
    assert ages == {key: float(key.split(b":")[0]) for key in keys}
    counts = client.hgetall(state)
    assert float(counts[b"total"]) == math.fsum(weights_of(client, prefix).values())
    assert int(counts[b"bytes"]) == sum(map(len, client.hvals(data)))
    assert int(counts[b"size"]) == len(keys)


@contextmanager
def chosen_server(name: str) -> Iterator[None]:
    """Let embedded servers be `name`: "bundled", or "redis-server", where the test is skipped without one on PATH."""
    program: str | Path | None = redis_server._bundled_server() if name == "bundled" else shutil.which(name)
    if program is None:
        pytest.skip(f"there is no {name} on PATH")
    before = os.environ.get("ZEROOUT_REDIS_SERVER")
    os.environ["ZEROOUT_REDIS_SERVER"] = str(program)
    try:
        yield
    finally:
        if before is None:
            del os.environ["ZEROOUT_REDIS_SERVER"]
        else:
            os.environ["ZEROOUT_REDIS_SERVER"] = before
