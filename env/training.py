"""Whole trainings: of the baseline, and of the chosen networks at the end (the source's 300 and 50 epochs).

A training can be killed at any moment and goes on from the last epoch that was kept, on a CPU bit for bit. Called by
`deploy/prepare.py` and `deploy/recover.py`. To the updates of env/retraining.py come what only whole trainings want: a
teacher's soft targets (Hinton et al. 2015), an average of the weights, and the accuracy on the way.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.averaging import averaged
from env.captured import captured
from env.data import DataConfig, Dataset, check_fields, require_batch
from env.errors import NonFiniteError
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
from env.training_checkpoint import Checkpoint, FileStore, Store
from env.training_reports import BatchReport, EpochReport, Means, Reporter

__all__ = ["RecoveryConfig", "TrainConfig", "distillation_loss", "train"]

_FINITE_PERIOD = 50  # minibatches between two looks at the loss: each look makes a GPU wait


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training. The defaults are a short one-cycle schedule. UserError for a value out of range."""

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1  # the highest of the schedule
    momentum: float = 0.9  # Nesterov's where above 0
    weight_decay: float = 5e-4  # of convolution and linear weights
    norm_weight_decay: float = 0.0  # of batch-norm and biases
    label_smoothing: float = 0.0
    warmup_share: float = 0.2  # of all minibatches: the rate rises from 0, then falls to 0
    schedule: str = "linear"  # how it falls, or "cosine" (Loshchilov and Hutter 2017)
    precision: str = "float32"  # or "bfloat16" (autocast): faster on GPUs, and on CPUs with AMX only
    distillation: float = 0.0  # share of the loss that compares with the teacher's outputs; 0 = no teacher
    temperature: float = 4.0  # divides the logits of both in that share: higher shows more of the unlikely classes
    average: float = 0.0  # decay per update of an exponential average of the weights, e.g. 0.999; 0 = none

    def __post_init__(self) -> None:
        check_fields("train", self, _RULES)


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig(TrainConfig):
    """The training of a chosen network at the end. The baseline is its teacher."""

    distillation: float = 0.5  # 0.4 to 1.6 points more, for up to twice the time (trial 40 of the search log)


_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "epochs": (lambda n: n >= 1, "a whole number of at least 1"),
    "batch_size": (lambda n: n >= 2, "a whole number of at least 2, because batch-norm needs two images"),
    "learning_rate": (lambda rate: 0 < rate <= 10, "a number above 0 and at most 10"),
    "momentum": (lambda momentum: 0 <= momentum < 1, "a number of at least 0 and below 1"),
    "weight_decay": (lambda decay: 0 <= decay <= 1, "a number of at least 0 and at most 1"),
    "norm_weight_decay": (lambda decay: 0 <= decay <= 1, "a number of at least 0 and at most 1"),
    "label_smoothing": (lambda share: 0 <= share < 1, "a share of at least 0 and below 1"),
    "warmup_share": (lambda share: 0 <= share < 1, "a share of at least 0 and below 1"),
    "schedule": (lambda schedule: schedule in ("linear", "cosine"), "linear or cosine"),
    "precision": (lambda precision: precision in ("float32", "bfloat16"), "float32 or bfloat16"),
    "distillation": (lambda share: 0 <= share <= 1, "a share of at least 0 and at most 1"),
    "temperature": (lambda temperature: 0 < temperature <= 100, "a number above 0 and at most 100"),
    "average": (lambda decay: 0 <= decay < 1, "a number of at least 0 and below 1"),
}


