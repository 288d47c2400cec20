import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from actors.play import Course, play


class Counting(gym.Env[dict[str, np.ndarray], int]):
    """Shows how many steps were made and what the last action was; ends after `length` of them."""

    def __init__(self, length: int, *, truncates: bool = False) -> None:
        self.length, self.truncates = length, truncates

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._seen(seed or 0), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        over = self.steps == self.length
        info = {"steps": self.steps}
        return self._seen(action), 10.0 * self.steps, over and not self.truncates, over and self.truncates, info

    def _seen(self, last: int) -> dict[str, np.ndarray]:
        return {"steps": np.array([self.steps], np.float32), "last": np.array([last], np.int64)}


class Doubling:
    """Acts twice the step; its state is the number of actions so far."""

    def __init__(self) -> None:
        self.acted = 0

    @property
    def recurrent_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, 2), float(self.acted)), torch.full((1, 2), -float(self.acted))

    def act(self, observation: dict[str, np.ndarray]) -> int:
        self.acted += 1
        return 2 * int(observation["steps"][0])


class Forgetful:
    recurrent_state = None

    def act(self, observation: dict[str, np.ndarray]) -> int:
        return 0


def test_a_trace_is_what_happened_in_order() -> None:
    trace = play(Counting(3), Doubling(), seed=7)
    assert trace.observations["steps"].tolist() == [[0], [1], [2], [3]]
    assert trace.observations["last"].tolist() == [[7], [0], [2], [4]]
    assert trace.actions.tolist() == [0, 2, 4]
    assert trace.rewards.tolist() == [10, 20, 30]
    assert trace.states.tolist() == [[[n, n], [-n, -n]] for n in range(3)]
    assert trace.terminated is True
    assert len(trace) == 3


def test_an_episode_that_is_cut_short_is_not_terminated() -> None:
    assert play(Counting(2, truncates=True), Doubling()).terminated is False


def test_an_actor_without_memory_has_states_of_size_0() -> None:
    assert play(Counting(2), Forgetful()).states.shape == (2, 2, 0)


def test_after_each_step_the_caller_is_told() -> None:
    told: list[tuple[float, int, bool]] = []
    play(Counting(3), Doubling(), after_step=lambda so_far, info, s: told.append((len(so_far), info["steps"], s >= 0)))
    assert told == [(1, 1, True), (2, 2, True), (3, 3, True)]


def test_an_episode_that_was_begun_is_played_on_without_a_reset() -> None:
    env, actor, kept = Counting(3, truncates=True), Doubling(), list[Course]()
    whole = play(env, actor, after_step=lambda so_far, info, s: kept.append(copy.deepcopy(so_far)))
    env.steps = actor.acted = 2
    second = Course.of(kept[1].trace(), truncated=False)
    assert (len(second), second.over) == (2, False)
    again = play(env, actor, begun=second)
    for name in whole.observations:
        assert np.array_equal(again.observations[name], whole.observations[name])
    for name in ("actions", "rewards", "states"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert (env.steps, actor.acted, again.terminated) == (3, 3, False)


def test_an_episode_that_is_over_is_played_no_further() -> None:
    env = Counting(3, truncates=True)
    whole = play(env, Doubling())
    over = Course.of(whole, truncated=True)
    assert play(env, Doubling(), begun=over).rewards.tolist() == whole.rewards.tolist()
    assert env.steps == 3
