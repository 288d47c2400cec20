"""A trained network moves to other classes: everything but its last layer goes with it.

The source's use of filter replacement on small data (IWAIT 2021, doi 10.1117/12.2590965): filters that matter little to
the new images are overwritten by copies of those that matter, instead of being pruned or initialised anew, and the
network is trained on. Called by deploy/transfer.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from env.data import check_fields
from env.errors import UserError
from env.networks import NetworkConfig, build_network
from env.replacement import COPIES, RULES, check_copies
from env.weights import fill, read_weights

__all__ = ["HOWS", "TransferConfig", "head_of", "with_new_head"]

#: What may become of the weakest filters. "none": nothing, "prune": they are gone for good, "reinit": fresh weights,
#: "noise": their own with noise; else copies of the strongest, as in env/replacement.py.
HOWS = ("none", "prune", "reinit", "noise", *COPIES)


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """How a network moves to new classes. UserError, naming the field, for a value out of range."""

    classes: int = 0  # that the network of network.weights was trained for; 0 = no transfer
    how: str = "none"  # of HOWS: what becomes of the weakest filters before the network is trained on the new classes
    share: float = 0.1  # of each layer's filters
    importance: str = "rank"  # of env.importance.IMPORTANCES, on the new images; taylor sees a last layer that is new
    images: int = 640  # training images behind it, augmented; all of them where there are fewer

    def __post_init__(self) -> None:
        check_fields("transfer", self, {**RULES, **_RULES})
        check_copies("transfer", self)
        if self.how != "none" and not self.classes:
            raise UserError(
                "transfer.classes",
                expected=f"how many classes the network was trained for, because transfer.how is {self.how}",
                got="0, which is no transfer",
                remedy="set it, or let replacement.how treat the filters of a network that stays with its classes",
            )


_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "classes": (lambda n: n == 0 or n >= 2, "a whole number of at least 2, or 0 for no transfer"),
    "how": (lambda how: how in HOWS, f"one of {', '.join(HOWS)}"),
}


def head_of(config: NetworkConfig, *, channels: int, classes: int) -> dict[str, tuple[int, ...]]:
    """What answers for the classes: all of each module whose size follows their number, by name in the state dict.

    Returns for each tensor the axes whose length follows the number of classes, perhaps none. UserError where nothing
    does, because the factory makes the same network for any number of classes.
    """
    one, other = (
        build_network(_bare(config), channels=channels, classes=count).state_dict() for count in (classes, classes + 1)
    )
    axes = {
        name: tuple(axis for axis, size in enumerate(tensor.shape) if other[name].shape[axis] != size)
        for name, tensor in one.items()
        if name in other and other[name].dim() == tensor.dim()
    }
    modules = {_module(name) for name, follow in axes.items() if follow}
    if not modules:
        raise UserError(
            "the network's last layer",
            expected="weights whose size follows the number of classes",
            got=f"the same sizes for {classes} and {classes + 1} classes",
            remedy="let the factory use classes=",
        )
    return {name: axes.get(name, ()) for name in one if _module(name) in modules}


def with_new_head(config: NetworkConfig, *, channels: int, before: int, classes: int, seed: int) -> nn.Module:
    """The network for `classes` classes with the weights of `config.weights`, of one for `before`, but for its head.

    Without skip convolutions, whatever `config` says; on the CPU. `seed` alone decides the new head. UserError for
    weights that are missing, that do not fit, or that are of another number of classes.
    """
    if not config.weights:
        raise UserError(
            "network.weights",
            expected="the weights of the network that moves to new classes",
            got="nothing",
            remedy="give them with --weights, or leave out transfer.classes to train from scratch",
        )
    head = head_of(config, channels=channels, classes=before)
    old = build_network(_bare(config), channels=channels, classes=before)
    given = read_weights(Path(config.weights))
    _check_head(head, given, old.state_dict(), config.weights)
    fill(old, given, Path(config.weights))
    network = build_network(_bare(config), channels=channels, classes=classes, seed=seed)
    body = {name: tensor for name, tensor in old.state_dict().items() if name not in head}
    network.load_state_dict({**network.state_dict(), **body})
    return network


def _bare(config: NetworkConfig) -> NetworkConfig:
    """As the factory makes it: no weights, no skip convolutions."""
    return replace(config, weights="", skips="coupled")


def _module(name: str) -> str:
    """The module that a tensor of this name belongs to."""
    return name.rpartition(".")[0]


def _check_head(
    head: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str
) -> None:
    """UserError where the given weights, from `path`, fit but for the number of classes."""
    for name, follow in head.items():
        mine, theirs = list(wanted[name].shape), list(given.get(name, wanted[name]).shape)
        differs = [axis for axis, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other]
        if differs and len(mine) == len(theirs) and set(differs) <= set(follow):
            raise UserError(
                "transfer.classes",
                expected=f"the number of classes that {path} was trained for",
                got=f"another: its {name} is {theirs}, not {mine}",
                remedy="set transfer.classes (--from-classes) to it",
            )
