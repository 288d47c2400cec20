"""Which channels of a network live or die together: torch-pruning's groups, and why some must stay whole.

The groups come from torch-pruning's DependencyGraph (Fang et al., DepGraph, CVPR 2023); what is left out here is what
could go wrong without a word. Called by env/channels.py only, which knows what a group costs and how it is taken out.
"""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch_pruning as tp
from torch import Tensor, nn

from env.errors import UserError, first_line

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "PRODUCERS",
    "TRANSPOSED",
    "Group",
    "Member",
    "count_logits",
    "find_groups",
    "is_depthwise",
    "module_tensors",
    "places",
    "touched",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
PRODUCERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class Member:
    """One side of a module in a group: unit `units[i]` of the group owns channel `channels[i]`."""

    module: str
    output: bool
    channels: list[int]
    units: list[int]


@dataclass(frozen=True)
class Group:
    """Everything that is taken out with some units; `units` is how many there are."""

    members: list[Member]

    @property
    def units(self) -> int:
        """Number of units, each a decision of its own."""
        return 1 + max(unit for member in self.members for unit in member.units)

    @property
    def producers(self) -> tuple[str, ...]:
        """Modules whose outputs the units are, in the network's order."""
        return tuple(dict.fromkeys(member.module for member in self.members if member.output))

    @property
    def readers(self) -> tuple[str, ...]:
        """Modules whose inputs the units are, in the network's order."""
        return tuple(dict.fromkeys(member.module for member in self.members if not member.output))


def find_groups(model: nn.Module, example: Tensor) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that may be pruned, in the network's order, and module -> why it is left out.

    Args:
        model: in eval mode, every parameter with requires_grad (the graph is read from gradients).
        example: float32 [1, C, H, W].

    Raises:
        UserError: torch cannot trace this network.

    """
    names = {module: name for name, module in model.named_modules()}
    order = {name: place for place, name in enumerate(names.values())}
    traced = []
    for found in _trace(model, example):
        members = sorted(_members(found, names), key=lambda member: order[member.module])
        reason = _bare_parameter(found) or _why_not(members, model)
        group, reason = (Group(members), reason) if reason else _folded(Group(members), model)
        traced.append((group, reason))
    doubtful = _doubtful(traced, model)
    sound, left_out = [], {}
    for group, reason in traced:
        unsure = next((m for m in group.members if (m.module, m.output) in doubtful), None)
        if reason:
            left_out.update(dict.fromkeys(group.producers, reason))
        elif unsure is not None:
            left_out.update({producer: _lost_track(producer, unsure, group) for producer in group.producers})
        else:
            sound += _parted(group)
    return sorted(sound, key=lambda group: order[group.producers[0]]), left_out


def count_logits(model: nn.Module, example: Tensor, *, batch: int = 1) -> int:
    """How many logits the network returns for an image; UserError where it returns anything but float [batch, N]."""
    try:
        answer = model(example)
    except Exception as error:  # whatever a user's forward raises
        raise _cannot_run(model, example, error) from error
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != batch:
        shape = f"{list(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        mode = "training" if model.training else "eval"
        raise UserError(
            f"network {type(model).__name__} in {mode} mode",
            expected=f"logits [{batch}, classes] for images {list(example.shape)}",
            got=shape,
            remedy="wrap it so that its forward returns the logits alone",
        )
    return answer.shape[1]


def _cannot_run(model: nn.Module, example: Tensor, error: Exception) -> UserError:
    return UserError(
        f"network {type(model).__name__}",
        expected=f"a forward that takes float32 {list(example.shape)} and returns logits",
        got=f"{type(error).__name__}: {first_line(error)}",
        remedy="give images of the size and channels it is made for, or mend its forward",
    )


def _trace(model: nn.Module, example: Tensor) -> list[tp.Group]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")  # they keep their groups whole, see below
        try:
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
            return list(graph.get_all_groups(root_module_types=[*PRODUCERS]))
        except Exception as error:  # whatever the tracer meets on its way through a user's forward
            raise _cannot_run(model, example, error) from error


def _members(group: tp.Group, names: Mapping[nn.Module, str]) -> Iterator[Member]:
    for item in group:
        module = item.dep.target.module
        if module in names:
            output = item.dep.handler.__name__ == "prune_out_channels"
            yield Member(names[module], output, list(item.idxs), list(item.root_idxs))


def _bare_parameter(group: tp.Group) -> str | None:
    """Why a group that a parameter outside any known module takes part in must stay whole, or None."""
    if any(isinstance(item.dep.target.module, nn.Parameter) for item in group):
        return "a bare nn.Parameter is joined to it, whose axes are not known"
    return None


def _why_not(members: list[Member], model: nn.Module) -> str | None:
    """Why this group must stay whole, or None."""
    shared = _shared(model)
    for member in members:
        module = model.get_submodule(member.module)
        if not isinstance(module, (*PRODUCERS, *NORMS)):
            return f"{member.module} is a {type(module).__name__}, which is not known to be safe to slice"
        if any(key not in module._parameters for key in ("weight", "bias")) and not isinstance(module, NORMS):
            return f"{member.module} computes its weights from other parameters"
        if member.module in shared:
            return f"{member.module} shares its weights with {shared[member.module]}"
    if all(member.output for member in members):
        return "nothing in the network reads it: it is an output"
    return None


def _shared(model: nn.Module) -> dict[str, str]:
    """Modules that hold the same parameter: name -> name of another one."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(name)
    return {
        one: other
        for ring in holders.values()
        for one, other in zip(ring, [*ring[1:], ring[0]], strict=True)
        if one != other
    }


