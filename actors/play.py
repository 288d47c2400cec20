"""One episode of any environment, as a pure function: what R2D2 has to remember of it.

Called by actors/rollout.py, which plays Compression-v0, and by benchmarks/memory_tasks.py.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch

from agents.network import RecurrentState
from learner.sequence import EpisodeTrace

__all__ = ["Actor", "play"]


class Actor(Protocol):
    """Decides; one object plays one episode."""

    def act(self, observation: Any) -> Any:
        """The action, in the environment's own form."""

    @property
    def recurrent_state(self) -> RecurrentState | None:
        """The state that the next `act` starts from, [1, H] each, or None where there is no memory."""


def play(
    env: gym.Env[Any, Any],
    actor: Actor,
    *,
    seed: int | None = None,
    after_step: Callable[[Mapping[str, np.ndarray], Mapping[str, Any], float], None] | None = None,
) -> EpisodeTrace:
    """Play one episode to its end.

    Args:
        env: its observations are a dictionary of arrays.
        actor: plays this episode only.
        seed: of `env.reset`.
        after_step: called after each step with the observation, the environment's info, and the seconds that the
            actor took to decide.

    """
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards, states = [observation], [], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        since = time.perf_counter()
        states.append(_stored(actor.recurrent_state))
        action = actor.act(observation)
        deciding_s = time.perf_counter() - since
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        if after_step is not None:
            after_step(observation, info, deciding_s)
    return EpisodeTrace(
        observations={name: np.stack([seen[name] for seen in observations]) for name in observations[0]},
        actions=np.stack(actions),
        rewards=np.array(rewards, np.float32),
        states=np.stack(states),
        terminated=terminated,
    )


def _stored(state: RecurrentState | None) -> np.ndarray:
    """The recurrent state as it is stored, float32 [2, H]; H = 0 for an actor without memory."""
    return np.zeros((2, 0), np.float32) if state is None else torch.cat(state).numpy().copy()
