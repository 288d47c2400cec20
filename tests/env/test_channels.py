import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import EXAMPLE, LEFT_OUT, NETWORKS, PRUNABLE, FunctionalCall

from env.channels import ChannelPlan, costs_of
from env.copies import adopt
from env.errors import UserError
from env.networks import small


def two_convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 3),
    )


MADE: dict[str, tuple[nn.Module, ChannelPlan]] = {}


def made(name: str) -> tuple[nn.Module, ChannelPlan]:
    """The network in eval mode, and its plan; made once."""
    if name not in MADE:
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
        MADE[name] = network, ChannelPlan(network, EXAMPLE)
    return MADE[name]


def random_mask(plan: ChannelPlan, seed: int) -> Tensor:
    """At least one unit of each layer, a random share of the others."""
    generator = torch.Generator().manual_seed(seed)
    keep_mask = torch.rand(plan.units, generator=generator) < torch.rand((), generator=generator)
    for layer in plan.layers:
        keep_mask[layer.first + int(torch.randint(layer.units, (), generator=generator))] = True
    return keep_mask


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def counted_macs(network: nn.Module, images: Tensor) -> int:
    """Independent of the plan: torch's own counter of floating-point operations, half of which are multiplications."""
    with FlopCounterMode(display=False) as counter:
        network(images)
    flops = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in flops.items() if "bias" not in str(operation)) // 2


