"""What an episode leaves behind: its line in episodes.jsonl, and a network for each target that it reached."""

import base64
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from actors.rollout import Rollout
from actors.schedule import EpisodeOrder
from env.compact_file import NetworkForm, network_to_bytes
from env.compression import TargetReached
from learner.replay.ledger import Candidate

__all__ = ["candidates", "episode_record", "slot"]


def slot(group: str, target: float) -> str:
    """Under which name the best network of a group at a target is kept."""
    return f"{group}/{target}"


def candidates(
    chosen: EpisodeOrder,
    played: Rollout,
    form: NetworkForm,
    *,
    best_score: Callable[[str], float | None] = lambda slot: None,
) -> Iterator[Candidate]:
    """The episode's networks; the lower the cross-entropy on validation, the better.

    `best_score` knows what a slot holds already: a network that is no better is left out.
    """
    for point in _measured(played):
        name, score = slot(chosen.group, point.target), -point.metrics.cross_entropy
        best = best_score(name)
        if best is not None and score <= best:
            continue
        yield Candidate(
            slot=name,
            score=score,
            payload=network_to_bytes(point.body.network, form),
            meta=json.dumps({"episode": chosen.episode, "policy": chosen.policy}),
        )


def episode_record(
    chosen: EpisodeOrder,
    played: Rollout,
    *,
    actor: str,
    seconds: float,
    weights_version: int = 0,
    offsets: np.ndarray | None = None,
    begun_by: str = "",
    steps_again: int = 0,
) -> dict[str, Any]:
    """The episode's line in episodes.jsonl.

    Args:
        chosen: who played, and with which random numbers.
        played: what came of it.
        actor: who finished it.
        seconds: wall time.
        weights_version: of the Controller that decided; else 0.
        offsets: what the cross-entropy method tried, where it played.
        begun_by: who played the first step, where `actor` only went on.
        steps_again: steps that were played again because who played them first died.

    """
    return {
        "id": chosen.episode,
        "group": chosen.group,
        "actor": actor,
        "begun_by": begun_by or actor,
        "policy": chosen.policy,
        "epsilon": chosen.epsilon,
        "sigma": chosen.sigma,
        "seed": chosen.seed,
        "steps": len(played.trace),
        "steps_again": steps_again,
        "collapsed": played.collapsed,
        "seconds": round(seconds, 3),
        "phases": {phase: round(spent, 3) for phase, spent in played.seconds.items()},
        "weights_version": weights_version,
        "return": played.total_return,
        "finished": time.time(),
        "curve": [[round(c, 6), round(a, 6)] for c, a in played.curve],
        "targets": [_point(point) for point in _measured(played)],
        **({} if offsets is None else {"offsets": offsets.tolist()}),
    }


def _point(point: TargetReached) -> dict[str, Any]:
    return {
        "target": point.target,
        "compression": point.compression,
        "parameters": point.parameters,
        "macs": point.macs,
        "accuracy": point.metrics.accuracy,
        "cross_entropy": point.metrics.cross_entropy,
        "keep_bits": base64.b64encode(np.packbits(point.body.keep_mask.numpy()).tobytes()).decode(),
    }


def _measured(played: Rollout) -> list[TargetReached]:
    """The networks that still say something: NaN beats nothing, and is no JSON."""
    return [point for point in played.reached if math.isfinite(point.metrics.cross_entropy)]
