"""Networks that pruning has to get right, each for images [B, 3, 8, 8] and three classes."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.networks import NetworkConfig, build_network

CLASSES = 3
EXAMPLE = torch.zeros(1, 3, 8, 8)


class Joined(nn.Module):
    """Two convolutions joined, one batch-norm over both, and one reader past it; perhaps the input joined too."""

    def __init__(self, *, with_input: bool = False) -> None:
        super().__init__()
        self.with_input = with_input
        width = 15 if with_input else 12
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 7, 3, padding=1)
        self.joined_norm = nn.BatchNorm2d(width)
        self.third = nn.Conv2d(width, 4, 1)
        self.past = nn.Conv2d(7, 4, 1)
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.second(torch.relu(self.norm(first)))
        parts = [images, first, second] if self.with_input else [first, second]
        joined = self.third(torch.relu(self.joined_norm(torch.cat(parts, 1))))
        return cast(Tensor, self.classifier((joined + self.past(second)).mean((2, 3))))


class DenseBlock(nn.Module):
    """DenseNet's block (Huang et al. 2017): every layer reads all that came before it, through a norm of its own."""

    def __init__(self, channels: int, *, growth: int, depth: int) -> None:
        super().__init__()
        widths = [channels + growth * i for i in range(depth)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1, bias=False) for width in widths)

    def forward(self, maps: Tensor) -> Tensor:
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            maps = torch.cat([maps, convolution(torch.relu(norm(maps)))], dim=1)
        return maps


def densenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        DenseBlock(5, growth=3, depth=3),
        nn.BatchNorm2d(14),
        nn.ReLU(),
        nn.Conv2d(14, 7, 1, bias=False),
        nn.AvgPool2d(2),
        DenseBlock(7, growth=3, depth=2),
        nn.BatchNorm2d(13),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(13, CLASSES),
    )


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): widen, filter each channel, narrow; a sum where shapes agree."""

    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        wide = 3 * before
        self.adds = stride == 1 and before == after
        self.layers = nn.Sequential(
            nn.Conv2d(before, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps) if self.adds else cast(Tensor, self.layers(maps))


def mobilenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU6(),
        InvertedResidual(5, 7, stride=2),
        InvertedResidual(7, 7, stride=1),
        InvertedResidual(7, 4, stride=1),
        nn.Conv2d(4, 11, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(11, CLASSES),
    )


class SqueezeExcitation(nn.Module):
    """A gate per channel from the mean of all (Hu et al. 2018), by convolutions or by linear layers."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.before = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Linear(8, 4) if linear else nn.Conv2d(8, 4, 1)
        self.excite = nn.Linear(4, 8) if linear else nn.Conv2d(4, 8, 1)
        self.after = nn.Conv2d(8, 6, 3)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.silu(self.norm(self.before(images)))
        means = maps.mean((2, 3)) if self.linear else maps.mean((2, 3), keepdim=True)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(means))))
        maps = maps * (gate[:, :, None, None] if self.linear else gate)
        return cast(Tensor, self.classifier(self.after(maps).mean((2, 3))))


class UsedTwice(nn.Module):
    """One convolution and one norm called twice, each time with what the last call made."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.after = nn.Conv2d(8, 6, 3)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.before(images))
        for _ in range(2):
            maps = torch.relu(self.norm(self.again(maps)))
        return cast(Tensor, self.classifier(self.after(maps).mean((2, 3))))


class SharedHead(nn.Module):
    """One convolution that reads two others, both its outputs joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 5, 3, padding=1)
        self.after = nn.Conv2d(10, 6, 3)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.shared(torch.relu(side(images))) for side in (self.left, self.right)], dim=1)
        return cast(Tensor, self.classifier(self.after(torch.relu(both)).mean((2, 3))))


