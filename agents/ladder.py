"""The ladder of waypoints: how a ranking of filters becomes an action.

An episode climbs a fixed number of equal shares of the parameters. In each step the action is the shortest prefix
of the policy's ranking that reaches the next waypoint, counted exactly, `min_width` kept. So every policy gets the
same retraining, and none can buy more of it by pruning cheap filters. Used by the rollout for one state and by the
learner's double-Q for a batch of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from env.channels import ChannelPlan

__all__ = ["Ladder"]


class Ladder:
    """Waypoints up to the last target, and the cut of a ranking at one.

    Args:
        plan: the network's units.
        given_parameters: parameters that compression is counted against.
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
        given_parameters: int,
        targets: Sequence[float],
        waypoints: int,
        min_width: int,
    ) -> None:
        self.plan, self.given_parameters = plan, given_parameters
        self.goals = _goals(targets, waypoints)
        self.least = torch.minimum(plan.widths, torch.tensor(min_width))

    def __len__(self) -> int:
        """W, the number of steps of an episode."""
        return len(self.goals)

    def cut(self, scores: Tensor, alive: Tensor, step: Tensor) -> Tensor:
        """The shortest prefix of the ranking that reaches the step's waypoint.

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
        return removable & (position < high[:, None])

    def compression(self, keep_mask: Tensor) -> Tensor:
        """1 - parameters of the compact network / parameters as given: bool [..., F] -> float64 [...]."""
        parameters = self.plan.parameters(self.plan.kept_per_layer(keep_mask))
        return 1.0 - parameters.to(torch.float64) / self.given_parameters

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
