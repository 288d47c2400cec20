"""The networks that come with Zeroout, and the way to a user's own.

VGG16, ResNet18 and ResNet34 in their CIFAR form are the networks of the source's tables, ResNet56 is the field's;
`small` is for the embedded 8x8 digits. Called by `deploy/prepare.py`, which makes the Recognizer, and by tests and
benchmarks.

A compacted network reuses these very classes with fewer channels, so no `forward` here names a channel
count, and no activation works in place: a ZeroOut layer or a hook may stand after any module.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from env.data import check_fields
from env.errors import UserError, first_line
from env.groups import module_tensors
from env.skips import add_skip_convolutions
from env.weights import fill, read_weights

__all__ = [
    "NetworkConfig",
    "ResNet",
    "ResidualBlock",
    "SequentialNetwork",
    "build_network",
    "initialise_anew",
    "resnet18",
    "resnet34",
    "resnet56",
    "small",
    "vgg16",
]

_POOL = 0  # stands for a max-pool in the plans below
_VGG16 = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL, 512, 512, 512, _POOL, 512, 512, 512, _POOL)
# 204,778 parameters for digits at width 1: the task needs a few thousand, so most filters can go.
_SMALL = (32, 32, _POOL, 64, 64, _POOL, 96, 96)
_IMAGENET_STAGES = (64, 128, 256, 512)  # of ResNet18 and ResNet34, He et al. 2016, table 1
_CIFAR_STAGES = (16, 32, 64)  # of ResNet56, He et al. 2016, section 4.2


class SequentialNetwork(nn.Module):
    """Convolutions with batch-norm, global average pooling, one linear layer.

    Input float [B, channels, H, W] of any H, W >= 1; output logits float [B, classes].
    """

    def __init__(self, plan: Sequence[int], *, channels: int, classes: int, width: float) -> None:
        super().__init__()
        self.features = _stack(plan, channels=channels, width=width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_scaled([c for c in plan if c != _POOL][-1], width), classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, channels, H, W]."""
        return cast(Tensor, self.classifier(self.pool(self.features(images)).flatten(1)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    `shortcut` is always a module: `nn.Identity` where shapes agree (env/skips.py may put a convolution
    there), else a strided 1x1 convolution with batch-norm.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps [B, C_in, H, W] to [B, C_out, H / stride, W / stride]."""
        main = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return cast(Tensor, self.relu2(main + self.shortcut(x)))


class ResNet(nn.Module):
    """Residual network with the CIFAR stem (one 3x3 convolution, no pooling before the first stage).

    Input float [B, channels, H, W]; output logits float [B, classes].
    """

    def __init__(
        self, blocks: Sequence[int], stages: Sequence[int], *, channels: int, classes: int, width: float
    ) -> None:
        super().__init__()
        widths = [_scaled(stage, width) for stage in stages]
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = nn.Sequential()
        before = widths[0]
        for index, (after, depth) in enumerate(zip(widths, blocks, strict=True)):
            self.stages.append(_stage(before, after, depth=depth, stride=1 if index == 0 else 2))
            before = after
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, channels, H, W]."""
        maps = self.stages(self.relu(self.bn(self.conv(images))))
        return cast(Tensor, self.classifier(self.pool(maps).flatten(1)))


def vgg16(*, channels: int = 3, classes: int = 10, width: float = 1.0) -> SequentialNetwork:
    """VGG16 as used on CIFAR: 13 convolutions with batch-norm, five max-pools, one linear layer.

    `width` multiplies every channel count (1.0 = 64 to 512; 14.7 million parameters).
    """
    return SequentialNetwork(_VGG16, channels=channels, classes=classes, width=width)


def small(*, channels: int = 1, classes: int = 10, width: float = 1.0) -> SequentialNetwork:
    """Six convolutions with batch-norm for 8x8 images; 204,778 parameters at width 1 for the digits."""
    return SequentialNetwork(_SMALL, channels=channels, classes=classes, width=width)


def resnet18(*, channels: int = 3, classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet18 as used on CIFAR: eight residual blocks (11.2 million parameters at width 1)."""
    return ResNet((2, 2, 2, 2), _IMAGENET_STAGES, channels=channels, classes=classes, width=width)


def resnet34(*, channels: int = 3, classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet34 as used on CIFAR: sixteen residual blocks (21.3 million parameters at width 1)."""
    return ResNet((3, 4, 6, 3), _IMAGENET_STAGES, channels=channels, classes=classes, width=width)


def resnet56(*, channels: int = 3, classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet56 for CIFAR: three stages of nine blocks (0.86 million parameters at width 1).

    Where a stage begins, the shortcut is a 1x1 convolution (He et al.'s option B), which can be pruned.
    """
    return ResNet((9, 9, 9), _CIFAR_STAGES, channels=channels, classes=classes, width=width)


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small": small,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet56": resnet56,
}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network is compressed. Raises UserError, naming the field, for a value out of range."""

    # "small" (8x8 digits), "vgg16", "resnet18", "resnet34" or "resnet56"; unused where `factory` is given
    name: str = "small"
    width: float = 1.0  # multiplies every channel count of our networks; more than 0, at most 16
    # "coupled": channels that a residual sum joins live or die together.
    # "convolution": a 1x1 convolution (identity at first) on every identity skip, as the source does.
    skips: str = "coupled"
    factory: str = ""  # "package.module:function" of the user's own network; takes channels= and classes=
    weights: str = ""  # a state dict to start from: .safetensors, or what torch.save wrote

    def __post_init__(self) -> None:
        check_fields("network", self, _RULES)


_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "name": (lambda name: name in _NETWORKS, f"one of {', '.join(_NETWORKS)}"),
    "width": (lambda width: 0 < width <= 16, "a number above 0 and at most 16"),
    "skips": (lambda skips: skips in ("coupled", "convolution"), "coupled or convolution"),
    "factory": (
        lambda factory: not factory or all(factory.partition(":")),
        "package.module:function, or nothing",
    ),
}


def build_network(config: NetworkConfig, *, channels: int, classes: int, seed: int = 0) -> nn.Module:
    """The network that `config` names, in float32 on the CPU, in training mode.

    `seed` alone decides the initial weights; torch's global generator is left as it was. Weights of a
    network without skip convolutions also fit one with them, which then starts as the same function.
    UserError for a factory that cannot be used and for weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.factory:
            network = _call_factory(config.factory, channels=channels, classes=classes)
        else:
            network = _NETWORKS[config.name](channels=channels, classes=classes, width=config.width)
    added: list[str] = []
    if config.skips == "convolution":
        added = add_skip_convolutions(network)
        if not added:
            raise UserError(
                "network.skips",
                expected="a network with identity skips (env/skips.py says how they are found)",
                got=f"{type(network).__name__}, which has none",
                remedy="set network.skips = coupled",
            )
    if config.weights:
        started = network.state_dict()
        identities = {f"{name}.weight": started[f"{name}.weight"] for name in added}
        fill(network, {**identities, **read_weights(Path(config.weights))}, Path(config.weights))
    return network


def _call_factory(factory: str, *, channels: int, classes: int) -> nn.Module:
    module_name, _, function_name = factory.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            "network.factory",
            expected="an importable package.module:function",
            got=f"{factory} ({error})",
            remedy="start where the package can be imported, or correct the name",
        ) from error
    try:
        inspect.signature(function).bind(channels=channels, classes=classes)
    except (TypeError, ValueError) as error:  # not a function of these, or nothing that can be called
        raise UserError(
            "network.factory",
            expected="a function that takes channels= and classes=",
            got=f"{factory} ({error})",
            remedy="give it these two arguments",
        ) from error
    try:
        network = function(channels=channels, classes=classes)
    except Exception as error:  # whatever a user's code raises
        raise UserError(
            "network.factory",
            expected=f"a network for {channels} channels and {classes} classes from {factory}",
            got=f"{type(error).__name__}: {first_line(error)}",
            remedy="mend the factory",
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            "network.factory",
            expected="a function that returns a torch.nn.Module",
            got=f"a {type(network).__name__} from {factory}",
            remedy="return the network itself",
        )
    _check_plain(network, factory)
    return network


def _check_plain(network: nn.Module, factory: str) -> None:
    """UserError where the filters of a module cannot be read or taken out, whatever the network is."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            found, remedy = "which torch.jit made", "return the module without torch.jit"
        elif "_orig_mod" in module._modules:
            found, remedy = "which torch.compile made", "return the module without torch.compile"
        elif any(is_lazy(tensor) for tensor in module_tensors(module).values()):
            found = "whose parameters have no sizes yet"
            remedy = "give the sizes, or run it once on images of zeros in the factory"
        else:
            continue
        raise UserError(
            "network.factory",
            expected=f"a plain torch.nn.Module from {factory}",
            got=f"{f'{type(module).__name__} {name}'.strip()}, {found}",
            remedy=remedy,
        )


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _stack(plan: Sequence[int], *, channels: int, width: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for planned in plan:
        if planned == _POOL:
            # Rounding up keeps a 1x1 map as it is, so images smaller than 32x32 pass five pools too.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        after = _scaled(planned, width)
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        channels = after
    return nn.Sequential(*layers)


def _stage(channels_in: int, channels_out: int, *, depth: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels_out, stride=stride)
    rest = [ResidualBlock(channels_out, channels_out, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def initialise_anew(network: nn.Module, *, seed: int) -> None:
    """Give a network of any origin fresh weights, in place: torch's own of each layer, and those of `_initialise`.

    What a module holds that torch does not know (a parameter of its own) stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = copy.deepcopy(network).cpu()  # the same numbers on every device
        for module in drawn.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        _initialise(drawn)
    network.load_state_dict(drawn.state_dict())


def _initialise(network: nn.Module) -> None:
    """He et al. 2015, fan out: keeps the gradients' size through many ReLU layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
