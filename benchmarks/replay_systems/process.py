"""The benchmark's side of a worker: its server, its process, requests and replies."""

import json
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import redis

from deploy.redis_server import EmbeddedServer

ROOT = Path(__file__).resolve().parents[2]
_STOP_WAIT_S = 60.0


class WorkerError(Exception):
    """A worker could not do what it was asked; the message is the first line of why."""


class WorkerProcess:
    """A running worker, ended with the context."""

    def __init__(self, python: Path, module: str, options: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.replay_systems.{module}", json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __enter__(self) -> Self:
        """Nothing more to do: the process runs."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its stdin, upon which it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(_STOP_WAIT_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, do: str, *, wait_s: float = 300.0, **arguments: Any) -> dict[str, Any]:
        """The reply to a request; WorkerError when it is an error, late, or never comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._last_words()) from None
        if not select.select([self._process.stdout], [], [], wait_s)[0]:
            self._process.kill()
            raise WorkerError(f"no answer to {do!r} in {wait_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _last_words(self) -> str:
        code = self._process.wait(_STOP_WAIT_S)
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ended with {code}"


@contextmanager
def server(transport: str) -> Iterator[str]:
    """The URL of an embedded server of its own, "unix" or "tcp"; the latter has a port of the loopback besides."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="zeroout-benchmark-"))
        url = stack.enter_context(EmbeddedServer(Path(folder))).url
        yield url if transport == "unix" else _with_port(url)


def _with_port(url: str) -> str:
    with redis.Redis.from_url(url) as client, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        client.config_set("bind", "127.0.0.1")
        client.config_set("port", port)
    return f"redis://127.0.0.1:{port}/0"
