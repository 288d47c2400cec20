import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agents.ladder import TOLERANCE, Ladder
from env.channels import ChannelPlan
from env.measure import Measure
from env.networks import resnet18, small, vgg16

torch.set_num_threads(1)
MADE: dict[tuple[int, ...], ChannelPlan] = {}


def plan_of(*widths: int) -> ChannelPlan:
    """A chain of convolutions of these widths."""
    if widths not in MADE:
        modules: list[nn.Module] = []
        for before, after in zip((2, *widths), widths, strict=False):
            modules += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        network = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))
        MADE[widths] = ChannelPlan(network, torch.zeros(1, 2, 4, 4))
    return MADE[widths]


def ladder_of(
    plan: ChannelPlan, *targets: float, waypoints: int = 5, min_width: int = 2, given: int | None = None
) -> Ladder:
    full = int(plan.parameters(plan.widths))
    measure = Measure("parameters", given or full)
    return Ladder(plan, measure=measure, targets=targets, waypoints=waypoints, min_width=min_width)


def greedy(ladder: Ladder, scores: Tensor, alive: Tensor, step: int) -> list[int]:
    """The filters to zero, one by one, as the docstring says it."""
    plan, goal = ladder.plan, float(ladder.goals[min(step, len(ladder) - 1)])
    left, chosen = alive.clone(), []
    for unit in sorted(range(plan.units), key=lambda unit: (-float(scores[unit]), unit)):
        if float(ladder.compression(left)) >= goal:
            break
        layer = int(plan.layer_of[unit])
        if not alive[unit] or int(plan.kept_per_layer(left)[layer]) <= int(ladder.least[layer]):
            continue
        left[unit] = False
        chosen.append(unit)
    if not chosen or float(ladder.compression(left)) <= goal + TOLERANCE:
        return chosen
    return stand_ins(ladder, scores, alive, chosen[:-1], goal) or chosen


def stand_ins(ladder: Ladder, scores: Tensor, alive: Tensor, chosen: list[int], goal: float) -> list[int] | None:
    """The action that lands within the tolerance after at most eight smaller filters, or None."""
    plan = ladder.plan
    for _ in range(8):
        left = alive.clone()
        left[chosen] = False
        nearest: tuple[float, int] | None = None
        for unit in sorted(left.nonzero().flatten().tolist(), key=lambda unit: (-float(scores[unit]), unit)):
            layer = int(plan.layer_of[unit])
            if int(plan.kept_per_layer(left)[layer]) <= int(ladder.least[layer]):
                continue
            without = left.clone()
            without[unit] = False
            past = float(ladder.compression(without)) - goal
            if 0 <= past <= TOLERANCE:
                return [*chosen, unit]
            if past < 0 and (nearest is None or past > nearest[0]):
                nearest = past, unit
        if nearest is None:
            return None
        chosen = [*chosen, nearest[1]]
    return None


@settings(max_examples=40, deadline=None)
@given(
    widths=st.sampled_from([(5, 7, 3), (7,), (3, 11), (2, 9, 1, 6)]),
    seed=st.integers(0, 2**31),
    min_width=st.integers(1, 4),
    target=st.floats(0.1, 0.6),
    ties=st.booleans(),
)
def test_a_cut_is_the_greedy_prefix_for_each_state_of_a_batch(
    widths: tuple[int, ...], seed: int, min_width: int, target: float, ties: bool
) -> None:
    plan, generator = plan_of(*widths), torch.Generator().manual_seed(seed)
    ladder = ladder_of(plan, target, waypoints=4, min_width=min_width)
    scores = torch.randn(5, plan.units, generator=generator)
    if ties:
        scores = scores.round()
    alive = torch.rand(5, plan.units, generator=generator) < 0.8
    step = torch.tensor([0, 1, 2, 3, 9])
    cut = ladder.cut(scores, alive, step)
    assert cut.dtype == torch.bool
    for row in range(5):
        expected = greedy(ladder, scores[row], alive[row], int(step[row]))
        assert cut[row].nonzero().flatten().tolist() == sorted(expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), min_width=st.integers(1, 3))
def test_an_episode_climbs_every_waypoint_and_keeps_every_layer(seed: int, min_width: int) -> None:
    plan, generator = plan_of(5, 7, 9), torch.Generator().manual_seed(seed)
    ladder = ladder_of(plan, 0.3, 0.5, waypoints=4, min_width=min_width)
    alive = torch.ones(1, plan.units, dtype=torch.bool)
    for step in range(len(ladder)):
        action = ladder.cut(torch.randn(1, plan.units, generator=generator), alive, torch.tensor([step]))
        assert not (action & ~alive).any()
        alive = alive & ~action
        assert float(ladder.compression(alive)) >= float(ladder.goals[step])
    assert float(ladder.goals[-1]) == 0.5
    assert bool((plan.kept_per_layer(alive[0]) >= min_width).all())


def test_an_unreachable_waypoint_takes_all_that_min_width_lets_go() -> None:
    plan = plan_of(5, 7, 3)
    ladder = ladder_of(plan, 0.9999, min_width=2)
    scores = torch.arange(15.0)[None]
    action = ladder.cut(scores, torch.ones(1, 15, dtype=torch.bool), torch.tensor([4]))
    assert (~action[0]).nonzero().flatten().tolist() == [0, 1, 5, 6, 12, 13]  # the two lowest scores of each layer


