"""Metrics on the /metrics endpoint of every Ray node, where Prometheus finds them.

Made inside the process whose numbers they are: by actors/ray_actors.py and deploy/search.py.
"""

import threading
from types import TracebackType
from typing import Any, Self

from ray.util.metrics import Counter, Gauge

from actors.metrics import Metric

__all__ = ["RayMetrics"]

# Ray forgets a gauge that was not set for two of its export intervals (10 s each); a step may take minutes.
_REPEAT_S = 5.0


class RayMetrics:
    """Metrics that carry `labels` beside their own; a context manager, which ends the repetition of the gauges.

    Args:
        repeat_s: seconds between two repetitions.
        labels: of everything that is told, e.g. campaign and actor.

    """

    def __init__(self, *, repeat_s: float = _REPEAT_S, **labels: str) -> None:
        self._labels, self._repeat_s = labels, repeat_s
        self._made: dict[Metric, Any] = {}
        self._standing: dict[tuple[Metric, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter; see `actors.metrics.Metrics`."""
        if amount > 0:  # Ray refuses 0
            with self._lock:
                self._of(counter, Counter).inc(float(amount), labels)

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        """Set a gauge, which stays until it is set anew or this is closed; see `actors.metrics.Metrics`."""
        with self._lock:
            self._standing[gauge, tuple(sorted(labels.items()))] = float(value)
            self._of(gauge, Gauge).set(float(value), labels)

    def _of(self, metric: Metric, kind: type) -> Any:
        """Ray's own object, made at its first use."""
        if metric not in self._made:
            made = kind(metric.name, metric.description, tag_keys=(*self._labels, *metric.by))
            self._made[metric] = made.set_default_tags(self._labels)
        return self._made[metric]

    def _repeat(self) -> None:
        while not self._closed.wait(self._repeat_s):
            with self._lock:
                for (gauge, labels), value in self._standing.items():
                    self._made[gauge].set(value, dict(labels))
