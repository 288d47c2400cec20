"""Sequences: how an episode is cut up, what travels, and what a batch of them looks like to the learner.

A sequence is `burn_in` steps that only warm the recurrent state up, then up to `unroll_length` steps that are learned
from, then the observation after them. It starts with the recurrent state the actor had there (R2D2, section 3), and
brings two later ones along, by which the learner measures how stale stored states are. How observations and actions
travel is the packing's affair (learner/packing.py).

The first sequence of an episode has no burn-in. `burn_in <= sequence_period` makes every other one have all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.network import RecurrentState
from env.errors import UserError
from learner.packing import Arrays, Packing

__all__ = ["Batch", "EpisodeTrace", "ForeignSequenceError", "SequenceConfig", "collate", "cut", "starts"]


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """How episodes are cut."""

    burn_in: int = 4  # steps that warm the recurrent state up
    unroll_length: int = 16  # steps that are learned from
    sequence_period: int = 8  # steps from one sequence's start to the next one's

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        checks = {
            "unroll_length": (self.unroll_length >= 1, "at least 1"),
            "sequence_period": (1 <= self.sequence_period <= self.unroll_length, f"1 to {self.unroll_length}"),
            "burn_in": (0 <= self.burn_in <= self.sequence_period, f"0 to sequence_period={self.sequence_period}"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise UserError(
                    f"sequence.{name}", expected=expected, got=repr(getattr(self, name)), remedy="change one of them"
                )


@dataclass(frozen=True, kw_only=True)
class EpisodeTrace:
    """What a rollout remembers of an episode of T steps."""

    observations: Mapping[str, np.ndarray]  # [T + 1, ...] each, as the environment gave them
    actions: np.ndarray  # [T, ...]
    rewards: np.ndarray  # float32 [T]
    states: np.ndarray  # float32 [T, 2, H], recurrent state (h, c) before each step
    terminated: bool

    def __len__(self) -> int:
        """T."""
        return len(self.rewards)


def cut(trace: EpisodeTrace, config: SequenceConfig, packing: Packing) -> list[Arrays]:
    """Cut an episode into sequences that between them learn from every step."""
    return [_sequence(trace, config, packing, start) for start in starts(len(trace), config)]


def starts(steps: int, config: SequenceConfig) -> list[int]:
    """The steps at which the sequences of an episode of so many steps begin to learn."""
    last = max(1, steps - config.unroll_length + config.sequence_period)
    return [start for start in range(0, last, config.sequence_period) if start < steps]


def _sequence(trace: EpisodeTrace, config: SequenceConfig, packing: Packing, start: int) -> Arrays:
    """The sequence that learns from the steps [start, start + unroll_length)."""
    first = start - (config.burn_in if start else 0)
    end = min(start + config.unroll_length, len(trace))
    observations = {name: array[first : end + 1] for name, array in trace.observations.items()}
    return {
        **packing.pack(observations, trace.actions[first:end]),
        "rewards": trace.rewards[first:end],
        "state": trace.states[first],
        # before the first and before the last step that are learned from
        "later_states": trace.states[[start, end - 1]],
        # step of the episode at which learning starts, steps before it, and whether the episode ended for good
        "place": np.array([start, start - first, int(trace.terminated and end == len(trace))], np.int32),
    }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B sequences side by side, time first; the learned part starts at index `burn_in`."""

    observations: Any  # [burn_in + T + 1, B, ...], as the network reads them; sliced by time
    actions: Tensor  # [T, B, ...]
    rewards: Tensor  # float32 [T, B]
    terminated: Tensor  # bool [T, B]
    length: Tensor  # int64 [B], real steps
    step: Tensor  # int64 [T + 1, B], step of the episode, which tells the waypoint
    burnt: Tensor  # bool [B], whether the sequence has a burn-in
    state: RecurrentState  # [B, H] each, at the first real step
    later_states: tuple[RecurrentState, RecurrentState]  # the actor's, before the first and the last learned step

    @property
    def valid(self) -> Tensor:
        """bool [T, B], the real steps."""
        return torch.arange(len(self.rewards), device=self.length.device)[:, None] < self.length

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        first, last = self.later_states
        return Batch(
            observations=self.observations.to(device),
            actions=self.actions.to(device),
            rewards=self.rewards.to(device),
            terminated=self.terminated.to(device),
            length=self.length.to(device),
            step=self.step.to(device),
            burnt=self.burnt.to(device),
            state=_moved(self.state, device),
            later_states=(_moved(first, device), _moved(last, device)),
        )


