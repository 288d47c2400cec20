"""How a ranking within layers becomes one over all layers: whoever is left narrow does harm.

What a layer of w filters costs the network's accuracy is taken to be c / w for each way through it, from a layer that
writes it to one that reads it. Found by regression over 162 episodes of quarter-width VGG16 at 95 %: the widths that
were left explain half of the variance of the cross-entropy after the short recovery, as a sum of such terms
(benchmarks/results/search-log.md). There one way leads through each layer; through the sums of a residual network there
are up to twelve, and where such a sum is narrow, all of them are (trial 30). So the filter goes first whose layer is
harmed least for each parameter that it frees.

With c alike in all layers that is the heuristic `balanced`, and what it leaves of a network is its usual shape: the
Controller learns by how much other shapes are better or worse.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from agents.ranking import places, places_in_layers
from env.channels import ChannelPlan
from env.measure import log_freed

__all__ = ["NARROWEST", "UsualShapes", "balanced"]

#: Filters that a layer is taken to have at the least; an empty one would do infinite harm.
NARROWEST = 0.5
_FINENESS = 50  # of a layer's filters, one part is taken at a time on the way to the usual shapes


def balanced(quality: Tensor, alive: Tensor, log_harm: Tensor, freed: Tensor, plan: ChannelPlan) -> Tensor:
    """Natural log of what is freed for each nat of harm, the highest of which goes first.

    A layer gives up its filters in rising order of `quality`; the k-th of them takes it from w - k + 1 filters to
    w - k, which does the harm c / (w - k) - c / (w - k + 1) for each way through the layer.

    Args:
        quality: float [N, F], to compare filters within a layer.
        alive: bool [N, F].
        log_harm: float [N, L], log c of each layer; what all layers share does not matter.
        freed: float [N, L], `env.measure.log_freed` of what is alive.
        plan: the network's units.

    Returns:
        float32 [N, F]; of no meaning for the dead.

    """
    layer_of = plan.layer_of.to(alive.device)
    kept = plan.kept_per_layer(alive)
    gone = places_in_layers(places(-quality, alive), alive, kept, plan)
    before = (kept[..., layer_of] - gone).clamp(min=1).float()
    after = (before - 1).clamp(min=NARROWEST)
    log_harm = log_harm + plan.paths.to(alive.device).log()
    harm = (1.0 / after - 1.0 / before).log() + log_harm[..., layer_of]
    return freed[..., layer_of] - harm


class UsualShapes(nn.Module):
    """What the rule `balanced` leaves of a network, whatever its filters are worth: widths by what is removed.

    Args:
        plan: the network's units.
        measure: what compression is counted in, one of `env.channels.MEASURES`.

    """

    removed: Tensor  # float32 [S], rising from 0
    widths: Tensor  # float32 [S, L]

    def __init__(self, plan: ChannelPlan, measure: str) -> None:
        super().__init__()
        self._plan, self._measure = plan, measure
        shapes = torch.stack(list(_narrowing(plan, measure)))
        self.register_buffer("widths", shapes.float(), persistent=False)
        self.register_buffer("removed", self._removed(shapes), persistent=False)

    def forward(self, kept: Tensor) -> Tensor:
        """The usual widths where as much is removed as with `kept`: int64 [..., L] -> float32 [..., L]."""
        at = torch.searchsorted(self.removed, self._removed(kept)).clamp(max=len(self.removed) - 1)
        return self.widths[at]

    def _removed(self, kept: Tensor) -> Tensor:
        plan, measure = self._plan, self._measure
        return (1.0 - plan.cost(measure, kept) / plan.cost(measure, plan.widths.to(kept.device))).float()


def _narrowing(plan: ChannelPlan, measure: str) -> Iterator[Tensor]:
    """The shapes on the way from the full network to one filter a layer, int64 [L] each."""
    kept = plan.widths.clone()
    while True:
        yield kept.clone()
        harm = plan.paths * (1.0 / (kept - 1).clamp(min=NARROWEST) - 1.0 / kept.clamp(min=1))
        worth = torch.where(kept > 1, log_freed(measure, plan, kept) - harm.log(), -torch.inf)
        layer = int(worth.argmax())
        if kept[layer] <= 1:
            return
        kept[layer] -= max(1, int(kept[layer]) // _FINENESS)
