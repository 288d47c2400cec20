"""Networks put together at random: whatever the plan lets go, masked equals compact and the counts are right."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from env.channels import ChannelPlan
from env.copies import adopt
from env.zero_out import attach_zero_out


class Sum(nn.Module):
    """What a block makes, added to what it was given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, self.block(maps)) + maps


class Join(nn.Module):
    """What a block makes, beside what it was given."""

    def __init__(self, block: nn.Module, *, first: bool) -> None:
        super().__init__()
        self.block, self.first = block, first

    def forward(self, maps: Tensor) -> Tensor:
        parts = [self.block(maps), maps]
        return torch.cat(parts if self.first else parts[::-1], dim=1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        means = maps.mean((2, 3), keepdim=True)
        return maps * torch.sigmoid(self.excite(torch.relu(self.squeeze(means))))


def _convolution(before: int, after: int, draw: st.DrawFn) -> nn.Module:
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if before % g == 0 and after % g == 0]))
    kernel = draw(st.sampled_from([1, 3]))
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=draw(st.booleans()))


def _finish(layer: nn.Module, channels: int, draw: st.DrawFn) -> nn.Sequential:
    """The layer with or without a norm, and an activation."""
    norm = draw(st.sampled_from([nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False), None]))
    activation = draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Identity]))
    return nn.Sequential(layer, *([norm(channels)] if norm else []), activation())


def _plain(before: int, draw: st.DrawFn) -> tuple[nn.Module, int]:
    after = draw(st.integers(2, 9))
    return _finish(_convolution(before, after, draw), after, draw), after


def _depthwise(before: int, draw: st.DrawFn) -> tuple[nn.Module, int]:
    return _finish(nn.Conv2d(before, before, 3, padding=1, groups=before), before, draw), before


def _transposed(before: int, draw: st.DrawFn) -> tuple[nn.Module, int]:
    after = draw(st.integers(2, 6))
    return _finish(nn.ConvTranspose2d(before, after, 3, padding=1), after, draw), after


def _residual(before: int, draw: st.DrawFn) -> tuple[nn.Module, int]:
    inside = draw(st.integers(2, 7))
    block = nn.Sequential(_finish(_convolution(before, inside, draw), inside, draw), _convolution(inside, before, draw))
    return nn.Sequential(Sum(block), nn.ReLU()), before


def _dense(before: int, draw: st.DrawFn) -> tuple[nn.Module, int]:
    block, growth = _plain(before, draw)
    return Join(block, first=draw(st.booleans())), before + growth


def _gated(before: int, draw: st.DrawFn) -> tuple[nn.Module, int]:
    return Gate(before), before


_BLOCKS: list[Callable[[int, st.DrawFn], tuple[nn.Module, int]]] = [
    _plain,
    _plain,
    _depthwise,
    _transposed,
    _residual,
    _dense,
    _gated,
]


@st.composite
def networks(draw: st.DrawFn) -> Callable[[], nn.Module]:
    """A factory of one random network for images [B, 3, 8, 8]; it makes the same structure at each call."""
    layers: list[nn.Module] = []
    channels = 3
    for block in [_plain, *draw(st.lists(st.sampled_from(_BLOCKS), min_size=1, max_size=4))]:
        layer, channels = block(channels, draw)
        layers.append(layer)
    if draw(st.booleans()):
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]
    else:
        layers += [nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * channels, 5), nn.ReLU(), nn.Linear(5, 4)]
    network = nn.Sequential(*layers)
    return lambda: copy.deepcopy(network)


def _lived(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """The network with weights, shifts, scales and statistics as a training would leave them, in eval mode."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.5 * noise)
    return network.eval().requires_grad_(False)


# shrinking a network takes minutes, and a small one says little more: the seed that is printed repeats it
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(make=networks(), seed=st.integers(0, 2**31))
def test_masked_equals_compact_and_counts_agree(make: Callable[[], nn.Module], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    network = _lived(make(), generator)
    images = torch.randn(5, 3, 8, 8, generator=generator)
    plan = ChannelPlan(network, images[:1])
    keep_mask = torch.rand(plan.units, generator=generator) < 0.6
    keep_mask[[layer.first for layer in plan.layers]] = True

    compact = plan.compact(network, keep_mask)
    kept = plan.kept_per_layer(keep_mask)
    assert int(plan.parameters(kept)) == sum(parameter.numel() for parameter in compact.parameters())
    with FlopCounterMode(display=False) as counter:
        compact(images[:1])
    assert int(plan.macs(kept)) * 2 == counter.get_total_flops()

    masked = copy.deepcopy(network)
    attach_zero_out(masked, plan, keep_mask)
    expected = masked(images)
    scale = max(1.0, float(expected.abs().max()))
    assert (expected - compact(images)).abs().max() <= 1e-5 * scale
    assert torch.equal(adopt(make().eval(), dict(compact.state_dict()))(images), compact(images))
