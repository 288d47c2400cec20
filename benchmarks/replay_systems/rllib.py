"""The worker for RLlib's prioritized episode buffer, in this very process: no server, no wire.

It holds episodes and draws single steps of them. Here an episode is one step whose observation is the dictionary of a
sequence's arrays, so that one draw is one sequence. What it draws refers to what it holds: no array is copied.
"""

from typing import Any

import numpy as np
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers import PrioritizedEpisodeReplayBuffer

from benchmarks.replay_systems.protocol import Arrays, Store, serve


class Rllib(Store):
    """`add` takes one weight for all that it is given: a batch goes in with the weight of its first sequence."""

    def open(self, capacity: int) -> None:
        """Begin with a new buffer."""
        self._buffer = PrioritizedEpisodeReplayBuffer(capacity, alpha=0.9)

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """One call for all of them; `add` copies the arrays."""
        self._buffer.add([self._episode(self.sequences[i]) for i in chosen], weight=priorities[0])

    def sample(self, count: int) -> list[Any]:
        """Draw by priority."""
        episodes: list[Any] = self._buffer.sample(count, beta=0.6)
        return episodes

    def update(self, drawn: list[Any], priorities: np.ndarray) -> None:
        """The buffer remembers what it drew last."""
        self._buffer.update_priorities(priorities)

    def unpack(self, drawn: list[Any]) -> list[Arrays]:
        """The first observation of each."""
        return [episode.get_observations(0) for episode in drawn]

    @staticmethod
    def _episode(sequence: Arrays) -> SingleAgentEpisode:
        return SingleAgentEpisode(
            observations=[sequence, {}], actions=[0], rewards=[0.0], terminated=True, len_lookback_buffer=0
        )


if __name__ == "__main__":
    serve(Rllib())
