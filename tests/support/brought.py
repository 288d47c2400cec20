"""Small networks as people bring them: a factory `brought:NAME` each, for images of 8x8 pixels."""

from typing import cast

from torch import Tensor, nn

from env.networks import ResNet


class Depthwise(nn.Module):
    """A stem, a depthwise and a pointwise convolution, and a mean over the maps."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(12, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.classifier = nn.Linear(20, classes)

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps [B, 20, 8, 8]."""
        return cast(Tensor, self.point(self.deep(self.stem(images))))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return cast(Tensor, self.classifier(self.maps(images).mean((2, 3))))


class Viewing(Depthwise):
    """Flattens feature maps with `view`, which channels innermost in memory do not allow."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes)
        self.classifier = nn.Linear(20 * 64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        maps = self.maps(images)
        return cast(Tensor, self.classifier(maps.view(maps.shape[0], -1)))


class Counting(Depthwise):
    """Asks how many images there are in a way that a traced program cannot follow."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return cast(Tensor, self.classifier(self.maps(images).reshape(len(images), -1, 64).mean(2)))


class Deciding(Depthwise):
    """Takes a branch by the values of its images: no program can be traced."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return super().forward(images * 2 if float(images.sum()) > 0 else images)


def depthwise(*, channels: int, classes: int) -> nn.Module:
    """A depthwise convolution."""
    return Depthwise(channels, classes)


def viewing(*, channels: int, classes: int) -> nn.Module:
    """A `view` of feature maps."""
    return Viewing(channels, classes)


def counting(*, channels: int, classes: int) -> nn.Module:
    """A `len` of the images."""
    return Counting(channels, classes)


def deciding(*, channels: int, classes: int) -> nn.Module:
    """A branch by values."""
    return Deciding(channels, classes)


def residual(*, channels: int, classes: int) -> nn.Module:
    """A ResNet of two blocks: one with an identity skip, one whose skip halves the maps."""
    return ResNet((1, 1), (8, 12), channels=channels, classes=classes, width=1.0)
