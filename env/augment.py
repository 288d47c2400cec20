"""Images on their way into a network: shifted, mirrored and normalised on the device that holds them.

Called for every minibatch of `env/retraining.py` and `env/training.py`; no worker process stands in between.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["augment", "normalise"]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images uint8 [B, C, H, W] as float32 [B, C, H, W] with the training split's mean 0 and deviation 1."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=16)  # a GPU would be waited for, each time they are sent there
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def augment(
    images: Tensor,
    *,
    flip: bool,
    shift_pixels: int,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """Images uint8 [B, C, H, W], each flipped and shifted by itself, normalised: float32 [B, C, H, W].

    Each image is mirrored with probability 1/2 where `flip`, and moved by whole pixels, uniform in
    -shift_pixels..shift_pixels along each axis; zeros (black) move in. Numbers are drawn on the generator's
    device, so a CPU generator gives the same pictures on every device.
    """
    if flip or shift_pixels:
        images = _moved(images, flip=flip, shift_pixels=shift_pixels, generator=generator)
    return normalise(images, mean, std)


def _moved(images: Tensor, *, flip: bool, shift_pixels: int, generator: torch.Generator) -> Tensor:
    """Each image cut as a window out of its padded self (one copy), then mirrored where drawn."""
    batch, _, height, width = images.shape
    source = generator.device
    shifts = torch.randint(2 * shift_pixels + 1, (2, batch), generator=generator, device=source)
    mirrored = torch.randint(2, (batch, 1, 1, 1), generator=generator, device=source, dtype=torch.bool)
    if shift_pixels:
        down, right = _sent(shifts, images.device)
        padded = torch.nn.functional.pad(images, [shift_pixels] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, rows, columns, H, W]
        images = windows[torch.arange(batch, device=images.device), :, down, right]
    if flip:
        images = torch.where(_sent(mirrored, images.device), images.flip(3), images)
    return images


def _sent(drawn: Tensor, device: torch.device) -> Tensor:
    """The same on `device`; a GPU is not waited for, as a copy from memory that may be swapped out would."""
    if drawn.device == device or device.type != "cuda":
        return drawn.to(device)
    return drawn.pin_memory().to(device, non_blocking=True)
