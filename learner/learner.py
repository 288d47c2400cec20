"""The R2D2 learner: samples sequences, updates the Controller, writes priorities back.

Owns no process and no connection: the replay is handed in by actors/trainer.py.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from agents.controller import Controller, Judgement, RecurrentState
from agents.ladder import Ladder
from env.errors import NonFiniteError, UserError
from env.importance import FEATURES
from learner.losses import n_step_targets, r2d2_loss, rescale, unrescale
from learner.sequence import Batch, ForeignSequenceError, SequenceConfig, collate

__all__ = ["Learner", "LearnerConfig", "SampledSequences", "SequenceReplay", "UpdateReport"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """R2D2's settings; the defaults are the paper's (table 2) unless the comment says otherwise."""

    batch_size: int = 16  # the paper's 64 is more than a short campaign ever holds
    learning_rate: float = 3e-4  # the paper's 1e-4 moves too little in the hundreds of updates of a campaign
    adam_epsilon: float = 1e-3
    gradient_clip: float = 40.0
    discount: float = 0.997
    n_step: int = 16  # to the end of a ladder, where its reward is; the paper's 5 is for games of thousands of steps
    priority_eta: float = 0.9
    target_update_period: int = 100  # updates; the paper's 2500 would outlast most campaigns
    publish_period: int = 5  # updates between two publications of the weights
    checkpoint_period: int = 50  # updates between two checkpoints
    max_bad_updates: int = 10  # non-finite updates in a row before the learner stops

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        periods = ("target_update_period", "publish_period", "checkpoint_period")
        whole = ("batch_size", "n_step", *periods, "max_bad_updates")
        wrong = [(name, "at least 1") for name in whole if getattr(self, name) < 1]
        positive = ("learning_rate", "adam_epsilon", "gradient_clip")
        wrong += [(name, "above 0") for name in positive if not getattr(self, name) > 0]
        wrong += [("discount", "in (0, 1]")] if not 0 < self.discount <= 1 else []
        wrong += [("priority_eta", "in [0, 1]")] if not 0 <= self.priority_eta <= 1 else []
        for name, expected in wrong:
            raise UserError(f"learner.{name}", expected=expected, got=repr(getattr(self, name)), remedy="change it")


class SampledSequences(Protocol):
    """What a replay hands out: parallel lists over B sequences."""

    @property
    def keys(self) -> list[str]:
        """What `update` knows them by."""

    @property
    def weights(self) -> np.ndarray:
        """Importance-sampling weights, float [B]."""

    @property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        """What `learner.sequence.cut` made."""


class SequenceReplay(Protocol):
    """The part of a replay that the learner uses."""

    def sample(self, batch_size: int) -> SampledSequences | None:
        """Draw by priority; None when it is not the learner's turn."""

    def update(self, keys: list[str], priorities: np.ndarray) -> int:
        """Write new priorities back; returns how many sequences were still there."""


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update, for logs and metrics."""

    updates: int
    loss: float
    mean_priority: float
    gradient_norm: float


class Learner:
    """R2D2 with set-valued actions.

    Args:
        controller: the online network; trained in place.
        ladder: turns the online network's ranking into the greedy set (double Q).
        replay: where sequences come from.
        config: R2D2's settings.
        sequences: how sequences were cut.

    Attributes:
        updates: updates made.
        skipped: updates not made because a loss or gradient was not finite, or a sequence not one of ours.

    """

    def __init__(
        self,
        controller: Controller,
        ladder: Ladder,
        replay: SequenceReplay,
        config: LearnerConfig,
        sequences: SequenceConfig,
    ) -> None:
        self.controller, self.ladder, self.replay = controller, ladder, replay
        self.config, self.sequences = config, sequences
        self.target = Controller(controller.config, controller.plan)
        self.target.load_state_dict(controller.state_dict())
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=config.learning_rate, eps=config.adam_epsilon)
        self.updates = self.skipped = self._bad_in_a_row = 0

    def update(self) -> UpdateReport | None:
        """Sample, learn, write priorities back; None when the replay has nothing for us now.

        Raises:
            NonFiniteError: `max_bad_updates` updates in a row were skipped; the weights are the last good ones.

        """
        sample = self.replay.sample(self.config.batch_size)
        if sample is None:
            return None
        batch = self._collated(sample)
        if batch is None:
            return None
        loss, priorities = self.loss(batch, torch.as_tensor(sample.weights, dtype=torch.float32))
        norm = self._step(loss)
        if norm is None:
            self._skip(sample.keys, "the loss or a gradient is not finite; lower learner.learning_rate and resume")
            return None
        self._bad_in_a_row = 0
        self.replay.update(sample.keys, priorities.double().numpy())
        self.updates += 1
        if self.updates % self.config.target_update_period == 0:
            self.target.load_state_dict(self.controller.state_dict())
        return UpdateReport(
            updates=self.updates, loss=loss.item(), mean_priority=priorities.mean().item(), gradient_norm=norm
        )

    def _collated(self, sample: SampledSequences) -> Batch | None:
        """The batch, or None where a sequence is not one of ours; that one is hardly ever drawn again."""
        config = self.controller.config
        kinds = len(FEATURES) if config.observation == "features" else 0
        units, hidden = self.controller.plan.units, config.hidden_size
        try:
            return collate(sample.arrays, self.sequences, units=units, kinds=kinds, hidden=hidden)
        except ForeignSequenceError as error:
            key = sample.keys[error.index]
            self.replay.update([key], np.zeros(1))
            self._skip([key], error.problem)
            return None

    def loss(self, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The R2D2 loss [] of a batch, and its sequences' new priorities [B]."""
        online = _unroll(self.controller, batch, self.sequences.burn_in)
        with torch.no_grad():
            target = _unroll(self.target, batch, self.sequences.burn_in)
            targets = rescale(self._targets(batch, online, target))
        alive = batch.observations.keep_mask[self.sequences.burn_in :]
        before = Judgement(value=online.value[:-1], advantage=online.advantage[:-1])
        q_taken = self.controller.q_of(before, batch.actions, alive[:-1])
        return r2d2_loss(q_taken, targets, batch.valid, weights, eta=self.config.priority_eta)

    def _targets(self, batch: Batch, online: Judgement, target: Judgement) -> Tensor:
        """n-step double-Q targets in units of reward, float32 [T, B]."""
        alive = batch.observations.keep_mask[self.sequences.burn_in :]
        flat = self.ladder.cut(online.advantage.flatten(0, 1), alive.flatten(0, 1), batch.step.flatten())
        greedy = flat.view(alive.shape)
        values = unrescale(self.target.q_of(target, greedy, alive))
        return n_step_targets(
            batch.rewards,
            values,
            batch.terminated,
            batch.length,
            n_step=self.config.n_step,
            discount=self.config.discount,
        )

    def _step(self, loss: Tensor) -> float | None:
        """One step of the optimizer; None, and nothing changed, when loss or gradient is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        if not loss.isfinite():
            return None
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.controller.parameters(), self.config.gradient_clip)
        if not norm.isfinite():
            return None
        self.optimizer.step()
        return norm.item()

    def _skip(self, keys: list[str], reason: str) -> None:
        self.skipped += 1
        self._bad_in_a_row += 1
        _log.warning("learner: update skipped (%s)", reason)
        if self._bad_in_a_row >= self.config.max_bad_updates:
            raise NonFiniteError(
                f"learner: {self._bad_in_a_row} updates in a row were skipped, the last on sequences "
                f"{', '.join(keys[:4])}: {reason}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that an update depends on, apart from the replay."""
        return {
            "controller": self.controller.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.controller.load_state_dict(state["controller"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates, self.skipped = state["updates"], state["skipped"]


def _unroll(network: Controller, batch: Batch, burn_in: int) -> Judgement:
    """Judge the learned part of a batch, [T + 1, B], after a burn-in without gradient (R2D2, section 3)."""
    state = _burnt_in(network, batch, burn_in)
    judgement, _ = network(batch.observations[burn_in:], state)
    assert isinstance(judgement, Judgement)
    return judgement


@torch.no_grad()
def _burnt_in(network: Controller, batch: Batch, burn_in: int) -> RecurrentState:
    """The state at the start of the learned part; the stored one where a sequence has no burn-in."""
    if burn_in == 0:
        return batch.state
    _, warmed = network(batch.observations[:burn_in], batch.state)
    burnt = batch.burnt[:, None]
    return torch.where(burnt, warmed[0], batch.state[0]), torch.where(burnt, warmed[1], batch.state[1])
