"""The ladder of waypoints: how a ranking of filters becomes an action.

An episode climbs a fixed number of equal shares of the network. In each step the action is the shortest prefix of the
policy's ranking that reaches the next waypoint, counted exactly, `min_width` kept. So every policy gets the same
retraining, and none can buy more of it by pruning cheap filters. Where the prefix's last filter is so large that it
goes past the waypoint by more than `TOLERANCE`, smaller ones are looked for in its place. Used by the rollout for one
state and by the learner's double-Q for a batch of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from env.channels import ChannelPlan
from env.measure import Measure

__all__ = ["TOLERANCE", "Ladder"]

#: How far an action may go past its waypoint, as a share of the network as given, if any filters allow it.
TOLERANCE = 0.002
#: How many smaller filters may stand in for a prefix's last one: more would be another ranking.
_STAND_INS = 8


class Ladder:
    """Waypoints up to the last target, and the cut of a ranking at one.

    Args:
        plan: the network's units.
        measure: what compression is counted in.
        targets: rising compressions; each of them is a waypoint.
        waypoints: how many steps an episode has; at least as many as targets.
        min_width: filters that every layer keeps.

    Attributes:
        goals: float64 [W], the compression to be reached by each step; the last is the last target.

    """

    def __init__(
        self,
        plan: ChannelPlan,
        *,
        measure: Measure,
        targets: Sequence[float],
        waypoints: int,
        min_width: int,
    ) -> None:
        self.plan, self.measure = plan, measure
        self.goals = _goals(targets, waypoints)
        self.least = torch.minimum(plan.widths, torch.tensor(min_width))

    def __len__(self) -> int:
        """W, the number of steps of an episode."""
        return len(self.goals)

    def cut(self, scores: Tensor, alive: Tensor, step: Tensor) -> Tensor:
        """The shortest prefix of the ranking that reaches the step's waypoint, its end mended to land there.

        Args:
            scores: float [N, F]; the highest goes first.
            alive: bool [N, F].
            step: int64 [N], from 0; steps beyond the ladder aim at its last waypoint.

        Returns:
            bool [N, F], the filters to zero; none where the waypoint is already reached.

        """
        position = _positions(scores, alive)
        removable = alive & (self._rank_in_layer(position, alive) < self._spare(alive))
        goal = self.goals.to(scores.device)[step.clamp(max=len(self) - 1)]
        low = torch.zeros_like(step)
        high = torch.full_like(step, alive.shape[-1])
        while bool((low < high).any()):  # the shortest length that reaches, by bisection
            middle = (low + high) // 2
            left = alive & ~(removable & (position < middle[:, None]))
            reached = self.compression(left) >= goal
            high = torch.where(reached, middle, high)
            low = torch.where(reached, low, torch.minimum(middle + 1, high))
        prefix = removable & (position < high[:, None])
        far = self.compression(alive & ~prefix) > goal + TOLERANCE
        if not bool(far.any()):
            return prefix
        shorter = removable & (position < (high - 1)[:, None])
        landed, mended = self._mend(shorter, removable, position, alive, goal)
        return torch.where((far & landed)[:, None], mended, prefix)

    def _mend(
        self, chosen: Tensor, removable: Tensor, position: Tensor, alive: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add a few filters to actions that fall short, so that they land: (bool [N], whether; bool [N, F], actions).

        Each time the highest-ranked filter that lands, else the one that comes nearest without going past.
        """
        units, layers = alive.shape[-1], len(self.plan.layers)
        layer = self.plan.layer_of.to(alive.device).expand(alive.shape)
        one = torch.eye(layers, dtype=torch.int64, device=alive.device)
        landed = torch.zeros_like(goal, dtype=torch.bool)
        for _ in range(_STAND_INS):
            first = torch.full((len(goal), layers), units, device=alive.device)  # place of each layer's next filter
            first.scatter_reduce_(1, layer, torch.where(removable & ~chosen, position, units), "amin")
            kept = self.plan.kept_per_layer(alive & ~chosen)
            past = self.measure.compression(self.plan, (kept[:, None] - one).clamp(min=0)) - goal[:, None]
            lands = (past >= 0) & (past <= TOLERANCE)
            worth = torch.where(lands, 1.0 + units - first, torch.where(past < 0, past, -torch.inf))
            best, which = torch.where(first < units, worth, -torch.inf).max(dim=1)
            take = ~landed & (best > -torch.inf)
            chosen = chosen | (take[:, None] & (position == first.gather(1, which[:, None])))
            landed = landed | (take & (best > 0))
            if not bool((take & ~landed).any()):
                break
        return landed, chosen

    def compression(self, keep_mask: Tensor) -> Tensor:
        """The share that a mask removes: bool [..., F] -> float64 [...]."""
        return self.measure.compression(self.plan, self.plan.kept_per_layer(keep_mask))

    def _spare(self, alive: Tensor) -> Tensor:
        """Filters that may still go from the layer of each filter: int64 [N, F]."""
        spare = self.plan.kept_per_layer(alive) - self.least.to(alive.device)
        return spare[:, self.plan.layer_of.to(alive.device)]

    def _rank_in_layer(self, position: Tensor, alive: Tensor) -> Tensor:
        """How many living filters of the same layer stand before each one: int64 [N, F]."""
        units, layers = alive.shape[-1], len(self.plan.layers)
        layer = self.plan.layer_of.to(alive.device).expand(alive.shape)
        order = (torch.where(alive, layer, layers) * units + position).argsort(-1)
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(units, device=alive.device).expand(alive.shape)
        )
        kept = self.plan.kept_per_layer(alive)
        return place - (kept.cumsum(-1) - kept).gather(-1, layer)


def _positions(scores: Tensor, alive: Tensor) -> Tensor:
    """Place of each filter in the ranking, the dead at its end: int64 [N, F]; ties go by index."""
    ranking = torch.where(alive, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(ranking).scatter_(-1, ranking, places)


def _goals(targets: Sequence[float], waypoints: int) -> Tensor:
    """Equal shares of the last target, the nearest free one moved onto each other target."""
    if not 1 <= len(targets) <= waypoints:
        raise ValueError(f"targets must be 1 to waypoints={waypoints}, got {len(targets)}")
    shares = torch.arange(1, waypoints + 1, dtype=torch.float64) * targets[-1] / waypoints
    goals = shares.tolist()
    goals[-1] = targets[-1]  # the product above need not be exactly it
    free = list(range(waypoints - 1))
    for target in targets[:-1]:
        nearest = min(free, key=lambda i: abs(goals[i] - target))
        free.remove(nearest)
        goals[nearest] = target
    return torch.tensor(sorted(goals), dtype=torch.float64)
