"""What compression is counted in, against which network. Called by the Recognizer, the ladder and the campaign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from env.channels import MEASURES, ChannelPlan

__all__ = ["Measure", "and_narrower", "log_freed", "log_share_freed"]


@dataclass(frozen=True)
class Measure:
    """One of `MEASURES`, and what the network as given costs in it; added skip convolutions count against us."""

    name: str
    given: int

    def __post_init__(self) -> None:
        if self.name not in MEASURES or self.given < 1:
            raise ValueError(f"a measure is one of {', '.join(MEASURES)} and above 0, got {self.name}, {self.given}")

    def compression(self, plan: ChannelPlan, kept: Tensor) -> Tensor:
        """1 - cost of the compact network / cost as given: int64 [..., L] units kept -> float64 [...]."""
        return 1.0 - plan.cost(self.name, kept).to(torch.float64) / self.given


def log_freed(measure: str, plan: ChannelPlan, kept: Tensor) -> Tensor:
    """Log of the share of today's cost that one filter of each layer would free.

    Args:
        measure: one of `MEASURES`.
        plan: the network's units.
        kept: int64 [..., L], units that are kept.

    Returns:
        float32 [..., L], at most 0; at least log(1e-6), also where nothing is left to free.

    """
    return log_share_freed(plan.cost(measure, and_narrower(kept)))


def log_share_freed(costs: Tensor) -> Tensor:
    """The same from the costs of the shapes `and_narrower` gives: int64 [..., 1 + L] -> float32 [..., L]."""
    now = costs[..., :1].float()
    return ((now - costs[..., 1:].float()) / now).clamp(min=1e-6).log()


def and_narrower(kept: Tensor) -> Tensor:
    """A shape, and those a filter narrower in one layer each: int64 [..., L] -> [..., 1 + L, L], at least 0."""
    less = torch.eye(1 + kept.shape[-1], kept.shape[-1], dtype=torch.int64, device=kept.device).roll(1, 0)
    return (kept[..., None, :] - less).clamp(min=0)
