"""The ladder of waypoints: how a ranking of filters becomes an action.

An episode climbs a fixed number of equal shares of the network. In each step the action is the shortest prefix of the
policy's ranking that reaches the next waypoint, counted exactly, `min_width` kept. So every policy gets the same
retraining, and none can buy more of it by pruning cheap filters. Where the prefix's last filter goes too far past a
target, a few filters at the prefix's end are exchanged for others, so that the action lands. Used by the rollout for
one state and by the learner's double-Q for a batch of them.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.controller import Observations
from agents.ranking import places, places_in_layers
from env.channels import ChannelPlan
from env.measure import Measure

__all__ = ["TOLERANCE", "Ladder"]

#: How far past a target an action may land, as a share of the target.
TOLERANCE = 0.002
#: Filters that may be given back or taken for it at once; each more multiplies the exchanges that are looked at.
_MOST_EXCHANGED, _MOST_LOOKED_AT = 4, 5_000
#: Into how many parts the lengths are divided in the search for the shortest, over all states: of one with 1,000
#: filters, it takes two rounds.
_PARTS = 33
#: How often the exchange that came nearest is the start of further ones, where none has landed.
_ROUNDS = 6


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
        rising = torch.tensor(tuple(targets), dtype=torch.float64)
        self._next_target = rising[torch.searchsorted(rising, self.goals)]
        self.least = torch.minimum(plan.widths, torch.tensor(min_width))

    def __len__(self) -> int:
        """W, the number of steps of an episode."""
        return len(self.goals)

    def cut(self, scores: Tensor, alive: Tensor, step: Tensor) -> Tensor:
        """The shortest prefix of the ranking that reaches the step's waypoint, its end mended to land on targets.

        Args:
            scores: float [N, F]; the highest goes first.
            alive: bool [N, F].
            step: int64 [N], from 0; steps beyond the ladder aim at its last waypoint.

        Returns:
            bool [N, F], the filters to zero; none where the waypoint is already reached.

        """
        position, kept = places(scores, alive), self.plan.kept_per_layer(alive)
        removable = alive & (places_in_layers(position, alive, kept, self.plan) < self._spare(kept))
        goal = self.goals.to(scores.device)[step.clamp(max=len(self) - 1)]
        high = self._shortest(alive, removable, position, goal)
        prefix = removable & (position < high[:, None])
        target = self._next_target.to(goal.device)[step.clamp(max=len(self) - 1)]
        far = prefix.any(dim=1) & (self.compression(alive & ~prefix) > target * (1 + TOLERANCE))
        for row in far.nonzero().flatten().tolist():  # one by one: each is multiplied by all exchanges
            prefix[row] = self._exchanged(
                prefix[row], removable[row], position[row], alive[row], goal=target[row], end=high[row]
            )
        return prefix

    def _shortest(self, alive: Tensor, removable: Tensor, position: Tensor, goal: Tensor) -> Tensor:
        """The length of the shortest prefix that reaches the goal, or of the whole ranking: int64 [N].

        By bisection, into more than two parts where there are few states: to look at several lengths at once takes
        hardly longer then than to look at one.
        """
        low, high = torch.zeros_like(position[:, 0]), torch.full_like(position[:, 0], alive.shape[-1])
        parts = max(2, _PARTS // len(goal))
        shares = torch.arange(1, parts, dtype=torch.float64, device=goal.device) / parts
        while bool((low < high).any()):
            looked_at = low[:, None] + ((high - low)[:, None] * shares).to(torch.int64)
            left = alive[:, None] & ~(removable[:, None] & (position[:, None] < looked_at[..., None]))
            short = (self.compression(left) < goal[:, None]).sum(1, keepdim=True)  # of them, which are the first ones
            low = torch.cat([low[:, None], looked_at + 1], dim=1).gather(1, short)[:, 0]
            high = torch.cat([looked_at, high[:, None]], dim=1).gather(1, short)[:, 0]
        return high

    def _exchanged(
        self, prefix: Tensor, removable: Tensor, position: Tensor, alive: Tensor, *, goal: Tensor, end: Tensor
    ) -> Tensor:
        """A prefix that goes too far, changed by as few filters as it takes to land, or else to come nearest.

        Within a layer the highest-ranked always go first, so that an exchange is a change of the layers' counts.
        """
        kept = self.plan.kept_per_layer(alive)
        order = places_in_layers(position[None], alive[None], kept[None], self.plan)[0]
        layer = self.plan.layer_of.to(alive.device)
        table = torch.zeros(len(self.plan.layers), alive.shape[-1], dtype=torch.float64, device=alive.device)
        table[layer[removable], order[removable]] = (position - end).abs()[removable].to(torch.float64)
        distances = torch.nn.functional.pad(table.cumsum(1), (1, 0))
        cut, spare = self.plan.kept_per_layer(prefix), self.plan.kept_per_layer(removable)
        counts = self._landing(cut, spare, kept, goal, distances)
        return removable & (order < counts[layer])

    def _landing(self, cut: Tensor, spare: Tensor, kept: Tensor, goal: Tensor, distances: Tensor) -> Tensor:
        """Filters to take from each layer, int64 [L], so that the goal is reached and hardly passed.

        Exchanges of one filter are tried first, then of two, and so on; where none of them lands, the one that came
        nearest, on either side, is where further ones start from. Of those that land together, the one whose filters
        stand nearest to the prefix's end.

        Args:
            cut: int64 [L], what the prefix takes from each layer; it passes the goal.
            spare: int64 [L], what may be taken.
            kept: int64 [L], what is there.
            goal: float64 [], a compression.
            distances: float64 [L, F + 1], of the first k filters that a layer would give up, to the prefix's end.

        """
        best, over = cut, self.measure.compression(self.plan, kept - cut) - goal
        tried, start = {tuple(cut.tolist())}, cut
        for _ in range(_ROUNDS):
            near, away = start, torch.full_like(over, torch.inf)
            for changes in _exchanges(len(self.plan.layers)):
                counts = start + changes.to(start.device)
                counts = counts[((counts >= 0) & (counts <= spare)).all(-1)]
                past = self.measure.compression(self.plan, kept - counts) - goal
                fits = (past >= 0) & (past <= goal * TOLERANCE)
                if bool(fits.any()):
                    return counts[fits][_moved(counts[fits], cut, distances).argmin()]
                best, over = _nearest(counts, torch.where(past >= 0, past, torch.inf), best, over)
                near, away = _nearest(counts, past.abs(), near, away)
            fresh = [place for place in (best, near) if tuple(place.tolist()) not in tried]
            if not fresh:
                break
            start = fresh[0]
            tried.add(tuple(start.tolist()))
        return best

    def greedy(self, advantages: Tensor, seen: Observations, step: Tensor) -> Tensor:
        """The set that a Controller's advantages [T, B, F] ask for at each step: bool [T, B, F]."""
        alive = seen.keep_mask
        return self.cut(advantages.flatten(0, 1), alive.flatten(0, 1), step.flatten()).view(alive.shape)

    def compression(self, keep_mask: Tensor) -> Tensor:
        """The share that a mask removes: bool [..., F] -> float64 [...]."""
        return self.measure.compression(self.plan, self.plan.kept_per_layer(keep_mask))

    def _spare(self, kept: Tensor) -> Tensor:
        """Filters that may still go from the layer of each filter, of int64 [N, L] that are there: int64 [N, F]."""
        return (kept - self.least.to(kept.device))[:, self.plan.layer_of.to(kept.device)]


def _nearest(counts: Tensor, away: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The row of `counts` [N, L] that is least `away` [N], and how far; `best` where none is nearer than `least`."""
    if len(away) == 0 or float(away.min()) >= float(least):
        return best, least
    return counts[away.argmin()], away.min()


def _moved(counts: Tensor, cut: Tensor, distances: Tensor) -> Tensor:
    """How far the filters that are taken or given back stand from the prefix's end, in places: float64 [N]."""
    return (distances.gather(1, counts.T) - distances.gather(1, cut[:, None])).abs().sum(0)


@functools.cache
def _exchanges(layers: int) -> tuple[Tensor, ...]:
    """By the number of filters, from one: all changes of the layers' cut counts, int64 [changes, layers]."""
    found = []
    for filters in range(1, _MOST_EXCHANGED + 1):
        choices = list(itertools.combinations_with_replacement(range(2 * layers), filters))
        if len(choices) > _MOST_LOOKED_AT:
            break
        signs = torch.cat([torch.eye(layers, dtype=torch.int64), -torch.eye(layers, dtype=torch.int64)])
        changes = signs[torch.tensor(choices)].sum(dim=1)
        found.append(changes[changes.abs().sum(dim=1) == filters])  # what is given and taken again is no change
    return tuple(found)


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
