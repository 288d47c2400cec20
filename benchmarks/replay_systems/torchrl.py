"""The worker for TorchRL's StoreStorage: tensors on a Redis server, drawn uniformly.

Two forms: each array a tensor of its own, as the API means it; and the whole sequence as one tensor of bytes, encoded
and decoded by our codec, which is fewer commands for it.
"""

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers import StoreStorage

from benchmarks.replay_systems.on_redis import OnRedis
from benchmarks.replay_systems.protocol import Arrays, options, serve
from learner.replay.codec import decode, encode


class TorchRL(OnRedis):
    """StoreStorage over the unix socket."""

    prioritized = False

    def __init__(self, url: str, *, as_bytes: bool) -> None:
        super().__init__(url)
        self._socket, self._as_bytes = url.removeprefix("unix://"), as_bytes

    def open(self, capacity: int) -> None:
        """Begin with a new storage."""
        super().open(capacity)
        self._buffer = ReplayBuffer(storage=StoreStorage(capacity, unix_socket_path=self._socket))

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """`add` for one, `extend` for more."""
        tensors = [self._tensors(self.sequences[i]) for i in chosen]
        if len(tensors) == 1:
            self._buffer.add(TensorDict(tensors[0], []))
        else:
            stacked = {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}
            self._buffer.extend(TensorDict(stacked, [len(tensors)]))

    def sample(self, count: int) -> list[Arrays] | Arrays:
        """Draw uniformly; arrays come stacked, sequences that travelled as bytes one by one."""
        drawn = {name: tensor.numpy() for name, tensor in self._buffer.sample(count).items()}
        return [decode(payload.tobytes()) for payload in drawn["payload"]] if self._as_bytes else drawn

    def update(self, drawn: list[Arrays] | Arrays, priorities: np.ndarray) -> None:
        """Never called."""
        raise NotImplementedError

    def unpack(self, drawn: list[Arrays] | Arrays) -> list[Arrays]:
        """Parted again, where they come stacked."""
        if isinstance(drawn, list):
            return drawn
        return [{name: drawn[name][b] for name in self.sequences[0]} for b in range(len(next(iter(drawn.values()))))]

    def _tensors(self, sequence: Arrays) -> dict[str, torch.Tensor]:
        if self._as_bytes:
            return {"payload": torch.frombuffer(bytearray(encode(sequence)), dtype=torch.uint8)}
        return {name: torch.from_numpy(array) for name, array in sequence.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = options()
    serve(TorchRL(told["url"], as_bytes=told["as_bytes"]))
