"""The R2D2 learner: samples sequences, updates a recurrent Q-network, writes priorities back.

Knows of the Controller no more than of any other network (agents/network.py). Owns no process and no connection: the
replay is handed in by actors/trainer.py.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from agents.network import ActionRule, Judgement, QNetwork, RecurrentState
from env.errors import NonFiniteError, UserError
from learner.losses import n_step_targets, q_discrepancy, r2d2_loss, rescale, sequence_priorities, unrescale
from learner.packing import Arrays, Packing
from learner.sequence import Batch, ForeignSequenceError, SequenceConfig, collate

__all__ = [
    "Learner",
    "LearnerConfig",
    "ReadyBatch",
    "SampledSequences",
    "SequenceReplay",
    "UpdateReport",
    "first_priorities",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """R2D2's settings; the defaults are the paper's (table 2) unless the comment says otherwise."""

    batch_size: int = 16  # the paper's 64 is more than a short campaign ever holds
    learning_rate: float = 3e-3  # the paper's 1e-4 moves too little in the tens of updates of a campaign
    adam_epsilon: float = 1e-5  # the paper's 1e-3 holds back gradients as small as differences in cross-entropy make
    gradient_clip: float = 40.0
    discount: float = 1.0  # the paper's 0.997 is for games without end; a ladder's length is given
    n_step: int = 16  # to the end of a ladder, where its reward is; the paper's 5 is for games of thousands of steps
    priority_eta: float = 0.9
    target_update_period: int = 100  # updates; the paper's 2500 would outlast most campaigns
    publish_period: int = 5  # updates between two publications of the weights
    checkpoint_period: int = 50  # updates between two checkpoints
    max_bad_updates: int = 10  # non-finite updates in a row before the learner stops
    delta_q_period: int = 10  # updates between two measurements of how stale stored states are; 0 never
    precision: str = "float32"  # or "bfloat16" (autocast), for GPUs

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        periods = ("target_update_period", "publish_period", "checkpoint_period")
        whole = ("batch_size", "n_step", *periods, "max_bad_updates")
        wrong = [(name, "at least 1") for name in whole if getattr(self, name) < 1]
        positive = ("learning_rate", "adam_epsilon", "gradient_clip")
        wrong += [(name, "above 0") for name in positive if not getattr(self, name) > 0]
        wrong += [("discount", "in (0, 1]")] if not 0 < self.discount <= 1 else []
        wrong += [("priority_eta", "in [0, 1]")] if not 0 <= self.priority_eta <= 1 else []
        wrong += [("delta_q_period", "at least 0")] if self.delta_q_period < 0 else []
        wrong += [("precision", "float32 | bfloat16")] if self.precision not in ("float32", "bfloat16") else []
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


@dataclass(frozen=True, kw_only=True)
class ReadyBatch:
    """A sample as an update needs it; see `Learner.prepare`."""

    keys: list[str]  # of the sequences in the batch
    weights: Tensor  # float32 [B], on the learner's device
    batch: Batch | None  # likewise; None where no sequence was ours
    foreign: list[tuple[str, str]]  # keys of sequences that are not ours, and why


class SequenceReplay(Protocol):
    """The part of a replay that the learner uses."""

    def sample(self, batch_size: int) -> SampledSequences | ReadyBatch | None:
        """Draw by priority; None when it is not the learner's turn."""

    def update(self, keys: list[str], priorities: np.ndarray) -> int:
        """Write new priorities back; returns how many sequences were still there."""

    def reject(self, keys: list[str]) -> int:
        """Remove sequences that are of no use; returns how many."""


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update, for logs and metrics."""

    updates: int
    loss: float
    mean_priority: float
    gradient_norm: float
    delta_q: tuple[float, float] | None  # at the first and the last learned step; every delta_q_period updates


class Learner:
    """R2D2, also with set-valued actions.

    Args:
        controller: the online network; trained in place, on its own device.
        actions: which action a judgement asks for (double Q); for a Controller its ladder.
        replay: where sequences come from.
        config: R2D2's settings.
        sequences: how sequences were cut.
        packing: how their observations and actions travel.
        optimizer: of the network's parameters, shared with the learner of another one that has the same; its own at
            None.

    Attributes:
        updates: updates made.
        skipped: updates not made because a loss or gradient was not finite.

    """

    def __init__(
        self,
        controller: QNetwork,
        actions: ActionRule,
        replay: SequenceReplay,
        config: LearnerConfig,
        sequences: SequenceConfig,
        packing: Packing,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.controller, self.actions, self.replay = controller, actions, replay
        self.config, self.sequences, self.packing = config, sequences, packing
        self.target = copy.deepcopy(controller).requires_grad_(False)
        self.optimizer = optimizer or torch.optim.Adam(
            controller.parameters(), lr=config.learning_rate, eps=config.adam_epsilon
        )
        self.updates = self.skipped = self._bad_in_a_row = 0
        self._device = next(controller.parameters()).device

    def update(self) -> UpdateReport | None:
        """Sample, learn, write priorities back; None when the replay has nothing for us now.

        Raises:
            NonFiniteError: `max_bad_updates` updates in a row were skipped; the weights are the last good ones.

        """
        sample = self.replay.sample(self.config.batch_size)
        if sample is None:
            return None
        ready = sample if isinstance(sample, ReadyBatch) else self.prepare(sample)
        for key, problem in ready.foreign:
            self._remove([key], problem)
        if ready.batch is None:
            return None
        report, priorities = self.learn(ready.batch, ready.weights)
        if report is None:
            self._skip(ready.keys, priorities)
            return None
        self._bad_in_a_row = 0
        self.replay.update(ready.keys, priorities.double().cpu().numpy())
        return report

    def prepare(self, sample: SampledSequences) -> ReadyBatch:
        """Put the sequences that are ours side by side; changes nothing, so that another thread may do it ahead."""
        places, hidden = list(range(len(sample.keys))), self.controller.hidden_size
        batch: Batch | None = None
        foreign: list[tuple[str, str]] = []
        while places and batch is None:
            try:
                arrays = [sample.arrays[place] for place in places]
                batch = collate(arrays, self.sequences, self.packing, hidden=hidden).to(self._device)
            except ForeignSequenceError as error:
                foreign.append((sample.keys[places.pop(error.index)], error.problem))
        weights = torch.as_tensor(np.asarray(sample.weights)[places], dtype=torch.float32)
        keys = [sample.keys[place] for place in places]
        return ReadyBatch(keys=keys, weights=weights.to(self._device), batch=batch, foreign=foreign)

    def learn(self, batch: Batch, weights: Tensor) -> tuple[UpdateReport | None, Tensor]:
        """One update on a batch that is there already: the report and the new priorities [B].

        No report, and nothing changed, when the loss or a gradient is not finite.
        """
        with self._autocast():
            loss, priorities = self.loss(batch, weights)
        norm = self._step(loss)
        if norm is None:
            return None, priorities
        self.updates += 1
        if self.updates % self.config.target_update_period == 0:
            self.target.load_state_dict(self.controller.state_dict())
        report = UpdateReport(
            updates=self.updates,
            loss=loss.item(),
            mean_priority=priorities.mean().item(),
            gradient_norm=norm,
            delta_q=self._delta_q(batch),
        )
        return report, priorities

    def _remove(self, keys: list[str], problem: str) -> None:
        _log.warning("learner: removed from the replay: %s (%s)", ", ".join(keys), problem)
        self.replay.reject(keys)

    def loss(self, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The R2D2 loss [] of a batch, and its sequences' new priorities [B]."""
        q_taken, targets = _q_and_targets(
            self.controller, self.target, self.actions, batch, self.config, burn_in=self.sequences.burn_in
        )
        return r2d2_loss(q_taken, targets, batch.valid, weights, eta=self.config.priority_eta)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

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

    @torch.no_grad()
    def _delta_q(self, batch: Batch) -> tuple[float, float] | None:
        """R2D2's Delta Q at the first and the last learned step, mean over the longest sequences of the batch."""
        if not self.config.delta_q_period or self.updates % self.config.delta_q_period:
            return None
        seen, network = batch.observations[self.sequences.burn_in :], self.controller
        trained = network.q_all(_unroll(network, batch, self.sequences.burn_in), seen)
        longest = batch.length.max()
        mine, found = batch.length == longest, []
        for place, stored in zip((0, int(longest) - 1), batch.later_states, strict=True):
            here = seen[place : place + 1]
            judged, _ = network(here, stored)
            found.append(q_discrepancy(trained[place], network.q_all(judged, here)[0])[mine].mean().item())
        return found[0], found[1]

    def _skip(self, keys: list[str], priorities: Tensor) -> None:
        """Count an update that was not made, and remove the sequences whose errors are what made it impossible."""
        self.skipped += 1
        self._bad_in_a_row += 1
        beyond = (~priorities.square().isfinite()).tolist()  # as the loss squares errors
        culprits = [key for key, bad in zip(keys, beyond, strict=True) if bad]
        named, reason = culprits or keys, "the loss or a gradient is not finite"
        _log.warning("learner: update skipped on sequences %s: %s", ", ".join(named), reason)
        if culprits:
            self._remove(culprits, "no finite loss")
        if self._bad_in_a_row >= self.config.max_bad_updates:
            raise NonFiniteError(
                f"learner: {self._bad_in_a_row} updates in a row were skipped, the last on sequences "
                f"{', '.join(named[:4])}: {reason}; lower learner.learning_rate and resume"
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


@torch.no_grad()
def first_priorities(
    controller: QNetwork,
    actions: ActionRule,
    sequences: Sequence[Arrays],
    config: LearnerConfig,
    cuts: SequenceConfig,
    packing: Packing,
) -> np.ndarray:
    """The priorities that an actor gives its new sequences, float64 [B], by the network it played with.

    As the learner's own (R2D2, section 2.3; Horgan et al. 2018, section 3), with that network as its own target.
    """
    device = next(controller.parameters()).device
    batch = collate(sequences, cuts, packing, hidden=controller.hidden_size).to(device)
    q_taken, targets = _q_and_targets(controller, controller, actions, batch, config, burn_in=cuts.burn_in)
    priorities = sequence_priorities(targets - q_taken, batch.valid, eta=config.priority_eta)
    return priorities.double().cpu().numpy()


def _q_and_targets(
    online: QNetwork, target: QNetwork, actions: ActionRule, batch: Batch, config: LearnerConfig, *, burn_in: int
) -> tuple[Tensor, Tensor]:
    """Q of what was done, and its n-step double-Q targets: float32 [T, B] each, in rescaled units."""
    seen = batch.observations[burn_in:]
    judgement = _unroll(online, batch, burn_in)
    with torch.no_grad():
        if _bootstraps(batch, config.n_step):
            judged = judgement if target is online else _unroll(target, batch, burn_in)
            greedy = actions.greedy(online.advantages(judgement, seen), seen, batch.step)
            values = unrescale(target.q_of(judged, greedy, seen).float())
        else:
            values = torch.zeros_like(judgement.value)
        targets = rescale(
            n_step_targets(
                batch.rewards,
                values,
                batch.terminated,
                batch.length,
                n_step=config.n_step,
                discount=config.discount,
            )
        )
    return online.q_of(judgement[:-1], batch.actions, seen[:-1]).float(), targets


def _bootstraps(batch: Batch, n_step: int) -> bool:
    """Whether any target needs the value of a state: not where n steps reach an end that is final in every sequence."""
    return n_step < int(batch.length.max()) or not bool(batch.terminated.any(dim=0).all())


def _unroll(network: QNetwork, batch: Batch, burn_in: int) -> Judgement:
    """Judge the learned part of a batch, [T + 1, B], after a burn-in without gradient (R2D2, section 3)."""
    state = _burnt_in(network, batch, burn_in)
    judgement, _ = network(batch.observations[burn_in:], state)
    assert isinstance(judgement, Judgement)
    return judgement


@torch.no_grad()
def _burnt_in(network: QNetwork, batch: Batch, burn_in: int) -> RecurrentState:
    """The state at the start of the learned part; the stored one where a sequence has no burn-in."""
    if burn_in == 0:
        return batch.state
    warmed = network.remember(batch.observations[:burn_in], batch.state)
    burnt = batch.burnt[:, None]
    return torch.where(burnt, warmed[0], batch.state[0]), torch.where(burnt, warmed[1], batch.state[1])
