"""One episode, as a pure function: environment, policy and ladder in, everything worth keeping out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.controller import RecurrentState
from agents.ladder import Ladder
from agents.policies import Policy
from env.compression import CompressionEnv, TargetReached
from learner.sequence import EpisodeTrace

__all__ = ["Rollout", "rollout"]


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


@dataclass
class _Memory:
    """What grows while an episode is played."""

    observations: list[dict[str, Any]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    reached: list[TargetReached] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, seconds: dict[str, float]) -> None:
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def curve(self) -> list[tuple[float, float]]:
        return [(float(seen["compression"][0]), float(seen["accuracy"][0])) for seen in self.observations]

    def trace(self, *, terminated: bool) -> EpisodeTrace:
        none = np.zeros((len(self.observations[0]["keep_mask"]), 0), np.float16)
        features = [seen.get("features", none).astype(np.float16) for seen in self.observations]
        return EpisodeTrace(
            accuracy=np.concatenate([seen["accuracy"] for seen in self.observations]),
            compression=np.concatenate([seen["compression"] for seen in self.observations]),
            keep_mask=np.stack([seen["keep_mask"] for seen in self.observations]).astype(bool),
            features=np.stack(features),
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards, np.float32),
            states=np.stack(self.states),
            terminated=terminated,
        )


def rollout(
    env: CompressionEnv,
    policy: Policy,
    ladder: Ladder,
    *,
    seed: int | None = None,
    on_step: Callable[[int, float, float], None] = lambda step, compression, accuracy: None,
) -> Rollout:
    """Play one episode to its end.

    Args:
        env: Compression-v0.
        policy: ranks the filters; plays this episode only.
        ladder: cuts the ranking at each waypoint.
        seed: of the retraining (minibatches, augmentation); the environment's own where it is None.
        on_step: called after each step with its number from 1, the compression and the accuracy.

    """
    memory = _Memory()
    observation, _ = env.reset(seed=seed)
    memory.observations.append(observation)
    over = terminated = collapsed = False
    while not over:
        since = time.perf_counter()
        memory.states.append(_stored(policy.recurrent_state))
        action = _act(policy, ladder, observation, len(memory.actions))
        memory.spend({"decide": time.perf_counter() - since})
        observation, reward, terminated, truncated, info = env.step(action.astype(np.int8))
        memory.observations.append(observation)
        memory.actions.append(action)
        memory.rewards.append(float(reward))
        memory.reached += info["reached"]
        memory.spend(env.phase_seconds)
        over, collapsed = terminated or truncated, info["collapsed"]
        on_step(len(memory.actions), float(observation["compression"][0]), float(observation["accuracy"][0]))
    return Rollout(
        trace=memory.trace(terminated=terminated),
        curve=memory.curve(),
        reached=memory.reached,
        seconds=memory.seconds,
        collapsed=collapsed,
    )


def _act(policy: Policy, ladder: Ladder, observation: dict[str, Any], step: int) -> np.ndarray:
    scores = policy.rank(observation)
    alive = torch.as_tensor(observation["keep_mask"]).bool()
    action: Tensor = ladder.cut(scores[None], alive[None], torch.tensor([step]))
    return action[0].numpy()


def _stored(state: RecurrentState | None) -> np.ndarray:
    """The recurrent state as it is stored, float32 [2, H]; H = 0 for a policy without memory."""
    return np.zeros((2, 0), np.float32) if state is None else torch.cat(state).numpy().copy()
