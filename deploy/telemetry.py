"""What the driver tells those who watch: gauges for Prometheus, and event files for TensorBoard.

Called by the driver's loop (deploy/search.py), which knows what no single worker does: the frontier and the records.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.metrics import (
    EPISODES_PLANNED,
    EPISODES_RECORDED,
    FRONTIER_ACCURACY,
    FRONTIER_CROSS_ENTROPY,
    LAST_EPISODE,
    REDIS_MAX_BYTES,
    REDIS_USED_BYTES,
    Metrics,
)
from deploy.event_files import EventFiles
from deploy.progress import SearchSnapshot

__all__ = ["Telemetry"]

_MEMORY_PERIOD_S = 5.0


class Telemetry:
    """The driver's part of what is told.

    Args:
        metrics: told of each snapshot.
        events: told of each episode and of the learner's heartbeats.
        memory: asks Redis for (bytes in use, bytes allowed or 0 for no limit); None where it does not say.

    """

    def __init__(self, metrics: Metrics, events: EventFiles, memory: Callable[[], tuple[int, int] | None]) -> None:
        self._metrics, self._events, self._memory = metrics, events, memory
        self._asked_s = -_MEMORY_PERIOD_S
        metrics.set(LAST_EPISODE, time.time())

    def episodes(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell of episodes that were just recorded in the folder."""
        self._events.episodes(records)
        if records:
            self._metrics.set(LAST_EPISODE, max(record["finished"] for record in records))

    def look(self, snapshot: SearchSnapshot, learner_beat: Mapping[str, float]) -> None:
        """Tell how the search stands."""
        self._events.learner(learner_beat)
        self._metrics.set(EPISODES_RECORDED, snapshot.done)
        self._metrics.set(EPISODES_PLANNED, snapshot.total)
        for target, _, cross_entropy, accuracy in snapshot.best:
            self._metrics.set(FRONTIER_ACCURACY, accuracy, target=f"{target:g}")
            self._metrics.set(FRONTIER_CROSS_ENTROPY, cross_entropy, target=f"{target:g}")
        if time.monotonic() - self._asked_s >= _MEMORY_PERIOD_S:
            self._asked_s = time.monotonic()
            self._tell_memory()

    def _tell_memory(self) -> None:
        found = self._memory()
        if found is not None:
            self._metrics.set(REDIS_USED_BYTES, found[0])
            self._metrics.set(REDIS_MAX_BYTES, found[1])
