"""The worker for the bound: GET and SET of the same bytes by the same client, nothing else.

A batch is one pipeline without a transaction. No priorities, no update, nothing encoded or decoded.
"""

import numpy as np

from benchmarks.replay_systems.on_redis import OnRedis
from benchmarks.replay_systems.protocol import Arrays, options, serve
from learner.replay.codec import decode, encode
from learner.replay.connection import connect


class Raw(OnRedis):
    """A ring of keys."""

    prioritized = False
    takes_empty_arrays = True

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._client, self._random = connect(url), np.random.default_rng(0)

    def open(self, capacity: int) -> None:
        """Encode what will be sent, once."""
        super().open(capacity)
        self._payloads = [encode(sequence) for sequence in self.sequences]
        self._capacity, self._inserted = capacity, 0

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """SET, over the oldest once the ring is full."""
        first = self._inserted
        self._inserted += len(chosen)
        if len(chosen) == 1:
            self._client.set(f"raw:{first % self._capacity}", self._payloads[chosen[0]])
            return
        with self._client.pipeline(transaction=False) as pipeline:
            for k, i in enumerate(chosen):
                pipeline.set(f"raw:{(first + k) % self._capacity}", self._payloads[i])
            pipeline.execute()

    def sample(self, count: int) -> list[bytes]:
        """GET of random keys."""
        size = min(self._inserted, self._capacity)
        with self._client.pipeline(transaction=False) as pipeline:
            for place in self._random.integers(size, size=count).tolist():
                pipeline.get(f"raw:{place}")
            payloads: list[bytes] = pipeline.execute()
        return payloads

    def update(self, drawn: list[bytes], priorities: np.ndarray) -> None:
        """Never called."""
        raise NotImplementedError

    def unpack(self, drawn: list[bytes]) -> list[Arrays]:
        """For the check only."""
        return [decode(payload) for payload in drawn]


if __name__ == "__main__":
    serve(Raw(options()["url"]))
