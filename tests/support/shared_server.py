"""Servers as a cluster would share them: by a configuration file, or behind a password."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from deploy import redis_server

__all__ = ["certificates", "free_port", "program", "serving"]

_START_S = 30.0


def program(name: str) -> Path:
    """The server program "bundled" or "redis-server"; the test is skipped without one on PATH."""
    found = redis_server._bundled_server() if name == "bundled" else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} on PATH")
    return Path(found)


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificates(folder: Path) -> None:
    """Write server.key, server.crt and ca.crt for 127.0.0.1, as deploy/redis.conf says."""
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    made = subprocess.run(
        [*command.split(), "-keyout", "server.key", "-out", "server.crt"], cwd=folder, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    shutil.copy(folder / "server.crt", folder / "ca.crt")


@contextlib.contextmanager
def serving(server: Path, folder: Path, *arguments: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """The server with these arguments in `folder`, once it answers at `url`; it logs to `log` there, and is ended."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, *arguments], cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(url):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    """Whether a server listens there; a refusal is an answer."""
    with redis.Redis.from_url(url, retry=None) as client:
        try:
            client.ping()
        except (redis.AuthenticationError, redis.ResponseError):
            return True
        except redis.ConnectionError as error:
            return "CERTIFICATE" in str(error)
    return True
