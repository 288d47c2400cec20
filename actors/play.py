"""One episode of any environment, as a pure function: what R2D2 has to remember of it.

Called by actors/rollout.py, which plays Compression-v0, and by benchmarks/memory_tasks.py.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch

from agents.network import RecurrentState
from learner.sequence import EpisodeTrace

__all__ = ["Actor", "Course", "play"]


class Actor(Protocol):
    """Decides; one object plays one episode."""

    def act(self, observation: Any) -> Any:
        """The action, in the environment's own form."""

    @property
    def recurrent_state(self) -> RecurrentState | None:
        """The state that the next `act` starts from, [1, H] each, or None where there is no memory."""


@dataclass(kw_only=True)
class Course:
    """An episode as far as it is played; each step adds an entry to every list."""

    observations: list[Mapping[str, np.ndarray]]  # one more than actions
    actions: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)  # float32 [2, H], before each step
    terminated: bool = False
    truncated: bool = False

    def __len__(self) -> int:
        """Steps so far."""
        return len(self.actions)

    @property
    def over(self) -> bool:
        """Whether no step follows."""
        return self.terminated or self.truncated

    def trace(self) -> EpisodeTrace:
        """The same as arrays, of at least one step."""
        return EpisodeTrace(
            observations={name: np.stack([seen[name] for seen in self.observations]) for name in self.observations[0]},
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards, np.float32),
            states=np.stack(self.states),
            terminated=self.terminated,
        )

    @classmethod
    def of(cls, trace: EpisodeTrace, *, truncated: bool) -> "Course":
        """The course whose `trace` this is."""
        observations = [{name: array[t] for name, array in trace.observations.items()} for t in range(len(trace) + 1)]
        return cls(
            observations=list(observations),
            actions=list(trace.actions),
            rewards=trace.rewards.tolist(),
            states=list(trace.states),
            terminated=trace.terminated,
            truncated=truncated,
        )


def play(
    env: gym.Env[Any, Any],
    actor: Actor,
    *,
    seed: int | None = None,
    after_step: Callable[[Course, Mapping[str, Any], float], None] | None = None,
    begun: Course | None = None,
) -> EpisodeTrace:
    """Play one episode to its end.

    Args:
        env: its observations are a dictionary of arrays.
        actor: plays this episode only.
        seed: of `env.reset`.
        after_step: called after each step with the episode so far, the environment's info, and the seconds that the
            actor took to decide.
        begun: an episode that environment and actor stand in the middle of, to be played on; there is no reset then.

    """
    course = Course(observations=[env.reset(seed=seed)[0]]) if begun is None else begun
    while not course.over:
        since = time.perf_counter()
        course.states.append(_stored(actor.recurrent_state))
        action = actor.act(course.observations[-1])
        deciding_s = time.perf_counter() - since
        observation, reward, course.terminated, course.truncated, info = env.step(action)
        course.observations.append(observation)
        course.actions.append(action)
        course.rewards.append(float(reward))
        if after_step is not None:
            after_step(course, info, deciding_s)
    return course.trace()


def _stored(state: RecurrentState | None) -> np.ndarray:
    """The recurrent state as it is stored, float32 [2, H]; H = 0 for an actor without memory."""
    return np.zeros((2, 0), np.float32) if state is None else torch.cat(state).numpy().copy()
