"""What compression is counted in, against which network. Called by the Recognizer, the ladder and the campaign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from env.channels import MEASURES, ChannelPlan

__all__ = ["Measure", "log_freed", "one_less"]


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
    now = plan.cost(measure, kept)[..., None].float()
    return ((now - plan.cost(measure, one_less(kept)).float()) / now).clamp(min=1e-6).log()


def one_less(kept: Tensor) -> Tensor:
    """The shapes that are a filter narrower in one layer each: int64 [..., L] -> int64 [..., L, L], at least 0."""
    return (kept[..., None, :] - torch.eye(kept.shape[-1], dtype=torch.int64, device=kept.device)).clamp(min=0)
