import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from agents.controller import Controller, ControllerConfig, Observations, ShapeJudgement, set_value
from agents.network import DuelingJudgement, RecurrentState
from agents.policies import heuristic
from env.channels import ChannelPlan
from env.errors import UserError
from env.importance import FEATURES
from env.measure import log_freed

PLAN = ChannelPlan(
    nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.Conv2d(7, 3, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    ),
    torch.zeros(1, 2, 4, 4),
)
KINDS = ["features", "mask"]


def controller(kind: str, seed: int = 0, *, measure: str = "parameters") -> Controller:
    torch.manual_seed(seed)
    return Controller(ControllerConfig(observation=kind, hidden_size=11, layer_size=6), PLAN, measure)


def observations(steps: int = 5, batch: int = 3, seed: int = 0, *, dead: float = 0.3) -> Observations:
    generator = torch.Generator().manual_seed(seed)
    keep_mask = torch.rand(steps, batch, PLAN.units, generator=generator) >= dead
    keep_mask[..., [0, 6, 13]] = True
    return Observations(
        accuracy=torch.rand(steps, batch, generator=generator),
        compression=torch.rand(steps, batch, generator=generator),
        keep_mask=keep_mask,
        features=torch.randn(steps, batch, PLAN.units, len(FEATURES), generator=generator) * 4 * keep_mask[..., None],
    )


def trained(kind: str) -> Controller:
    """After one step of Q towards another value, so that no head is zero any more."""
    made = controller(kind)
    step(made)
    return made


def step(made: Controller) -> None:
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    q(made, observations()).sub(2.0).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def q(made: Controller, seen: Observations) -> Tensor:
    judgement, _ = made(seen, made.initial_state(seen.accuracy.shape[1]))
    generator = torch.Generator().manual_seed(9)
    action = (torch.rand(seen.keep_mask.shape, generator=generator) < 0.4) & seen.keep_mask
    return made.q_of(judgement, action, seen)


