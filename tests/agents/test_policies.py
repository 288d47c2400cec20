import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.controller import Controller, ControllerConfig
from agents.policies import (
    HEURISTICS,
    ControllerPolicy,
    LayerOffsets,
    Policy,
    Shadowed,
    heuristic,
    importance_of,
    observe,
)
from env.channels import ChannelPlan

PLAN = ChannelPlan(
    nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
    torch.zeros(1, 2, 8, 8),
)
KEEP = [1, 1, 0, 1, 1, 1, 1, 1]
TAYLOR = [0.4, 0.1, 0.0, 0.3, 0.2, -1.0, 0.25, 2.0]
GAMMA = [3.0, 2.0, 0.0, 1.0, 4.0, 0.5, 0.1, 0.2]
L1 = [0.5, 0.9, 0.0, 0.1, 0.3, 7.0, 8.0, 6.0]
IMPORTANCE = [1.0, 5.0, 0.0, 4.0, 2.0, 30.0, 10.0, 20.0]


def observation(seed: int | None = None) -> dict[str, Any]:
    features = np.array([TAYLOR, GAMMA, L1], np.float32).T
    if seed is not None:
        features = np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32)
    return {
        "accuracy": np.array([0.7], np.float32),
        "compression": np.array([0.2], np.float32),
        "keep_mask": np.array(KEEP, np.int8),
        "features": features,
        "importance": np.array(IMPORTANCE, np.float32),
    }


def ranking(scores: Tensor) -> list[int]:
    """The living, first to go first; ties by index."""
    alive = torch.tensor(KEEP).bool()
    return [i for i in scores.argsort(descending=True, stable=True).tolist() if alive[i]]


def controller(kind: str = "features") -> Controller:
    """One whose heads are not zero."""
    torch.manual_seed(0)
    made = Controller(ControllerConfig(observation=kind, hidden_size=7, layer_size=5), PLAN)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("taylor", [5, 1, 4, 6, 3, 0, 7]),
        ("gamma", [6, 7, 5, 3, 1, 0, 4]),
        # A filter of layer one frees 18 + 1 and 9 parameters in each of layer two's 3 filters, 46; one of layer two
        # 4 * 9 + 1 and 4 in the classifier, 41. Layer one has 4 left, in the order 1, 4, 3, 0, and does the harm 1/12,
        # 1/6, 1/2, 1 by losing them; layer two, 5, 6, 7, the harm 1/6, 1/2, 1. Parameters for the harm are 552, 276,
        # 92, 46 and 246, 82, 41.
        ("balanced", [1, 4, 5, 3, 6, 0, 7]),
        # the same alternation of layers; L1 within them: layer one 3, 4, 0, 1, layer two 7, 5, 6
        ("balanced-l1", [3, 4, 7, 0, 5, 1, 6]),
        # shares gone with it: layer one, of which 1 of 5 is dead, 1/5, 2/5, 3/5, 4/5; layer two 0, 1/3, 2/3
        ("uniform-l1", [7, 3, 5, 4, 0, 6, 1]),
        # the same shares, by importance: layer one 0, 4, 3, 1, layer two 6, 7, 5
        ("hrank", [6, 0, 7, 4, 3, 5, 1]),
        ("fpgm", [6, 0, 7, 4, 3, 5, 1]),
        ("l2", [6, 0, 7, 4, 3, 5, 1]),
    ],
)
def test_a_heuristic_ranks_by_hand(name: str, expected: list[int]) -> None:
    policy = heuristic(name, PLAN, seed=3)
    assert ranking(policy.rank(observation())) == expected
    assert policy.recurrent_state is None


