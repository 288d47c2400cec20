"""What a campaign tells those who watch it, number by number, and where it tells it to.

Called by the player, the learner's worker and the driver (deploy/telemetry.py). They are handed a `Metrics`: here is
the one that listens to nothing, so that what plays alone needs no Ray; actors/ray_metrics.py exports to Prometheus.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "EPISODES_PLANNED",
    "EPISODES_RECORDED",
    "FRONTIER_ACCURACY",
    "FRONTIER_CROSS_ENTROPY",
    "LAST_EPISODE",
    "LEARNER_DELTA_Q",
    "LEARNER_GRADIENT_NORM",
    "LEARNER_LOSS",
    "LEARNER_PRIORITY",
    "LEARNER_SKIPPED",
    "LEARNER_UPDATES",
    "LEARNER_WAIT",
    "METRICS",
    "NO_METRICS",
    "PLAYER_ACCURACY",
    "PLAYER_COMPRESSION",
    "PLAYER_EPISODES",
    "PLAYER_IMAGES",
    "PLAYER_REFUSED_SNAPSHOTS",
    "PLAYER_SECONDS",
    "PLAYER_STEPS",
    "PLAYER_WEIGHTS_AGE",
    "REDIS_MAX_BYTES",
    "REDIS_USED_BYTES",
    "REPLAY_BYTES",
    "REPLAY_EVICTED",
    "REPLAY_INSERTED",
    "REPLAY_REFUSED",
    "REPLAY_REJECTED",
    "REPLAY_SAMPLED",
    "REPLAY_SIZE",
    "REPLAY_WAITING",
    "Metric",
    "Metrics",
    "Tally",
]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number under Prometheus's naming rules: base units, the unit last; shares are ratios in [0, 1]."""

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    by: tuple[str, ...] = ()  # labels beside those that the process carries: campaign, and for a player actor

    @property
    def exported(self) -> str:
        """Its name in Prometheus, as Ray makes it."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


class Metrics(Protocol):
    """Where numbers are told. Calls are cheap and never fail for what is told."""

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter by `amount` >= 0; `labels` are its `by`."""

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        """Say what a gauge stands at from now on; `labels` are its `by`."""


class _NoMetrics:
    """Listens to nothing."""

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        """Forget it."""

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        """Forget it."""


NO_METRICS: Metrics = _NoMetrics()


class Tally:
    """A counter of what somebody else counts: each look adds what came since the one before.

    The first look adds nothing: a restarted process must not count again what an earlier life of it has told.
    """

    def __init__(self, metrics: Metrics, counter: Metric) -> None:
        self._metrics, self._counter = metrics, counter
        self._seen: float | None = None

    def look(self, total: float) -> None:
        """Note that the total stands at `total`; one that fell begins anew."""
        if self._seen is not None and total > self._seen:
            self._metrics.add(self._counter, total - self._seen)
        self._seen = total


def _counter(name: str, description: str, *by: str) -> Metric:
    return Metric(name=f"zeroout_{name}", kind="counter", description=description, by=by)


def _gauge(name: str, description: str, *by: str) -> Metric:
    return Metric(name=f"zeroout_{name}", kind="gauge", description=description, by=by)


# of each player
PLAYER_STEPS = _counter("env_steps", "Steps played: filters zeroed, the network retrained and measured")
PLAYER_EPISODES = _counter("episodes", "Episodes played and recorded")
PLAYER_IMAGES = _counter("retrained_images", "Images that networks were retrained on, recoveries included")
PLAYER_SECONDS = _counter(
    "phase_seconds",
    "Wall time by phase: decide, compact, retrain, evaluate, score, recover, snapshot, insert, wait",
    "phase",
)
PLAYER_REFUSED_SNAPSHOTS = _counter(
    "refused_snapshots", "Snapshots that no episode could go on from: the episode began anew"
)
PLAYER_COMPRESSION = _gauge("compression_ratio", "Share removed from the network in work")
PLAYER_ACCURACY = _gauge("accuracy_ratio", "Accuracy of the network in work on a sample of the validation split")
PLAYER_WEIGHTS_AGE = _gauge("weights_age_updates", "Updates that the newest weights are ahead of those that decide")

# of the learner
LEARNER_UPDATES = _counter("learner_updates", "Updates made")
LEARNER_SKIPPED = _counter("learner_skipped_updates", "Updates not made because a loss or gradient was not finite")
LEARNER_WAIT = _counter("learner_wait_seconds", "Wall time in which the replay had nothing for the learner")
LEARNER_LOSS = _gauge("learner_loss", "Loss of the newest update")
LEARNER_GRADIENT_NORM = _gauge("learner_gradient_norm", "Gradient norm of the newest update, before clipping")
LEARNER_PRIORITY = _gauge("learner_mean_priority", "Mean new priority of the newest update's sequences")
LEARNER_DELTA_Q = _gauge(
    "learner_delta_q", "How stale stored recurrent states are: Delta Q at the first and last learned step", "place"
)

# of the replay, told by the learner
REPLAY_SIZE = _gauge("replay_size_sequences", "Sequences held")
REPLAY_BYTES = _gauge("replay_size_bytes", "Bytes of their payloads")
REPLAY_INSERTED = _counter("replay_inserted_sequences", "Sequences inserted")
REPLAY_SAMPLED = _counter("replay_sampled_sequences", "Sequences sampled")
REPLAY_EVICTED = _counter("replay_evicted_sequences", "Sequences evicted, the oldest first")
REPLAY_REJECTED = _counter("replay_rejected_sequences", "Sequences removed because they were damaged")
REPLAY_REFUSED = _counter("replay_refused_samples", "Samples that the rate limiter refused the learner")
REPLAY_WAITING = _gauge("replay_waiting", "1 while the rate limiter holds this side back, else 0", "who")

# of the campaign, told by its driver
EPISODES_RECORDED = _gauge("recorded_episodes", "Episodes in the campaign's folder")
EPISODES_PLANNED = _gauge("planned_episodes", "Episodes of the whole campaign")
LAST_EPISODE = _gauge(
    "last_episode_timestamp_seconds", "Unix time of the newest record, or of the driver's start before there is one"
)
FRONTIER_ACCURACY = _gauge(
    "frontier_accuracy_ratio", "Validation accuracy of the best network so far at a target compression", "target"
)
FRONTIER_CROSS_ENTROPY = _gauge("frontier_cross_entropy_nats", "Its cross-entropy, which chose it", "target")
REDIS_USED_BYTES = _gauge("redis_used_bytes", "Memory that the campaign's Redis uses")
REDIS_MAX_BYTES = _gauge("redis_max_bytes", "Memory that it may use; 0 is unlimited")

#: All of them, as the dashboard and the alerts may name them.
METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
