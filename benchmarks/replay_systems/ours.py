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

    With `pipelined`, samples are fetched ahead, inserts and priorities written behind.
    """

    takes_empty_arrays = True

    def __init__(self, url: str, *, pipelined: bool) -> None:
        super().__init__(url)
        self._client, self._inserted, self._pipelined = connect(url), 0, pipelined
        self._replay: Replay | PipelinedReplay | None = None

    def open(self, capacity: int) -> None:
        """Begin empty."""
        super().open(capacity)
        config = ReplayConfig(
            capacity_sequences=capacity, replay_ratio=_NO_LIMIT, replay_ratio_tolerance=_NO_LIMIT, min_sequences=1
        )
        if isinstance(self._replay, PipelinedReplay):
            self._replay.close()
        replay = Replay(self._client, "benchmark", config, np.random.default_rng(0))
        self._replay = PipelinedReplay(replay, BATCH) if self._pipelined else replay

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """Every sequence has an id of its own, as a campaign's have."""
        assert self._replay is not None
        first = self._inserted
        self._inserted += len(chosen)
        items = (
            Item(f"episode-{first + k:08d}", encode(self.sequences[i]), priority)
            for k, (i, priority) in enumerate(zip(chosen, priorities, strict=True))
        )
        self._replay.insert(list(items) if isinstance(self._replay, PipelinedReplay) else items)

    def sample(self, count: int) -> Sample:
        """Draw by priority."""
        assert self._replay is not None
        sample = self._replay.sample(count)
        if sample is None:
            raise RuntimeError("the replay refused a sample")
        return sample

    def update(self, drawn: Sample, priorities: np.ndarray) -> None:
        """New priorities."""
        assert self._replay is not None
        self._replay.update(drawn.keys, priorities)

    def acknowledge(self) -> None:
        """Wait for what is written behind."""
        if isinstance(self._replay, PipelinedReplay):
            self._replay.flush()

    def unpack(self, drawn: Sample) -> list[Arrays]:
        """As they are."""
        return drawn.arrays


if __name__ == "__main__":
    serve(Ours(options()["url"], pipelined=options()["pipelined"]))
