import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agents.ladder import TOLERANCE, Ladder
from env.channels import ChannelPlan
from env.measure import Measure
from env.networks import resnet18, resnet56, small, vgg16

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
    return chosen


def lands(ladder: Ladder, left: Tensor, goal: float) -> bool:
    return 0 <= float(ladder.compression(left)) - goal <= goal * TOLERANCE


def exchanges_that_land(ladder: Ladder, chosen: list[int], alive: Tensor, goal: float) -> dict[tuple[int, ...], int]:
    """Cut counts per layer within four filters of the chosen ones that land on the goal: counts -> filters changed."""
    plan = ladder.plan
    kept = plan.kept_per_layer(alive)
    cut = kept - plan.kept_per_layer(alive & ~torch.zeros_like(alive).index_fill(0, torch.tensor(chosen), True))
    found = {}
    for change in itertools.product(range(-4, 5), repeat=len(plan.layers)):
        filters, counts = sum(map(abs, change)), cut + torch.tensor(change)
        if 0 < filters <= 4 and bool(((counts >= 0) & (counts <= (kept - ladder.least).clamp(min=0))).all()):
            past = float(ladder.measure.compression(plan, kept - counts)) - goal
            if 0 <= past <= goal * TOLERANCE:
                found[tuple(counts.tolist())] = filters
    return found


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
        without = alive[row].clone()
        without[expected] = False
        if float(ladder.compression(without)) >= target:  # the prefix, or an exchange at its end
            check_target(ladder, scores[row], alive[row], cut[row], expected)
        else:
            assert cut[row].nonzero().flatten().tolist() == sorted(expected)


def check_target(ladder: Ladder, scores: Tensor, alive: Tensor, cut: Tensor, prefix: list[int]) -> None:
    """The prefix where it lands; else what lands with the fewest filters changed, the best-ranked of each layer."""
    goal, plan = float(ladder.goals[-1]), ladder.plan
    without = alive & ~torch.zeros_like(alive).index_fill(0, torch.tensor(prefix, dtype=torch.int64), True)
    if not prefix or float(ladder.compression(without)) <= goal * (1 + TOLERANCE):
        assert cut.nonzero().flatten().tolist() == sorted(prefix)
        return
    found = exchanges_that_land(ladder, prefix, alive, goal)
    if not found:  # then it comes as near as it can
        assert goal <= float(ladder.compression(alive & ~cut)) <= float(ladder.compression(without))
        return
    assert lands(ladder, alive & ~cut, goal)
    counts = plan.kept_per_layer(cut)
    assert found[tuple(counts.tolist())] == min(found.values())
    for layer, count in zip(plan.layers, counts.tolist(), strict=True):
        mine = [unit for unit in range(layer.first, layer.first + layer.units) if alive[unit]]
        ranked = sorted(mine, key=lambda unit: (-float(scores[unit]), unit))
        assert {unit for unit in mine if cut[unit]} == set(ranked[:count])


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
        assert 0 <= 1 - int(plan.cost(measure, kept)) / given - target <= target * TOLERANCE
        assert bool((kept >= 2).all())


@pytest.mark.parametrize("waypoints", [1, 10])
@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
@pytest.mark.parametrize("make", [lambda: resnet18(width=0.25), resnet56])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_rankings_that_empty_one_layer_after_the_other_land_too(
    make: Callable[[], nn.Module], measure: str, target: float, waypoints: int
) -> None:
    plan = real(make)
    given = int(plan.cost(measure, plan.widths))
    ladder = Ladder(plan, measure=Measure(measure, given), targets=(target,), waypoints=waypoints, min_width=2)
    scores = plan.layer_of + torch.rand(1, plan.units, generator=torch.Generator().manual_seed(3))
    alive = torch.ones(1, plan.units, dtype=torch.bool)
    for step in range(waypoints):
        alive = alive & ~ladder.cut(scores, alive, torch.tensor([step]))
    assert 0 <= float(ladder.compression(alive)) - target <= target * TOLERANCE


def test_a_waypoint_before_the_target_does_not_leap_over_it() -> None:
    plan = plan_of(5, 7, 3)  # of 636 parameters a filter of the first layer holds 83, one of the last 68
    ladder = ladder_of(plan, 67.95 / 636, waypoints=2, min_width=1)
    scores = torch.zeros(1, plan.units)
    scores[0, 0] = 1.0
    action = ladder.cut(scores, torch.ones(1, plan.units, dtype=torch.bool), torch.tensor([0]))
    assert action[0].nonzero().flatten().tolist() == [12]  # half of the target is asked; 83 would be past it


@functools.cache
def real(make: Callable[[], nn.Module]) -> ChannelPlan:
    return ChannelPlan(make(), torch.zeros(1, 3, 16, 16))


def test_ties_go_by_index() -> None:
    ladder = ladder_of(plan_of(5, 7, 3), 0.6, waypoints=2, min_width=1)
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