class FunctionalFlatten(nn.Module):
    """A convolution whose maps are flattened in `forward`, place by place, into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 5)
        self.classifier = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.max_pool2d(torch.relu(self.norm(self.convolution(images))), 2)
        return cast(Tensor, self.classifier(torch.relu(self.hidden(maps.flatten(1)))))


class ReadPastItsNorm(nn.Module):
    """A convolution that one reader takes through batch-norm and another past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.through = nn.Conv2d(5, 7, 3, padding=1)
        self.past = nn.Conv2d(5, 7, 1)
        self.classifier = nn.Linear(7, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        both = self.through(torch.relu(self.norm(first))) + self.past(first)
        return cast(Tensor, self.classifier(both.mean((2, 3))))


class Between(nn.Module):
    """Two convolutions, and a function of the maps between them."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, width: int = 8, reads: int = 8) -> None:
        super().__init__()
        self.function = function
        self.before = nn.Conv2d(3, width, 3, padding=1)
        self.after = nn.Conv2d(reads, 6, 3)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.function(self.before(images), images)
        return cast(Tensor, self.classifier(torch.relu(self.after(maps)).mean((2, 3))))


class Patches(nn.Module):
    """The image cut into four, which a convolution reads as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 1)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
        maps = torch.relu(self.second(torch.relu(self.first(patches)))).mean((2, 3))
        return cast(Tensor, self.classifier(maps.view(len(images), 4, -1).mean(1)))


class ChannelsLast(nn.Module):
    """A linear layer on maps whose channels are turned to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside = nn.Conv2d(3, 5, 3), nn.Linear(5, 7)
        self.classifier = nn.Linear(7, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.first(images)).permute(0, 2, 3, 1)
        return cast(Tensor, self.classifier(torch.relu(self.inside(maps)).mean((1, 2))))


class HalvesReadApart(nn.Module):
    """A convolution of which two others read one half each: as many must stay in both."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 3)
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
        self.after = nn.Conv2d(12, 5, 1)
        self.classifier = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.before(images))
        half = maps.shape[1] // 2
        both = torch.cat([self.left(maps[:, :half]), self.right(maps[:, half:])], dim=1)
        return cast(Tensor, self.classifier(torch.relu(self.after(torch.relu(both))).mean((2, 3))))


class TrainingBranch(nn.Module):
    """A convolution that reads another in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 6, 3)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.first(images))
        if self.training:
            maps = maps + 0.1 * self.extra(maps)
        return cast(Tensor, self.classifier(torch.relu(self.second(maps)).mean((2, 3))))


class FunctionalCall(nn.Module):
    """A convolution that is never called: a function takes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.third = nn.Conv2d(6, 5, 1)
        self.classifier = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(F.conv2d(torch.relu(self.first(images)), self.second.weight, self.second.bias))
        return cast(Tensor, self.classifier(torch.relu(self.third(maps)).mean((2, 3))))


class ComputedWeight(nn.Module):
    """A convolution whose weight is computed from two other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))
        self.second = nn.Conv2d(5, 6, 1)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(torch.relu(self.second(torch.relu(self.first(images)))).mean((2, 3))))


class Scaled(nn.Module):
    """A convolution whose output a bare parameter scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.scale = nn.Parameter(torch.ones(5, 1, 1))
        self.second = nn.Conv2d(5, 7, 3)
        self.classifier = nn.Linear(7, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.second(self.first(images) * self.scale).mean((2, 3))))


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight
        self.last = nn.Conv2d(8, 5, 3)
        self.classifier = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.third(torch.relu(self.second(torch.relu(self.first(images)))))
        return cast(Tensor, self.classifier(self.last(torch.relu(maps)).mean((2, 3))))


def flattened() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 36, 7),
        nn.ReLU(),
        nn.Linear(7, CLASSES),
    )


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3, groups=5),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 7, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, CLASSES),
    )


def transposed(groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 8, 3, stride=2, groups=groups),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 5, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )


def without_norms() -> nn.Sequential:
    """No batch-norm but one without weights, a transposed convolution in the middle; then flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 7, 3),
        nn.BatchNorm2d(7, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(28, 5),
        nn.ReLU(),
        nn.Linear(5, CLASSES),
    )


def grouped(before: int, after: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, before, 3),
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.Conv2d(before, after, 3, groups=groups),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, 7, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, CLASSES),
    )


def grouped_in_a_row() -> nn.Sequential:
    """The channels between stand in two groups of six for one convolution, in three of four for the other."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 9, 3, groups=3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, CLASSES),
    )


