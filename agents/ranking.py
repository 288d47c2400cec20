"""Rankings of filters, over all layers and within each. Used by the ladder, the Controller and the heuristics.

Axes: N states side by side, F filters, L layers.
"""

import torch
from torch import Tensor

from env.channels import ChannelPlan

__all__ = ["places", "places_in_layers"]


def places(scores: Tensor, alive: Tensor) -> Tensor:
    """Place of each filter among all, the highest score first and the dead last: int64 [N, F]; ties go by index."""
    ranking = torch.where(alive, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    numbers = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(ranking).scatter_(-1, ranking, numbers)


def places_in_layers(place: Tensor, alive: Tensor, kept: Tensor, plan: ChannelPlan) -> Tensor:
    """How many living filters of the same layer stand before each one in `place` [N, F]: int64 [N, F].

    `kept` is int64 [N, L], how many live.
    """
    units, layers = alive.shape[-1], len(plan.layers)
    layer = plan.layer_of.to(alive.device).expand(alive.shape)
    order = (torch.where(alive, layer, layers) * units + place).argsort(-1)
    among_all = torch.empty_like(order).scatter_(
        -1, order, torch.arange(units, device=alive.device).expand(alive.shape)
    )
    return among_all - (kept.cumsum(-1) - kept).gather(-1, layer)
