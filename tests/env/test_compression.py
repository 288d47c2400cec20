import copy
import functools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

from env.channels import ChannelPlan
from env.compression import CompressionEnv, EpisodeConfig, make_compression, unreachable
from env.data import DataConfig, load_dataset
from env.errors import UserError
from env.measure import Measure
from env.networks import small
from env.recognizer import Recognizer
from env.retraining import retrain

TINY: dict[str, Any] = {
    "targets": (0.8,),
    "step_minibatches": 1,
    "recovery_minibatches": 2,
    "batch_size": 32,
    "score_images": 40,
    "step_images": 50,
}


@functools.cache
def recognizer() -> Recognizer:
    """`small` at a tenth of its width, a little trained."""
    torch.manual_seed(0)
    dataset = load_dataset(DataConfig(train_limit=400, validation_share=0.1))
    network = small(width=0.1)
    retrain(network, dataset, DataConfig(), minibatches=60, batch_size=64, learning_rate=0.1, seed=1, decay=True)
    given = sum(parameter.numel() for parameter in network.parameters())
    return Recognizer(network, dataset, DataConfig(), measure=Measure("parameters", given))


def made(*, features: bool = True, seed: int = 5, **changes: Any) -> CompressionEnv:
    return CompressionEnv(recognizer(), EpisodeConfig(**{**TINY, **changes}), features=features, seed=seed)


def zero(env: CompressionEnv, *units: int) -> np.ndarray:
    action = np.zeros(env.plan.units, np.int8)
    action[list(units)] = 1
    return action