def test_the_value_of_a_set_by_hand() -> None:
    judgement = DuelingJudgement(
        value=torch.tensor([[1.0, -2.0, 0.5]]),
        advantage=torch.tensor([[[4.0, 0.0, 2.0, 100.0], [1.0, 3.0, 5.0, 7.0], [1.0, 2.0, 3.0, 4.0]]]),
    )
    alive = torch.tensor([[[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]]).bool()
    action = torch.tensor([[[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]]).bool()
    # (4 + 2) / 2 - (4 + 0 + 2) / 3 = 1;  3 - 16 / 4 = -1;  an empty set is worth V
    value = set_value(judgement, action, alive, scale=0.5)
    torch.testing.assert_close(value, torch.tensor([[1.5, -2.5, 0.5]]))


def test_the_value_of_all_that_live_is_the_state_s() -> None:
    judgement, alive = (
        DuelingJudgement(value=torch.randn(5, 3), advantage=torch.randn(5, 3, 7)),
        torch.rand(5, 3, 7) < 0.6,
    )
    torch.testing.assert_close(set_value(judgement, alive, alive, scale=2.0), judgement.value)


def test_the_value_of_a_set_ignores_what_all_advantages_share() -> None:
    judgement = DuelingJudgement(value=torch.randn(5, 3), advantage=torch.randn(5, 3, 7))
    raised = DuelingJudgement(value=judgement.value, advantage=judgement.advantage + 3.0)
    alive = torch.rand(5, 3, 7) < 0.9
    action = alive & (torch.rand(5, 3, 7) < 0.5)
    torch.testing.assert_close(
        set_value(judgement, action, alive, scale=1.0), set_value(raised, action, alive, scale=1.0)
    )


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_on_its_first_day_the_features_controller_ranks_as_balanced_does(measure: str) -> None:
    seen = observations()
    made = controller("features", measure=measure)
    judgement, _ = made(seen, (torch.randn(3, 11), torch.randn(3, 11)))
    advantages = made.advantages(judgement, seen)
    assert advantages.shape == (5, 3, 15)
    policy = heuristic("balanced", PLAN, seed=0, measure=measure)
    for time in range(5):
        for row in range(3):
            alive, features = seen.keep_mask[time, row], seen.features[time, row].numpy()
            expected = policy.rank({"keep_mask": alive.numpy(), "features": features})[alive]
            found = advantages[time, row][alive]
            torch.testing.assert_close(found - found.mean(), expected - expected.mean())


def shaped(*, log_harm: list[float], worth: list[float]) -> ShapeJudgement:
    """One state of PLAN's three layers of 5, 7 and 3 filters."""
    return ShapeJudgement(
        value=torch.tensor([[2.0]]),
        log_harm=torch.tensor([[log_harm]]),
        worth=torch.tensor([[worth]]),
        scores=torch.zeros(1, 1, 15, len(FEATURES)),
        freed=log_freed("parameters", PLAN, PLAN.widths)[None, None],
    )


def test_the_value_of_a_set_is_that_of_the_shape_it_leaves_by_hand() -> None:
    made, seen = controller("features"), observations(1, 1, dead=0.0)
    made.usual.removed, made.usual.widths = torch.tensor([0.0]), torch.tensor([[5.0, 4.0, 2.0]])  # whatever is removed
    usual = 1 / 5 + 2 / 4 + 3 / 2
    seen.keep_mask[..., 5:7] = False
    judgement = shaped(log_harm=[0.0, math.log(2.0), math.log(3.0)], worth=[float(i) for i in range(15)])
    action = torch.zeros(1, 1, 15, dtype=torch.bool)
    # left: 5, 5, 3 of the three layers
    nothing = 2.0 + usual - (1 / 5 + 2 / 5 + 3 / 3)
    assert float(made.q_of(judgement, action, seen)) == pytest.approx(nothing)
    action[..., [1, 4, 8]] = True  # left: 3, 4, 3; their worth is 13 / 3 in the mean
    expected = 2.0 + usual - (1 / 3 + 2 / 4 + 3 / 3) - 0.02 * 13 / 3
    assert float(made.q_of(judgement, action, seen)) == pytest.approx(expected)
    alone = made.q_all(judgement, seen)[0, 0]
    assert float(alone[5]) == pytest.approx(nothing)  # gone already
    assert float(alone[8]) == pytest.approx(2.0 + usual - (1 / 5 + 2 / 4 + 3 / 3) - 0.02 * 8)
    action[:] = False
    action[..., 12:] = True  # a layer left empty is taken to have half a filter
    expected = 2.0 + usual - (1 / 5 + 2 / 5 + 3 / 0.5) - 0.02 * 13
    assert float(made.q_of(judgement, action, seen)) == pytest.approx(expected)


def test_a_layer_with_two_ways_through_it_does_its_harm_twice() -> None:
    made, seen = controller("features"), observations(1, 1, dead=0.0)
    made.usual.removed, made.usual.widths = torch.tensor([0.0]), torch.tensor([[5.0, 4.0, 2.0]])
    made.paths = torch.tensor([1, 2, 1])
    judgement = shaped(log_harm=[0.0, math.log(2.0), math.log(3.0)], worth=[0.0] * 15)
    action = torch.zeros(1, 1, 15, dtype=torch.bool)
    action[..., [1, 4, 8]] = True  # left: 3, 6, 3
    expected = 2.0 - (1 / 3 - 1 / 5) - 2 * 2 * (1 / 6 - 1 / 4) - 3 * (1 / 3 - 1 / 2)
    assert float(made.q_of(judgement, action, seen)) == pytest.approx(expected)


def test_what_harms_more_goes_later_and_what_a_filter_is_worth_decides_within_its_layer() -> None:
    made, seen = controller("features"), observations(1, 1, dead=0.0)
    before, _ = made(seen, made.initial_state())
    ranked = made.advantages(before, seen)[0, 0]
    with torch.no_grad():
        made.filter_weights.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    after, _ = made(seen, made.initial_state())
    assert isinstance(before, ShapeJudgement)
    assert isinstance(after, ShapeJudgement)
    after = dataclasses.replace(after, log_harm=before.log_harm + torch.tensor([0.0, 2.0, 0.0]))
    middle = slice(5, 12)
    ranked_after = made.advantages(after, seen)[0, 0]
    assert float((ranked_after - ranked)[middle].mean()) == pytest.approx(-2.0, abs=1e-5)
    # gamma decides now instead of Taylor
    order = ranked_after[middle].argsort(descending=True)
    assert torch.equal(order, seen.features[0, 0, middle, 1].argsort())


def test_the_usual_shape_is_worth_the_state_s_value_whatever_is_removed() -> None:
    made, seen = trained("features"), observations(1, 1, dead=0.0)
    judgement, _ = made(seen, made.initial_state())
    judgement = dataclasses.replace(judgement, worth=torch.zeros(1, 1, 15))
    for shape in made.usual.widths.long().tolist():
        action = torch.cat([torch.arange(width) >= left for width, left in zip((5, 7, 3), shape, strict=True)])
        torch.testing.assert_close(made.q_of(judgement, action[None, None], seen), judgement.value)


def test_removing_one_filter_is_judged_alike_alone_and_as_a_set() -> None:
    made, seen = trained("features"), observations(2, 2)
    judgement, _ = made(seen, made.initial_state(2))
    alone = made.q_all(judgement, seen)
    for unit in range(15):
        action = (torch.arange(15) == unit) & seen.keep_mask
        torch.testing.assert_close(alone[..., unit], made.q_of(judgement, action, seen))


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_starts_at_zero_and_the_features_controller_ranks_alike_whatever_the_seed(kind: str) -> None:
    made, other = controller(kind, seed=1), controller(kind, seed=2)
    seen = observations()
    judgement, _ = made(seen, made.initial_state(3))
    judgement_other, _ = other(seen, other.initial_state(3))
    assert bool((judgement.value == 0).all())
    ranked, ranked_other = made.advantages(judgement, seen), other.advantages(judgement_other, seen)
    assert torch.equal(ranked, ranked_other) == (kind == "features")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter_after_one_step(kind: str) -> None:
    made = trained(kind)
    q(made, observations(seed=3)).square().mean().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-9, name


@pytest.mark.parametrize("kind", KINDS)
def test_steps_one_by_one_equal_all_at_once(kind: str) -> None:
    made, seen = trained(kind), observations(7, 3, seed=4)
    state: RecurrentState = (torch.randn(3, 11), torch.randn(3, 11))
    together, last = made(seen, state)
    ranked = made.advantages(together, seen)
    for time in range(7):
        one, state = made(seen[time : time + 1], state)
        torch.testing.assert_close(one.value[0], together.value[time])
        torch.testing.assert_close(made.advantages(one, seen[time : time + 1])[0], ranked[time])
    torch.testing.assert_close(state, last)
    assert state[0].shape == (3, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_remembered_without_being_judged_is_the_same(kind: str) -> None:
    made, seen = trained(kind), observations()
    _, after = made(seen, made.initial_state(3))
    for mine, other in zip(made.remember(seen, made.initial_state(3)), after, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_matters(kind: str) -> None:
    made, seen = trained(kind), observations(5, 3, seed=4)
    together, _ = made(seen, made.initial_state(3))
    forgotten, _ = made(seen[4:5], made.initial_state(3))
    assert not torch.allclose(together.value[4], forgotten.value[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_touch_each_other(kind: str) -> None:
    made, seen = trained(kind), observations(5, 3, seed=4)
    together, _ = made(seen, made.initial_state(3))
    parts = Observations(
        accuracy=seen.accuracy[:, 1:2],
        compression=seen.compression[:, 1:2],
        keep_mask=seen.keep_mask[:, 1:2],
        features=seen.features[:, 1:2],
    )
    alone, _ = made(parts, made.initial_state(1))
    torch.testing.assert_close(alone.value[:, 0], together.value[:, 1])
    torch.testing.assert_close(made.advantages(alone, parts)[:, 0], made.advantages(together, seen)[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_dead_filters_does_not_matter(kind: str) -> None:
    made, seen = trained(kind), observations(seed=5)
    other = copy.copy(seen.features)
    other[~seen.keep_mask] = 77.0
    changed = Observations(
        accuracy=seen.accuracy, compression=seen.compression, keep_mask=seen.keep_mask, features=other
    )
    judgement, state = made(seen, made.initial_state(3))
    judgement_changed, state_changed = made(changed, made.initial_state(3))
    torch.testing.assert_close(judgement_changed.value, judgement.value)
    ranked, ranked_changed = made.advantages(judgement, seen), made.advantages(judgement_changed, changed)
    torch.testing.assert_close(ranked_changed[seen.keep_mask], ranked[seen.keep_mask])
    torch.testing.assert_close(state_changed, state)
    torch.testing.assert_close(q(made, changed), q(made, seen))


@pytest.mark.parametrize(("kind", "reads"), [("mask", True), ("features", False)])
def test_the_mask_controller_sees_which_filter_and_the_features_one_how_many(kind: str, reads: bool) -> None:
    made, seen = trained(kind), observations(1, 1, dead=0.0)
    seen.features.zero_()
    masks = seen.keep_mask.clone(), seen.keep_mask.clone()
    masks[0][..., 1] = False
    masks[1][..., 2] = False  # the same layer
    values = [
        made(
            Observations(accuracy=seen.accuracy, compression=seen.compression, keep_mask=mask, features=seen.features),
            made.initial_state(),
        )[0].value
        for mask in masks
    ]
    assert torch.equal(values[0], values[1]) != reads


def test_a_taste_changes_the_order_within_layers_as_a_learned_weight_would() -> None:
    made, seen = controller("features"), observations(2, 2, dead=0.3)
    judgement, _ = made(seen, made.initial_state(2))
    ranked = made.advantages(judgement, seen)
    assert torch.equal(made.advantages(judgement, seen, torch.zeros(3)), ranked)
    taste = torch.tensor([-0.5, 0.0, 2.0])
    with torch.no_grad():
        made.filter_weights.bias.add_(taste)
    learned, _ = made(seen, made.initial_state(2))
    found = made.advantages(judgement, seen, taste)
    torch.testing.assert_close(found[seen.keep_mask], made.advantages(learned, seen)[seen.keep_mask])
    assert not torch.equal(found, ranked)


def test_scores_are_in_standard_deviations_of_their_layer_by_hand() -> None:
    made, seen = controller("features"), observations(1, 1, dead=0.0)
    seen.features[..., 12:, 2] = torch.tensor([1.0, 2.0, 3.0])  # mean 2, deviation sqrt(2 / 3)
    seen.features[..., :5, 2] = 0.7  # all alike
    with torch.no_grad():
        made.filter_weights.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    judgement, _ = made(seen, made.initial_state())
    assert isinstance(judgement, ShapeJudgement)
    assert judgement.worth[0, 0, 12:].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], abs=1e-5)
    assert judgement.worth[0, 0, :5].tolist() == pytest.approx([0.0] * 5, abs=1e-2)


def test_the_features_controller_ignores_the_order_of_filters_within_a_layer() -> None:
    made, seen = trained("features"), observations(3, 2, seed=6)
    order = torch.tensor([4, 2, 0, 1, 3, *range(5, 15)])
    shuffled = Observations(
        accuracy=seen.accuracy,
        compression=seen.compression,
        keep_mask=seen.keep_mask[..., order],
        features=seen.features[..., order, :],
    )
    judgement, _ = made(seen, made.initial_state(2))
    judgement_shuffled, _ = made(shuffled, made.initial_state(2))
    torch.testing.assert_close(
        made.advantages(judgement_shuffled, shuffled), made.advantages(judgement, seen)[..., order]
    )
    torch.testing.assert_close(judgement_shuffled.value, judgement.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_at_its_narrowest_is_judged_finitely(kind: str) -> None:
    made = trained(kind)
    keep_mask = torch.zeros(1, 1, 15, dtype=torch.bool)
    keep_mask[..., [0, 5, 12]] = True
    features = torch.full((1, 1, 15, len(FEATURES)), -23.0) * keep_mask[..., None]
    seen = Observations(
        accuracy=torch.zeros(1, 1), compression=torch.ones(1, 1), keep_mask=keep_mask, features=features
    )
    judgement, state = made(seen, made.initial_state())
    assert bool(made.advantages(judgement, seen).isfinite().all())
    assert bool(torch.cat(state).isfinite().all())
    assert bool(q(made, seen).isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_alone_are_saved(kind: str) -> None:
    made, other = trained(kind), controller(kind, seed=8)
    assert set(made.state_dict()) == {name for name, _ in made.named_parameters()}
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(q(other, observations()), q(made, observations()))


@pytest.mark.parametrize(("key", "value"), [("observation", "pixels"), ("hidden_size", 0), ("layer_size", -1)])
def test_a_bad_value_is_a_user_error_that_names_its_key(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^controller\.{key}: expected"):
        ControllerConfig(**{key: value})  # type: ignore[arg-type]


def test_on_another_network_it_is_the_same_controller() -> None:
    made = trained("features")
    longer = ChannelPlan(
        nn.Sequential(
            *(nn.Conv2d(2 if i == 0 else 4, 4, 3, padding=1) for i in range(6)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        torch.zeros(1, 2, 8, 8),
    )
    other = made.on(longer, "macs")
    assert (other.plan, other.measure) == (longer, "macs")
    mine, its = dict(made.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == its.keys()
    assert all(its[name] is parameter for name, parameter in mine.items())
    keep_mask = torch.ones(1, 1, longer.units, dtype=torch.bool)
    features = torch.randn(1, 1, longer.units, len(FEATURES))
    seen = Observations(
        accuracy=torch.ones(1, 1), compression=torch.zeros(1, 1), keep_mask=keep_mask, features=features
    )
    judgement, _ = other(seen, other.initial_state())
    assert judgement.log_harm.shape == (1, 1, 6)
    alone = Controller(made.config, longer, "macs")
    assert alone.adopt(made.state_dict()) == []
    torch.testing.assert_close(alone(seen, alone.initial_state())[0].log_harm, judgement.log_harm)
    with pytest.raises(ValueError, match="one network"):
        trained("mask").on(longer)


def test_values_of_layers_are_carried_over_to_depths_linearly() -> None:
    made = controller("features")
    depths = made.by_depth.shape[1]
    torch.testing.assert_close(torch.tensor([0.0, 1.0, 2.0]) @ made.by_depth, torch.linspace(0.0, 2.0, depths))


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_a_layer_is_judged_by_the_positions_at_which_its_parameters_are_used_by_hand(measure: str) -> None:
    made, seen = controller("features", measure=measure), observations(1, 1, dead=0.0)
    with torch.no_grad():
        made.layer_output.weight[0, 6 + 4] = 5.0  # after the 6 hidden units, beside the scale of logarithms
    judgement, _ = made(seen, made.initial_state())
    assert isinstance(judgement, ShapeJudgement)
    # a filter's own weights and those that read it work at all 16 positions, but for the linear layer's; biases and
    # batch-norm are parameters without MACs
    positions = [16 * (18 + 63) / (18 + 3 + 63), 16 * (45 + 27) / (45 + 3 + 27), (16 * 63 + 4) / (63 + 1 + 4)]
    torch.testing.assert_close(judgement.log_harm[0, 0].exp(), 0.5 * torch.tensor(positions))
