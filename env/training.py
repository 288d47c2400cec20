"""Training, judging and the short retraining inside a step.

`train` makes the baseline and recovers the chosen networks (the source's 300 and 50 epochs); it can be
killed at any moment and goes on from its last epoch, bit for bit. `retrain` is the step's few minibatches:
the inner loop of a campaign, as cheap as it can be. Called by `deploy/campaign.py` and the environment.

Images go in as channels_last and the layers follow (but see `_misread`); weights stay as they are, so that saving
and slicing them never meets odd strides.
"""

import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.data import DataConfig, Dataset, Split, augment, check_fields, normalise, require_batch
from env.errors import NonFiniteError, UserError
from env.files import replace_file

__all__ = ["EpochReport", "Metrics", "TrainConfig", "evaluate", "retrain", "train"]

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


@dataclass(frozen=True)
class Metrics:
    """How well a network recognizes a split."""

    accuracy: float  # share of images whose highest logit is right, 0 to 1
    cross_entropy: float  # nats, mean over images


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


def evaluate(
    network: nn.Module,
    split: Split,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    batch_size: int = 500,
    precision: str = "float32",
) -> Metrics:
    """Judge `network` in eval mode on `split` (same device); its modes are then as they were before."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    right = loss = torch.zeros((), dtype=torch.float64, device=split.images.device)
    try:
        with torch.inference_mode():
            for start in range(0, len(split), batch_size):
                images = _channels_last(normalise(split.images[start : start + batch_size], mean, std))
                labels = split.labels[start : start + batch_size]
                with _autocast(images.device, precision):
                    logits = network(images).float()
                right = right + (logits.argmax(1) == labels).sum()
                loss = loss + F.cross_entropy(logits, labels, reduction="sum")
    finally:
        for module, training in modes:
            module.training = training
    return Metrics(accuracy=float(right) / len(split), cross_entropy=float(loss) / len(split))


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


def retrain(
    network: nn.Module,
    dataset: Dataset,
    data_config: DataConfig,
    *,
    minibatches: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    precision: str = "float32",
    decay: bool = False,
    label_smoothing: float = 0.0,
) -> float:
    """Train `network` in place for a few minibatches, with a fresh momentum; returns their mean loss in nats.

    `seed` alone draws the images and their augmentation (common random numbers: the same seed means the same
    pictures whatever the network). The learning rate is constant, or with `decay` falls linearly from
    `learning_rate` towards 0. The network's modes are left in training mode. NonFiniteError when the loss or
    a weight is not finite; UserError when there are fewer training images than a batch.
    """
    if minibatches < 1:
        raise ValueError(f"minibatches must be at least 1, got {minibatches}")
    require_batch(dataset, batch_size)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(network, learning_rate, momentum=momentum, weight_decay=weight_decay)
    network.train()
    total = torch.zeros((), device=dataset.train.images.device)
    with _seeded(dataset.train.images.device, seed):
        for index, chosen in enumerate(_choices(len(dataset.train), batch_size, minibatches, generator)):
            if decay:
                _set_rate(optimizer, learning_rate * (1 - index / minibatches))
            batch = dataset.train.take(chosen.to(total.device))
            total += _step(
                network,
                optimizer,
                _augmented(batch, dataset, data_config, generator),
                batch.labels,
                label_smoothing=label_smoothing,
                precision=precision,
            )
    if not bool(total.isfinite()) or not _finite(network):
        raise NonFiniteError(
            f"retraining: loss or weights are not finite after {minibatches} minibatches at learning rate "
            f"{learning_rate:g}; try a lower learning rate"
        )
    return float(total) / minibatches


class _Run:
    """All that a training changes, and that its checkpoint therefore holds."""

    def __init__(self, network: nn.Module, config: TrainConfig, seed: int) -> None:
        self.network = network
        self.optimizer = _optimizer(
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
    with _seeded(device, inner_seed):
        for index, chosen in enumerate(_choices(len(dataset.train), config.batch_size, count, run.generator)):
            rate = _scheduled(config, (epoch * count + index + 1) / (config.epochs * count + 1))
            _set_rate(run.optimizer, rate)
            batch = dataset.train.take(chosen.to(device))
            total += _step(
                run.network,
                run.optimizer,
                _augmented(batch, dataset, data_config, run.generator),
                batch.labels,
                label_smoothing=config.label_smoothing,
                precision=config.precision,
            )
            last = index + 1 == count
            if ((index + 1) % _FINITE_PERIOD == 0 or last) and not (
                bool(total.isfinite()) and (not last or _finite(run.network))
            ):
                raise NonFiniteError(
                    f"training: loss or weights are not finite in epoch {epoch + 1} at learning rate "
                    f"{rate:g}; try a lower train.learning_rate, a longer train.warmup_share, or "
                    f"train.precision float32"
                )
    return float(total) / count, rate


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    precision: str,
) -> Tensor:
    """One update; returns the loss before it, a scalar that the device need not have finished."""
    if images.device.type != "cpu" or not any(map(_misread, network.modules())):
        images = _channels_last(images)
    with _autocast(images.device, precision):
        logits = network(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _augmented(batch: Split, dataset: Dataset, config: DataConfig, generator: torch.Generator) -> Tensor:
    return augment(
        batch.images,
        flip=config.flip,
        shift_pixels=config.shift_pixels,
        mean=dataset.mean,
        std=dataset.std,
        generator=generator,
    )


def _choices(images: int, batch_size: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`count` times the indices of a minibatch (int64 [batch_size]): no image twice before all came once."""
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        if len(waiting) < batch_size:
            waiting = torch.randperm(images, generator=generator)  # an incomplete rest is left out
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _optimizer(network: nn.Module, learning_rate: float, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},  # batch-norm and biases
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)


def _scheduled(config: TrainConfig, progress: float) -> float:
    """The triangle: from 0 up to the configured rate at `warmup_share` of the way (0 to 1), down to 0."""
    if progress < config.warmup_share:
        return config.learning_rate * progress / config.warmup_share
    return config.learning_rate * (1 - progress) / (1 - config.warmup_share)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _misread(module: nn.Module) -> bool:
    """Whether the CPU's gradient of this convolution writes past its memory for channels_last images.

    oneDNN issue 6035: strided 1x1 convolutions with fewer input channels than a register holds (8 in AVX2, 16 in
    AVX-512), as pruning makes them. The process crashes, or hangs, or goes on with a wrong gradient.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
    )


def _channels_last(images: Tensor) -> Tensor:
    """The images with channels innermost in memory, which every following layer then keeps to.

    With one channel both orders are the same bytes, and only strides that say so turn the layers.
    """
    batch, channels, height, width = images.shape
    if channels == 1:
        return images.contiguous().as_strided((batch, 1, height, width), (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators start from `seed` inside, and are as before outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _finite(network: nn.Module) -> bool:
    """Whether every weight and batch-norm entry is finite."""
    tensors: Iterable[Tensor] = (*network.parameters(), *network.buffers())
    flags = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not flags or bool(torch.stack(flags).all())


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
