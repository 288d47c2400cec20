"""Whole trainings: of the baseline, and of the chosen networks at the end (the source's 300 and 50 epochs).

A training can be killed at any moment and goes on from its last epoch, bit for bit. Called by `deploy/prepare.py` and
`deploy/recover.py`. To the updates of env/retraining.py come what only whole trainings want: a teacher's soft targets
(Hinton et al. 2015), an average of the weights, and the accuracy on the way.
"""

import copy
import io
import json
import logging
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from env.data import DataConfig, Dataset, check_fields, require_batch
from env.errors import NonFiniteError, UserError
from env.files import replace_file
from env.retraining import (
    Metrics,
    augmented,
    choices,
    evaluate,
    finite,
    logits_of,
    make_optimizer,
    seeded,
    set_rate,
    update,
)

__all__ = ["BatchReport", "EpochReport", "TrainConfig", "distillation_loss", "train"]

_LOG = logging.getLogger(__name__)
_FINITE_PERIOD = 50  # minibatches between two looks at the loss: each look makes a GPU wait
_REPORT_PERIOD_S = 1.0  # between two reports within an epoch, for the same reason


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
    distillation: float = 0.0  # share of the loss that compares with the teacher's outputs; 0 = no teacher
    temperature: float = 4.0  # divides the logits of both in that share: higher shows more of the unlikely classes
    average: float = 0.0  # decay per update of an exponential average of the weights, e.g. 0.999; 0 = none

    def __post_init__(self) -> None:
        check_fields("train", self, _RULES)


_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "epochs": (lambda n: n >= 1, "a whole number of at least 1"),
    "batch_size": (lambda n: n >= 2, "a whole number of at least 2, because batch-norm needs two images"),
    "learning_rate": (lambda rate: 0 < rate <= 10, "a number above 0 and at most 10"),
    "momentum": (lambda momentum: 0 <= momentum < 1, "a number of at least 0 and below 1"),
    "weight_decay": (lambda decay: 0 <= decay <= 1, "a number of at least 0 and at most 1"),
    "label_smoothing": (lambda share: 0 <= share < 1, "a share of at least 0 and below 1"),
    "warmup_share": (lambda share: 0 <= share < 1, "a share of at least 0 and below 1"),
    "precision": (lambda precision: precision in ("float32", "bfloat16"), "float32 or bfloat16"),
    "distillation": (lambda share: 0 <= share <= 1, "a share of at least 0 and at most 1"),
    "temperature": (lambda temperature: 0 < temperature <= 100, "a number above 0 and at most 100"),
    "average": (lambda decay: 0 <= decay < 1, "a number of at least 0 and below 1"),
}


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
    """One finished epoch of `train`."""

    epoch: int  # 1 to epochs
    epochs: int
    train_loss: float  # nats, mean over the epoch's minibatches
    train_accuracy: float  # share of augmented images recognized in training mode, 0 to 1
    validation: Metrics  # of the averaged weights, where there is an average
    learning_rate: float  # of the epoch's last minibatch
    seconds: float
    images_per_s: float
    seconds_left: float  # of the whole training, at the pace so far


def train(
    network: nn.Module,
    dataset: Dataset,
    data_config: DataConfig,
    config: TrainConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    section: str = "train",
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_batch: Callable[[BatchReport], None] | None = None,
) -> Metrics:
    """Train `network` in place (on the dataset's device); returns the last epoch's validation metrics.

    `seed` alone draws the order of the images and their augmentation. With `config.distillation` the `teacher`
    (same device and classes) sees the same images, in eval mode, where it stays. With `config.average` it is the
    averaged weights that are validated and that end in `network`. With `checkpoint`, a file, every
    epoch is kept, and a call with the same arguments goes on where the last one ended: in float32 with the
    same number of threads, bit for bit as if it had not been interrupted. A broken checkpoint is logged and
    training starts again. `on_batch` is called at most once a second. Messages call the configuration `section`.

    Raises:
        NonFiniteError: the loss or a weight is not finite; names epoch, learning rate and what to try. The last
            good epoch stays in `checkpoint`.
        UserError: the checkpoint is of another training, or cannot be written; fewer images than a batch.

    """
    require_batch(dataset, config.batch_size)
    run = _Run(network, dataset, data_config, config, seed=seed, teacher=teacher, section=section)
    identity = _identity(run, seed)
    if checkpoint is not None:
        _restore(run, checkpoint, identity)
    network.train()
    live = _Live(run, on_batch)
    validation: Metrics | None = None
    while run.epoch < config.epochs:
        started_s = time.perf_counter()
        train_loss, train_accuracy, rate = _epoch(run, live, checkpoint)
        validation = _judge(run)
        run.epoch += 1
        if checkpoint is not None:
            _save(run, checkpoint, identity)
        if on_epoch is not None:
            seconds = time.perf_counter() - started_s
            on_epoch(
                EpochReport(
                    epoch=run.epoch,
                    epochs=config.epochs,
                    train_loss=train_loss,
                    train_accuracy=train_accuracy,
                    validation=validation,
                    learning_rate=rate,
                    seconds=seconds,
                    images_per_s=run.minibatches * config.batch_size / seconds,
                    seconds_left=live.seconds_left(0),
                )
            )
    validation = validation or _judge(run)
    if run.average is not None:
        network.load_state_dict(run.average.module.state_dict())
    return validation


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened outputs, nats, mean over images; both float32 [B, classes].

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2: both softmaxes at temperature T;
    the factor T^2 keeps the gradient as large as that of the hard targets whatever T is.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    wanted = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, wanted, reduction="batchmean", log_target=True)


