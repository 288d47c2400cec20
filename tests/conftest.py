"""One thread for all; for tests that need a server, one embedded server for all, a prefix of its own for each."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from deploy.redis_server import EmbeddedServer
from learner.replay.connection import connect


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Torch on one thread: with more, tiny networks take many times longer on shared cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server that all tests share."""
    folder: Path = tmp_path_factory.mktemp("redis")
    with EmbeddedServer(folder) as server:
        yield server.url


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the shared server."""
    with connect(redis_url) as connected:
        yield connected


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"