class ForeignSequenceError(ValueError):
    """A sequence is of another network or another configuration, or poisoned; `index` is its place in the batch."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem

    def __str__(self) -> str:
        return f"sequence {self.index} of the batch is not one of ours: {self.problem}"


def collate(
    sequences: Sequence[Mapping[str, np.ndarray]], config: SequenceConfig, packing: Packing, *, hidden: int
) -> Batch:
    """Put decoded sequences side by side, whatever wrote them.

    Args:
        sequences: at least one, as `cut` makes them.
        config: how they were cut.
        packing: how their observations and actions travel.
        hidden: H, the size of the recurrent state.

    Raises:
        ForeignSequenceError: a sequence's arrays do not fit each other, this network or this configuration, or hold
            numbers that are not finite.

    """
    time, batch = config.burn_in + config.unroll_length + 1, len(sequences)
    observations = packing.blank_observations(time, batch)
    actions = packing.blank_actions(config.unroll_length, batch)
    rewards = np.zeros((config.unroll_length, batch), np.float32)
    terminated = np.zeros((config.unroll_length, batch), bool)
    place, length = np.zeros((3, batch), np.int64), np.zeros(batch, np.int64)
    for b, sequence in enumerate(sequences):
        problem = _misfit(sequence, packing, hidden) or _nonsense(sequence, config, packing)
        if problem:
            raise ForeignSequenceError(b, problem)
        place[:, b] = sequence["place"]
        burnt, ended = place[1:, b]
        steps = len(sequence["rewards"])
        length[b] = steps - burnt
        here = slice(config.burn_in - burnt, config.burn_in - burnt + steps + 1)
        seen, done = packing.unpack(sequence)
        for name, array in seen.items():
            observations[name][here, b] = array
        actions[: length[b], b] = done[burnt:]
        rewards[: length[b], b] = sequence["rewards"][burnt:]
        terminated[length[b] - 1, b] = bool(ended)
    later = [[sequence["later_states"][index] for sequence in sequences] for index in (0, 1)]
    return Batch(
        observations=packing.tensors(observations),
        actions=torch.from_numpy(actions),
        rewards=torch.from_numpy(rewards),
        terminated=torch.from_numpy(terminated),
        length=torch.from_numpy(length),
        step=torch.from_numpy(place[0] + np.arange(config.unroll_length + 1)[:, None]),
        burnt=torch.from_numpy(place[1] > 0),
        state=_side_by_side([sequence["state"] for sequence in sequences]),
        later_states=(_side_by_side(later[0]), _side_by_side(later[1])),
    )


def _side_by_side(states: Sequence[np.ndarray]) -> RecurrentState:
    """States float32 [2, H] of B sequences as (h, c), float32 [B, H] each."""
    h, c = torch.from_numpy(np.stack(states, axis=1))
    return h.contiguous(), c.contiguous()


def _moved(state: RecurrentState, device: torch.device | str) -> RecurrentState:
    return state[0].to(device), state[1].to(device)


def _misfit(sequence: Mapping[str, np.ndarray], packing: Packing, hidden: int) -> str:
    """What is wrong with the names, dtypes and shapes of a sequence's arrays; nothing where they fit."""
    steps = sequence["rewards"].size if "rewards" in sequence else 0
    expected = {
        **packing.expected(sequence, steps),
        "rewards": ("float32", (steps,)),
        "state": ("float32", (2, hidden)),
        "later_states": ("float32", (2, 2, hidden)),
        "place": ("int32", (3,)),
    }
    found = {name: (array.dtype.name, array.shape) for name, array in sequence.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            return f"{name}: expected {expected.get(name, 'no such array')}, got {found.get(name, 'nothing')}"
    return ""


def _nonsense(sequence: Mapping[str, np.ndarray], config: SequenceConfig, packing: Packing) -> str:
    """What is wrong with the values of a sequence whose arrays fit; nothing where they can be ours."""
    start, burnt, _ended = sequence["place"].tolist()
    steps = len(sequence["rewards"])
    if start < 0 or burnt != (config.burn_in if start else 0):
        return f"place: expected a burn-in of {config.burn_in} steps, none at 0, got {burnt} before {start}"
    if not burnt < steps <= burnt + config.unroll_length:
        return f"rewards: expected {burnt + 1} to {burnt + config.unroll_length} steps, got {steps}"
    problem = packing.nonsense(sequence)
    if problem:
        return problem
    for name, array in sequence.items():
        if array.dtype.kind == "f" and not _finite(array):
            return f"{name}: expected finite numbers, got NaN or infinity"
    return ""


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers are; of half precision, which numpy widens for it, by the bits of the largest."""
    if array.dtype == np.float16:
        infinity = 0x7C00  # and all above it are NaN
        return array.size == 0 or bool((array.view(np.uint16) & 0x7FFF).max() < infinity)
    return bool(np.isfinite(array).all())
