"""Trainings of a second, on 200 digits, that several tests share."""

import dataclasses

import torch
from torch import nn

from env.data import DataConfig, load_dataset
from env.networks import small
from env.training import TrainConfig

FEW = load_dataset(DataConfig(train_limit=200))
AUGMENTED = DataConfig(flip=True, shift_pixels=1)
TINY = TrainConfig(epochs=3, batch_size=32, label_smoothing=0.1)
ALL_ON = dataclasses.replace(TINY, distillation=0.5, average=0.9)


def network(seed: int = 0, *, dropout: bool = False, width: float = 0.2) -> nn.Module:
    """A fresh network for digits."""
    torch.manual_seed(seed)
    return nn.Sequential(small(width=width), nn.Dropout(0.1)) if dropout else small(width=width)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and buffers agree, bit for bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
