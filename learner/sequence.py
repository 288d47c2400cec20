"""Sequences: how an episode is cut up, what travels, and what a batch of them looks like to the learner.

A sequence is `burn_in` steps that only warm the recurrent state up, then up to `unroll_length` steps that are learned
from, then the observation after them. It starts with the recurrent state the actor had there (R2D2, section 3).
Masks do not travel: the first one in bits and the indices zeroed by each action say it all.

The first sequence of an episode has no burn-in. `burn_in <= sequence_period` makes every other one have all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.controller import Observations, RecurrentState
from env.errors import UserError

__all__ = ["Batch", "EpisodeTrace", "ForeignSequenceError", "SequenceConfig", "collate", "cut"]

Arrays = dict[str, np.ndarray]


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

    accuracy: np.ndarray  # float32 [T + 1]
    compression: np.ndarray  # float32 [T + 1]
    keep_mask: np.ndarray  # bool [T + 1, F]
    features: np.ndarray  # float16 [T + 1, F, K]; K = 0 where the Controller does not read them
    actions: np.ndarray  # bool [T, F]
    rewards: np.ndarray  # float32 [T]
    states: np.ndarray  # float32 [T, 2, H], recurrent state (h, c) before each step
    terminated: bool

    def __len__(self) -> int:
        """T."""
        return len(self.rewards)


def cut(trace: EpisodeTrace, config: SequenceConfig) -> list[Arrays]:
    """Cut an episode into sequences that between them learn from every step."""
    starts = range(0, max(1, len(trace) - config.unroll_length + config.sequence_period), config.sequence_period)
    return [_sequence(trace, config, start) for start in starts if start < len(trace)]


def _sequence(trace: EpisodeTrace, config: SequenceConfig, start: int) -> Arrays:
    """The sequence that learns from the steps [start, start + unroll_length)."""
    first = start - (config.burn_in if start else 0)
    end = min(start + config.unroll_length, len(trace))
    zeroed = [np.flatnonzero(action) for action in trace.actions[first:end]]
    return {
        "first_mask": np.packbits(trace.keep_mask[first], bitorder="little"),
        "zeroed": np.concatenate(zeroed).astype(np.int32),
        "zeroed_per_step": np.array([len(indices) for indices in zeroed], np.int32),
        "accuracy": trace.accuracy[first : end + 1],
        "compression": trace.compression[first : end + 1],
        "features": trace.features[first : end + 1],
        "rewards": trace.rewards[first:end],
        "state": trace.states[first],
        # step of the episode at which learning starts, steps before it, and whether the episode ended for good
        "place": np.array([start, start - first, int(trace.terminated and end == len(trace))], np.int32),
    }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B sequences side by side, time first; the learned part starts at index `burn_in`."""

    observations: Observations  # [burn_in + T + 1, B, ...]
    actions: Tensor  # bool [T, B, F]
    rewards: Tensor  # float32 [T, B]
    terminated: Tensor  # bool [T, B]
    length: Tensor  # int64 [B], real steps
    step: Tensor  # int64 [T + 1, B], step of the episode, which tells the waypoint
    burnt: Tensor  # bool [B], whether the sequence has a burn-in
    state: RecurrentState  # [B, H] each, at the first real step

    @property
    def valid(self) -> Tensor:
        """bool [T, B], the real steps."""
        return torch.arange(len(self.rewards))[:, None] < self.length


