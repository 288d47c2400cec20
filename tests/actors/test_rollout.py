import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.rollout import Rollout, StepReport, rollout
from agents.controller import Controller, ControllerConfig
from agents.ladder import Ladder
from agents.policies import ControllerPolicy, Policy, Shadowed, heuristic, observe
from env.compression import CompressionEnv, EpisodeConfig
from env.data import DataConfig, load_dataset
from env.importance import FEATURES
from env.measure import Measure
from env.networks import small
from env.recognizer import Recognizer
from learner.sequence import EpisodeTrace

HIDDEN = 5
EPISODE = EpisodeConfig(
    targets=(0.5, 0.8),
    waypoints=3,
    batch_size=16,
    step_minibatches=1,
    recovery_minibatches=1,
    step_images=40,
    score_images=32,
)


@functools.cache
def recognizer() -> Recognizer:
    data = DataConfig(train_limit=100, validation_share=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small(width=0.25)
    given = sum(parameter.numel() for parameter in network.parameters())
    return Recognizer(network, load_dataset(data), data, measure=Measure("parameters", given))


def made(config: EpisodeConfig = EPISODE, *, features: bool = True) -> tuple[CompressionEnv, Ladder]:
    env = CompressionEnv(recognizer(), config, features=features, seed=3)
    steps = Ladder(
        env.plan,
        measure=recognizer().measure,
        targets=config.targets,
        waypoints=config.waypoints,
        min_width=config.min_width,
    )
    return env, steps


def controller(observation: str = "features") -> Controller:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Controller(ControllerConfig(observation=observation, hidden_size=HIDDEN), recognizer().plan)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def played(policy: Policy | None = None, **options: Any) -> Rollout:
    env, steps = made()
    return rollout(env, policy or heuristic("taylor", env.plan, seed=0), steps, **options)


class Recording:
    """A policy whose observations and states are looked at from outside."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.seen, self.before = policy, list[Any](), list[np.ndarray]()

    @property
    def recurrent_state(self) -> Any:
        return self.policy.recurrent_state

    def rank(self, observation: Any) -> Tensor:
        self.seen.append(observation)
        state = self.policy.recurrent_state
        assert state is not None
        self.before.append(torch.cat(state).numpy().copy())
        return self.policy.rank(observation)


def arrays(trace: EpisodeTrace) -> dict[str, np.ndarray]:
    return {**trace.observations, "actions": trace.actions, "rewards": trace.rewards, "states": trace.states}


def masks(trace: EpisodeTrace) -> np.ndarray:
    return trace.observations["keep_mask"].astype(bool)


def test_a_traces_arrays_have_the_shapes_and_dtypes_it_promises() -> None:
    result = played(ControllerPolicy(controller()))
    trace, filters = result.trace, recognizer().plan.units
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays(trace).items()}
    assert shapes == {
        "accuracy": ("float32", (4, 1)),
        "compression": ("float32", (4, 1)),
        "keep_mask": ("int8", (4, filters)),
        "features": ("float32", (4, filters, len(FEATURES))),
        "actions": ("int8", (3, filters)),
        "rewards": ("float32", (3,)),
        "states": ("float32", (3, 2, HIDDEN)),
    }
    assert len(trace) == 3
    assert trace.terminated is True


def test_masks_follow_from_the_actions_and_actions_touch_only_the_living() -> None:
    trace = played().trace
    keep_mask, actions = masks(trace), trace.actions.astype(bool)
    assert keep_mask[0].all()
    assert (actions.sum(1) > 0).all()
    for t in range(len(trace)):
        assert keep_mask[t][actions[t]].all()
        assert np.array_equal(keep_mask[t + 1], keep_mask[t] & ~actions[t])


def test_the_curve_climbs_the_waypoints_and_its_numbers_are_those_of_the_masks() -> None:
    result = played()
    _, steps = made()
    compressions = [compression for compression, _ in result.curve]
    assert compressions[0] == 0.0
    for reached, goal in zip(compressions[1:], steps.goals.tolist(), strict=True):
        assert goal - 1e-6 <= reached < goal + 0.1
    exact = [recognizer().compression(torch.from_numpy(mask)) for mask in masks(result.trace)]
    assert compressions == pytest.approx(exact, abs=1e-6)
    assert result.trace.observations["compression"][:, 0].tolist() == compressions
    assert result.trace.observations["accuracy"][:, 0].tolist() == [accuracy for _, accuracy in result.curve]


def test_every_target_is_reached_once_with_a_network_as_small_as_it_says() -> None:
    result = played()
    assert [point.target for point in result.reached] == [0.5, 0.8]
    for point in result.reached:
        assert point.compression >= point.target
        assert sum(p.numel() for p in point.body.network.parameters()) == point.parameters
        assert point.compression == pytest.approx(1 - point.parameters / recognizer().measure.given)
    assert np.array_equal(result.reached[-1].body.keep_mask.numpy(), masks(result.trace)[-1])


def test_the_return_is_the_sum_of_the_rewards_which_terminal_episodes_pay_at_targets_alone() -> None:
    result = played()
    paid = {t for t in range(3) if result.trace.rewards[t] != 0}
    reached_at = {
        next(t for t in range(3) if result.trace.observations["compression"][t + 1, 0] >= np.float32(point.target))
        for point in result.reached
    }
    assert paid == reached_at
    assert result.total_return == pytest.approx(float(result.trace.rewards.sum()))


def test_seconds_are_told_by_phase() -> None:
    result = played()
    assert {"decide", "compact", "retrain", "evaluate", "score", "recover"} <= set(result.seconds)
    assert all(spent >= 0 for spent in result.seconds.values())


def test_an_episode_cut_short_is_not_terminated() -> None:
    env, steps = made(replace(EPISODE, max_steps=2))
    result = rollout(env, heuristic("taylor", env.plan, seed=0), steps)
    assert len(result.trace) == 2
    assert result.trace.terminated is False


def test_an_environment_without_features_leaves_none_in_the_trace() -> None:
    env, steps = made(features=False)
    result = rollout(env, heuristic("random-filters", env.plan, seed=0), steps)
    assert set(result.trace.observations) == {"accuracy", "compression", "keep_mask"}


def test_on_step_is_called_after_each_step_with_what_came_of_it() -> None:
    calls: list[StepReport] = []
    result = played(on_step=calls.append)
    told = [(call.step, call.compression, call.accuracy) for call in calls]
    assert told == [(number, *point) for number, point in enumerate(result.curve)][1:]
    assert sum(call.reached for call in calls) == len(result.reached) == 2
    for phase, spent in result.seconds.items():
        assert spent == pytest.approx(sum(call.seconds.get(phase, 0.0) for call in calls))


def test_the_recurrent_state_is_stored_as_it_is_before_each_step() -> None:
    network = controller()
    policy = Recording(ControllerPolicy(network))
    trace = played(policy).trace
    assert np.array_equal(trace.states, np.stack(policy.before))
    assert not trace.states[0].any()
    state = network.initial_state()
    for t, seen in enumerate(policy.seen):
        np.testing.assert_array_equal(trace.states[t], torch.cat(state).numpy())
        with torch.inference_mode():
            _, state = network(observe(seen), state)
    assert trace.states[1].any()
    assert not np.array_equal(trace.states[1], trace.states[2])


def test_a_policy_without_memory_stores_states_of_size_0() -> None:
    assert played().trace.states.shape == (3, 2, 0)


def test_a_shadowed_teacher_plays_as_it_would_alone_with_the_controllers_own_states() -> None:
    network, plan = controller(), recognizer().plan
    alone = played(heuristic("gamma", plan, seed=0)).trace
    policy = Recording(Shadowed(heuristic("gamma", plan, seed=0), network))
    shadowed = played(policy).trace
    assert np.array_equal(shadowed.actions, alone.actions)
    state = network.initial_state()
    for t, seen in enumerate(policy.seen):
        np.testing.assert_array_equal(shadowed.states[t], torch.cat(state).numpy())
        with torch.inference_mode():
            _, state = network(observe(seen), state)


def same(one: Rollout, other: Rollout) -> bool:
    mine, theirs = arrays(one.trace), arrays(other.trace)
    return all(np.array_equal(mine[name], theirs[name]) for name in mine | theirs)


def test_the_same_seeds_play_the_same_episode_and_others_another() -> None:
    def explore(seed: int, retraining: int) -> Rollout:
        return played(ControllerPolicy(controller(), epsilon=0.5, sigma=0.4, seed=seed), seed=retraining)

    first = explore(7, 11)
    assert same(first, explore(7, 11))
    assert not np.array_equal(first.trace.actions, explore(8, 11).trace.actions)
    assert not same(first, explore(7, 12))


def test_an_environment_can_be_played_again_and_gives_the_same() -> None:
    env, steps = made()
    first, again = (rollout(env, heuristic("taylor", env.plan, seed=0), steps, seed=5) for _ in range(2))
    assert same(first, again)
