import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import NETWORKS

from env.augment import normalise
from env.channels import ChannelPlan
from env.data import DataConfig, Dataset
from env.retraining import retrain
from env.splits import Split
from env.zero_out import ZeroOut, attach_zero_out


@functools.cache
def dataset() -> Dataset:
    """Colour images 8x8 whose class is their brightest channel."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (96,), generator=generator)
    noise = torch.randint(0, 160, (96, 3, 8, 8), generator=generator)
    noise[torch.arange(96), labels] += 90
    split = Split(noise.to(torch.uint8), labels)
    return Dataset(
        train=split, validation=split, test=split, classes=("r", "g", "b"), mean=(0.4,) * 3, std=(0.2, 0.25, 0.3)
    )


@functools.cache
def trained(name: str) -> tuple[nn.Module, ChannelPlan, Tensor]:
    """A network after six real minibatches, in eval mode; its plan; images."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    retrain(network, dataset(), DataConfig(), minibatches=6, batch_size=32, learning_rate=0.05, seed=7)
    images = normalise(dataset().validation.images[:7], dataset().mean, dataset().std)
    return network.eval().requires_grad_(False), ChannelPlan(network, images[:1]), images


def random_mask(plan: ChannelPlan, seed: int) -> Tensor:
    """A random share of each layer: its first unit always stays, its last always goes."""
    generator = torch.Generator().manual_seed(seed)
    keep_mask = torch.rand(plan.units, generator=generator) < 0.3 + 0.6 * torch.rand((), generator=generator)
    keep_mask[[layer.first + layer.units - 1 for layer in plan.layers]] = False
    keep_mask[[layer.first for layer in plan.layers]] = True
    return keep_mask


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_trained_network_masked_equals_it_compact(name: str, seed: int) -> None:
    network, plan, images = trained(name)
    keep_mask = random_mask(plan, seed)
    masked = copy.deepcopy(network)
    attach_zero_out(masked, plan, keep_mask)
    compact = plan.compact(network, keep_mask)
    assert not keep_mask.all()
    assert sum(p.numel() for p in compact.parameters()) < sum(p.numel() for p in network.parameters())
    # in float64: logits of 31 differ by 1.1e-5 in float32, by rounding alone
    assert (masked.double()(images.double()) - compact.double()(images.double())).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["vgg16", "resnet18 coupled", "resnet18 convolution"])
def test_a_mask_after_the_bare_convolutions_would_not_agree(name: str) -> None:
    network, plan, images = trained(name)
    keep_mask = random_mask(plan, 4)
    compact = plan.compact(network, keep_mask)(images)
    masked = copy.deepcopy(network)
    for layer in plan.layers:
        for path in layer.modules:
            module = masked.get_submodule(path)
            if isinstance(module, nn.Conv2d):
                owner = dict(plan.axes(f"{path}.weight"))[0]
                module.weight.mul_(keep_mask[owner].float()[:, None, None, None])
    assert (masked(images) - compact).abs().max() > 1e-3
    assert (network(images) - compact).abs().max() > 1e-3  # and the mask itself matters


def test_a_mask_after_the_norm_alone_would_miss_who_reads_past_it() -> None:
    network, plan, images = trained("read past its norm")
    keep_mask = random_mask(plan, 4)
    compact = plan.compact(network, keep_mask)(images)
    masked = copy.deepcopy(network)
    zero_out = ZeroOut(5)
    zero_out.keep_mask.copy_(keep_mask[:5])
    masked.get_submodule("norm").register_forward_hook(lambda _module, _inputs, output: zero_out(output))
    assert (masked(images) - compact).abs().max() > 1e-3


def test_zero_out_silences_the_channels_whose_bit_is_0() -> None:
    layer = ZeroOut(3)
    assert torch.equal(layer(torch.ones(2, 3)), torch.ones(2, 3))
    layer.keep_mask.copy_(torch.tensor([1.0, 0.0, 1.0]))
    maps = torch.arange(1.0, 1 + 2 * 3 * 5 * 7).view(2, 3, 5, 7)
    expected = maps.clone()
    expected[:, 1] = 0
    assert torch.equal(layer(maps), expected)
    assert torch.equal(layer(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[1.0, 0.0, 3.0]]))
    assert layer(maps.to(torch.bfloat16)).dtype == torch.bfloat16


def test_no_gradient_passes_a_silenced_channel() -> None:
    network, plan, images = trained("small")
    masked = copy.deepcopy(network)
    keep_mask = torch.ones(plan.units, dtype=torch.bool)
    keep_mask[2] = False
    attach_zero_out(masked, plan, keep_mask)
    masked.requires_grad_(True)(images).square().sum().backward()
    gradient = masked.get_parameter("features.0.weight").grad
    assert gradient is not None
    silent = gradient.flatten(1).abs().sum(1) == 0
    assert silent.nonzero().flatten().tolist() == [2]


def test_there_is_one_layer_for_each_module_that_carries_units() -> None:
    network, plan, _ = trained("resnet18 convolution")
    layers = attach_zero_out(copy.deepcopy(network), plan, torch.ones(plan.units, dtype=torch.bool))
    assert len(layers) == 20 + 20 + 5  # convolutions with their norms, and the skips without
    assert all(bool((layer.keep_mask == 1).all()) for layer in layers)