class _Run:
    """A training: what it works on, and all that it changes, which its checkpoint therefore holds."""

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        data_config: DataConfig,
        config: TrainConfig,
        *,
        seed: int,
        teacher: nn.Module | None,
        section: str,
    ) -> None:
        if config.distillation and teacher is None:
            raise ValueError(f"distillation {config.distillation} needs a teacher")
        self.network, self.dataset, self.data_config, self.config = network, dataset, data_config, config
        self.teacher = teacher.eval() if teacher is not None and config.distillation else None
        self.section = section
        self.minibatches = len(dataset.train) // config.batch_size  # in an epoch
        self.optimizer = make_optimizer(
            network, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.average = _averaged(network, config.average) if config.average else None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0  # epochs finished

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.generator.set_state(state["generator"])
        self.epoch = int(state["epoch"])


def _averaged(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of weights and batch-norm statistics that soon forgets where the training started.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage with
    `num_updates`: with a constant decay of 0.999 the random start would still weigh a third after 1,000 updates.
    """

    def update(averaged: Any, current: Any, count: Any) -> None:
        if averaged[0].is_floating_point():
            n = int(count)  # on the CPU, wherever the network is: no GPU waits for it
            average = get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))  # type: ignore[no-untyped-call]
            average(averaged, current, count)
        else:  # batch-norm's counts of minibatches
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(theirs)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)


class _Live:
    """Tells `on_batch` how an epoch goes, now and then, and how long the training will still take."""

    def __init__(self, run: _Run, on_batch: Callable[[BatchReport], None] | None) -> None:
        self._run, self._on_batch = run, on_batch
        self._started_s = self._last_s = time.perf_counter()
        self._started_epoch = run.epoch

    def is_due(self) -> bool:
        return self._on_batch is not None and time.perf_counter() - self._last_s >= _REPORT_PERIOD_S

    def batch(self, minibatch: int, loss: float, accuracy: float, rate: float) -> None:
        assert self._on_batch is not None
        self._on_batch(
            BatchReport(
                epoch=self._run.epoch + 1,
                epochs=self._run.config.epochs,
                minibatch=minibatch,
                minibatches=self._run.minibatches,
                train_loss=loss,
                train_accuracy=accuracy,
                learning_rate=rate,
                seconds_left=self.seconds_left(minibatch),
            )
        )
        self._last_s = time.perf_counter()

    def seconds_left(self, minibatch: int) -> float:
        """Of the whole training, when so many minibatches of the present epoch are done."""
        now = self._run.epoch + minibatch / self._run.minibatches
        pace_s = (time.perf_counter() - self._started_s) / (now - self._started_epoch)
        return pace_s * (self._run.config.epochs - now)


def _judge(run: _Run) -> Metrics:
    network = run.network if run.average is None else run.average.module
    dataset = run.dataset
    return evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=run.config.precision)


def _epoch(run: _Run, live: _Live, checkpoint: Path | None) -> tuple[float, float, float]:
    """One pass over the training images: (mean loss in nats, share recognized, last learning rate)."""
    config, dataset, count = run.config, run.dataset, run.minibatches
    device = dataset.train.images.device
    sums, loss, accuracy, rate = torch.zeros(2, device=device), 0.0, 0.0, 0.0
    # Dropout in a user's network draws from torch's global generator: seeded by ours, it resumes too.
    inner_seed = int(torch.randint(2**62, (), generator=run.generator))
    with seeded(device, inner_seed):
        images_of = choices(len(dataset.train), config.batch_size, count, run.generator)
        for index, chosen in enumerate(images_of, start=1):
            rate = _scheduled(config, (run.epoch * count + index) / (config.epochs * count + 1))
            set_rate(run.optimizer, rate)
            batch = dataset.train.take(chosen.to(device))
            sums += _update(run, augmented(batch, dataset, run.data_config, run.generator), batch.labels)
            due, last = live.is_due(), index == count
            if due or last or index % _FINITE_PERIOD == 0:
                loss, accuracy = (sums / index).tolist()
                if not math.isfinite(loss) or (last and not finite(run.network)):
                    raise _not_finite(run, rate, checkpoint)
            if due:
                live.batch(index, loss, accuracy, rate)
    return loss, accuracy, rate


def _update(run: _Run, images: Tensor, labels: Tensor) -> Tensor:
    """One update; float32 [2]: the loss before it in nats, and the share of images recognized. Not awaited."""
    config, wanted = run.config, _taught(run, images)
    right = torch.zeros((), device=images.device)

    def loss_of(logits: Tensor) -> Tensor:
        right.copy_((logits.detach().argmax(1) == labels).float().mean())
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if wanted is None:
            return loss
        share = config.distillation
        return (1 - share) * loss + share * distillation_loss(logits, wanted, config.temperature)

    loss = update(run.network, run.optimizer, images, loss_of, precision=config.precision)
    if run.average is not None:
        run.average.update_parameters(run.network)
    return torch.stack([loss, right])


def _taught(run: _Run, images: Tensor) -> Tensor | None:
    """The teacher's logits for these images, float32 [B, classes]; None without a teacher."""
    if run.teacher is None:
        return None
    with torch.no_grad():
        return logits_of(run.teacher, images, precision=run.config.precision)


def _not_finite(run: _Run, rate: float, checkpoint: Path | None) -> NonFiniteError:
    """What happened, what to try, and what is kept."""
    name = run.section
    attempts = [f"a lower {name}.learning_rate", f"a longer {name}.warmup_share"]
    if run.config.precision != "float32":
        attempts.append(f"{name}.precision float32")
    kept = f"; the state after epoch {run.epoch} is kept in {checkpoint}" if checkpoint and run.epoch else ""
    return NonFiniteError(
        f"training: loss or weights are not finite in epoch {run.epoch + 1} at learning rate {rate:g}; "
        f"try {', '.join(attempts[:-1])} or {attempts[-1]}{kept}"
    )


def _scheduled(config: TrainConfig, progress: float) -> float:
    """The triangle: from 0 up to the configured rate at `warmup_share` of the way (0 to 1), down to 0."""
    if progress < config.warmup_share:
        return config.learning_rate * progress / config.warmup_share
    return config.learning_rate * (1 - progress) / (1 - config.warmup_share)


def _identity(run: _Run, seed: int) -> dict[str, str]:
    """What must agree for a checkpoint to belong to this training."""
    shapes = {name: list(value.shape) for name, value in run.network.state_dict().items()}
    return {
        **_fields(run.config),
        "data.flip": json.dumps(run.data_config.flip),
        "data.shift_pixels": json.dumps(run.data_config.shift_pixels),
        "seed": json.dumps(seed),
        "training images": json.dumps([len(run.dataset.train), *run.dataset.image_shape]),
        "network": json.dumps(shapes),
    }


def _fields(config: TrainConfig) -> dict[str, str]:
    return {f"train.{name}": json.dumps(value) for name, value in asdict(config).items()}


def _save(run: _Run, path: Path, identity: dict[str, str]) -> None:
    buffer = io.BytesIO()  # torch's own writer says of a full disk only that an assertion failed
    torch.save({"identity": identity, **run.state_dict()}, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except OSError as error:
        raise UserError(
            f"checkpoint {path}",
            expected=f"{buffer.tell():,} bytes of disk that can be written",
            got=error.strerror or repr(error),
            remedy="make room there and resume; the epochs before it are kept",
        ) from error


def _restore(run: _Run, path: Path, identity: dict[str, str]) -> None:
    if not path.exists():
        return
    before = copy.deepcopy(run.state_dict())
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the sums that torch.save wrote
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged} does not agree")
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_identity(path, state["identity"], identity, run.section)
        run.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # foreign bytes make torch's unpickler raise nearly anything
        _LOG.warning("checkpoint %s is broken (%s): training starts again", path, error)
        run.load_state_dict(before)


def _check_identity(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str], section: str) -> None:
    # A field that is younger than the checkpoint stood at its default, which changes nothing.
    stored = {**_fields(TrainConfig()), **stored}
    different = [name for name in wanted if stored.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise UserError(
            f"checkpoint {path}",
            expected=f"this training, with {name.replace('train.', f'{section}.')} {_short(wanted[name])}",
            got=_short(stored.get(name, "nothing")),
            remedy="remove that file to train anew, or set the former value again",
        )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
