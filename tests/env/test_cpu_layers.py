import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from env.cpu_layers import cpu_layers, judges_channels_last, keep_freed_memory, quick_form


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


def gradients(network: nn.Module, images: Tensor, upstream: Tensor) -> list[Tensor]:
    """Of the images and of every parameter, after the output."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    output = network(images)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in (images, *network.parameters()) if leaf.grad is not None)]


@pytest.mark.parametrize("channels", [1, 3, 5, 11])
def test_folded_batch_norm_equals_torchs_in_double(channels: int) -> None:
    torch.manual_seed(channels)
    layer = norm(channels)
    exact = copy.deepcopy(layer).double()
    images = channels_last(16, channels, 32, 32) * 3 + 2
    upstream = channels_last(16, channels, 32, 32)
    with cpu_layers(layer):
        assert "forward" in vars(layer)
        got = gradients(layer, images, upstream)
    for one, other in zip(got, gradients(exact, images.double(), upstream), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    for one, other in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 11])
def test_folded_batch_norm_keeps_the_layout_and_judges_alike(channels: int) -> None:
    torch.manual_seed(0)
    layer = norm(channels).eval()
    layer.running_mean.normal_()  # type: ignore[union-attr]
    images = channels_last(16, channels, 32, 32)
    with torch.inference_mode(), cpu_layers(layer):
        got = layer(images)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, layer(images))


@pytest.mark.parametrize("shape", [(16, 3, 31, 33), (2, 3, 8, 8)])
def test_images_that_do_not_fold_are_torchs_own_affair(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, images = norm(3), channels_last(*shape)
    other = copy.deepcopy(layer)
    with cpu_layers(layer):
        got = layer(images)
    assert torch.equal(got, other(images))
    assert torch.equal(layer.running_var, other.running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "stride", "groups"), [(4, 2, 1), (6, (3, 2), 2), (20, 2, 1)])
@pytest.mark.parametrize("size", [8, 7])
def test_strided_1x1_convolutions_have_the_right_gradients(
    channels: int, stride: int | tuple[int, int], groups: int, size: int
) -> None:
    # as they are, channels_last images with few channels let oneDNN write past its memory (issue 6035)
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 10, 1, stride=stride, groups=groups)
    exact = copy.deepcopy(layer).double()
    images = channels_last(5, channels, size, size)
    upstream = torch.randn_like(layer(images.contiguous()))
    with cpu_layers(layer):
        got = gradients(layer, images, upstream)
    for one, other in zip(got, gradients(exact, images.double().contiguous(), upstream), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_layers_are_as_before_afterwards_even_after_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1, stride=2), nn.BatchNorm2d(5))
    with pytest.raises(KeyError), cpu_layers(network):
        raise KeyError
    assert not any("forward" in vars(module) for module in network.modules())


def test_unusual_layers_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda images: images  # type: ignore[method-assign]
    alone: list[nn.Module] = [
        Own(3), replaced, nn.BatchNorm2d(16), nn.BatchNorm2d(35), nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, momentum=None),
        nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(3, 5, 1, stride=2, padding=1),
    ]  # fmt: skip
    assert [quick_form(module) for module in alone] == [None] * len(alone)


FAULTS = """
import resource, sys, torch
from env.cpu_layers import keep_freed_memory
assert sys.argv[1] == "as it is" or keep_freed_memory()
def step():
    tensors = [torch.ones(2**21) for _ in range(4)]  # 8 MiB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="the allocator is not glibc's")
def test_kept_memory_is_not_cleared_again() -> None:
    faults = {}
    for how in ("as it is", "kept"):
        ended = subprocess.run(
            [sys.executable, "-c", FAULTS, how], cwd=Path(__file__).parents[2], capture_output=True, check=True
        )
        faults[how] = int(ended.stdout)
    assert faults["kept"] < 100
    assert faults["kept"] <= faults["as it is"]


@pytest.mark.parametrize(
    ("widths", "ordered"),
    [
        # work in registers of 8, 9 kernel places, the stride leaving a quarter of the pixels
        ((3, 16, 16), True),  # unfilled 2, filled 4 / 4
        ((3, 5, 7), False),  # unfilled 1 + 1 / 4, filled none
        ((3, 8, 8), False),  # unfilled 1, filled 1 / 4
        ((3, 8, 16), True),  # unfilled 1, filled 2 / 4
    ],
)
def test_networks_of_few_channels_are_judged_in_plain_order(widths: tuple[int, ...], ordered: bool) -> None:
    first, second, third = widths
    network = nn.Sequential(nn.Conv2d(first, second, 3), nn.ReLU(), nn.Conv2d(second, third, 3, stride=2))
    assert judges_channels_last(network) is ordered
