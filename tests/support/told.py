"""A Metrics that remembers, for tests of what is told."""

from collections import Counter

from actors.metrics import Metric

Labels = tuple[tuple[str, str], ...]


class Told:
    """Sums of counters and the newest value of gauges, by metric and labels."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[Metric, Labels]] = Counter()
        self.gauges: dict[tuple[Metric, Labels], float] = {}

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        assert counter.kind == "counter"
        assert set(labels) == set(counter.by)
        assert amount >= 0
        self.counters[counter, tuple(labels.items())] += amount  # type: ignore[assignment]

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        assert gauge.kind == "gauge"
        assert set(labels) == set(gauge.by)
        self.gauges[gauge, tuple(labels.items())] = value

    def __getitem__(self, metric: Metric) -> float:
        """The value of a metric without labels of its own."""
        return self.counters[metric, ()] if metric.kind == "counter" else self.gauges[metric, ()]

    def by(self, metric: Metric) -> dict[str, float]:
        """Its values by its one label."""
        kept = self.counters if metric.kind == "counter" else self.gauges
        return {labels[0][1]: value for (found, labels), value in kept.items() if found == metric}
