"""What compression is counted in, against which network. Called by the Recognizer, the ladder and the campaign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from env.channels import MEASURES, ChannelPlan

__all__ = ["Measure"]


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