@pytest.mark.parametrize(
    ("name", "allocation", "expected"),
    [
        ("hrank", "global", [0, 4, 3, 1, 6, 7, 5]),
        # as `balanced` by hand above, with layer one in the order 0, 4, 3, 1 and layer two 6, 7, 5
        ("hrank", "balanced", [0, 4, 6, 3, 7, 1, 5]),
        ("balanced", "global", [5, 1, 4, 6, 3, 0, 7]),
        ("taylor", "uniform", [5, 1, 6, 4, 3, 7, 0]),
    ],
)
def test_an_allocation_divides_between_layers_what_a_score_orders_within(
    name: str, allocation: str, expected: list[int]
) -> None:
    assert ranking(heuristic(name, PLAN, seed=0, allocation=allocation).rank(observation())) == expected


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        # of the ways 2 and 1: layer one, of which 1 is dead, 3 at 2/2, 4 at 3/2, 0 at 4/2, 1 at 5/2; layer two 1, 2, 3
        ([3, 2], [3, 7, 4, 0, 5, 1, 6]),
        ([5, 2], [7, 5, 6, 3, 4, 0, 1]),  # layer one has no way to go
    ],
)
def test_all_layers_arrive_together_at_the_widths_that_are_given(like: list[int], expected: list[int]) -> None:
    policy = heuristic("uniform-l1", PLAN, seed=0, like=torch.tensor(like))
    assert ranking(policy.rank(observation())) == expected


def test_what_draws_its_allocation_takes_no_widths() -> None:
    with pytest.raises(ValueError, match="random-filters has an allocation of its own, got widths"):
        heuristic("random-filters", PLAN, seed=0, like=torch.tensor([3, 2]))


def test_what_draws_its_allocation_takes_no_other() -> None:
    with pytest.raises(ValueError, match="random-allocation has an allocation of its own, got uniform"):
        heuristic("random-allocation", PLAN, seed=0, allocation="uniform")


def test_only_some_rules_ask_for_more_than_the_features() -> None:
    assert {name: importance_of(name) for name in HEURISTICS if importance_of(name)} == {
        "hrank": "rank",
        "fpgm": "fpgm",
        "l2": "l2",
    }


def test_uniform_l1_takes_the_same_share_of_each_layer() -> None:
    scores = heuristic("uniform-l1", PLAN, seed=0).rank(observation())
    torch.testing.assert_close(
        scores[[3, 4, 0, 1, 7, 5, 6]], -torch.tensor([1 / 5, 2 / 5, 3 / 5, 4 / 5, 0, 1 / 3, 2 / 3])
    )


def test_random_allocation_shifts_whole_layers_and_ranks_by_l1_within_them() -> None:
    uniform = heuristic("uniform-l1", PLAN, seed=0).rank(observation())
    shift = heuristic("random-allocation", PLAN, seed=5).rank(observation()) - uniform
    alive = torch.tensor(KEEP).bool()
    first, second = shift[:5][alive[:5]], shift[5:]
    torch.testing.assert_close(first, first[:1].expand(4))
    torch.testing.assert_close(second, second[:1].expand(3))
    assert float(first[0]) != pytest.approx(float(second[0]))


def test_taylor_offsets_keep_more_of_a_layer_with_a_higher_offset() -> None:
    policy = LayerOffsets(PLAN, torch.tensor([0.0, 0.5], dtype=torch.float64))
    # the second layer's scores become -0.5, 0.75, 2.5
    assert ranking(policy.rank(observation())) == [5, 1, 4, 3, 0, 6, 7]
    assert policy.recurrent_state is None
    drawn = heuristic("taylor-offsets", PLAN, seed=2).rank(observation()) + torch.tensor(TAYLOR)
    torch.testing.assert_close(drawn[:5], drawn[:1].expand(5))
    assert float(drawn[0]) != pytest.approx(float(drawn[5]))


@pytest.mark.parametrize("name", HEURISTICS)
def test_the_seed_alone_decides_a_heuristic(name: str) -> None:
    first, again, other = (heuristic(name, PLAN, seed=seed) for seed in (1, 1, 2))
    ranks = [[policy.rank(observation()) for _ in range(3)] for policy in (first, again, other)]
    for one, same in zip(ranks[0], ranks[1], strict=True):
        assert torch.equal(one, same)
    drawn = name.startswith("random") or name == "taylor-offsets"
    assert torch.equal(ranks[0][0], ranks[2][0]) != drawn
    assert torch.equal(ranks[0][0], ranks[0][1]) == (name != "random-filters")  # offsets are an episode's


def test_random_filters_puts_every_filter_first_equally_often() -> None:
    policy = heuristic("random-filters", PLAN, seed=0)
    first = torch.stack([policy.rank(observation()).argmax() for _ in range(2000)])
    counts = torch.bincount(first, minlength=8)
    assert float((counts - 250).abs().max()) < 75  # five standard deviations of 14.8