def half_of_each_layer(env: CompressionEnv) -> np.ndarray:
    return zero(env, *(layer.first + i for layer in env.plan.layers for i in range(layer.units // 2)))


def finite(observation: dict[str, Any]) -> bool:
    return all(bool(np.isfinite(value).all()) for value in observation.values())


@pytest.mark.parametrize("features", [True, False])
def test_gymnasiums_own_checks_pass(features: bool) -> None:
    check_env(made(features=features), skip_render_check=True)


def test_an_episode_starts_with_everything_kept() -> None:
    env = made()
    observation, info = env.reset()
    assert env.observation_space.contains(observation)
    assert observation["keep_mask"].tolist() == [1] * env.plan.units
    assert observation["compression"].tolist() == [0.0]
    assert observation["accuracy"][0] == pytest.approx(env.baseline.accuracy, abs=0.15)
    assert observation["accuracy"][0] > 0.6  # the network was trained: 0.1 is a guess
    assert info["reached"] == []


def test_only_the_bits_asked_for_go_and_dead_bits_are_ignored() -> None:
    env = made()
    env.reset()
    observation, *_, info = env.step(zero(env, 0, 4))
    assert np.flatnonzero(observation["keep_mask"] == 0).tolist() == [0, 4]
    again, *_, info_again = env.step(zero(env, 0, 4))
    assert np.flatnonzero(again["keep_mask"] == 0).tolist() == [0, 4]
    assert again["compression"] == observation["compression"]
    assert (info["refused"], info_again["refused"]) == (0, 0)
    assert (info["step"], info_again["step"]) == (1, 2)
    assert bool((again["features"][[0, 4]] == 0).all())


def test_what_a_layer_must_keep_is_refused_from_its_end() -> None:
    env = made(min_width=2, targets=(0.88,))
    env.reset()
    first, second = env.plan.layers[:2]
    assert (first.units, second.first) == (3, 3)
    observation, *_, info = env.step(zero(env, 0, 1, 2))
    assert observation["keep_mask"][:3].tolist() == [0, 1, 1]
    assert info["refused"] == 2
    observation, *_, info = env.step(zero(env, *range(env.plan.units)))
    kept = env.plan.kept_per_layer(torch.as_tensor(observation["keep_mask"]).bool())
    assert kept.tolist() == [2] * 6
    assert info["refused"] == 12
    assert observation["keep_mask"][:3].tolist() == [0, 1, 1]


def test_a_target_reached_is_reported_with_the_counts_of_its_compact_network() -> None:
    env = made(targets=(0.3, 0.5, 0.85))
    env.reset()
    action = half_of_each_layer(env)
    observation, _, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (False, False)
    assert [point.target for point in info["reached"]] == [0.3, 0.5]
    for point in info["reached"]:
        count = sum(parameter.numel() for parameter in point.body.network.parameters())
        assert point.parameters == count
        assert point.compression == pytest.approx(1 - count / recognizer().measure.given)
        assert observation["compression"][0] == pytest.approx(point.compression)
        assert point.body.keep_mask.tolist() == (action == 0).tolist()
        assert 0 < point.macs < int(env.plan.macs(env.plan.widths))
        assert recognizer().evaluate(point.body, recognizer().dataset.validation) == point.metrics
    assert env.step(zero(env))[-1]["reached"] == []  # not a second time


def test_an_episode_terminates_at_its_last_target_with_the_scores_of_the_living_alone() -> None:
    env = made(targets=(0.4,))
    env.reset()
    action = half_of_each_layer(env)
    observation, _, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (True, False)
    assert len(info["reached"]) == 1
    assert bool((observation["features"][action == 1] == 0).all())
    assert bool((observation["features"][action == 0] != 0).any(axis=1).all())


def test_the_terminal_reward_is_the_mean_of_what_the_targets_lost() -> None:
    env = made(targets=(0.3, 0.5, 0.85))
    env.reset()
    assert env.step(zero(env, 0))[1] == 0.0
    _, reward, _, _, info = env.step(half_of_each_layer(env))
    lost = [point.metrics.cross_entropy - env.baseline.cross_entropy for point in info["reached"]]
    assert len(lost) == 2
    assert max(lost) < 2 * math.log(10)
    assert reward == pytest.approx(-sum(lost) / 3)


def test_the_accuracy_reward_is_that_of_the_end() -> None:
    env = made(targets=(0.1, 0.4), reward="accuracy")
    env.reset()
    assert env.step(zero(env, 0))[1] == 0.0
    _, reward, terminated, _, info = env.step(half_of_each_layer(env))
    assert terminated
    assert reward == info["reached"][-1].metrics.accuracy > 0


def test_the_rewards_of_differences_sum_to_the_accuracy_lost() -> None:
    env = made(reward="difference")
    start, _ = env.reset()
    first, reward, *_ = env.step(zero(env, 0, 5, 9))
    assert reward == pytest.approx(float(first["accuracy"][0] - start["accuracy"][0]))
    second, another, *_ = env.step(half_of_each_layer(env))
    assert reward + another == pytest.approx(float(second["accuracy"][0] - start["accuracy"][0]))


def played(env: CompressionEnv, **reset: Any) -> tuple[list[float], np.ndarray]:
    env.reset(**reset)
    _, first, *_ = env.step(zero(env, 1, 7, 11))
    observation, second, *_ = env.step(half_of_each_layer(env))
    return [first, second], observation["features"]


def test_the_same_seed_and_masks_give_the_same_rewards_exactly() -> None:
    env = made(targets=(0.4, 0.8))
    rewards, features = played(env)
    again, features_again = played(env)
    fresh, features_fresh = played(made(targets=(0.4, 0.8)))
    assert rewards == again == fresh
    assert np.array_equal(features, features_again)
    assert np.array_equal(features, features_fresh)


def test_another_seed_gives_other_minibatches() -> None:
    env = made(targets=(0.4, 0.8))
    rewards, _ = played(env)
    others, _ = played(env, seed=6)
    assert rewards[1] != others[1]
    assert played(made(targets=(0.4, 0.8), seed=6), seed=6)[0][0] == others[0]
    assert played(env, seed=5)[0] == rewards


def test_observations_are_copies() -> None:
    env = made()
    observation, _ = env.reset()
    before = observation["features"].copy()
    observation["features"][:] = 99.0
    observation["keep_mask"][:] = 0
    again, _ = env.reset()
    assert np.array_equal(again["features"], before)
    assert bool(again["keep_mask"].all())


def test_an_episode_is_truncated_at_max_steps() -> None:
    env = made(max_steps=3)
    env.reset()
    ends = [env.step(zero(env))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize(
    ("reward", "expected"), [("terminal", -2 * math.log(10)), ("accuracy", None), ("difference", None)]
)
def test_a_collapse_in_a_step_ends_the_episode_with_the_worst_reward(reward: str, expected: float | None) -> None:
    env = made(reward=reward, step_learning_rate=1e30, step_minibatches=3, targets=(0.4,))
    start, _ = env.reset()
    observation, given, terminated, truncated, info = env.step(half_of_each_layer(env))
    assert (terminated, truncated, info["collapsed"], info["reached"]) == (True, False, True, [])
    assert given == pytest.approx(-start["accuracy"][0] if expected is None else expected)
    assert observation["accuracy"].tolist() == [0.0]
    assert finite(observation)
    assert env.observation_space.contains(observation)
    assert finite(env.reset()[0])  # and the next episode is a new one


def test_a_collapse_in_the_short_recovery_reaches_no_target() -> None:
    env = made(recovery_learning_rate=1e30, recovery_minibatches=3, targets=(0.4, 0.8))
    env.reset()
    observation, reward, terminated, truncated, info = env.step(half_of_each_layer(env))
    assert (terminated, truncated, info["collapsed"], info["reached"]) == (True, False, True, [])
    assert reward == pytest.approx(-2 * math.log(10))
    assert finite(observation)


def test_a_sound_step_is_not_collapsed() -> None:
    env = made()
    env.reset()
    assert env.step(zero(env, 3))[-1]["collapsed"] is False


@pytest.mark.parametrize("rate", [1.0, 30.0, 1e3, 1e6, 1e12])
def test_whatever_the_learning_rate_rewards_and_observations_are_finite_and_bounded(rate: float) -> None:
    env = made(step_learning_rate=rate, recovery_learning_rate=rate, targets=(0.1, 0.4))
    env.reset()
    for action in (zero(env, 0, 3), half_of_each_layer(env)):
        observation, reward, terminated, truncated, _ = env.step(action)
        assert finite(observation)
        assert -2 * math.log(10) - 1e-9 <= reward < 1.0
        if terminated or truncated:
            break


def test_a_finite_but_huge_loss_counts_as_twice_a_blind_guess() -> None:
    env = made(recovery_learning_rate=1e4, targets=(0.4,))
    env.reset()
    _, reward, terminated, _, info = env.step(half_of_each_layer(env))
    assert terminated
    assert info["reached"][0].metrics.cross_entropy > 2 * math.log(10) + 1
    assert reward == pytest.approx(-2 * math.log(10))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("targets", ()),
        ("targets", (0.9, 0.8)),
        ("targets", (0.8, 0.8)),
        ("targets", (0.0, 0.5)),
        ("targets", (1.0,)),
        ("waypoints", 0),
        ("min_width", 0),
        ("reward", "speed"),
        ("batch_size", 1),
        ("step_minibatches", 0),
        ("recovery_minibatches", 0),
        ("step_learning_rate", 0.0),
        ("recovery_learning_rate", math.nan),
        ("step_images", 0),
        ("score_images", 0),
        ("precision", "float16"),
        ("max_steps", 0),
    ],
)
def test_a_bad_value_is_a_user_error_that_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^episode\.{key}: expected"):
        EpisodeConfig(**{key: value})


def test_each_target_needs_a_waypoint() -> None:
    with pytest.raises(UserError, match=r"^episode\.waypoints: expected at least 3"):
        EpisodeConfig(targets=(0.1, 0.2, 0.3), waypoints=2)


def test_a_target_that_min_width_forbids_is_a_user_error_with_the_most_there_is() -> None:
    config = EpisodeConfig(**{**TINY, "targets": (0.99,)}, min_width=3)
    plan = recognizer().plan
    most = 1 - int(plan.parameters(torch.full((6,), 3))) / recognizer().measure.given
    with pytest.raises(UserError, match=rf"^episode\.targets: expected at most {most:.4f}.*got 0\.99") as caught:
        CompressionEnv(recognizer(), config)
    assert "min_width = 3" in str(caught.value)
    within = EpisodeConfig(targets=(most - 1e-6,), min_width=3)
    assert unreachable(plan, recognizer().measure, within) is None


def test_gymnasium_makes_it_with_a_recognizer_of_ours() -> None:
    env = gym.make("Compression-v0", recognizer=recognizer(), config=EpisodeConfig(**TINY), features=False, seed=3)
    observation, _ = env.reset()
    assert set(observation) == {"accuracy", "compression", "keep_mask"}
    assert env.unwrapped.recognizer is recognizer()  # type: ignore[attr-defined]
    observation, reward, *_ = env.step(np.zeros(env.action_space.shape, np.int8))
    assert (reward, observation["compression"].tolist()) == (0.0, [0.0])


def test_gymnasium_makes_one_by_itself_that_recognizes_digits() -> None:
    env = gym.make("Compression-v0", config=EpisodeConfig(**TINY))
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert observation["accuracy"][0] > 0.9
    again = make_compression(seed=1)
    assert again.recognizer is env.unwrapped.recognizer  # type: ignore[attr-defined]


def test_a_network_of_which_nothing_can_be_pruned_is_told_as_that() -> None:
    plan = ChannelPlan(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), torch.zeros(1, 1, 8, 8))
    problem = unreachable(plan, Measure("parameters", 260), EpisodeConfig(targets=(0.1,)))
    assert "got none, whatever the target; zeroout doctor --model says why" in str(problem)


@pytest.mark.parametrize("features", [True, False])
def test_an_episode_goes_on_in_another_environment_bit_for_bit(features: bool) -> None:
    first, other = made(features=features), made(features=features)
    actions = [zero(first, step, 4 + step) for step in range(3)] + [half_of_each_layer(first)]
    first.reset(seed=7)
    other.reset(seed=8)
    other.step(actions[3])
    for action in actions[:2]:
        first.step(action)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    for action in actions[2:]:
        (seen, *told, info), (seen_there, *told_there, info_there) = first.step(action), other.step(action)
        assert all(np.array_equal(seen[name], seen_there[name]) for name in seen | seen_there)
        assert (told, info) == (told_there, info_there)
    mine, theirs = first.state_dict()["network"], other.state_dict()["network"]
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)


def test_after_another_episodes_state_a_reset_begins_as_ever() -> None:
    env, other = made(), made()
    expected, _ = env.reset(seed=7)
    other.reset(seed=8)
    other.step(zero(other, 0))
    env.load_state_dict(other.state_dict())
    again, _ = env.reset(seed=7)
    assert all(np.array_equal(expected[name], again[name]) for name in expected)
