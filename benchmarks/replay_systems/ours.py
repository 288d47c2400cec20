"""The worker for Zeroout's own replay, by the calls that an actor and the learner make."""

import numpy as np

from benchmarks.replay_systems.on_redis import OnRedis
from benchmarks.replay_systems.protocol import Arrays, options, serve
from learner.replay.codec import encode
from learner.replay.connection import connect
from learner.replay.pipeline import PipelinedReplay
from learner.replay.replay import Item, Replay, ReplayConfig, Sample

BATCH = 64  # of every sample
_NO_LIMIT = 1e15  # nobody waits for anybody here


class Ours(OnRedis):
    """`learner.replay.Replay`: payloads are encoded in the insert and decoded in the sample.

    With `pipelined`, samples are fetched ahead and priorities written behind, as the learner of a campaign does it.
    """

    takes_empty_arrays = True

    def __init__(self, url: str, *, pipelined: bool) -> None:
        super().__init__(url)
        self._client, self._inserted, self._pipelined = connect(url), 0, pipelined
        self._reader: Replay | PipelinedReplay | None = None

    def open(self, capacity: int) -> None:
        """Begin empty."""
        super().open(capacity)
        config = ReplayConfig(
            capacity_sequences=capacity, replay_ratio=_NO_LIMIT, replay_ratio_tolerance=_NO_LIMIT, min_sequences=1
        )
        if isinstance(self._reader, PipelinedReplay):
            self._reader.close()
        self._replay, reader = (Replay(self._client, "benchmark", config, np.random.default_rng(i)) for i in (0, 1))
        self._reader = PipelinedReplay(reader, BATCH) if self._pipelined else reader

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """Every sequence has an id of its own, as a campaign's have."""
        first = self._inserted
        self._inserted += len(chosen)
        self._replay.insert(
            [
                Item(f"episode-{first + k:08d}", encode(self.sequences[i]), priority)
                for k, (i, priority) in enumerate(zip(chosen, priorities, strict=True))
            ]
        )

    def sample(self, count: int) -> Sample:
        """Draw by priority."""
        assert self._reader is not None
        sample = self._reader.sample(count)
        if sample is None:
            raise RuntimeError("the replay refused a sample")
        return sample

    def update(self, drawn: Sample, priorities: np.ndarray) -> None:
        """New priorities."""
        assert self._reader is not None
        self._reader.update(drawn.keys, priorities)

    def unpack(self, drawn: Sample) -> list[Arrays]:
        """As they are."""
        return drawn.arrays


if __name__ == "__main__":
    serve(Ours(options()["url"], pipelined=options()["pipelined"]))