@pytest.mark.parametrize("kind", ["features", "mask"])
def test_without_exploration_the_controllers_advantage_is_played(kind: str) -> None:
    made = controller(kind)
    policy, state = ControllerPolicy(made, seed=1), made.initial_state()
    for step in range(3):
        torch.testing.assert_close(policy.recurrent_state, state)
        rank = policy.rank(observation(step))
        judgement, state = made(observe(observation(step)), state)
        torch.testing.assert_close(rank, made.advantages(judgement, observe(observation(step)))[0, 0])
    torch.testing.assert_close(policy.recurrent_state, state)


def by_place(rank: torch.Tensor) -> torch.Tensor:
    """The ranking of each of the two layers in falling order, whichever filters stand there."""
    return torch.cat([layer.sort(descending=True).values for layer in (rank[:5], rank[5:])])


def test_each_episode_has_a_taste_of_its_own_within_layers() -> None:
    made = controller()
    plain = ControllerPolicy(made).rank(observation())
    orders = set()
    for seed in range(20):
        rank = ControllerPolicy(made, sigma=0.7, seed=seed).rank(observation())
        orders.add(tuple(rank[:5].argsort().tolist()))
    assert len(orders) > 1
    assert torch.equal(ControllerPolicy(made, sigma=0.0, seed=3).rank(observation()), plain)


