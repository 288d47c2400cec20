"""ChannelPlan: which channels of a network live or die together, what they cost, and how to take them out.

Made once for a network; afterwards parameters and MACs of any mask are counted without building anything, and
`compact` is plain indexing. Called by the Recognizer (env/recognizer.py) and by the ladder (agents/ladder.py).

Words: a *unit* is one decision (a filter, with every channel that is tied to it); a *layer* is a group of units
that stand side by side in the same tensors. The groups come from torch-pruning's DependencyGraph
(Fang et al., DepGraph, CVPR 2023).
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch_pruning as tp
from torch import Tensor, nn

__all__ = ["NORMS", "PRODUCERS", "TRANSPOSED", "ChannelPlan", "Layer", "adopt"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PRODUCERS = (*_CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A group of units that stand side by side.

    `modules` names the convolutions, linear layers and norms whose outputs the units are; unit number
    `first + i` is the i-th of `units`.
    """

    name: str
    first: int
    units: int
    modules: tuple[str, ...]


class ChannelPlan:
    """Units of a network, the tensors' axes they own, and the cost of keeping any of them.

    Args:
        network: any network that torch can trace; it is not changed.
        example: float32 [1, C, H, W], an input of the size the network is used at (MACs depend on it).

    Attributes:
        layers: the prunable layers, in the network's order.
        layer_of: int64 [F], the layer of each unit.
        left_out: module name -> why it is not pruned.

    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():  # the graph is read from the gradients' own
            model = copy.deepcopy(network).eval().requires_grad_(True)
            groups, self.left_out = _find_groups(model, example.clone())
        self.layers = tuple(_layers(groups))
        self.layer_of = torch.repeat_interleave(
            torch.arange(len(self.layers)), torch.tensor([layer.units for layer in self.layers], dtype=torch.int64)
        )
        self.owners = _owners(model, groups, self.layers)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._parameter_cost = _Cost(shapes, dict.fromkeys(shapes, 1), self.owners, self.layer_of)
        positions = _positions(model, example)
        weights = {name: shapes[name] for name in positions}
        self._mac_cost = _Cost(weights, positions, self.owners, self.layer_of)

    @property
    def units(self) -> int:
        """F, the number of units."""
        return len(self.layer_of)

    @property
    def widths(self) -> Tensor:
        """int64 [L], units of each layer in the full network."""
        return torch.tensor([layer.units for layer in self.layers], dtype=torch.int64)

    def kept_per_layer(self, keep_mask: Tensor) -> Tensor:
        """Units kept in each layer: bool [..., F] -> int64 [..., L]."""
        shape = (*keep_mask.shape[:-1], len(self.layers))
        index = self.layer_of.to(keep_mask.device).expand(keep_mask.shape)
        kept = torch.zeros(shape, dtype=torch.int64, device=keep_mask.device)
        return kept.scatter_add(-1, index, keep_mask.to(torch.int64))

    def parameters(self, kept: Tensor) -> Tensor:
        """Parameters of the compact network: int64 [..., L] units kept -> int64 [...]."""
        return self._parameter_cost(kept)

    def macs(self, kept: Tensor) -> Tensor:
        """Multiply-accumulates of convolutions and linear layers for one input: int64 [..., L] -> int64 [...]."""
        return self._mac_cost(kept)

    def compact(self, network: nn.Module, keep_mask: Tensor, have: Tensor | None = None) -> nn.Module:
        """Return a copy of `network` in which the units outside `keep_mask` are really gone.

        Args:
            network: the planned network, or a compact form of it.
            keep_mask: bool [F], 1 = kept.
            have: bool [F], the units that `network` still has; all of them by default.

        """
        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        sliced: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part = tensor.detach()
            for axis, owner in self.axes(name, have):
                kept = ((owner < 0) | keep_mask[owner.clamp(min=0)]).nonzero().squeeze(1)
                part = part.index_select(axis, kept.to(part.device))
            sliced[name] = part if part is not tensor and part.data_ptr() != tensor.data_ptr() else part.clone()
        # Structure is copied, tensors are not: they are all replaced a line later.
        shell = copy.deepcopy(network, memo={id(tensor): tensor for tensor in tensors.values()})
        return adopt(shell, sliced)

    def axes(self, name: str, have: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The pruned axes of a tensor: (axis, int64 owner of each index, -1 = nobody's), less what is gone."""
        for axis, owner in self.owners.get(name, {}).items():
            yield axis, owner if have is None else owner[(owner < 0) | have[owner.clamp(min=0)]]


