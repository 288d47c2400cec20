"""How a ranking within layers becomes one over all layers: whoever is left narrow does harm.

What a layer of w filters costs the network's accuracy is taken to be c / w. Found by regression over 162 episodes of
quarter-width VGG16 at 95 %: the widths that were left explain half of the variance of the cross-entropy after the
short recovery, as a sum of such terms (benchmarks/results/search-log.md). So the filter goes first whose layer is
harmed least for each parameter that it frees.

Where parameters are counted, computation is free, and it is worth something: c grows with the MACs that each of a
layer's parameters does; layers of high resolution have many. That shows after a full recovery only.
"""

import torch
from torch import Tensor

from agents.ranking import places, places_in_layers
from env.channels import ChannelPlan
from env.measure import log_freed

__all__ = ["NARROWEST", "balanced", "first_log_harm"]

#: Filters that a layer is taken to have at the least; an empty one would do infinite harm.
NARROWEST = 0.5
#: How c grows with a layer's MACs for a parameter, where not MACs are counted: about the slope over depth that full
#: recoveries of 5 epochs liked best (trial 7 of the search log).
_RESOLUTION = 0.7


def first_log_harm(plan: ChannelPlan, measure: str, kept: Tensor) -> Tensor:
    """Log c of each layer before anything is learned, up to what all share: int64 [..., L] kept -> float32 [..., L]."""
    if measure == "macs":
        return torch.zeros(kept.shape, device=kept.device)
    return _RESOLUTION * (log_freed("macs", plan, kept) - log_freed("parameters", plan, kept))


def balanced(quality: Tensor, alive: Tensor, log_harm: Tensor, plan: ChannelPlan, measure: str) -> Tensor:
    """Natural log of what is freed for each nat of harm, the highest of which goes first.

    A layer gives up its filters in rising order of `quality`; the k-th of them takes it from w - k + 1 filters to
    w - k, which does the harm c / (w - k) - c / (w - k + 1).

    Args:
        quality: float [N, F], to compare filters within a layer.
        alive: bool [N, F].
        log_harm: float [N, L], log c of each layer; what all layers share does not matter.
        plan: the network's units.
        measure: what compression is counted in, one of `env.channels.MEASURES`.

    Returns:
        float32 [N, F]; of no meaning for the dead.

    """
    layer_of = plan.layer_of.to(alive.device)
    kept = plan.kept_per_layer(alive)
    gone = places_in_layers(places(-quality, alive), alive, plan)
    before = (kept[..., layer_of] - gone).clamp(min=1).float()
    after = (before - 1).clamp(min=NARROWEST)
    harm = (1.0 / after - 1.0 / before).log() + log_harm[..., layer_of]
    return log_freed(measure, plan, kept)[..., layer_of] - harm
