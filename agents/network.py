"""What every recurrent Q-network has in common, whatever it sees and does.

The learner (learner/learner.py) knows networks and actions by these words alone: the Controller with its sets of
filters (agents/controller.py) is one case, a network for ordinary Gymnasium tasks (agents/discrete.py) another.
Axes: T time, B batch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

__all__ = ["ActionRule", "DuelingJudgement", "Judgement", "OverTime", "QNetwork", "RecurrentState"]

RecurrentState = tuple[Tensor, Tensor]  # LSTM h and c, each float32 [B, H]


@dataclass(frozen=True, kw_only=True)
class OverTime:
    """A dataclass of tensors, time first."""

    def __getitem__(self, time: slice) -> Self:
        """A stretch of time."""
        return type(self)(**{field.name: getattr(self, field.name)[time] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Judgement(OverTime):
    """What a network says of T x B states."""

    value: Tensor  # float32 [T, B]


@dataclass(frozen=True, kw_only=True)
class DuelingJudgement(Judgement):
    """What a dueling network says (Wang et al. 2016)."""

    advantage: Tensor  # float32 [T, B, A], of each action, or of each filter


class QNetwork(nn.Module, ABC):
    """An LSTM Q-network. What it sees is a tensor or an object of tensors [T, B, ...] that is sliced by time."""

    hidden_size: int  # H, of the LSTM

    def initial_state(self, batch: int = 1) -> RecurrentState:
        """The state at the start of an episode: zeros [B, H]."""
        zeros = torch.zeros(batch, self.hidden_size, device=next(self.parameters()).device)
        return zeros, zeros.clone()

    @abstractmethod
    def forward(self, seen: Any, state: RecurrentState) -> tuple[Judgement, RecurrentState]:
        """Judge T x B states in a row, starting from `state`."""

    def remember(self, seen: Any, state: RecurrentState) -> RecurrentState:
        """The state after T x B states in a row that nobody wants judged, as in a burn-in."""
        _, after = self(seen, state)
        return after  # type: ignore[no-any-return]

    @abstractmethod
    def advantages(self, judgement: Any, seen: Any) -> Tensor:
        """What ranks the actions, or the filters, the highest first: float32 [T, B, A], without gradient.

        Apart from `forward`, as most updates ask for no ranking.
        """

    @abstractmethod
    def q_of(self, judgement: Any, action: Tensor, seen: Any) -> Tensor:
        """Q of the actions [T, B, ...]: float32 [T, B], in rescaled units."""

    @abstractmethod
    def q_all(self, judgement: Any, seen: Any) -> Tensor:
        """Q of every single action: float32 [T, B, A], in rescaled units."""


class ActionRule(Protocol):
    """Which action a network's advantages ask for."""

    def greedy(self, advantages: Tensor, seen: Any, step: Tensor) -> Tensor:
        """The best actions [T, B, ...]; `step` int64 [T, B] is the step of the episode, from 0."""
