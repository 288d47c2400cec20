"""One recovery away from the driver: a network is retrained here, and its checkpoints are handed over on the way.

Called by the actor of actors/ray_actors.py; knows no Ray. The driver (deploy/recover_on_ray.py) keeps the checkpoints,
so that nothing is lost with this process but what came after the last of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from actors.metrics import NO_METRICS, PLAYER_IMAGES, Metrics, Tally
from env.compact_file import NetworkForm, network_from_bytes, network_to_bytes
from env.data import DataConfig, Dataset
from env.training import TrainConfig, train
from env.training_reports import BatchReport, EpochReport

__all__ = ["News", "RecoveryOrder", "RecoveryRun"]


@dataclass(frozen=True, kw_only=True)
class RecoveryOrder:
    """A network to retrain, and how. The same order gives the same network: on a CPU in float32 bit for bit."""

    name: str  # for people
    form: NetworkForm
    network: bytes  # compact, of env/compact_file.py
    data: DataConfig
    training: TrainConfig
    seed: int
    checkpoint: bytes  # what an earlier process had reached; empty where none had
    kept_as: str  # the checkpoint's path on the driver, for messages


@dataclass(frozen=True, kw_only=True)
class News:
    """How far a recovery is."""

    epochs: float  # done, and the share of the one that runs
    checkpoint: bytes  # the newest; empty where it is the one that was known
    version: int  # of that checkpoint


class RecoveryRun:
    """Carries out one order; `news` may be asked for in another thread while `run` goes on.

    Args:
        order: what to retrain.
        device: where.
        log: is told each finished epoch in words.
        metrics: are told the images.

    """

    def __init__(
        self, order: RecoveryOrder, *, device: str, log: Callable[[str], object], metrics: Metrics = NO_METRICS
    ) -> None:
        self._order, self._device, self._log = order, device, log
        self._kept = _Kept(order)
        self._images, self._epochs = Tally(metrics, PLAYER_IMAGES), 0.0

    def run(self, dataset: Dataset, teacher: bytes) -> bytes:
        """The retrained network, of env/compact_file.py; `teacher` is one too, or empty where there is none.

        Raises as `env.training.train`.
        """
        order = self._order
        self._images_an_epoch = len(dataset.train) // order.training.batch_size * order.training.batch_size
        network = network_from_bytes(order.network, order.form).to(self._device)
        train(
            network,
            dataset.to(self._device),
            order.data,
            order.training,
            seed=order.seed,
            teacher=network_from_bytes(teacher, order.form).to(self._device) if teacher else None,
            section="recovery",
            checkpoint=self._kept,
            on_epoch=self._on_epoch,
            on_batch=self._on_batch,
        )
        return network_to_bytes(network, order.form)

    def news(self, version: int) -> News:
        """How far it is, with the newest checkpoint unless that is `version` (0: the one in the order)."""
        newest, data = self._kept.newest
        return News(epochs=self._epochs, checkpoint=b"" if newest == version else data, version=newest)

    def _on_batch(self, report: BatchReport) -> None:
        self._tell(report.epoch - 1 + report.minibatch / report.minibatches)

    def _on_epoch(self, report: EpochReport) -> None:
        self._tell(float(report.epoch))
        self._log(
            f"{self._order.name}: epoch {report.epoch}/{report.epochs}, loss {report.train_loss:.3f}, "
            f"accuracy {report.validation.accuracy:.2%}, {report.images_per_s:,.0f} images/s"
        )

    def _tell(self, epochs: float) -> None:
        self._epochs = epochs
        self._images.look(epochs * self._images_an_epoch)


class _Kept:
    """The checkpoint in this process (an `env.training_checkpoint.Store`), which people know as the driver's file."""

    def __init__(self, order: RecoveryOrder) -> None:
        self.newest = (0, order.checkpoint)  # version and data, replaced at once
        self._name = order.kept_as

    def __str__(self) -> str:
        return self._name

    def read(self) -> bytes | None:
        return self.newest[1] or None

    def write(self, data: bytes | memoryview) -> None:
        self.newest = (self.newest[0] + 1, bytes(data))