class ForeignSequenceError(ValueError):
    """A sequence is of another network or another configuration, or poisoned; `index` is its place in the batch."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem

    def __str__(self) -> str:
        return f"sequence {self.index} of the batch is not one of ours: {self.problem}"


def collate(
    sequences: Sequence[Mapping[str, np.ndarray]], config: SequenceConfig, *, units: int, kinds: int, hidden: int
) -> Batch:
    """Put decoded sequences side by side, whatever wrote them.

    Args:
        sequences: at least one, as `cut` makes them.
        config: how they were cut.
        units: F, the filters of this network.
        kinds: K, the features of each filter; 0 where the Controller does not read them.
        hidden: H, the size of the recurrent state.

    Raises:
        ForeignSequenceError: a sequence's arrays do not fit each other, this network or this configuration, or hold
            numbers that are not finite.

    """
    time, batch = config.burn_in + config.unroll_length + 1, len(sequences)
    accuracy, compression = np.zeros((time, batch), np.float32), np.zeros((time, batch), np.float32)
    keep_mask = np.ones((time, batch, units), bool)
    features = np.zeros((time, batch, units, kinds), np.float32)
    actions = np.zeros((config.unroll_length, batch, units), bool)
    rewards = np.zeros((config.unroll_length, batch), np.float32)
    terminated = np.zeros((config.unroll_length, batch), bool)
    place = np.zeros((3, batch), np.int64)
    length = np.zeros(batch, np.int64)
    for b, sequence in enumerate(sequences):
        problem = _misfit(sequence, units, kinds, hidden) or _nonsense(sequence, config, units)
        if problem:
            raise ForeignSequenceError(b, problem)
        place[:, b] = sequence["place"]
        burnt, ended = place[1:, b]
        steps = len(sequence["rewards"])
        length[b] = steps - burnt
        here = slice(config.burn_in - burnt, config.burn_in - burnt + steps + 1)
        accuracy[here, b], compression[here, b] = sequence["accuracy"], sequence["compression"]
        features[here, b] = sequence["features"]
        masks, zeroed = _masks(sequence, units)
        keep_mask[here, b] = masks
        actions[: length[b], b] = zeroed[burnt:]
        rewards[: length[b], b] = sequence["rewards"][burnt:]
        terminated[length[b] - 1, b] = bool(ended)
    state = torch.from_numpy(np.stack([sequence["state"] for sequence in sequences], axis=1))
    return Batch(
        observations=Observations(
            accuracy=torch.from_numpy(accuracy),
            compression=torch.from_numpy(compression),
            keep_mask=torch.from_numpy(keep_mask),
            features=torch.from_numpy(features),
        ),
        actions=torch.from_numpy(actions),
        rewards=torch.from_numpy(rewards),
        terminated=torch.from_numpy(terminated),
        length=torch.from_numpy(length),
        step=torch.from_numpy(place[0] + np.arange(config.unroll_length + 1)[:, None]),
        burnt=torch.from_numpy(place[1] > 0),
        state=(state[0].contiguous(), state[1].contiguous()),
    )


def _masks(sequence: Mapping[str, np.ndarray], units: int) -> tuple[np.ndarray, np.ndarray]:
    """The masks before each step and after the last, bool [S + 1, F], and the actions, bool [S, F]."""
    counts = sequence["zeroed_per_step"]
    zeroed = np.zeros((len(counts), units), bool)
    zeroed[np.repeat(np.arange(len(counts)), counts), sequence["zeroed"]] = True
    first = np.unpackbits(sequence["first_mask"], count=units, bitorder="little").astype(bool)
    gone = np.concatenate([np.zeros((1, units), bool), np.logical_or.accumulate(zeroed, axis=0)])
    return first & ~gone, zeroed


def _misfit(sequence: Mapping[str, np.ndarray], units: int, kinds: int, hidden: int) -> str:
    """What is wrong with the names, dtypes and shapes of a sequence's arrays; nothing where they fit."""
    sizes = {name: array.size for name, array in sequence.items()}
    steps = sizes.get("rewards", 0)
    expected = {
        "first_mask": ("uint8", ((units + 7) // 8,)),
        "zeroed": ("int32", (sizes.get("zeroed", 0),)),
        "zeroed_per_step": ("int32", (steps,)),
        "accuracy": ("float32", (steps + 1,)),
        "compression": ("float32", (steps + 1,)),
        "features": ("float16", (steps + 1, units, kinds)),
        "rewards": ("float32", (steps,)),
        "state": ("float32", (2, hidden)),
        "place": ("int32", (3,)),
    }
    found = {name: (array.dtype.name, array.shape) for name, array in sequence.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            return f"{name}: expected {expected.get(name, 'no such array')}, got {found.get(name, 'nothing')}"
    return ""


def _nonsense(sequence: Mapping[str, np.ndarray], config: SequenceConfig, units: int) -> str:
    """What is wrong with the values of a sequence whose arrays fit; nothing where they can be ours."""
    start, burnt, _ended = sequence["place"].tolist()
    steps, zeroed, counts = len(sequence["rewards"]), sequence["zeroed"], sequence["zeroed_per_step"]
    if start < 0 or burnt != (config.burn_in if start else 0):
        return f"place: expected a burn-in of {config.burn_in} steps, none at 0, got {burnt} before {start}"
    if not burnt < steps <= burnt + config.unroll_length:
        return f"rewards: expected {burnt + 1} to {burnt + config.unroll_length} steps, got {steps}"
    if (counts < 0).any() or counts.sum() != len(zeroed):
        return f"zeroed_per_step: expected counts with the sum {len(zeroed)}, got {counts.tolist()}"
    if ((zeroed < 0) | (zeroed >= units)).any():
        return f"zeroed: expected 0 to {units - 1}, got {zeroed.min()} to {zeroed.max()}"
    for name in ("accuracy", "compression", "features", "rewards", "state"):
        if not np.isfinite(sequence[name]).all():
            return f"{name}: expected finite numbers, got NaN or infinity"
    return ""
