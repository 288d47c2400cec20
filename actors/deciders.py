"""Who decides in an episode: from its order to the policy that plays it.

Called by the player (actors/player.py) and by campaigns that one rule plays alone (deploy/alone.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from actors.schedule import EpisodeOrder
from agents.controller import Controller
from agents.cross_entropy import generation_size, next_offsets
from agents.policies import ControllerPolicy, LayerOffsets, Policy, heuristic
from env.channels import ChannelPlan

__all__ = ["decider", "next_candidate"]


def decider(
    chosen: EpisodeOrder,
    plan: ChannelPlan,
    measure: str,
    *,
    controller: Controller,
    offsets: np.ndarray | None,
    allocation: str = "",
    like: torch.Tensor | None = None,
) -> Policy:
    """Return the policy of one episode.

    Args:
        chosen: the episode.
        plan: the network's units.
        measure: what compression is counted in.
        controller: plays where the order says "controller" or "controller-untrained".
        offsets: of `next_candidate`.
        allocation: of a rule that scores filters, `agents.policies.ALLOCATIONS`; "" is its usual one.
        like: int64 [L], the widths that such a rule ends with; None where they are its own affair.

    """
    if chosen.policy in ("controller", "controller-untrained"):
        return ControllerPolicy(controller, epsilon=chosen.epsilon, sigma=chosen.sigma, seed=chosen.seed)
    if offsets is not None:
        return LayerOffsets(plan, torch.from_numpy(offsets))
    return heuristic(chosen.policy, plan, seed=chosen.seed, measure=measure, allocation=allocation, like=like)


def next_candidate(
    chosen: EpisodeOrder, records: Callable[[], Iterable[dict[str, Any]]], layers: int, *, episodes: int
) -> np.ndarray | None:
    """Return what the cross-entropy method plays next, float64 [layers]; None for everyone else.

    `records` gives the campaign's, in order of completion; it is asked only where that method plays. `episodes` is how
    many it plays in all.
    """
    if chosen.policy != "cem":
        return None
    finished = [(np.array(record["offsets"]), record["return"]) for record in records() if record["policy"] == "cem"]
    return next_offsets(finished, layers, seed=chosen.seed, generation=generation_size(episodes))
