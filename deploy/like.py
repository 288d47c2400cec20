"""What a compact network that is there already says to another of its kind: how wide each layer ends.

Called where a rule decides alone (deploy/alone.py), before it (deploy/prepare.py), and by the command line.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from env.channels import ChannelPlan, costs_of
from env.compact_file import describe_layers, form_of_file, network_from_file
from env.errors import UserError
from env.networks import NetworkConfig

__all__ = ["removed_in", "widths_like"]

_ROUNDED = 1e6  # down to a millionth: a target that is a rounding error too high would not be reached by the widths


def widths_like(path: str, kind: NetworkConfig, plan: ChannelPlan, network: nn.Module) -> Tensor:
    """Filters of each layer of the compact network in a file, int64 [L].

    Args:
        path: of a file that `zeroout export` or a campaign has written.
        kind: what `network` was built by; the file's must have been built alike.
        plan: of `network`.
        network: the whole one that is to become like it.

    Raises:
        UserError: as `network_from_file`, or the file is of another kind of network.

    """
    compact, theirs = network_from_file(path), form_of_file(path).network
    if replace(theirs, weights="") != replace(kind, weights=""):
        raise _unlike(path, f"one of {_said(theirs)}, where this is {_said(kind)}")
    try:
        layers = describe_layers(plan, network, compact)
    except AttributeError as error:  # a module that the other does not have
        raise _unlike(path, str(error)) from error
    for layer in layers:
        if not 1 <= layer["after"] <= layer["before"]:
            raise _unlike(path, f"{layer['after']} filters in {layer['name']}, which has {layer['before']} here")
    return torch.tensor([layer["after"] for layer in layers])


def removed_in(path: str, measure: str) -> float:
    """Which share of the network as given is gone in the compact one of a file, by one of `env.channels.MEASURES`.

    UserError as `network_from_file`.
    """
    form = form_of_file(path)
    as_given = replace(form, network=replace(form.network, skips="coupled")).build().eval()
    example = torch.zeros(1, form.channels, form.image_size, form.image_width or form.image_size)
    before, after = (costs_of(network, example)[measure] for network in (as_given, network_from_file(path)))
    return math.floor((1.0 - after / before) * _ROUNDED) / _ROUNDED


def _said(kind: NetworkConfig) -> str:
    return f"{kind.factory or kind.name}, width {kind.width:g}, skips {kind.skips}"


def _unlike(path: str, got: str) -> UserError:
    return UserError(
        f"search.like {path}",
        expected="a compact network of the same kind, no layer wider than here",
        got=got,
        remedy="give one that the same --model was pruned to",
    )