def _folded(group: Group, model: nn.Module) -> tuple[Group, str | None]:
    """The group with channels tied across the groups of its grouped convolutions, or why that cannot be done.

    Every group of such a convolution must keep as many channels as the others, so the channels at the same
    place of each group become one unit.
    """
    period = 0
    for member in group.members:
        module = model.get_submodule(member.module)
        if not _is_grouped(module):
            continue
        channels = module.out_channels if member.output else module.in_channels
        period = math.gcd(period, channels // module.groups)
        if period == 1:
            return group, f"{member.module} is a grouped convolution with a single channel in a group"
        apart = any((c - u) % period for c, u in zip(member.channels, member.units, strict=True))
        if apart or sorted(set(member.channels)) != list(range(channels)):
            return group, f"{member.module} is a grouped convolution that reads several layers"
    if not period:
        return group, None
    return Group([replace(m, units=[unit % period for unit in m.units]) for m in group.members]), None


def _parted(group: Group) -> list[Group]:
    """The group as several, where its units are not alike.

    A depthwise convolution after a concatenation puts the channels of two convolutions into one group, though each
    unit takes channels out of one of them only. Units that own as much everywhere stay together.
    """
    owned: dict[int, Counter[tuple[str, bool]]] = defaultdict(Counter)
    for member in group.members:
        for unit in member.units:
            owned[unit][member.module, member.output] += 1
    alike: dict[frozenset[tuple[tuple[str, bool], int]], list[int]] = defaultdict(list)
    for unit in sorted(owned):
        alike[frozenset(owned[unit].items())].append(unit)
    return [_part(group, units) for units in alike.values()]


def _part(group: Group, units: list[int]) -> Group:
    """The group less all units but these, which are numbered anew."""
    number = {unit: place for place, unit in enumerate(units)}
    members = []
    for member in group.members:
        pairs = [(c, number[u]) for c, u in zip(member.channels, member.units, strict=True) if u in number]
        if pairs:
            channels, numbers = map(list, zip(*pairs, strict=True))
            members.append(replace(member, channels=channels, units=numbers))
    return Group(members)


def _doubtful(traced: list[tuple[Group, str | None]], model: nn.Module) -> set[tuple[str, bool]]:
    """(module, whether its output) of sound groups with channels that no group has, or that are not there.

    So it is where a concatenation takes in the network's input: torch-pruning then counts the places without it.
    """
    mine = {member.module for group, reason in traced if not reason for member in group.members}
    seen: dict[tuple[str, bool, int], set[int]] = defaultdict(set)
    for member in (member for group, _ in traced for member in group.members if member.module in mine):
        module = model.get_submodule(member.module)
        for _, _, size in touched(module, member):
            seen[member.module, member.output, size].update(places(module, member, size))
    return {(module, output) for (module, output, size), channels in seen.items() if channels != set(range(size))}


def _lost_track(producer: str, unsure: Member, group: Group) -> str:
    """Why `producer` is left out where the channels of one side of a module of its group are not all known."""
    how = "on the way they are reshaped, split, repeated, mixed, or joined with the image's"
    if not unsure.output:
        return f"{unsure.module} reads its channels, but which is which is not known: {how}"
    shown = ", ".join(group.readers[:4]) + (", ..." if len(group.readers) > 4 else "")
    whose = "its channels" if unsure.module == producer else f"it is tied to {unsure.module}, whose channels"
    return f"{whose} cannot be followed to all that read them ({shown}): {how}"


def places(module: nn.Module, member: Member, size: int) -> list[int]:
    """The member's channels as indices of an axis of `size`: in a grouped convolution it may hold one group's."""
    return [channel % size for channel in member.channels] if _is_grouped(module) else member.channels


def is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether each channel of this convolution is read and written by itself."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def _is_grouped(module: nn.Module) -> TypeGuard[_Convolution]:
    return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1 and not is_depthwise(module)


def touched(module: nn.Module, member: Member) -> Iterator[tuple[str, int, int]]:
    """(tensor name, axis, size) that this member slices."""
    for key, tensor in module_tensors(module).items():
        if tensor.dim() == 0:
            continue
        if isinstance(module, NORMS) or is_depthwise(module):
            axis = 0
        elif key == "bias":
            if not member.output:
                continue
            axis = 0
        else:
            axis = int(member.output == isinstance(module, TRANSPOSED))
        yield f"{member.module}.{key}", axis, tensor.shape[axis]


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    found = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in found.items() if tensor is not None}
