import torch
from torch import nn

from env.networks import ResidualBlock, resnet18, vgg16
from env.skips import add_skip_convolutions, identity_convolution

IDENTITY_SKIPS = ["stages.0.0", "stages.0.1", "stages.1.1", "stages.2.1", "stages.3.1"]


def test_an_identity_convolution_returns_its_input() -> None:
    images = torch.randn(2, 5, 3, 7)
    torch.testing.assert_close(identity_convolution(5)(images), images, atol=1e-6, rtol=0)


def test_every_identity_skip_gets_one_and_the_function_stays() -> None:
    network = resnet18(width=0.2).eval()
    images = torch.randn(3, 3, 16, 16)
    before = network(images)
    assert add_skip_convolutions(network) == [f"{name}.shortcut" for name in IDENTITY_SKIPS]
    assert (network(images) - before).abs().max() <= 1e-6
    for name in IDENTITY_SKIPS:
        block = network.get_submodule(name)
        assert isinstance(block, ResidualBlock)
        assert isinstance(block.shortcut, nn.Conv2d)
        assert not block.shortcut.training


def test_new_convolutions_can_be_trained() -> None:
    network = resnet18(width=0.1)
    (name, *_) = add_skip_convolutions(network)
    network(torch.randn(3, 3, 16, 16)).square().sum().backward()
    weight = network.get_parameter(f"{name}.weight")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_a_second_time_and_a_network_without_skips_add_none() -> None:
    network = resnet18(width=0.1)
    assert len(add_skip_convolutions(network)) == 5
    assert add_skip_convolutions(network) == []
    assert add_skip_convolutions(vgg16(width=0.1)) == []


def test_a_block_alone_and_another_dtype_are_served() -> None:
    block = ResidualBlock(5, 5, stride=1).double()
    assert add_skip_convolutions(block) == ["shortcut"]
    images = torch.randn(2, 5, 7, 7, dtype=torch.float64)
    assert block(images).dtype == torch.float64


class Downsampled(nn.Module):
    """A block as torchvision writes it: `downsample` is None where the shapes agree."""

    def __init__(self, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(5, 5, 3, padding=1)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv1(x)) + (x if self.downsample is None else self.downsample(x))


class EmptyShortcut(nn.Module):
    """A block whose identity is an empty Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(5, 5, 3, padding=1)
        self.shortcut = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv1(x)) + self.shortcut(x)


def test_blocks_as_others_write_them_are_served_and_keep_their_function() -> None:
    network = nn.Sequential(Downsampled(None), EmptyShortcut(), Downsampled(nn.Conv2d(5, 5, 1)))
    images = torch.randn(2, 5, 7, 7)
    before = network(images)
    assert add_skip_convolutions(network) == ["0.downsample", "1.shortcut"]
    torch.testing.assert_close(network(images), before)
    assert add_skip_convolutions(network) == []
