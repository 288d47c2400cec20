"""The worker for cpprb: prioritized, in C++ within this very process. No server, no wire: the upper bound."""

import cpprb
import numpy as np

from benchmarks.replay_systems.protocol import Arrays, Store, serve

Drawn = dict[str, np.ndarray]


class Cpprb(Store):
    """A sequence is one item, its arrays the item's fields."""

    def open(self, capacity: int) -> None:
        """Begin with a new buffer."""
        fields = {name: {"shape": a.shape, "dtype": a.dtype} for name, a in self.sequences[0].items()}
        self._buffer = cpprb.PrioritizedReplayBuffer(capacity, fields, alpha=0.9)

    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """One call for all of them."""
        if len(chosen) == 1:
            self._buffer.add(**self.sequences[chosen[0]], priorities=priorities[0])
            return
        stacked = {name: np.stack([self.sequences[i][name] for i in chosen]) for name in self.sequences[0]}
        self._buffer.add(**stacked, priorities=np.array(priorities))

    def sample(self, count: int) -> Drawn:
        """Draw by priority; the arrays come stacked."""
        drawn: Drawn = self._buffer.sample(count, beta=0.6)
        return drawn

    def update(self, drawn: Drawn, priorities: np.ndarray) -> None:
        """New priorities."""
        self._buffer.update_priorities(drawn["indexes"], priorities)

    def unpack(self, drawn: Drawn) -> list[Arrays]:
        """Parted again."""
        return [{name: drawn[name][b] for name in self.sequences[0]} for b in range(len(drawn["indexes"]))]


if __name__ == "__main__":
    serve(Cpprb())
