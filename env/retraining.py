"""The inner loop: one update, a few of them in a row, and judging. Nearly all of a campaign's time is spent here.

Called by the environment in every step, and by `env/training.py` for whole trainings.

Images go in as channels_last, where the network can read them, and the layers follow, on a CPU those of
env/cpu_layers.py; weights stay as they are, so that saving and slicing them never meets odd strides.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.augment import augment, normalise
from env.captured import WORTH, captured
from env.copies import duplicate
from env.cpu_layers import cpu_layers, judges_channels_last, keep_freed_memory, quick_form
from env.data import DataConfig, Dataset, require_batch
from env.errors import NonFiniteError
from env.splits import Split

__all__ = [
    "Metrics",
    "augmented",
    "choices",
    "evaluate",
    "finite",
    "logits_of",
    "make_optimizer",
    "retrain",
    "seeded",
    "set_rate",
    "update",
]

_READS: dict[frozenset[type], bool] = {}  # of `_reads_channels_last`


@dataclass(frozen=True)
class Metrics:
    """How well a network recognizes a split."""

    accuracy: float  # share of images whose highest logit is right, 0 to 1
    cross_entropy: float  # nats, mean over images


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
        with torch.inference_mode(), _layers(network, split.images.device):
            ordered = split.images.device.type != "cpu" or judges_channels_last(network)
            for start in range(0, len(split), batch_size):
                images = normalise(split.images[start : start + batch_size], mean, std)
                images = _channels_last(images) if ordered and _reads_channels_last(network, images[:1]) else images
                labels = split.labels[start : start + batch_size]
                with _autocast(images.device, precision):
                    logits = network(images).float()
                right = right + (logits.argmax(1) == labels).sum()
                loss = loss + F.cross_entropy(logits, labels, reduction="sum")
    finally:
        for module, training in modes:
            module.training = training
    return Metrics(accuracy=float(right) / len(split), cross_entropy=float(loss) / len(split))


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
    on_minibatch: Callable[[], object] | None = None,
) -> float:
    """Train `network` in place for a few minibatches, with a fresh momentum; returns their mean loss in nats.

    `seed` alone draws the images and their augmentation (common random numbers: the same seed means the same
    pictures whatever the network). The learning rate is constant, or with `decay` falls linearly from
    `learning_rate` towards 0. The network's modes are left in training mode. `on_minibatch` is called after each: a GPU
    may lag behind. NonFiniteError when the loss or a weight is not finite; UserError when there are fewer training
    images than a batch.
    """
    if minibatches < 1:
        raise ValueError(f"minibatches must be at least 1, got {minibatches}")
    require_batch(dataset, batch_size)
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(network, learning_rate, momentum=momentum, weight_decay=weight_decay)
    network.train()
    total = torch.zeros((), device=dataset.train.images.device)

    def once(images: Tensor, labels: Tensor) -> Tensor:
        loss = partial(F.cross_entropy, target=labels, label_smoothing=label_smoothing)
        return update(network, optimizer, images, loss, precision=precision)

    play = captured(once, network) if minibatches >= WORTH else once
    with seeded(dataset.train.images.device, seed):
        for index, chosen in enumerate(choices(len(dataset.train), batch_size, minibatches, generator, total.device)):
            if decay:
                set_rate(optimizer, learning_rate * (1 - index / minibatches))
            batch = dataset.train.take(chosen)
            total += play(augmented(batch, dataset, data_config, generator), batch.labels)
            if on_minibatch is not None:
                on_minibatch()
    if not bool(total.isfinite()) or not finite(network):
        raise NonFiniteError(
            f"retraining: loss or weights are not finite after {minibatches} minibatches at learning rate "
            f"{learning_rate:g}; try a lower learning rate"
        )
    return float(total) / minibatches


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    precision: str,
) -> Tensor:
    """One update by the gradient of `loss`, a function of the logits float32 [B, classes].

    Returns the loss before it, a scalar that the device need not have finished.
    """
    value = loss(logits_of(network, images, precision=precision))
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value.detach()


def logits_of(network: nn.Module, images: Tensor, *, precision: str) -> Tensor:
    """The network's answer to normalised images [B, C, H, W], the quickest way: float32 [B, classes]."""
    misread = (_misread(module) and quick_form(module) is None for module in network.modules())
    if (images.device.type != "cpu" or not any(misread)) and _reads_channels_last(network, images[:1]):
        images = _channels_last(images)
    with _layers(network, images.device), _autocast(images.device, precision):
        return cast(Tensor, network(images)).float()


def augmented(batch: Split, dataset: Dataset, config: DataConfig, generator: torch.Generator) -> Tensor:
    """The batch's images augmented as `config` says and normalised: float32 [B, C, H, W]."""
    return augment(
        batch.images,
        flip=config.flip,
        shift_pixels=config.shift_pixels,
        mean=dataset.mean,
        std=dataset.std,
        generator=generator,
    )


def choices(
    images: int, batch_size: int, count: int, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """`count` times the indices of a minibatch (int64 [batch_size] on `device`): no image twice before all came once.

    The generator's device draws them, so a CPU generator gives the same on every device.
    """
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        if len(waiting) < batch_size:
            waiting = torch.randperm(images, generator=generator).to(device)  # an incomplete rest is left out
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def make_optimizer(
    network: nn.Module, learning_rate: float, *, momentum: float, weight_decay: float, norm_weight_decay: float = 0.0
) -> torch.optim.SGD:
    """SGD (Nesterov's, where there is momentum); `weight_decay` is that of convolution and linear weights."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": norm_weight_decay},  # batch-norm, biases
    ]
    # fused: one call for all tensors; of a narrow network's step the loop over them takes 2 to 3 %
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters; on a GPU in a tensor there, which a recorded update reads anew."""
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        if device.type != "cuda":
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor) and group["lr"].device == device:
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.full((), rate, device=device)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _layers(network: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """The context that a network runs in quickest on `device`."""
    if device.type != "cpu":
        return nullcontext()
    keep_freed_memory()
    return cpu_layers(network)


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


def _reads_channels_last(network: nn.Module, image: Tensor) -> bool:
    """Whether the network's forward can: one that calls `view` on feature maps cannot.

    Tried once for all networks of the same modules, by one image [1, C, H, W].
    """
    kind = frozenset(type(module) for module in network.modules())
    if kind not in _READS:
        trial = duplicate(network).eval()
        with torch.no_grad():
            try:
                trial(_channels_last(image))
                _READS[kind] = True
            except RuntimeError:
                trial(image.contiguous())  # and what is wrong with it otherwise is said here
                _READS[kind] = False
    return _READS[kind]


def _channels_last(images: Tensor) -> Tensor:
    """The images with channels innermost in memory, which every following layer then keeps to.

    With one channel both orders are the same bytes, and only strides that say so turn the layers.
    """
    batch, channels, height, width = images.shape
    if channels == 1:
        return images.contiguous().as_strided((batch, 1, height, width), (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators start from `seed` inside, and are as before outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def finite(network: nn.Module) -> bool:
    """Whether every weight and batch-norm entry is finite."""
    tensors: Iterable[Tensor] = (*network.parameters(), *network.buffers())
    flags = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not flags or bool(torch.stack(flags).all())
