"""Whole trainings: of the baseline, and of the chosen networks at the end (the source's 300 and 50 epochs).

A training can be killed at any moment and goes on from its last epoch, bit for bit. Called by `deploy/prepare.py` and
`deploy/recover.py`; the updates themselves are env/retraining.py's.
"""

import json
import logging
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from env.data import DataConfig, Dataset, check_fields, require_batch
from env.errors import NonFiniteError, UserError
from env.files import replace_file
from env.retraining import Metrics, augmented, choices, evaluate, finite, make_optimizer, seeded, set_rate, update

__all__ = ["EpochReport", "TrainConfig", "train"]

_LOG = logging.getLogger(__name__)
_FINITE_PERIOD = 50  # minibatches between two looks at the loss: each look makes a GPU wait


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training. The defaults are a short one-cycle schedule. UserError for a value out of range."""

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1  # the highest of the schedule
    momentum: float = 0.9  # Nesterov's where above 0
    weight_decay: float = 5e-4  # of convolution and linear weights; none on batch-norm and biases
    label_smoothing: float = 0.0
    warmup_share: float = 0.2  # of all minibatches: the rate rises from 0, then falls linearly to 0
    precision: str = "float32"  # or "bfloat16" (autocast): faster on GPUs, and on CPUs with AMX only

    def __post_init__(self) -> None:
        check_fields("train", self, _RULES)


_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "epochs": (lambda n: n >= 1, "a whole number of at least 1"),
    "batch_size": (lambda n: n >= 2, "a whole number of at least 2, because batch-norm needs two images"),
    "learning_rate": (lambda rate: rate > 0, "a number above 0"),
    "momentum": (lambda momentum: 0 <= momentum < 1, "a number of at least 0 and below 1"),
    "weight_decay": (lambda decay: decay >= 0, "a number of at least 0"),
    "label_smoothing": (lambda share: 0 <= share < 1, "a share of at least 0 and below 1"),
    "warmup_share": (lambda share: 0 <= share < 1, "a share of at least 0 and below 1"),
    "precision": (lambda precision: precision in ("float32", "bfloat16"), "float32 or bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One finished epoch of `train`."""

    epoch: int  # 1 to epochs
    epochs: int
    train_loss: float  # nats, mean over the epoch's minibatches
    validation: Metrics
    learning_rate: float  # of the epoch's last minibatch
    seconds: float
    images_per_s: float


def train(
    network: nn.Module,
    dataset: Dataset,
    data_config: DataConfig,
    config: TrainConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Metrics:
    """Train `network` in place (on the dataset's device); returns the last epoch's validation metrics.

    `seed` alone draws the order of the images and their augmentation. With `checkpoint`, a file, every
    epoch is kept, and a call with the same arguments goes on where the last one ended: in float32 with the
    same number of threads, bit for bit as if it had not been interrupted. A broken checkpoint is logged and
    training starts again; the checkpoint of another training is a UserError. NonFiniteError, naming epoch and
    learning rate, when the loss or a weight is not finite: the last good epoch stays in `checkpoint`.
    """
    require_batch(dataset, config.batch_size)
    run = _Run(network, config, seed)
    identity = _identity(network, dataset, data_config, config, seed)
    if checkpoint is not None:
        _restore(run, checkpoint, identity)
    network.train()
    validation: Metrics | None = None
    for epoch in range(run.epoch, config.epochs):
        started_s = time.perf_counter()
        train_loss, rate = _epoch(run, dataset, data_config, config, epoch)
        validation = evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=config.precision)
        run.epoch = epoch + 1
        if checkpoint is not None:
            _save(run, checkpoint, identity)
        if on_epoch is not None:
            seconds = time.perf_counter() - started_s
            images = len(dataset.train) // config.batch_size * config.batch_size
            on_epoch(
                EpochReport(
                    epoch=epoch + 1,
                    epochs=config.epochs,
                    train_loss=train_loss,
                    validation=validation,
                    learning_rate=rate,
                    seconds=seconds,
                    images_per_s=images / seconds,
                )
            )
    return validation or evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=config.precision)