def test_sigma_shifts_the_layers_by_the_same_all_through_an_episode() -> None:
    made = controller()
    plain, explored = ControllerPolicy(made), ControllerPolicy(made, sigma=0.7, seed=4)
    shifts = [by_place(explored.rank(observation(step))) - by_place(plain.rank(observation(step))) for step in range(3)]
    for shift in shifts:
        torch.testing.assert_close(shift, shifts[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shift[:5], shift[:1].expand(5), atol=1e-5, rtol=1e-5)
    assert float(shifts[0][0] - shifts[0][5]) != pytest.approx(0.0, abs=1e-3)


def test_sigma_is_in_units_of_the_mask_controllers_own_spread() -> None:
    made = controller("mask")
    wide = controller("mask")
    with torch.no_grad():
        for parameter in wide.advantage[-1].parameters():
            parameter.mul_(100.0)
    shifts = []
    for one in (made, wide):
        plain, explored = ControllerPolicy(one), ControllerPolicy(one, sigma=0.7, seed=4)
        shifts.append(explored.rank(observation()) - plain.rank(observation()))
    torch.testing.assert_close(shifts[1], 100 * shifts[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_offsets_are_each_layers_own_and_a_parabola_over_depth(sigma: float) -> None:
    made = controller()
    plain = by_place(ControllerPolicy(made).rank(observation()))
    drawn = (by_place(ControllerPolicy(made, sigma=sigma, seed=s).rank(observation())) - plain for s in range(400))
    shifts = torch.stack([shift[[0, 5]] for shift in drawn])  # the first of each of the two layers, at depth -1 and 1
    # the slope moves them against each other by 1.5, the bend not at all, and each has 0.7 of its own
    sum_of_both, difference = shifts.sum(1).std(), (shifts[:, 0] - shifts[:, 1]).std()
    assert float(sum_of_both) == pytest.approx(sigma * 0.7 * 2**0.5, rel=0.15)  # standard error 3.5 %
    assert float(difference) == pytest.approx(sigma * (4 * 1.5**2 + 2 * 0.7**2) ** 0.5, rel=0.15)


def test_epsilon_1_draws_new_offsets_at_every_step_for_the_features_controller() -> None:
    made = controller()
    plain, explored = ControllerPolicy(made), ControllerPolicy(made, epsilon=1.0, seed=4)
    shifts = [explored.rank(observation(step)) - plain.rank(observation(step)) for step in range(3)]
    for shift in shifts:
        torch.testing.assert_close(shift[:5], shift[:1].expand(5), atol=1e-5, rtol=1e-5)
    assert len({round(float(shift[0]), 3) for shift in shifts}) == 3


def test_epsilon_1_ranks_at_random_for_the_mask_controller_and_keeps_its_memory() -> None:
    made = controller("mask")
    plain, explored = ControllerPolicy(made), ControllerPolicy(made, epsilon=1.0, seed=4)
    ranks = [explored.rank(observation(step)) for step in range(2)]
    for step in range(2):
        plain.rank(observation(step))
    assert all(0 <= float(value) < 1 for rank in ranks for value in rank)
    assert not torch.equal(ranks[0], ranks[1])
    torch.testing.assert_close(explored.recurrent_state, plain.recurrent_state)


def test_epsilon_is_the_share_of_exploratory_steps() -> None:
    made = controller("mask")
    plain, explored = ControllerPolicy(made), ControllerPolicy(made, epsilon=0.3, seed=4)
    steps = 400
    different = sum(not torch.equal(explored.rank(observation(0)), plain.rank(observation(0))) for _ in range(steps))
    assert different / steps == pytest.approx(0.3, abs=0.1)  # more than four standard deviations


@pytest.mark.parametrize("kind", ["features", "mask"])
def test_exploration_is_the_same_for_a_seed_and_leaves_torchs_generator_alone(kind: str) -> None:
    made = controller(kind)
    before = torch.get_rng_state()
    policies = [ControllerPolicy(made, epsilon=0.5, sigma=0.3, seed=seed) for seed in (1, 1, 2)]
    ranks = [torch.stack([policy.rank(observation(step)) for step in range(5)]) for policy in policies]
    assert torch.equal(ranks[0], ranks[1])
    assert not torch.equal(ranks[0], ranks[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shadowed_policy_decides_and_the_controller_lends_its_state() -> None:
    made = controller()
    shadowed, alone = Shadowed(heuristic("gamma", PLAN, seed=0), made), ControllerPolicy(made)
    for step in range(3):
        torch.testing.assert_close(shadowed.recurrent_state, alone.recurrent_state)
        rank = shadowed.rank(observation(step))
        alone.rank(observation(step))
        assert torch.equal(rank, -torch.as_tensor(observation(step)["features"][:, 1]))
    assert float(shadowed.recurrent_state[0].abs().max()) > 0


def policies() -> dict[str, Callable[[], Policy]]:
    made = controller()
    named: dict[str, Callable[[], Policy]] = {
        name: functools.partial(heuristic, name, PLAN, seed=3) for name in HEURISTICS
    }
    return named | {
        "layer-offsets": lambda: LayerOffsets(PLAN, torch.tensor([0.0, 0.5])),
        "controller": lambda: ControllerPolicy(made, epsilon=0.5, sigma=0.4, seed=3),
        "shadowed": lambda: Shadowed(heuristic("random-filters", PLAN, seed=3), made),
    }


@pytest.mark.parametrize("name", list(policies()))
def test_a_policy_made_alike_goes_on_from_anothers_state(name: str) -> None:
    make = policies()[name]
    first, second = make(), make()
    for step in range(3):
        first.rank(observation(step))
    state = {key: value.clone() for key, value in first.state_dict().items()}
    second.load_state_dict(state)
    for step in range(3, 8):
        assert torch.equal(first.rank(observation(step)), second.rank(observation(step)))
    with pytest.raises(ValueError, match="a policy's state: expected"):
        second.load_state_dict({**state, "another": torch.zeros(1)})


def test_the_offsets_of_an_episode_are_part_of_its_state() -> None:
    made = controller()
    first, other = (ControllerPolicy(made, sigma=0.4, seed=seed) for seed in (3, 4))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.rank(observation(0)), other.rank(observation(0)))


def test_an_observation_becomes_tensors_with_time_and_batch_in_front() -> None:
    seen = observe(observation())
    assert seen.accuracy.tolist() == [[pytest.approx(0.7)]]
    assert seen.compression.tolist() == [[pytest.approx(0.2)]]
    assert seen.keep_mask.dtype == torch.bool
    assert seen.keep_mask.tolist() == [[[bool(bit) for bit in KEEP]]]
    assert seen.features.shape == (1, 1, 8, 3)
    bare = {key: value for key, value in observation().items() if key != "features"}
    assert observe(bare).features.tolist() == [[[[0.0] * 3] * 8]]
