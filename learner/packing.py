"""How observations and actions of an episode travel, and how they come back: one packing for each kind of agent.

`MaskPacking` is the campaign's: masks do not travel, the first one in bits and the indices zeroed by each action say it
all. `VectorPacking` is for ordinary Gymnasium tasks. What is common to both (recurrent states, rewards, places) stands
in learner/sequence.py, which calls them.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.controller import Observations

__all__ = ["Arrays", "MaskPacking", "Packing", "VectorPacking"]

Arrays = dict[str, np.ndarray]
#: An array that a sequence must hold: name -> (dtype, shape).
Expected = dict[str, tuple[str, tuple[int, ...]]]


class Packing(Protocol):
    """Observations and actions of one kind of agent, S steps of them: to arrays that travel, and back."""

    def pack(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> Arrays:
        """Observations [S + 1, ...] and actions [S, ...] as they travel."""

    def expected(self, sequence: Mapping[str, np.ndarray], steps: int) -> Expected:
        """The arrays that `pack` makes of S = `steps` steps."""

    def nonsense(self, sequence: Mapping[str, np.ndarray]) -> str:
        """What is wrong with the values of arrays that are as expected; nothing where they can be ours."""

    def unpack(self, sequence: Mapping[str, np.ndarray]) -> tuple[Arrays, np.ndarray]:
        """Observations [S + 1, ...], by the names of `blank_observations`, and actions [S, ...]."""

    def blank_observations(self, time: int, batch: int) -> Arrays:
        """Observations [time, batch, ...] that are nothing but padding."""

    def blank_actions(self, time: int, batch: int) -> np.ndarray:
        """Actions [time, batch, ...] that are nothing but padding."""

    def tensors(self, observations: Arrays) -> Any:
        """Observations [T, B, ...] as the network reads them."""


class MaskPacking:
    """Of Compression-v0 and a Controller.

    Args:
        units: F, the filters of the network.
        kinds: K, the features of each filter; 0 where the Controller does not read them.

    """

    def __init__(self, units: int, kinds: int) -> None:
        self.units, self.kinds = units, kinds

    def pack(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> Arrays:
        """Accuracy and compression as they are, features in half precision, masks by what is zeroed."""
        zeroed = [np.flatnonzero(action) for action in actions]
        features = observations["features"] if self.kinds else np.zeros((len(actions) + 1, self.units, 0))
        return {
            "first_mask": np.packbits(observations["keep_mask"][0].astype(bool), bitorder="little"),
            "zeroed": np.concatenate(zeroed).astype(np.int32),
            "zeroed_per_step": np.array([len(indices) for indices in zeroed], np.int32),
            "accuracy": observations["accuracy"].reshape(-1).astype(np.float32),
            "compression": observations["compression"].reshape(-1).astype(np.float32),
            "features": features.astype(np.float16),
        }

    def expected(self, sequence: Mapping[str, np.ndarray], steps: int) -> Expected:
        """See `pack`."""
        zeroed = sequence["zeroed"].size if "zeroed" in sequence else 0
        return {
            "first_mask": ("uint8", ((self.units + 7) // 8,)),
            "zeroed": ("int32", (zeroed,)),
            "zeroed_per_step": ("int32", (steps,)),
            "accuracy": ("float32", (steps + 1,)),
            "compression": ("float32", (steps + 1,)),
            "features": ("float16", (steps + 1, self.units, self.kinds)),
        }

    def nonsense(self, sequence: Mapping[str, np.ndarray]) -> str:
        """Counts that do not add up, filters that are not there, numbers that are none."""
        zeroed, counts = sequence["zeroed"], sequence["zeroed_per_step"]
        if (counts < 0).any() or counts.sum() != len(zeroed):
            return f"zeroed_per_step: expected counts with the sum {len(zeroed)}, got {counts.tolist()}"
        if ((zeroed < 0) | (zeroed >= self.units)).any():
            return f"zeroed: expected 0 to {self.units - 1}, got {zeroed.min()} to {zeroed.max()}"
        return ""

    def unpack(self, sequence: Mapping[str, np.ndarray]) -> tuple[Arrays, np.ndarray]:
        """The masks before each step and after the last follow from the first one and the actions."""
        counts = sequence["zeroed_per_step"]
        zeroed = np.zeros((len(counts), self.units), bool)
        zeroed[np.repeat(np.arange(len(counts)), counts), sequence["zeroed"]] = True
        first = np.unpackbits(sequence["first_mask"], count=self.units, bitorder="little").astype(bool)
        gone = np.concatenate([np.zeros((1, self.units), bool), np.logical_or.accumulate(zeroed, axis=0)])
        plain = {name: sequence[name] for name in ("accuracy", "compression", "features")}
        return {**plain, "keep_mask": first & ~gone}, zeroed

    def blank_observations(self, time: int, batch: int) -> Arrays:
        """Zeros, and masks that keep everything."""
        return {
            "accuracy": np.zeros((time, batch), np.float32),
            "compression": np.zeros((time, batch), np.float32),
            "keep_mask": np.ones((time, batch, self.units), bool),
            "features": np.zeros((time, batch, self.units, self.kinds), np.float16),
        }

    def blank_actions(self, time: int, batch: int) -> np.ndarray:
        """Sets without a filter."""
        return np.zeros((time, batch, self.units), bool)

    def tensors(self, observations: Arrays) -> Observations:
        """What a Controller reads; torch widens a whole batch's features in a tenth of numpy's time."""
        found = {name: torch.from_numpy(array) for name, array in observations.items()}
        return Observations(**{**found, "features": found["features"].float()})


class VectorPacking:
    """Of tasks that show a vector and take one of A actions.

    Args:
        inputs: D, numbers in an observation.
        actions: A.

    """

    def __init__(self, inputs: int, actions: int) -> None:
        self.inputs, self.actions = inputs, actions

    def pack(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> Arrays:
        """Both as they are."""
        return {"vector": observations["vector"].astype(np.float32), "action": actions.astype(np.int32)}

    def expected(self, sequence: Mapping[str, np.ndarray], steps: int) -> Expected:
        """See `pack`."""
        return {"vector": ("float32", (steps + 1, self.inputs)), "action": ("int32", (steps,))}

    def nonsense(self, sequence: Mapping[str, np.ndarray]) -> str:
        """Actions that there are not."""
        action = sequence["action"]
        if ((action < 0) | (action >= self.actions)).any():
            return f"action: expected 0 to {self.actions - 1}, got {action.min()} to {action.max()}"
        return ""

    def unpack(self, sequence: Mapping[str, np.ndarray]) -> tuple[Arrays, np.ndarray]:
        """Both as they are."""
        return {"vector": sequence["vector"]}, sequence["action"]

    def blank_observations(self, time: int, batch: int) -> Arrays:
        """Zeros."""
        return {"vector": np.zeros((time, batch, self.inputs), np.float32)}

    def blank_actions(self, time: int, batch: int) -> np.ndarray:
        """Action 0."""
        return np.zeros((time, batch), np.int64)

    def tensors(self, observations: Arrays) -> Tensor:
        """The vectors, float32 [T, B, D]."""
        return torch.from_numpy(observations["vector"])
