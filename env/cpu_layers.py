"""Layers as a CPU runs them quickest: the same functions, in another order of memory or of rounding.

Called by env/retraining.py around every update and every evaluation; a network is as it was afterwards. All rules go
by shape, never by a timed trial, so that the same seed gives the same numbers. Each is there because
`benchmarks/step.py` got slower without it.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["cpu_layers", "judges_channels_last", "keep_freed_memory", "quick_form"]

_LANES = 8  # floats in an AVX2 register
_FOLD = 16  # rows of a channels_last image that are read as one
_LEAST_PIXELS = 2**14  # in a batch, from which on folding outweighs its few more calls
_MOST_CHANNELS = 32  # above, the last, unfilled register is a small share
# Forward, channels_last is quicker for convolutions whose input fills a register, and slower for others. It pays where
# the first do more than a third of the others' work: so measured on VGG16 and ResNet18, both, pruned by 50 to 99 %.
_FILLED_SHARE = 1 / 3
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_HELD_BYTES = 2**31 - 1, 2**25  # the largest that any, and that every glibc accepts


@contextmanager
def cpu_layers(network: nn.Module) -> Iterator[None]:
    """Inside, strided 1x1 convolutions and batch-norms of `network` compute the same by quicker ways.

    Images must be channels_last for it to matter. Modules of other types, also subclasses, stay as they are.
    """
    changed = []
    for module in network.modules():
        quick = quick_form(module)
        if quick is not None:
            module.forward = functools.partial(quick, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def quick_form(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """What `cpu_layers` puts in place of this module's forward, or None."""
    if "forward" in vars(module):  # somebody else's
        return None
    if type(module) is nn.BatchNorm2d and module.num_features % _LANES and module.num_features < _MOST_CHANNELS:
        return _norm if module.affine and module.track_running_stats and module.momentum else None
    if type(module) is nn.Conv2d and _is_strided_1x1(module) and module.padding == (0, 0):
        return _strided_1x1
    return None


def judges_channels_last(network: nn.Module) -> bool:
    """Whether a forward pass alone is likely quicker with channels_last images: not for networks of a few channels.

    Backward it always is. An estimate: each convolution is weighed by its work in whole registers, at the resolution
    that the strides before it leave.
    """
    filled, unfilled, pixels = 0.0, 0.0, 1.0
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and _longest(module.kernel_size) > 1:
            pixels /= _longest(module.stride) ** 2
        if isinstance(module, nn.Conv2d):
            registers = math.ceil(module.in_channels / _LANES) * math.ceil(module.out_channels / _LANES)
            work = pixels * registers * math.prod(module.kernel_size) / module.groups
            if module.in_channels >= _LANES:
                filled += work
            else:
                unfilled += work
    return filled >= _FILLED_SHARE * unfilled


def _longest(sides: int | tuple[int, ...]) -> int:
    return sides if isinstance(sides, int) else max(sides)


def _is_strided_1x1(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1


def _strided_1x1(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Leave the pixels out first: quicker than oneDNN's strided kernels, and clear of their mistake."""
    rows, columns = module.stride
    # cut with the channels last: a slice's gradient is laid out as its input's axes stand, and one that arrives in
    # another order than its activation costs ReLU tenfold
    left = images.permute(0, 2, 3, 1)[:, ::rows, ::columns].permute(0, 3, 1, 2)
    return F.conv2d(left, module.weight, module.bias, groups=module.groups)


def _norm(module: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Batch-norm of channels_last images whose channels do not fill registers.

    torch then works channel by channel. But `_FOLD` pixels side by side are a row of `_FOLD` x C floats, which do fill
    registers: statistics and sums are taken over those columns and then joined.
    """
    running_mean, running_var = module.running_mean, module.running_var
    if not _folds(images) or running_mean is None or running_var is None:
        return nn.BatchNorm2d.forward(module, images)
    if not module.training:
        scale = module.weight * (running_var + module.eps).rsqrt()
        return _scaled(images, scale, module.bias - running_mean * scale)
    output, mean, variance = cast(
        tuple[Tensor, Tensor, Tensor],
        _FoldedNorm.apply(images, module.weight, module.bias, module.eps),  # type: ignore[no-untyped-call]
    )
    pixels, momentum = images.numel() // images.shape[1], module.momentum or 0.0
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (pixels / (pixels - 1)), momentum)
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
    return output


def _folds(images: Tensor) -> bool:
    pixels = images.numel() // images.shape[1]
    return (
        images.dtype == torch.float32
        and pixels >= _LEAST_PIXELS
        and pixels % _FOLD == 0
        and images.is_contiguous(memory_format=torch.channels_last)
    )


def _folded(images: Tensor) -> Tensor:
    """Channels_last images [B, C, H, W] as rows of `_FOLD` pixels: [B * H * W / _FOLD, _FOLD * C], a view."""
    return images.permute(0, 2, 3, 1).reshape(-1, _FOLD * images.shape[1])


def _row(values: Tensor) -> Tensor:
    """Values [C] for each pixel of a row: [_FOLD * C]; `repeat` takes three times as long."""
    return values.expand(_FOLD, len(values)).contiguous().view(-1)


def _unfolded(rows: Tensor, shape: torch.Size) -> Tensor:
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _scaled(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Images [B, C, H, W] x scale [C] + shift [C]."""
    return _unfolded(torch.addcmul(_row(shift), _folded(images), _row(scale)), images.shape)


class _FoldedNorm(torch.autograd.Function):
    """(images [B, C, H, W], weight [C], bias [C], eps) -> (normalised images, mean [C], biased variance [C])."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows, channels = _folded(images), images.shape[1]
        means, variances = (part.view(_FOLD, channels) for part in torch.batch_norm_update_stats(rows, None, None, 0.0))
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        inverse = (variance + eps).rsqrt()
        scale = weight * inverse
        ctx.save_for_backward(images, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return _scaled(images, scale, bias - mean * scale), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """d loss / d images = scale * (g - mean(g) - normalised * mean(g * normalised)), in two passes."""
        images, weight, mean, inverse = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        rows, gradient_rows = _folded(images), _folded(gradient)
        sums = torch.ops.aten.native_batch_norm_backward(
            gradient_rows, rows, None, None, None, _row(mean), _row(inverse), True, 0.0,
            [False, True, True],
        )  # fmt: skip
        weight_gradient, bias_gradient = (part.view(_FOLD, -1).sum(0) for part in sums[1:])
        count = images.numel() // images.shape[1]
        scale = weight * inverse
        slope = -scale * inverse * weight_gradient / count
        offset = -scale * bias_gradient / count - mean * slope
        result = torch.addcmul(_row(offset), rows, _row(slope))
        result.addcmul_(gradient_rows, _row(scale))
        return _unfolded(result, images.shape), weight_gradient, bias_gradient, None


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for the next tensor; returns whether the system can.

    glibc gives large blocks back to the kernel at once, which then clears every page again for each feature map:
    10 to 20 % of a step. What an actor holds is what it needs at its widest network.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return any(mallopt(_MMAP_THRESHOLD, held) and mallopt(_TRIM_THRESHOLD, held) for held in _HELD_BYTES)
