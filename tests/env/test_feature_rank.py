"""HRank's importance: ranks of maps worked out by hand, and which maps are looked at."""

import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLE, PRUNABLE

from env.channels import ChannelPlan
from env.feature_rank import feature_rank
from env.importance import rank
from env.networks import resnet18, vgg16


def everything(plan: ChannelPlan) -> Tensor:
    return torch.ones(plan.units, dtype=torch.bool)


class Copies(nn.Module):
    """Filters that pass on, negate, or flatten the image; read by a linear layer after pooling."""

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.relu, self.functional = nn.ReLU(), functional
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1.0]).view(4, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, 0.0, 0.5, -1.5]))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        maps = maps.relu() if self.functional else self.relu(maps)
        return self.classifier(self.pool(maps).flatten(1))


IMAGES = torch.stack(
    [torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [0.0, 0.0, 0.0]])]
)
#: Passed on: 3 and 1. Negated, then cut off at 0: nothing. A constant 0.5: 1. Lowered by 1.5: diag(0.5, 1.5), and
#: [[0, 0.5, 1.5], [0.5, 2.5, 4.5]], of rank 2.
RANKS = torch.tensor([2.0, 0.0, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("functional", [False, True])
def test_ranks_of_maps_after_the_activation(functional: bool) -> None:
    network = Copies(functional=functional)
    plan = ChannelPlan(network, torch.zeros(1, 1, 3, 3))
    batches = [(IMAGES[None, :1], torch.zeros(1)), (IMAGES[None, 1:], torch.zeros(1))]
    ranks, maps = feature_rank(network, plan, everything(plan), batches)
    torch.testing.assert_close(ranks, RANKS)
    assert maps.tolist() == [2.0] * 4


def test_equal_ranks_are_told_apart_by_the_weights_and_others_never() -> None:
    network = Copies()
    plan = ChannelPlan(network, torch.zeros(1, 1, 3, 3))
    batches = [(IMAGES[:, None], torch.zeros(2))]
    scores = rank(network, plan, everything(plan), batches)
    assert scores.argsort(descending=True, stable=True).tolist() == [0, 3, 2, 1]
    with torch.no_grad():
        network.conv.weight[3] *= 1.5
        network.conv.bias[3] *= 1.5
    assert rank(network, plan, everything(plan), batches).argmax() == 3
    torch.testing.assert_close(scores.double(), RANKS, atol=0.25, rtol=0)  # half of what two mean ranks can differ by


def test_what_is_gone_has_no_rank_and_the_rest_is_as_before() -> None:
    network = Copies()
    plan = ChannelPlan(network, torch.zeros(1, 1, 3, 3))
    kept = torch.tensor([True, False, True, True])
    ranks, _ = feature_rank(plan.compact(network, kept), plan, kept, [(IMAGES[:, None], torch.zeros(2))])
    torch.testing.assert_close(ranks, torch.where(kept, RANKS, 0.0))


def test_every_filter_of_a_residual_network_is_seen_where_the_next_convolution_reads_it() -> None:
    torch.manual_seed(0)
    network = resnet18(width=0.1).eval()
    plan = ChannelPlan(network, torch.zeros(1, 3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    ranks, maps = feature_rank(network, plan, everything(plan), [(images, torch.zeros(2))])
    assert bool((ranks >= 0).all())
    assert bool((ranks <= 32).all())
    assert float(ranks.mean()) > 1
    assert set(maps[: plan.layers[0].units].tolist()) == {6.0}, "the stem's map and two sums, of two images"
    with torch.inference_mode():
        stem = network.relu(network.bn(network.conv(images)))
        first = network.stages[0][0](stem)
        maps = torch.stack([stem, first, network.stages[0][1](first)])
    expected = torch.linalg.matrix_rank(maps).double().mean((0, 1))
    torch.testing.assert_close(ranks[: plan.layers[0].units], expected)


def test_the_network_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    network = vgg16(width=0.1).train()
    before = copy.deepcopy(network.state_dict())
    plan = ChannelPlan(network, torch.zeros(1, 3, 32, 32))
    feature_rank(network, plan, everything(plan), [(torch.randn(2, 3, 32, 32), torch.zeros(2))])
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


class OneActivation(nn.Module):
    """Two convolutions of different widths, and a block that adds in place, with a single ReLU for all of them."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.third, self.third_norm = nn.Conv2d(9, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.relu, self.classifier = nn.ReLU(inplace=inplace), nn.Linear(9, 2)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps that are read, each a copy of its own."""
        first = self.relu(self.norm(self.first(images)))
        second = self.relu(self.second_norm(self.second(first)))
        third = self.third_norm(self.third(second))
        third += second
        return first.clone(), second.clone(), self.relu(third).clone()

    def forward(self, images: Tensor) -> Tensor:
        first = self.relu(self.norm(self.first(images)))
        second = self.relu(self.second_norm(self.second(first)))
        third = self.third_norm(self.third(second))
        third += second
        return self.classifier(self.relu(third).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_that_is_called_in_many_places_is_told_apart_call_by_call(inplace: bool) -> None:
    torch.manual_seed(0)
    network = OneActivation(inplace=inplace).eval()
    for norm in (network.norm, network.second_norm, network.third_norm):
        nn.init.normal_(norm.bias)
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    images = torch.randn(4, 1, 8, 8)
    ranks, maps = feature_rank(network, plan, everything(plan), [(images, torch.zeros(4))])
    with torch.inference_mode():
        first, second, third = (torch.linalg.matrix_rank(seen).double() for seen in network.maps(images))
    torch.testing.assert_close(ranks[:6], first.mean(0))
    torch.testing.assert_close(ranks[6:], torch.cat([second, third]).mean(0))
    assert maps.tolist() == [4.0] * 6 + [8.0] * 9


ODD = ("mobilenet", "densenet", "joined", "grouped", "transposed", "flattened", "channels last", "patches in the batch")


@pytest.mark.parametrize("name", ODD)
def test_odd_networks_can_be_ranked(name: str) -> None:
    network = PRUNABLE[name]().eval()
    plan = ChannelPlan(network, EXAMPLE)
    ranks, maps = feature_rank(network, plan, everything(plan), [(torch.randn_like(EXAMPLE), torch.zeros(1))])
    assert bool((maps > 0).all())
    assert bool((ranks >= 0).all())
    assert bool((ranks <= max(EXAMPLE.shape[2:])).all())
