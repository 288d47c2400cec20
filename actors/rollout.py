"""One episode of Compression-v0, as a pure function: environment, policy, ladder in, all that is worth keeping out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.play import play
from agents.ladder import Ladder
from agents.policies import Climber, Policy
from env.compression import CompressionEnv, TargetReached
from learner.sequence import EpisodeTrace

__all__ = ["Rollout", "StepReport", "rollout"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step as it ended; compression and accuracy are those of the network it left."""

    step: int  # from 1
    compression: float
    accuracy: float  # on the step's validation images
    reached: int  # targets, each with a recovery of its own
    seconds: dict[str, float]  # wall time by phase


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A finished episode.

    `curve` holds (compression, accuracy on the step's validation images) before the first step and after each;
    `seconds` is wall time by phase.
    """

    trace: EpisodeTrace
    curve: list[tuple[float, float]]
    reached: list[TargetReached]
    seconds: dict[str, float]
    collapsed: bool  # retraining made it infinite or NaN: no target was reached after that

    @property
    def total_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(self.trace.rewards.sum())


def rollout(
    env: CompressionEnv,
    policy: Policy,
    ladder: Ladder,
    *,
    seed: int | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Rollout:
    """Play one episode to its end.

    Args:
        env: Compression-v0.
        policy: ranks the filters; plays this episode only.
        ladder: cuts the ranking at each waypoint.
        seed: of the retraining (minibatches, augmentation); the environment's own where it is None.
        on_step: called after each step.

    """
    reached: list[TargetReached] = []
    seconds: dict[str, float] = {}
    infos: list[Mapping[str, Any]] = []

    def after_step(observation: Mapping[str, np.ndarray], info: Mapping[str, Any], deciding_s: float) -> None:
        infos.append(info)
        reached.extend(info["reached"])
        phases = {"decide": deciding_s, **env.phase_seconds}
        for phase, spent in phases.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        on_step(
            StepReport(
                step=len(infos),
                compression=float(observation["compression"][0]),
                accuracy=float(observation["accuracy"][0]),
                reached=len(info["reached"]),
                seconds=phases,
            )
        )

    trace = play(env, Climber(policy, ladder), seed=seed, after_step=after_step)
    compression, accuracy = (trace.observations[name].reshape(-1).tolist() for name in ("compression", "accuracy"))
    return Rollout(
        trace=trace,
        curve=list(zip(compression, accuracy, strict=True)),
        reached=reached,
        seconds=seconds,
        collapsed=infos[-1]["collapsed"],
    )