def train(
    network: nn.Module,
    dataset: Dataset,
    data_config: DataConfig,
    config: TrainConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    section: str = "train",
    checkpoint: Path | Store | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_batch: Callable[[BatchReport], None] | None = None,
) -> Metrics:
    """Train `network` in place (on the dataset's device); returns the last epoch's validation metrics.

    `seed` alone draws the order of the images and their augmentation. With `config.distillation` the `teacher`
    (same device and classes) sees the same images, in eval mode, where it stays. With `config.average` it is the
    averaged weights that are validated and that end in `network`. With `checkpoint`, a file or another store, every
    epoch is kept (of a large network one in ten seconds), and a call with the same arguments goes on where the last one
    ended: on a CPU in float32 with the same number of threads, bit for bit as if it had not been interrupted. It may
    also go on with another learning rate, schedule or precision, which is logged. A broken checkpoint is logged and
    training starts again. `on_batch` is called at most once a second. Messages call the configuration `section`.

    Raises:
        NonFiniteError: the loss or a weight is not finite; names epoch, learning rate and what to try. The last
            epoch that was kept stays in `checkpoint`.
        UserError: the checkpoint is of another training, or cannot be written; fewer images than a batch.

    """
    require_batch(dataset, config.batch_size)
    run = _Run(network, dataset, data_config, config, seed=seed, teacher=teacher, section=section)
    kept = None
    store = FileStore(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    if store is not None:
        kept = Checkpoint(
            store, network, dataset, data_config, config, defaults=TrainConfig(), seed=seed, section=section
        )
        kept.restore(run)
        run.kept = run.epoch
    network.train()
    reporter = Reporter(
        epochs=config.epochs,
        minibatches=run.minibatches,
        batch_size=config.batch_size,
        finished=run.epoch,
        on_epoch=on_epoch,
        on_batch=on_batch,
    )
    once = captured(partial(_update, run), network, *([] if run.teacher is None else [run.teacher]))
    validation: Metrics | None = None
    while run.epoch < config.epochs:
        means = _epoch(run, once, reporter, store)
        validation = _judge(run)
        run.epoch += 1
        if kept is not None and (kept.is_due() or run.epoch == config.epochs):
            kept.save(run)
            run.kept = run.epoch
        reporter.epoch(means, validation)
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
            network,
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            norm_weight_decay=config.norm_weight_decay,
        )
        self.average = averaged(network, config.average) if config.average else None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0  # epochs finished
        self.kept = 0  # of them in the checkpoint

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


def _judge(run: _Run) -> Metrics:
    network = run.network if run.average is None else run.average.module
    dataset = run.dataset
    return evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=run.config.precision)


def _epoch(run: _Run, once: Callable[[Tensor, Tensor], Tensor], reporter: Reporter, store: Store | None) -> Means:
    """One pass over the training images; NonFiniteError says that `store` keeps the epoch before."""
    config, dataset, count = run.config, run.dataset, run.minibatches
    device = dataset.train.images.device
    sums, means = torch.zeros(2, device=device), Means(0.0, 0.0, 0.0)
    # Dropout in a user's network draws from torch's global generator: seeded by ours, it resumes too.
    inner_seed = int(torch.randint(2**62, (), generator=run.generator))
    with seeded(device, inner_seed):
        images_of = choices(len(dataset.train), config.batch_size, count, run.generator, device)
        for index, chosen in enumerate(images_of, start=1):
            rate = _scheduled(config, (run.epoch * count + index) / (config.epochs * count + 1))
            set_rate(run.optimizer, rate)
            batch = dataset.train.take(chosen)
            sums += once(augmented(batch, dataset, run.data_config, run.generator), batch.labels)
            if run.average is not None:
                run.average.update_parameters(run.network)
            due, last = reporter.batch_is_due(), index == count
            if due or last or index % _FINITE_PERIOD == 0:
                loss, accuracy = (sums / index).tolist()
                means = Means(loss, accuracy, rate)
                if not math.isfinite(loss) or (last and not finite(run.network)):
                    raise _not_finite(run, rate, store)
            if due:
                reporter.batch(index, means)
    return means


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
    return torch.stack([loss, right])


def _taught(run: _Run, images: Tensor) -> Tensor | None:
    """The teacher's logits for these images, float32 [B, classes]; None without a teacher."""
    if run.teacher is None:
        return None
    with torch.no_grad():
        return logits_of(run.teacher, images, precision=run.config.precision)


def _not_finite(run: _Run, rate: float, store: Store | None) -> NonFiniteError:
    """What happened, what to try, and what is kept."""
    name = run.section
    attempts = [f"a lower {name}.learning_rate", f"a longer {name}.warmup_share"]
    if run.config.precision != "float32":
        attempts.append(f"{name}.precision float32")
    kept = ""
    if store is not None and run.kept:
        kept = f"; the state after epoch {run.kept} is kept in {store}, and training goes on from there"
    return NonFiniteError(
        f"training: loss or weights are not finite in epoch {run.epoch + 1} at learning rate {rate:g}; "
        f"try {', '.join(attempts[:-1])} or {attempts[-1]}{kept}"
    )


def _scheduled(config: TrainConfig, progress: float) -> float:
    """Up from 0 to the configured rate at `warmup_share` of the way (0 to 1), then down to 0 as `schedule` says."""
    if progress < config.warmup_share:
        return config.learning_rate * progress / config.warmup_share
    left = (1 - progress) / (1 - config.warmup_share)  # 1 to 0
    if config.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return config.learning_rate * left
