"""Which image serves for what: drawn by seed, class by class. Called by `env/data.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from env.errors import UserError

__all__ = ["Split", "draw_share", "shuffled", "take_turns"]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes, in random order, so that any prefix is a fair sample."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], 0 to classes - 1

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The images at `indices` (int64 [M]), in that order."""
        return Split(self.images[indices], self.labels[indices])


def draw_share(
    indices: Tensor, labels: Tensor, share: float, generator: torch.Generator, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Draw `share` of each class out of `indices`: (the rest, the drawn), at least one of a class in both.

    `indices` (int64 [M]) point into `labels` (int64 [N]). UserError for a class of fewer than two images.
    """
    drawn = torch.zeros(len(indices), dtype=torch.bool)
    for index, name in enumerate(classes):
        members = (labels[indices] == index).nonzero().flatten()
        if len(members) < 2:
            raise UserError(
                f"images of class {name}",
                expected="at least 3 (2 for training where test images are given), so that every split has one",
                got="fewer",
                remedy="add images of this class",
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        drawn[shuffled(members, generator)[:count]] = True
    return indices[~drawn], indices[drawn]


def shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    """The same `indices` (int64 [M]) in random order."""
    return indices[torch.randperm(len(indices), generator=generator)]


def take_turns(labels: Tensor, generator: torch.Generator) -> Tensor:
    """All indices of `labels` (int64 [N]), drawn class by class in turn: every prefix is as balanced as it can be."""
    order = torch.randperm(len(labels), generator=generator)
    turn = torch.empty_like(labels)  # how many of the same class come before
    for index in range(int(labels.max()) + 1):
        members = order[labels[order] == index]
        turn[members] = torch.arange(len(members))
    return order[torch.argsort(turn[order], stable=True)]