def test_nothing_is_cut_where_the_waypoint_is_already_reached() -> None:
    ladder = ladder_of(plan_of(5, 7, 3), 0.5)
    alive = torch.zeros(1, 15, dtype=torch.bool)
    alive[0, [0, 1, 5, 6, 12, 13]] = True
    assert not ladder.cut(torch.randn(1, 15), alive, torch.tensor([4])).any()


def test_dead_filters_are_never_chosen_even_with_the_highest_scores() -> None:
    plan = plan_of(5, 7, 3)
    ladder = ladder_of(plan, 0.4)
    alive = torch.ones(1, 15, dtype=torch.bool)
    alive[0, [2, 8]] = False
    scores = torch.zeros(1, 15)
    scores[0, [2, 8]] = torch.tensor([torch.inf, 1e9])
    action = ladder.cut(scores, alive, torch.tensor([4]))
    assert action.any()
    assert not action[0, [2, 8]].any()


@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("make", [lambda: vgg16(width=0.25), lambda: resnet18(width=0.25), lambda: small(channels=3)])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.75, 0.9, 0.95])
def test_real_networks_land_within_the_tolerance(make: Callable[[], nn.Module], measure: str, target: float) -> None:
    plan = real(make)
    given = int(plan.cost(measure, plan.widths))
    ladder = Ladder(plan, measure=Measure(measure, given), targets=(target,), waypoints=1, min_width=2)
    scores = torch.randn(4, plan.units, generator=torch.Generator().manual_seed(1))
    cut = ladder.cut(scores, torch.ones(4, plan.units, dtype=torch.bool), torch.zeros(4, dtype=torch.int64))
    for row in cut:
        kept = plan.kept_per_layer(~row)
        assert 0 <= 1 - int(plan.cost(measure, kept)) / given - target <= TOLERANCE
        assert bool((kept >= 2).all())


@functools.cache
def real(make: Callable[[], nn.Module]) -> ChannelPlan:
    return ChannelPlan(make(), torch.zeros(1, 3, 16, 16))


def test_ties_go_by_index() -> None:
    ladder = ladder_of(plan_of(5, 7, 3), 0.3, waypoints=1, min_width=1)
    action = ladder.cut(torch.zeros(1, 15), torch.ones(1, 15, dtype=torch.bool), torch.tensor([0]))
    chosen = action[0].nonzero().flatten().tolist()
    assert chosen == list(range(len(chosen)))
    assert chosen


def test_compression_by_hand() -> None:
    # 18a + 2a + 9ab + 2b + 9bc + 2c + 3c + 3 parameters for widths a, b, c
    plan = plan_of(5, 7, 3)
    full = 90 + 10 + 315 + 14 + 189 + 6 + 9 + 3
    keep_mask = torch.ones(2, 15, dtype=torch.bool)
    keep_mask[1, [0, 4, 5, 14]] = False  # leaves 3, 6, 2
    left = 54 + 6 + 162 + 12 + 108 + 4 + 6 + 3
    ladder = ladder_of(plan, 0.5)
    assert ladder.measure.given == full
    assert ladder.compression(keep_mask).tolist() == [0.0, pytest.approx(1 - left / full)]
    assert float(ladder_of(plan, 0.5, given=500).compression(keep_mask)[0]) == pytest.approx(1 - full / 500)


@pytest.mark.parametrize(
    ("targets", "waypoints", "goals"),
    [
        ((0.9,), 3, [0.3, 0.6, 0.9]),
        ((0.9,), 1, [0.9]),
        ((0.5, 0.9), 3, [0.3, 0.5, 0.9]),  # 0.6 is the nearest
        ((0.45, 0.9), 2, [0.45, 0.9]),  # a share already
        ((0.85, 0.9), 3, [0.3, 0.85, 0.9]),  # the last waypoint is the last target's
        ((0.8, 0.82, 0.9), 3, [0.8, 0.82, 0.9]),  # one share each
        ((0.1, 0.2, 0.8), 4, [0.1, 0.2, 0.6, 0.8]),
    ],
)
def test_goals_are_equal_shares_with_the_nearest_moved_onto_each_target(
    targets: tuple[float, ...], waypoints: int, goals: list[float]
) -> None:
    ladder = ladder_of(plan_of(5, 7, 3), *targets, waypoints=waypoints)
    assert ladder.goals.tolist() == pytest.approx(goals)
    assert len(ladder) == waypoints


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6, unique=True), st.integers(0, 20))
def test_goals_rise_hold_every_target_exactly_and_are_as_many_as_waypoints(targets: list[float], more: int) -> None:
    ladder = ladder_of(plan_of(5, 7, 3), *sorted(targets), waypoints=len(targets) + more)
    goals = ladder.goals.tolist()
    assert goals == sorted(goals)
    assert len(goals) == len(targets) + more
    assert set(targets) <= set(goals)
    assert goals[-1] == max(targets)


def test_more_targets_than_waypoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 to waypoints=2, got 3"):
        ladder_of(plan_of(5, 7, 3), 0.1, 0.2, 0.3, waypoints=2)
