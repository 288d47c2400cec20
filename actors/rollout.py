"""One episode of Compression-v0, as a pure function: environment, policy, ladder in, all that is worth keeping out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.play import Course, play
from agents.ladder import Ladder
from agents.policies import Climber, Policy
from env.compression import CompressionEnv, TargetReached
from learner.sequence import EpisodeTrace

__all__ = ["Rollout", "StepReport", "Underway", "rollout"]


@dataclass(kw_only=True)
class Underway:
    """What is collected of an episode that goes on; as `Rollout`, which it becomes."""

    course: Course
    reached: list[TargetReached] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step as it ended; compression and accuracy are those of the network it left."""

    step: int  # from 1
    compression: float
    accuracy: float  # on the step's validation images
    reached: int  # targets, each with a recovery of its own
    seconds: dict[str, float]  # wall time by phase
    underway: Underway  # the episode up to here; grows on


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
    begun: Underway | None = None,
) -> Rollout:
    """Play one episode to its end.

    Args:
        env: Compression-v0.
        policy: ranks the filters; plays this episode only.
        ladder: cuts the ranking at each waypoint.
        seed: of the retraining (minibatches, augmentation); the environment's own where it is None.
        on_step: called after each step.
        begun: an episode that `env` and `policy` stand in the middle of, to be played on; `seed` is not used then.

    """
    underway = Underway(course=Course(observations=[env.reset(seed=seed)[0]])) if begun is None else begun

    def after_step(course: Course, info: Mapping[str, Any], deciding_s: float) -> None:
        underway.reached.extend(info["reached"])
        underway.collapsed = info["collapsed"]
        phases = {"decide": deciding_s, **env.phase_seconds}
        for phase, spent in phases.items():
            underway.seconds[phase] = underway.seconds.get(phase, 0.0) + spent
        observation = course.observations[-1]
        on_step(
            StepReport(
                step=len(course),
                compression=float(observation["compression"][0]),
                accuracy=float(observation["accuracy"][0]),
                reached=len(info["reached"]),
                seconds=phases,
                underway=underway,
            )
        )

    climber = Climber(policy, ladder, step=len(underway.course))
    trace = play(env, climber, after_step=after_step, begun=underway.course)
    compression, accuracy = (trace.observations[name].reshape(-1).tolist() for name in ("compression", "accuracy"))
    return Rollout(
        trace=trace,
        curve=list(zip(compression, accuracy, strict=True)),
        reached=underway.reached,
        seconds=underway.seconds,
        collapsed=underway.collapsed,
    )