def factory(*, channels: int, classes: int) -> nn.Sequential:
    """A user's own network, as `network.factory` names it."""
    return nn.Sequential(
        nn.Conv2d(channels, 9, 3, padding=1),
        nn.LeakyReLU(),
        nn.Conv2d(9, 6, 3),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def built(name: str, *, skips: str = "coupled", width: float = 0.06) -> nn.Module:
    return build_network(NetworkConfig(name=name, width=width, skips=skips), channels=3, classes=CLASSES)


def shuffled(maps: Tensor, _images: Tensor) -> Tensor:
    """ShuffleNet's exchange of channels between two groups."""
    batch, channels, height, width = maps.shape
    return maps.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


#: All of a network's convolutions but the last can be pruned.
PRUNABLE: dict[str, Callable[[], nn.Module]] = {
    "vgg16": lambda: built("vgg16"),
    "resnet18 coupled": lambda: built("resnet18"),
    "resnet18 convolution": lambda: built("resnet18", skips="convolution"),
    "resnet34 coupled": lambda: built("resnet34"),
    "resnet34 convolution": lambda: built("resnet34", skips="convolution"),
    "resnet56 coupled": lambda: built("resnet56", width=0.3),
    "resnet56 convolution": lambda: built("resnet56", skips="convolution", width=0.3),
    "small": lambda: built("small", width=0.1),
    "mobilenet": mobilenet,
    "densenet": densenet,
    "joined": Joined,
    "squeeze-excitation by convolutions": lambda: SqueezeExcitation(linear=False),
    "squeeze-excitation by linear layers": lambda: SqueezeExcitation(linear=True),
    "used twice": UsedTwice,
    "shared head": SharedHead,
    "functional flatten": FunctionalFlatten,
    "flattened": flattened,
    "depthwise": depthwise,
    "grouped": lambda: grouped(8, 12, 2),
    "grouped in a row": grouped_in_a_row,
    "transposed": transposed,
    "transposed in groups": lambda: transposed(2),
    "without norms": without_norms,
    "read past its norm": ReadPastItsNorm,
    "a function that is 0 at 0": lambda: Between(lambda maps, _: F.gelu(maps)),
    "both signs joined": lambda: Between(lambda maps, _: torch.cat([maps.relu(), (-maps).relu()], 1), reads=16),
    "patches in the batch": Patches,
    "channels last": ChannelsLast,
    "a user's factory": lambda: factory(channels=3, classes=CLASSES),
}
#: Name -> how to make it, the first layer that is left out, a part of the reason.
LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "joined with the input": (
        lambda: Joined(with_input=True),
        "first",
        "its channels cannot be followed to all that read them (second, third, past): on the way",
    ),
    "bare parameter": (Scaled, "first", "a bare nn.Parameter"),
    "channel multiplier": (lambda: grouped(4, 8, 4), "0", "single channel in a group"),
    "halves read apart": (HalvesReadApart, "before", "does not run without some of its channels"),
    "a branch for training alone": (TrainingBranch, "first", "in training mode the network does not run without"),
    "computed weight": (ComputedWeight, "first", "computes its weights from other parameters"),
    "tied weights": (Tied, "second", "second shares its weights with third"),
    # by how many are taken out in a trial, it does not run or answers otherwise: both say so
    "channels exchanged": (lambda: Between(shuffled), "before", "its channels"),
    "channels halved": (
        lambda: Between(lambda maps, _: maps[:, :4].relu() * maps[:, 4:], reads=4),
        "before",
        "not the same as silencing",
    ),
    "a function that is not 0 at 0": (
        lambda: Between(lambda maps, _: maps.sigmoid()),
        "before",
        "not the same as silencing",
    ),
    "a mean over channels": (
        lambda: Between(lambda maps, _: maps - maps.mean(1, keepdim=True)),
        "before",
        "not the same as silencing",
    ),
    "the input added": (
        lambda: Between(lambda maps, images: (maps + images).relu(), width=3, reads=3),
        "before",
        "does not run without some of its channels",
    ),
}
NETWORKS = PRUNABLE | {name: make for name, (make, _, _) in LEFT_OUT.items()}
