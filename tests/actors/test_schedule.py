from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.schedule import CONTROLS, EpisodeOrder, ScheduleConfig, epsilon_ladder, order
from agents.policies import HEURISTICS
from env.errors import UserError

SEED = 11


def orders(config: ScheduleConfig, *, seed: int = SEED) -> list[EpisodeOrder]:
    return [order(config, episode, seed=seed) for episode in range(config.total)]


def group(config: ScheduleConfig, name: str) -> list[EpisodeOrder]:
    return [one for one in orders(config) if one.group == name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": -1}, "search.episodes: expected at least 0, got -1"),
        ({"actors": 0}, "search.actors: expected at least 1, got 0"),
        ({"teacher_share": 1.0}, r"search.teacher_share: expected in \[0, 1\), got 1.0"),
        ({"teacher_share": -0.1}, r"search.teacher_share: expected in \[0, 1\), got -0.1"),
        ({"snapshot_period": -1}, "search.snapshot_period: expected at least 0, got -1"),
        ({"sigma": -0.4}, "search.sigma: expected a number of at least 0, or -1 for the usual, got -0.4"),
        ({"sigma": float("nan")}, "search.sigma: expected a number of at least 0, or -1 for the usual, got nan"),
        ({"epsilon_base": 1.4}, r"search.epsilon_base: expected in \[0, 1\], got 1.4"),
        ({"epsilon_alpha": -7.0}, "search.epsilon_alpha: expected a number of at least 0, got -7.0"),
        ({"controls": ("taylor", "magic")}, r"search.controls: expected different ones of random, .*'magic'"),
        ({"controls": ("cem", "cem")}, "search.controls: expected different ones of"),
        ({"teacher_rules": ()}, "search.teacher_rules: expected one or more of uniform-l1, "),
        ({"teacher_rules": ("taylor", "magic")}, r"search.teacher_rules: .* got \['taylor', 'magic'\]"),
        ({"allocation": "uniform"}, "search.allocation: expected global | uniform | balanced"),
        ({"method": "gamma", "allocation": "fair"}, "search.allocation: .* got 'fair' with gamma"),
        (
            {"like": "a.safetensors"},
            "search.like: expected no search.allocation beside it, .* search.method = 'controller'",
        ),
        (
            {"method": "taylor", "allocation": "uniform", "like": "a.safetensors"},
            "search.like: expected no search.allocation beside it, .* got search.allocation = 'uniform'",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        ScheduleConfig(**changes)


def test_without_a_number_of_episodes_there_are_twice_as_many_as_actors() -> None:
    config = ScheduleConfig(actors=7, controls=("random", "cem"))
    assert (config.per_group, config.total) == (14, 42)
    assert config.groups == ("search", "random", "cem")


def test_groups_are_played_one_after_the_other_with_equally_many_episodes() -> None:
    config = ScheduleConfig(episodes=5, actors=3, controls=CONTROLS)
    assert [one.group for one in orders(config)] == [name for name in ("search", *CONTROLS) for _ in range(5)]


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.lists(st.sampled_from(CONTROLS), unique=True),
    st.floats(0, 0.99),
    st.integers(),
)
def test_every_episode_has_one_order_that_a_player_can_carry_out(
    episodes: int, actors: int, controls: list[str], teacher_share: float, seed: int
) -> None:
    config = ScheduleConfig(
        episodes=episodes, actors=actors, controls=tuple(controls), teacher_share=teacher_share, epsilon_base=0.4
    )
    found = orders(config, seed=seed)
    assert [one.episode for one in found] == list(range(episodes * (1 + len(controls))))
    assert {one.policy for one in found} <= {*HEURISTICS, "controller", "controller-untrained", "cem"}
    assert all(0 <= one.epsilon <= config.epsilon_base and 0 <= one.sigma <= config.exploration for one in found)
    assert all(0 <= number < 2**62 for one in found for number in (one.seed, one.retraining_seed))
    assert any(one.policy == "controller" for one in found)  # whatever the teachers' share, something is left over
    assert found == orders(config, seed=seed)


def test_teachers_come_first_then_the_later_ones_in_turn_then_the_controller() -> None:
    config = ScheduleConfig(episodes=14, actors=2, teacher_share=0.5)
    assert [one.policy for one in orders(config)] == [
        "taylor",
        "gamma",
        "uniform-l1",
        "random-allocation",
        "taylor-offsets",
        "random-allocation",
        "taylor-offsets",
        *["controller"] * 7,
    ]
    assert all(one.epsilon == one.sigma == 0.0 for one in orders(config)[:7])


def test_without_teachers_the_controller_plays_everything() -> None:
    assert {one.policy for one in orders(ScheduleConfig(episodes=5))} == {"controller"}


def test_the_untrained_group_mirrors_the_search() -> None:
    config = ScheduleConfig(episodes=12, actors=3, controls=("untrained",))
    for trained, untrained in zip(group(config, "search"), group(config, "untrained"), strict=True):
        assert untrained.policy == trained.policy.replace("controller", "controller-untrained")
        assert (untrained.epsilon, untrained.sigma, untrained.seed) == (trained.epsilon, trained.sigma, trained.seed)


def test_the_epsilon_ladder_of_three_actors_by_hand() -> None:
    config = ScheduleConfig(actors=3, epsilon_base=0.4)
    assert [epsilon_ladder(i, config) for i in range(3)] == pytest.approx([0.4, 0.4**4.5, 0.4**8])


@given(st.integers(2, 300), st.data())
def test_the_epsilon_ladder_is_the_papers_formula(actors: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, actors - 1))
    expected = 0.4 ** (1 + 7 * i / (actors - 1))
    assert epsilon_ladder(i, ScheduleConfig(actors=actors, epsilon_base=0.4)) == pytest.approx(expected)