def stored_bytes(network: nn.Module) -> int:
    """Independent of the plan: what safetensors would store, without its header."""
    tensors = {tensor.data_ptr(): tensor for tensor in network.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_counts_equal_those_of_the_really_compact_network(name: str, seed: int) -> None:
    network, plan = made(name)
    keep_mask = random_mask(plan, seed)
    compact = plan.compact(network, keep_mask)
    kept = plan.kept_per_layer(keep_mask)
    assert int(plan.parameters(kept)) == parameters(compact)
    assert int(plan.macs(kept)) == counted_macs(compact, EXAMPLE)
    assert int(plan.cost("bytes", kept)) == stored_bytes(compact)
    assert costs_of(compact, EXAMPLE) == plan.costs(kept)
    logits, classes = compact(EXAMPLE), network(EXAMPLE).shape[1]
    assert logits.shape == (1, classes)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_compact_in_two_steps_equals_compact_at_once(name: str, seed: int) -> None:
    network, plan = made(name)
    last = random_mask(plan, seed)
    between = last | random_mask(plan, seed + 1)
    once = plan.compact(network, last)
    twice = plan.compact(plan.compact(network, between), last, have=between)
    assert repr(once) == repr(twice)
    for (name_once, a), (name_twice, b) in zip(once.state_dict().items(), twice.state_dict().items(), strict=True):
        assert name_once == name_twice
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compact_network_can_be_trained(name: str) -> None:
    network, plan = made(name)
    compact = plan.compact(network, random_mask(plan, 5)).train()
    compact(torch.randn(2, 3, 8, 8)).sum().backward()
    assert compact.training
    assert not network.training


@pytest.mark.parametrize("name", NETWORKS)
def test_keeping_everything_changes_nothing_and_shares_nothing(name: str) -> None:
    network, plan = made(name)
    images = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(network.state_dict())
    same = plan.compact(network, torch.ones(plan.units, dtype=torch.bool))
    assert repr(same) == repr(network)
    assert torch.equal(same(images), network(images))
    for tensor in (*same.parameters(), *same.buffers()):
        tensor.data.zero_()
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_compact_leaves_the_original_untouched() -> None:
    network, plan = made("resnet18 coupled")
    before, shape = copy.deepcopy(network.state_dict()), repr(network)
    compact = plan.compact(network, random_mask(plan, 3))
    compact.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert repr(network) == shape
    assert not network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_costs_of_two_convolutions_by_hand() -> None:
    plan = ChannelPlan(two_convolutions(), torch.zeros(1, 2, 6, 6))
    assert [(layer.name, layer.first, layer.units, layer.modules) for layer in plan.layers] == [
        ("0", 0, 5, ("0", "1")),
        ("3", 5, 7, ("3",)),
    ]
    assert plan.layer_of.tolist() == [0] * 5 + [1] * 7
    assert plan.widths.tolist() == [5, 7]
    # convolution 2*k*9 + k, batch-norm 2k, convolution k*m*9, linear 3m + 3; maps 6x6, then 4x4 without padding
    kept = torch.tensor([[5, 7], [3, 2], [1, 1]])
    assert plan.parameters(kept).tolist() == [105 + 315 + 24, 63 + 54 + 9, 21 + 9 + 6]
    assert plan.macs(kept).tolist() == [
        36 * 90 + 16 * 315 + 21,
        36 * 54 + 16 * 54 + 6,
        36 * 18 + 16 * 9 + 3,
    ]


def test_compact_keeps_the_very_weights_of_the_kept() -> None:
    network = two_convolutions()
    plan = ChannelPlan(network, torch.zeros(1, 2, 6, 6))
    first, second = [0, 3, 4], [1, 6]
    keep_mask = torch.zeros(12, dtype=torch.bool)
    keep_mask[[*first, *(5 + i for i in second)]] = True
    compact = plan.compact(network, keep_mask)
    state, small_state = network.state_dict(), compact.state_dict()
    for key in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(small_state[key], state[key][first])
    assert torch.equal(small_state["3.weight"], state["3.weight"][second][:, first])
    assert torch.equal(small_state["6.weight"], state["6.weight"][:, second])
    assert torch.equal(small_state["6.bias"], state["6.bias"])


def test_kept_filters_are_counted_per_layer_over_any_leading_axes() -> None:
    plan = ChannelPlan(two_convolutions(), torch.zeros(1, 2, 6, 6))
    keep_mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    keep_mask[0, 1, [0, 4, 5]] = True
    keep_mask[1, 2, 5:] = True
    assert plan.kept_per_layer(keep_mask).tolist() == [[[0, 0], [2, 1], [0, 0]], [[0, 0], [0, 0], [0, 7]]]
    assert plan.parameters(plan.kept_per_layer(keep_mask)).shape == (2, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_classifier_is_never_pruned(name: str) -> None:
    network, plan = made(name)
    last = [path for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
    assert "it is an output" in plan.left_out[last]
    assert all(last not in layer.modules for layer in plan.layers)


@pytest.mark.parametrize("name", PRUNABLE)
def test_everything_but_the_classifier_is_pruned_in_a_sound_network(name: str) -> None:
    network, plan = made(name)
    assert len(plan.left_out) == 1
    pruned = {module for layer in plan.layers for module in layer.modules}
    assert pruned | set(plan.left_out) == {
        path for path, module in network.named_modules() if module._parameters or module._buffers
    }


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_pruned_safely_is_left_out_with_its_reason(name: str) -> None:
    _, plan = made(name)
    _, module, reason = LEFT_OUT[name]
    assert reason in plan.left_out[module]
    assert all(module not in layer.modules for layer in plan.layers)
    assert plan.units > 0  # the rest can still be pruned


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_lies_outside_the_modules_of_a_network_that_calls_them(name: str) -> None:
    _, plan = made(name)
    assert (plan.macs_outside, plan.share_outside, plan.uncounted) == (0, 0.0, "")


def test_a_module_that_is_not_called_is_left_out_and_its_work_is_told() -> None:
    network = FunctionalCall()
    plan = ChannelPlan(network, EXAMPLE)
    assert "does not call it in eval mode" in plan.left_out["second"]
    assert plan.macs_outside == 8 * 6 * 9 * 36
    assert int(plan.macs(plan.widths)) + plan.macs_outside == counted_macs(network, EXAMPLE)
    assert f"15,552 more MACs ({plan.share_outside:.0%} of all) lie outside" in plan.uncounted


def test_what_attention_does_lies_outside_too() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 1, batch_first=True)
            self.classifier = nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            places = self.first(images).flatten(2).transpose(1, 2)
            return self.classifier(self.attention(places, places, places)[0].mean(1))  # type: ignore[no-any-return]

    plan = ChannelPlan(Attending(), EXAMPLE)
    assert plan.macs_outside == 4 * 36 * 8 * 8 + 2 * 36 * 36 * 8  # projections in and out, both products of places


def test_channels_that_are_lost_from_sight_name_who_reads_and_who_is_tied() -> None:
    class Lost(nn.Module):
        """Channels gated by a convolution over their own means, and others that are halved by a GLU."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1)
            self.halved, self.classifier = nn.Conv2d(8, 6, 1), nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            maps = torch.relu(self.first(images))
            gate = self.gate(maps.mean((2, 3))[:, None])[:, 0].sigmoid()
            maps = F.glu(self.halved(maps * gate[:, :, None, None]), dim=1)
            return self.classifier(maps.mean((2, 3)))  # type: ignore[no-any-return]

    left_out = ChannelPlan(Lost(), EXAMPLE).left_out
    assert left_out["first"].startswith("its channels cannot be followed to all that read them (gate, halved): ")
    assert left_out["gate"].startswith("it is tied to first, whose channels cannot be followed to all that read them")
    assert left_out["halved"].startswith("classifier reads its channels, but which is which is not known: on the way")


def test_vgg16_has_one_layer_for_each_convolution() -> None:
    network, plan = made("vgg16")
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert [layer.name for layer in plan.layers] == convolutions
    assert plan.widths.tolist() == [4, 4, 8, 8, 15, 15, 15, 31, 31, 31, 31, 31, 31]
    assert plan.paths.tolist() == [1] * 13


def test_a_residual_sum_joins_its_blocks_and_skip_convolutions_part_them() -> None:
    _, coupled = made("resnet18 coupled")
    _, parted = made("resnet18 convolution")
    assert len(coupled.layers) == 4 + 8  # a stage each, and the inside of each block
    stem = coupled.layers[0].modules
    assert {"conv", "bn", "stages.0.0.conv2", "stages.0.1.conv2"} <= set(stem)
    # the stem and two blocks write the first sum, which those, the next stage's first block and its shortcut read
    assert coupled.paths.tolist() == [3 * 4, 1, 1, 1, 3 * 3, 1, 1, 3 * 3, 1, 1, 3 * 2, 1]
    assert len(parted.layers) == 4 + 8 + 5
    joined = next(layer.modules for layer in parted.layers if "stages.0.0.conv2" in layer.modules)
    assert set(joined) == {"stages.0.0.conv2", "stages.0.0.bn2", "stages.0.0.shortcut"}


def test_a_flattened_map_belongs_to_its_filter_place_by_place() -> None:
    _, plan = made("flattened")
    owner = dict(plan.axes("4.weight"))[1]
    assert owner.tolist() == [unit for unit in range(5) for _ in range(36)]


def test_a_concatenation_has_an_owner_for_each_place() -> None:
    _, plan = made("joined")
    owner = dict(plan.axes("joined_norm.weight"))[0]
    assert owner.tolist() == list(range(12))


def test_a_depthwise_convolution_goes_with_its_input() -> None:
    network, plan = made("depthwise")
    assert plan.layers[0].modules == ("0", "1", "3", "4")
    assert plan.paths.tolist() == [1, 1]
    compact = plan.compact(network, torch.tensor([1, 0, 1, 1, 0, *[1] * 7]).bool())
    module = compact.get_submodule("3")
    assert isinstance(module, nn.Conv2d)
    assert (module.groups, module.in_channels, module.out_channels, module.weight.shape[0]) == (3, 3, 3, 3)


def test_the_groups_of_a_convolution_lose_as_many_channels_each() -> None:
    network, plan = made("grouped")  # 8 channels read and 12 written, in two groups
    assert [(layer.name, layer.units) for layer in plan.layers] == [("0", 4), ("3", 6), ("6", 7)]
    keep_mask = torch.ones(plan.units, dtype=torch.bool)
    keep_mask[[1, 4 + 0, 4 + 5]] = False  # read channels 1 and 5; written channels 0, 5, 6, 11
    module = plan.compact(network, keep_mask).get_submodule("3")
    assert isinstance(module, nn.Conv2d)
    assert (module.groups, module.in_channels, module.out_channels) == (2, 6, 8)
    written = [1, 2, 3, 4, 7, 8, 9, 10]
    assert torch.equal(module.weight, network.get_parameter("3.weight")[written][:, [0, 2, 3]])


def test_convolutions_with_other_groups_share_the_places_common_to_both() -> None:
    _, plan = made("grouped in a row")  # 12 channels: in two groups of six for one, in three of four for the other
    assert [layer.units for layer in plan.layers] == [4, 2, 3]


def test_shared_weights_stay_shared_and_leave_the_original_alone() -> None:
    network, plan = made("tied weights")
    before = copy.deepcopy(network.state_dict())
    compact = plan.compact(network, random_mask(plan, 0))
    assert compact.get_parameter("second.weight") is compact.get_parameter("third.weight")
    assert compact.get_parameter("second.weight") is not network.get_parameter("second.weight")
    for parameter in compact.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda images: (images.mean((2, 3)), None), "a tuple"),
        (lambda images: {"logits": images.mean((2, 3))}, "a dict"),
        (lambda images: images, r"\[1, 3, 8, 8\]"),
        (lambda images: images.mean(), r"\[\]"),
    ],
)
def test_a_network_must_return_logits(network: Any, got: str) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Any:
            return network(self.convolution(images))

    with pytest.raises(UserError, match=rf"network Made in eval mode: expected logits \[1, classes\] .* got {got}"):
        ChannelPlan(Made(), EXAMPLE)


def test_a_mistake_that_is_small_beside_the_logits_is_found() -> None:
    class Hidden(nn.Module):
        """Channels rolled by one, and a large bias that hides what that does."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.after, self.classifier = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
            nn.init.constant_(self.classifier.bias, 1e4)

        def forward(self, images: Tensor) -> Tensor:
            maps = torch.relu(self.before(images)).roll(1, dims=1)
            return self.classifier(torch.relu(self.after(maps)).mean((2, 3)))  # type: ignore[no-any-return]

    assert "not the same as silencing" in ChannelPlan(Hidden(), EXAMPLE).left_out["before"]


def test_a_network_that_answers_otherwise_each_time_is_told() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(F.dropout(self.before(images).mean((2, 3))))  # type: ignore[no-any-return]

    with pytest.raises(
        UserError, match=r"network Dropping in eval mode: .* others each time; .*training=self\.training"
    ):
        ChannelPlan(Dropping(), EXAMPLE)


class Unsure(nn.Module):
    """A network whose forward fails."""

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("no images of this size")


def test_a_network_that_cannot_run_is_told_with_what_it_said() -> None:
    with pytest.raises(UserError, match=r"network Unsure: expected a forward .* got ValueError: no images"):
        ChannelPlan(Unsure(), EXAMPLE)


@pytest.mark.parametrize("norm", [nn.GroupNorm(3, 6), nn.GroupNorm(3, 6, affine=False), nn.PReLU(6)])
def test_unknown_norms_keep_their_convolution_whole(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(80, 2))
    plan = ChannelPlan(network, EXAMPLE)
    assert type(norm).__name__ in plan.left_out["0"]
    assert plan.widths.tolist() == [5]


def test_a_network_with_nothing_to_prune_still_has_costs() -> None:
    plan = ChannelPlan(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), EXAMPLE)
    kept = plan.kept_per_layer(torch.ones(0, dtype=torch.bool))
    assert (plan.units, int(plan.parameters(kept)), int(plan.macs(kept))) == (0, 772, 768)


def test_the_plan_changes_nothing_in_its_network() -> None:
    network = small().train()
    before = copy.deepcopy(network.state_dict())
    ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_frozen_weights_are_planned_too_and_stay_frozen(context: Any) -> None:
    network = two_convolutions()
    network.get_submodule("0").requires_grad_(False)
    with context():
        plan = ChannelPlan(network, torch.zeros(1, 2, 6, 6))
    assert plan.widths.tolist() == [5, 7]
    compact = plan.compact(network, torch.tensor([1, 0, 1, 1, 1, *[1] * 7]).bool())
    assert [name for name, p in compact.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_adopts_the_tensors_of_a_compact_one(name: str) -> None:
    network, plan = made(name)
    compact = plan.compact(network, random_mask(plan, 11))
    rebuilt = adopt(NETWORKS[name]().eval(), dict(compact.state_dict()))
    images = torch.randn(2, 3, 8, 8)
    assert repr(rebuilt) == repr(compact)
    assert torch.equal(rebuilt(images), compact(images))
    assert all(isinstance(parameter, nn.Parameter) for parameter in rebuilt.parameters())