def adopt(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give `network` these tensors, by name, and set each module's sizes to fit them; returns `network`.

    This is all that rebuilding a compact network takes, so a saved one needs its tensors and its factory only.
    """
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for kind in (module._parameters, module._buffers):
            for key, old in kind.items():
                if old is not None and prefix + key in tensors:
                    new = tensors[prefix + key]
                    kind[key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        _fit(module)
    return network


def _fit(module: nn.Module) -> None:
    """Set a module's sizes from its own tensors."""
    if isinstance(module, (*_CONVOLUTIONS, *TRANSPOSED)):
        first, second = module.weight.shape[:2]
        if _depthwise(module):
            module.groups = module.in_channels = module.out_channels = first
        elif isinstance(module, _CONVOLUTIONS):
            module.out_channels, module.in_channels = first, second * module.groups
        else:
            module.in_channels, module.out_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        module.num_features = next((len(t) for t in _tensors(module).values() if t.dim() == 1), module.num_features)


class _Cost:
    """Sum over tensors of factor x product of kept axis lengths, as a function of units kept per layer.

    Every axis length is affine in the kept counts: fixed + multiplicity @ kept. A flattened feature map has
    multiplicity H*W, a concatenation several non-zero layers.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, int],
        owners: Mapping[str, Mapping[int, Tensor]],
        layer_of: Tensor,
    ) -> None:
        layers = int(layer_of.max()) + 1 if len(layer_of) else 0
        widths = torch.bincount(layer_of, minlength=layers)
        axes = max([len(axes) for axes in owners.values()], default=0)
        self.factor = torch.zeros(len(shapes), dtype=torch.int64)
        self.fixed = torch.ones(len(shapes), axes, dtype=torch.int64)
        self.multiplicity = torch.zeros(len(shapes), axes, layers, dtype=torch.int64)
        for row, (name, shape) in enumerate(shapes.items()):
            owned = owners.get(name, {})
            rest = [size for axis, size in enumerate(shape) if axis not in owned]
            self.factor[row] = factors[name] * int(torch.tensor(rest, dtype=torch.int64).prod())
            for column, owner in enumerate(owned.values()):
                mine = layer_of[owner[owner >= 0]]
                self.fixed[row, column] = int((owner < 0).sum())
                self.multiplicity[row, column] = torch.bincount(mine, minlength=layers) // widths

    def __call__(self, kept: Tensor) -> Tensor:
        # float64 is exact to 2**53, and has a fast matrix product where int64 has none
        flat = self.multiplicity.flatten(0, 1).to(kept.device, torch.float64)
        lengths = (kept.to(torch.float64) @ flat.T).reshape(*kept.shape[:-1], *self.fixed.shape)
        sizes = (lengths + self.fixed.to(kept.device)).prod(-1)
        return (sizes * self.factor.to(kept.device)).sum(-1).to(torch.int64)


@dataclass(frozen=True)
class _Member:
    """One tensor axis of a group: `roots[i]` is the position in the group that owns index `indices[i]`."""

    module: str
    output: bool
    indices: list[int]
    roots: list[int]


def _find_groups(model: nn.Module, example: Tensor) -> tuple[list[list[_Member]], dict[str, str]]:
    names = {module: name for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")  # they keep their groups whole, see below
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    order = {name: place for place, name in enumerate(names.values())}
    traced = []
    for group in graph.get_all_groups(root_module_types=[*_CONVOLUTIONS, *TRANSPOSED, nn.Linear]):
        members = sorted(_members(group, names), key=lambda member: order[member.module])
        traced.append((members, _bare_parameter(group) or _why_not(members, model)))
    doubtful = _doubtful([members for members, reason in traced if not reason], [m for m, _ in traced], model)
    found, left_out = [], {}
    for members, reason in traced:
        producers = [member.module for member in members if member.output]
        unsure = next((m.module for m in members if (m.module, m.output) in doubtful), None)
        if not reason and unsure is not None:
            reason = f"{unsure} reads channels that come from outside any layer: their places are not known"
        if reason:
            left_out.update(dict.fromkeys(producers, reason))
        else:
            found.append((order[producers[0]], members))
    return [members for _, members in sorted(found, key=lambda pair: pair[0])], left_out


def _members(group: tp.Group, names: Mapping[nn.Module, str]) -> Iterator[_Member]:
    for item in group:
        module = item.dep.target.module
        if module in names:
            output = item.dep.handler.__name__ == "prune_out_channels"
            yield _Member(names[module], output, list(item.idxs), list(item.root_idxs))


def _bare_parameter(group: tp.Group) -> str | None:
    """Why a group that a parameter outside any known module takes part in must stay whole, or None."""
    if any(isinstance(item.dep.target.module, nn.Parameter) for item in group):
        return "a bare nn.Parameter is joined to it, whose axes are not known"
    return None


def _why_not(members: list[_Member], model: nn.Module) -> str | None:
    """Why this group must stay whole, or None."""
    for member in members:
        module = model.get_submodule(member.module)
        if not isinstance(module, (*PRODUCERS, *NORMS)):
            return f"{member.module} is a {type(module).__name__}, which is not known to be safe to slice"
        if isinstance(module, (*_CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1 and not _depthwise(module):
            return f"{member.module} is a grouped convolution ({module.groups} groups)"
    if all(member.output for member in members):
        return "nothing in the network reads it: it is an output"
    return None


def _doubtful(sound: list[list[_Member]], everything: list[list[_Member]], model: nn.Module) -> set[tuple[str, bool]]:
    """(module, whether its output) of sound groups with channels that no group has, or that are not there.

    So it is where a concatenation takes in the network's input: torch-pruning then counts the places without it.
    """
    mine = {member.module for members in sound for member in members}
    seen: dict[tuple[str, bool, int], set[int]] = defaultdict(set)
    for member in (member for members in everything for member in members if member.module in mine):
        for _, _, size in _touched(model.get_submodule(member.module), member):
            seen[member.module, member.output, size].update(member.indices)
    return {(module, output) for (module, output, size), indices in seen.items() if indices != set(range(size))}


def _depthwise(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    return (
        isinstance(module, _CONVOLUTIONS)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def _layers(groups: list[list[_Member]]) -> Iterator[Layer]:
    first = 0
    for members in groups:
        units = 1 + max(root for member in members for root in member.roots)
        modules = tuple(dict.fromkeys(member.module for member in members if member.output))
        yield Layer(name=modules[0], first=first, units=units, modules=modules)
        first += units


def _owners(model: nn.Module, groups: list[list[_Member]], layers: tuple[Layer, ...]) -> dict[str, dict[int, Tensor]]:
    """For each tensor and axis that pruning touches: int64 [size], the unit that owns each index or -1."""
    owners: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for members, layer in zip(groups, layers, strict=True):
        for member in members:
            module = model.get_submodule(member.module)
            units = torch.tensor(member.roots) + layer.first
            for name, axis, size in _touched(module, member):
                owner = owners[name].setdefault(axis, torch.full((size,), -1, dtype=torch.int64))
                owner[member.indices] = units
    return dict(owners)


def _touched(module: nn.Module, member: _Member) -> Iterator[tuple[str, int, int]]:
    """(tensor name, axis, size) that this member slices."""
    for key, tensor in _tensors(module).items():
        if tensor.dim() == 0:
            continue
        if isinstance(module, NORMS) or _depthwise(module):
            axis = 0
        elif key == "bias":
            if not member.output:
                continue
            axis = 0
        else:
            axis = int(member.output == isinstance(module, TRANSPOSED))
        yield f"{member.module}.{key}", axis, tensor.shape[axis]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    found = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """How often each weight of a convolution or linear layer is used for one input: output positions."""
    positions: dict[str, int] = defaultdict(int)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PRODUCERS):

            def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                # a transposed convolution uses each weight once per *input* position
                seen = inputs[0] if isinstance(module, TRANSPOSED) else output
                channels = seen.shape[-1] if isinstance(module, nn.Linear) else seen.shape[1]
                positions[f"{name}.weight"] += seen.numel() // (seen.shape[0] * channels)

            handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return dict(positions)