def test_a_single_actor_explores_with_the_base() -> None:
    assert epsilon_ladder(0, ScheduleConfig(actors=1, epsilon_base=0.4)) == pytest.approx(0.4)


def test_epsilon_and_sigma_fall_over_the_campaign_by_hand() -> None:
    config = ScheduleConfig(episodes=5, actors=2, epsilon_base=0.4, sigma=0.8)
    found = orders(config)
    assert [one.sigma for one in found] == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2])
    assert [one.epsilon for one in found] == pytest.approx([0.4, 0.75 * 0.4**8, 0.5 * 0.4, 0.25 * 0.4**8, 0.0])


def test_one_episode_is_enough_for_a_schedule() -> None:
    (only,) = orders(ScheduleConfig(episodes=1, actors=1, teacher_share=0.9, epsilon_base=0.4, sigma=0.4))
    assert (only.policy, only.epsilon, only.sigma) == ("controller", pytest.approx(0.4), pytest.approx(0.4))


def test_the_same_place_has_the_same_luck_in_every_group_and_another_place_other_luck() -> None:
    config = ScheduleConfig(episodes=7, controls=CONTROLS)
    seeds = [[one.seed for one in group(config, name)] for name in config.groups]
    assert all(row == seeds[0] for row in seeds)
    assert len(set(seeds[0])) == 7


def test_minibatches_are_the_same_everywhere_but_for_the_controls_that_would_repeat_themselves() -> None:
    config = ScheduleConfig(episodes=5, controls=CONTROLS)
    common = {one.retraining_seed for name in ("search", "random", "cem", "untrained") for one in group(config, name)}
    rules = ("taylor", "balanced", "gamma")
    taylor, *others = ([one.retraining_seed for one in group(config, name)] for name in rules)
    assert len(common) == 1
    assert others == [taylor, taylor]
    assert len({*taylor, *common}) == 6


def test_another_campaign_has_other_seeds() -> None:
    config = ScheduleConfig(episodes=5, controls=("taylor",))
    for one, other in zip(orders(config), orders(config, seed=12), strict=True):
        assert one.seed != other.seed
        assert one.retraining_seed != other.retraining_seed


def test_each_control_is_played_by_its_own_policy() -> None:
    config = ScheduleConfig(episodes=3, controls=("random", "taylor", "gamma", "cem"))
    found = {name: {one.policy for one in group(config, name)} for name in config.controls}
    assert found == {"random": {"random-allocation"}, "taylor": {"taylor"}, "gamma": {"gamma"}, "cem": {"cem"}}
