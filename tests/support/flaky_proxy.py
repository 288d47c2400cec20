"""A TCP proxy before a server on a unix socket that loses replies after the server has carried the command out."""

import contextlib
import random
import select
import socket
import threading
from types import TracebackType
from typing import Self

__all__ = ["FlakyProxy"]


class FlakyProxy:
    """Listens on a free port of the loopback while its context is open; 1 of `one_in` replies is lost, at random.

    To lose a reply is to close the connection when the server has answered and nothing of it was passed on.

    Attributes:
        lost: replies lost so far.

    """

    def __init__(self, url: str, *, one_in: int, seed: int) -> None:
        self._path, self._one_in, self._random = url.removeprefix("unix://"), one_in, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self.lost = 0

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, work: "threading._Target", *args: object) -> None:  # type: ignore[name-defined]
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                server.connect(self._path)
                self._start(self._bridge, client, server)

    def _bridge(self, client: socket.socket, server: socket.socket) -> None:
        """Pass bytes on in both directions until one side ends, or a reply is lost."""
        other, awaiting = {client: server, server: client}, False
        with client, server, contextlib.suppress(OSError):
            while not self._closing.is_set():
                for side in select.select([client, server], [], [], 0.05)[0]:
                    data = side.recv(1 << 16)
                    # Only the first part of an answer: a connection that has passed half a reply on stays honest.
                    if side is server and awaiting and self._random.randrange(self._one_in) == 0:
                        self.lost += 1
                        return
                    if not data:
                        return
                    awaiting = side is client
                    other[side].sendall(data)
