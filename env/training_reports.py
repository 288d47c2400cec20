"""What a whole training tells of itself on the way: after each epoch, and now and then within one.

The reports are made by `env/training.py` and read by `deploy/progress.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from env.retraining import Metrics

__all__ = ["BatchReport", "EpochReport", "Means", "Reporter"]

_PERIOD_S = 1.0  # between two reports within an epoch: each makes a GPU wait


class Means(NamedTuple):
    """How an epoch went so far."""

    train_loss: float  # nats, mean over the epoch's minibatches
    train_accuracy: float  # share of augmented images recognized in training mode, 0 to 1
    learning_rate: float  # of the last minibatch


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """A training in the middle of an epoch; means are over the epoch's minibatches so far."""

    epoch: int  # the one that runs, 1 to epochs
    epochs: int
    minibatch: int  # finished in this epoch, 1 to minibatches
    minibatches: int
    train_loss: float  # nats
    train_accuracy: float  # share of augmented images recognized in training mode, 0 to 1
    learning_rate: float
    seconds_left: float  # of the whole training, at the pace so far


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One finished epoch."""

    epoch: int  # 1 to epochs
    epochs: int
    train_loss: float  # nats, mean over the epoch's minibatches
    train_accuracy: float  # share of augmented images recognized in training mode, 0 to 1
    validation: Metrics  # of the averaged weights, where there is an average
    learning_rate: float  # of the epoch's last minibatch
    seconds: float
    images_per_s: float
    seconds_left: float  # of the whole training, at the pace so far


class Reporter:
    """Makes a training's reports; its clock starts when it is made, after `finished` epochs of an earlier call."""

    def __init__(
        self,
        *,
        epochs: int,
        minibatches: int,
        batch_size: int,
        finished: int,
        on_epoch: Callable[[EpochReport], None] | None,
        on_batch: Callable[[BatchReport], None] | None,
    ) -> None:
        self._epochs, self._minibatches, self._batch_size = epochs, minibatches, batch_size
        self._started_at = self._finished = finished
        self._on_epoch, self._on_batch = on_epoch, on_batch
        self._started_s = self._epoch_s = self._batch_s = time.perf_counter()

    def batch_is_due(self) -> bool:
        """Whether somebody listens, and the last report is long enough ago."""
        return self._on_batch is not None and time.perf_counter() - self._batch_s >= _PERIOD_S

    def batch(self, minibatch: int, means: Means) -> None:
        """Report within an epoch, when so many of its minibatches (1 to all) are done."""
        if self._on_batch is None:
            return
        self._on_batch(
            BatchReport(
                epoch=self._finished + 1,
                epochs=self._epochs,
                minibatch=minibatch,
                minibatches=self._minibatches,
                seconds_left=self._seconds_left(minibatch),
                **means._asdict(),
            )
        )
        self._batch_s = time.perf_counter()

    def epoch(self, means: Means, validation: Metrics) -> None:
        """Report a finished epoch; the next one begins when this returns."""
        self._finished += 1
        if self._on_epoch is not None:
            seconds = time.perf_counter() - self._epoch_s
            self._on_epoch(
                EpochReport(
                    epoch=self._finished,
                    epochs=self._epochs,
                    validation=validation,
                    seconds=seconds,
                    images_per_s=self._minibatches * self._batch_size / seconds,
                    seconds_left=self._seconds_left(0),
                    **means._asdict(),
                )
            )
        self._epoch_s = time.perf_counter()

    def _seconds_left(self, minibatch: int) -> float:
        """Of the whole training, when so many minibatches of the present epoch are done."""
        now = self._finished + minibatch / self._minibatches
        pace_s = (time.perf_counter() - self._started_s) / (now - self._started_at)
        return pace_s * (self._epochs - now)