class _Run:
    """All that a training changes, and that its checkpoint therefore holds."""

    def __init__(self, network: nn.Module, config: TrainConfig, seed: int) -> None:
        self.network = network
        self.optimizer = make_optimizer(
            network, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0  # epochs finished

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.epoch = int(state["epoch"])


def _epoch(
    run: _Run, dataset: Dataset, data_config: DataConfig, config: TrainConfig, epoch: int
) -> tuple[float, float]:
    """One pass over the training images: (mean loss in nats, last learning rate)."""
    count = len(dataset.train) // config.batch_size
    device = dataset.train.images.device
    total, rate = torch.zeros((), device=device), 0.0
    # Dropout in a user's network draws from torch's global generator: seeded by ours, it resumes too.
    inner_seed = int(torch.randint(2**62, (), generator=run.generator))
    with seeded(device, inner_seed):
        for index, chosen in enumerate(choices(len(dataset.train), config.batch_size, count, run.generator)):
            rate = _scheduled(config, (epoch * count + index + 1) / (config.epochs * count + 1))
            set_rate(run.optimizer, rate)
            batch = dataset.train.take(chosen.to(device))
            total += update(
                run.network,
                run.optimizer,
                augmented(batch, dataset, data_config, run.generator),
                batch.labels,
                label_smoothing=config.label_smoothing,
                precision=config.precision,
            )
            last = index + 1 == count
            if ((index + 1) % _FINITE_PERIOD == 0 or last) and not (
                bool(total.isfinite()) and (not last or finite(run.network))
            ):
                raise NonFiniteError(
                    f"training: loss or weights are not finite in epoch {epoch + 1} at learning rate "
                    f"{rate:g}; try a lower train.learning_rate, a longer train.warmup_share, or "
                    f"train.precision float32"
                )
    return float(total) / count, rate


def _scheduled(config: TrainConfig, progress: float) -> float:
    """The triangle: from 0 up to the configured rate at `warmup_share` of the way (0 to 1), down to 0."""
    if progress < config.warmup_share:
        return config.learning_rate * progress / config.warmup_share
    return config.learning_rate * (1 - progress) / (1 - config.warmup_share)


def _identity(
    network: nn.Module, dataset: Dataset, data_config: DataConfig, config: TrainConfig, seed: int
) -> dict[str, str]:
    """What must agree for a checkpoint to belong to this training."""
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    return {
        **{f"train.{name}": json.dumps(value) for name, value in asdict(config).items()},
        "data.flip": json.dumps(data_config.flip),
        "data.shift_pixels": json.dumps(data_config.shift_pixels),
        "seed": json.dumps(seed),
        "training images": json.dumps([len(dataset.train), *dataset.image_shape]),
        "network": json.dumps(shapes),
    }


def _save(run: _Run, path: Path, identity: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        torch.save({"identity": identity, **run.state_dict()}, temporary)


def _restore(run: _Run, path: Path, identity: dict[str, str]) -> None:
    if not path.exists():
        return
    before = run.state_dict()
    before = {**before, "network": {name: value.clone() for name, value in before["network"].items()}}
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the sums that torch.save wrote
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged} does not agree")
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_identity(path, state["identity"], identity)
        run.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # foreign bytes make torch's unpickler raise nearly anything
        _LOG.warning("checkpoint %s is broken (%s): training starts again", path, error)
        run.load_state_dict(before)


def _check_identity(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    different = [name for name in wanted if stored.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise UserError(
            f"checkpoint {path}",
            expected=f"this training, with {name} {_short(wanted[name])}",
            got=_short(stored.get(name, "nothing")),
            remedy="continue with the same configuration, or choose another folder",
        )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
