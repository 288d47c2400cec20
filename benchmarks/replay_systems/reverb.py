"""The worker for dm-reverb: a prioritized table in a server process, by the quickest of its ways in and out.

In: `Writer` (quicker here than `TrajectoryWriter` and than `Client.insert`), flushed, that is acknowledged, at the end
of each call. Out: `TrajectoryDataset`, which fetches ahead while the last batch is in use: a sample's latency is that
of taking a batch that is often there already, drawn by priorities of some batches ago.

The server listens on every interface and cannot be told not to: worker and server get a network namespace of their
own, with nothing in it but the loopback. Only the thread that asks for it moves, so reverb is imported afterwards.
"""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks.replay_systems.protocol import Arrays, Store, serve

_TABLE = "replay"
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_STOP_WAIT_S = 30.0


class Reverb(Store):
    """A sequence is an item of one step."""

    _server: subprocess.Popen[str] | None = None

    def open(self, capacity: int) -> None:
        """Begin with a new server."""
        import reverb

        self.stop()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.replay_systems.reverb", str(capacity)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._server.stdout is not None
        self._address = f"127.0.0.1:{int(self._server.stdout.readline())}"
        self._writer = reverb.Client(self._address).writer(max_sequence_length=1, chunk_length=1)
        self._tf_client = reverb.TFClient(self._address)
        self._batches: Any = None

    def stop(self) -> None:
        """End the server."""
        if self._server is not None:
            self._batches = None
            self._writer.close()
            self._server.communicate(timeout=_STOP_WAIT_S)
            self._server = None

    def server_pid(self) -> int | None:
        """None before the first server."""
        return self._server.pid if self._server else None

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """Append all, flush once."""
        for i, priority in zip(chosen, priorities, strict=True):
            self._writer.append(self.sequences[i])
            self._writer.create_item(_TABLE, 1, priority)
        self._writer.flush()

    def sample(self, count: int) -> tuple[Any, Arrays]:
        """The next batch: (keys, arrays stacked)."""
        if self._batches is None:
            self._batches = iter(self._dataset(count))
        drawn = next(self._batches)
        return drawn.info.key, {name: tensor.numpy() for name, tensor in drawn.data.items()}

    def update(self, drawn: tuple[Any, Arrays], priorities: np.ndarray) -> None:
        """By the client that reverb's own documentation prefers."""
        self._tf_client.update_priorities(_TABLE, drawn[0], priorities)

    def unpack(self, drawn: tuple[Any, Arrays]) -> list[Arrays]:
        """Parted again."""
        return [{name: array[b] for name, array in drawn[1].items()} for b in range(len(drawn[0]))]

    def _dataset(self, count: int) -> Any:
        """Two batches in flight for each of its threads, whose number is left to reverb, as its documentation says."""
        import reverb
        import tensorflow as tf

        first = self.sequences[0]
        return reverb.TrajectoryDataset(
            self._address, _TABLE,
            dtypes={name: tf.as_dtype(array.dtype) for name, array in first.items()},
            shapes={name: tf.TensorShape((1, *array.shape)) for name, array in first.items()},
            max_in_flight_samples_per_worker=2 * count,
        ).batch(count)  # fmt: skip


def run_server(capacity: int) -> None:
    """Serve until stdin ends; the port is the one line of output."""
    import reverb

    table = reverb.Table(
        _TABLE, reverb.selectors.Prioritized(0.9), reverb.selectors.Fifo(),
        max_size=capacity, rate_limiter=reverb.rate_limiters.MinSize(1),
    )  # fmt: skip
    server = reverb.Server([table])
    print(server.port, flush=True)
    sys.stdin.read()
    server.stop()


def leave_the_network() -> None:
    """Move this process to a network namespace with the loopback only; OSError where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(
            number, f"{os.strerror(number)} (a network namespace, without which it listens on all interfaces)"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def main() -> None:
    """The server where a capacity is given, else the worker."""
    if sys.argv[1].isdigit():
        run_server(int(sys.argv[1]))
        return
    leave_the_network()
    store = Reverb()
    try:
        serve(store)
    finally:
        store.stop()


if __name__ == "__main__":
    main()
