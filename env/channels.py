"""ChannelPlan: which channels of a network live or die together, what they cost, and how to take them out.

Made once for a network; afterwards parameters and MACs of any mask are counted without building anything, and
`compact` is plain indexing. Called by the Recognizer (env/recognizer.py) and by the ladder (agents/ladder.py).

Words: a *unit* is one decision (a filter, with every channel that is tied to it); a *layer* is a group of units
that stand side by side in the same tensors. The groups come from torch-pruning's DependencyGraph
(Fang et al., DepGraph, CVPR 2023).
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from env.copies import adopt, structure_of, tensors_of
from env.errors import UserError, first_line
from env.groups import (
    PRODUCERS,
    TRANSPOSED,
    Group,
    count_logits,
    find_groups,
    is_depthwise,
    places,
    touched,
)
from env.trials import find_broken

__all__ = ["MEASURES", "ChannelPlan", "Layer", "costs_of"]

#: What compression can be counted in; each is a method of ChannelPlan.
MEASURES = ("parameters", "macs", "bytes")
_HARDLY = 0.01  # of all multiply-accumulates: what lies outside the modules is not worth a word


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A group of units that stand side by side.

    `modules` names the convolutions, linear layers and norms whose outputs the units are; unit number
    `first + i` is the i-th of `units`. `paths` counts the ways through them, from each convolution or linear layer that
    writes them to each that reads them; one that reads and writes them channel by channel (depthwise) is part of a way.
    """

    name: str
    first: int
    units: int
    modules: tuple[str, ...]
    paths: int


class ChannelPlan:
    """Units of a network, the tensors' axes they own, and the cost of keeping any of them.

    Args:
        network: any network that torch can trace; it is not changed.
        example: float32 [1, C, H, W], an input of the size the network is used at (MACs depend on it).

    Attributes:
        layers: the prunable layers, in the network's order.
        layer_of: int64 [F], the layer of each unit.
        widths: int64 [L], units of each layer in the full network.
        paths: int64 [L], the ways through each layer: 1 in a plain network, more where outputs are added or joined.
        left_out: module name -> why it is not pruned.
        outputs: how many logits the network returns for an image.
        macs_outside: multiply-accumulates of the full network outside the convolutions and linear layers that it calls
            (functional calls, products of maps); no measure counts them.

    Raises:
        UserError: the network cannot be copied, run or traced, or does not return logits [1, outputs].

    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():  # the graph is read from the gradients' own
            model = _copied(network).eval().requires_grad_(True)
            self.outputs = count_logits(model, example.clone())
            groups, self.left_out = find_groups(model, example.clone())
        self._assign(model, groups)
        broken = find_broken(self, model, example)
        for layer, reason in broken.items():
            self.left_out.update(dict.fromkeys(self.layers[layer].modules, reason))
        if broken:
            self._assign(model, [group for layer, group in enumerate(groups) if layer not in broken])
        positions, all_macs = _used(model, example)
        self.left_out.update(_unnamed(model, self.layers, self.left_out, positions))
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        self._costs = {
            "parameters": self._cost(dict.fromkeys(tensors, 1), tensors),
            "macs": self._cost(positions, _weights(model)),
        }
        self.macs_outside = max(0, all_macs - int(self.macs(self.widths)))
        tensors |= dict(model.named_buffers())
        self._costs["bytes"] = self._cost({name: t.element_size() for name, t in tensors.items()}, tensors)

    def _assign(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Number the units of these groups, and find the places they own."""
        self.layers = tuple(_layers(model, groups))
        self.widths = torch.tensor([layer.units for layer in self.layers], dtype=torch.int64)
        self.paths = torch.tensor([layer.paths for layer in self.layers], dtype=torch.int64)
        self.layer_of = torch.repeat_interleave(torch.arange(len(self.layers)), self.widths)
        self.owners = _owners(model, groups, self.layers)

    def _cost(self, factors: Mapping[str, int], tensors: Mapping[str, Tensor]) -> "_Cost":
        shapes = {name: tuple(tensors[name].shape) for name in factors}
        return _Cost(shapes, factors, self.owners, self.layer_of)

    @property
    def units(self) -> int:
        """F, the number of units."""
        return len(self.layer_of)

    def kept_per_layer(self, keep_mask: Tensor) -> Tensor:
        """Units kept in each layer: bool [..., F] -> int64 [..., L]."""
        shape = (*keep_mask.shape[:-1], len(self.layers))
        index = self.layer_of.to(keep_mask.device).expand(keep_mask.shape)
        kept = torch.zeros(shape, dtype=torch.int64, device=keep_mask.device)
        return kept.scatter_add(-1, index, keep_mask.to(torch.int64))

    def parameters(self, kept: Tensor) -> Tensor:
        """Parameters of the compact network: int64 [..., L] units kept -> int64 [...]."""
        return self.cost("parameters", kept)

    def macs(self, kept: Tensor) -> Tensor:
        """Multiply-accumulates of convolutions and linear layers for one input: int64 [..., L] -> int64 [...]."""
        return self.cost("macs", kept)

    def cost(self, measure: str, kept: Tensor) -> Tensor:
        """What the compact network costs in one of `MEASURES`: int64 [..., L] units kept -> int64 [...].

        "bytes" are those of all parameters and buffers as they are stored.
        """
        return self._costs[measure](kept)

    def costs(self, kept: Tensor) -> dict[str, int]:
        """All of `MEASURES` for one state, int64 [L] units kept."""
        return {measure: int(self.cost(measure, kept)) for measure in MEASURES}

    @property
    def share_outside(self) -> float:
        """`macs_outside` as a share of all multiply-accumulates of the full network."""
        return self.macs_outside / max(1, self.macs_outside + int(self.macs(self.widths)))

    @property
    def uncounted(self) -> str:
        """A clause on the multiply-accumulates that no measure counts; "" where they hardly matter."""
        if self.share_outside < _HARDLY:
            return ""
        return (
            f"{self.macs_outside:,} more MACs ({self.share_outside:.0%} of all) lie outside the convolutions and "
            "linear layers that it calls, and are not counted"
        )

    def compact(self, network: nn.Module, keep_mask: Tensor, have: Tensor | None = None) -> nn.Module:
        """Return a copy of `network` in which the units outside `keep_mask` are really gone.

        Args:
            network: the planned network, or a compact form of it.
            keep_mask: bool [F], 1 = kept.
            have: bool [F], the units that `network` still has; all of them by default.

        """
        tensors = tensors_of(network)
        sliced: dict[str, Tensor] = {}
        kept: dict[int, Tensor] = {}  # by owner, of which equal ones are the same tensor
        for name, tensor in tensors.items():
            part = tensor.detach()
            for axis, owner in self.owners.get(name, {}).items():
                if id(owner) not in kept:
                    left = _left(owner, have)
                    kept[id(owner)] = ((left < 0) | keep_mask[left.clamp(min=0)]).nonzero().squeeze(1)
                part = part.index_select(axis, kept[id(owner)].to(part.device))
            sliced[name] = part if part is not tensor and part.data_ptr() != tensor.data_ptr() else part.clone()
        return adopt(structure_of(network, tensors), sliced)

    def axes(self, name: str, have: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The pruned axes of a tensor: (axis, int64 owner of each index, -1 = nobody's), less what is gone."""
        for axis, owner in self.owners.get(name, {}).items():
            yield axis, _left(owner, have)


def costs_of(network: nn.Module, example: Tensor) -> dict[str, int]:
    """What a network costs as it is, by `MEASURES`: what a plan of it counts for its full widths, without one.

    `example` is float32 [1, C, H, W] on the network's device; the network is not changed.
    """
    model = _copied(network).eval()
    positions, _ = _used(model, example)
    weights, stored = _weights(model), [*model.parameters(), *model.buffers()]
    return {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "macs": sum(times * weights[name].numel() for name, times in positions.items()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
    }


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
        axes = max([1, *(len(axes) for axes in owners.values())])
        factor = torch.zeros(len(shapes), dtype=torch.int64)
        lengths = torch.zeros(len(shapes), axes, 1 + layers, dtype=torch.int64)  # of each axis: fixed, multiplicities
        lengths[:, :, 0] = 1
        for row, (name, shape) in enumerate(shapes.items()):
            owned = owners.get(name, {})
            rest = [size for axis, size in enumerate(shape) if axis not in owned]
            factor[row] = factors[name] * int(torch.tensor(rest, dtype=torch.int64).prod())
            for column, owner in enumerate(owned.values()):
                mine = layer_of[owner[owner >= 0]]
                lengths[row, column, 0] = int((owner < 0).sum())
                lengths[row, column, 1:] = torch.bincount(mine, minlength=layers) // widths
        alike, of_row = torch.unique(lengths, dim=0, return_inverse=True)  # a norm has five tensors, of one length
        factor = torch.zeros(len(alike), dtype=torch.int64).index_add_(0, of_row, factor)
        # float64 is exact to 2**53, and has a fast matrix product where int64 has none
        self._factor = factor.to(torch.float64)
        self._fixed = alike[:, :, 0].to(torch.float64)
        self._multiplicity = alike[:, :, 1:].flatten(0, 1).to(torch.float64).T

    def __call__(self, kept: Tensor) -> Tensor:
        device = kept.device
        grown = (kept.to(torch.float64) @ self._multiplicity.to(device)).view(*kept.shape[:-1], *self._fixed.shape)
        cost: Tensor = (grown + self._fixed.to(device)).prod(-1) @ self._factor.to(device)
        return cost.to(torch.int64)


def _layers(model: nn.Module, groups: Sequence[Group]) -> Iterator[Layer]:
    first = 0
    for group in groups:
        yield Layer(
            name=group.producers[0],
            first=first,
            units=group.units,
            modules=group.producers,
            paths=max(1, len(_writers(model, group)) * len(group.readers)),
        )
        first += group.units


def _writers(model: nn.Module, group: Group) -> list[str]:
    """The convolutions and linear layers that make the group's channels of others."""
    modules = {name: model.get_submodule(name) for name in group.producers}
    return [name for name, module in modules.items() if isinstance(module, PRODUCERS) and not is_depthwise(module)]


def _owners(model: nn.Module, groups: Sequence[Group], layers: Sequence[Layer]) -> dict[str, dict[int, Tensor]]:
    """For each tensor and axis that pruning touches: int64 [size], the unit that owns each index or -1."""
    owners: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for group, layer in zip(groups, layers, strict=True):
        for member in group.members:
            module = model.get_submodule(member.module)
            units = torch.tensor(member.units) + layer.first
            for name, axis, size in touched(module, member):
                owner = owners[name].setdefault(axis, torch.full((size,), -1, dtype=torch.int64))
                owner[places(module, member, size)] = units
    distinct: dict[bytes, Tensor] = {}
    return {
        name: {axis: distinct.setdefault(owner.numpy().tobytes(), owner) for axis, owner in axes.items()}
        for name, axes in owners.items()
    }


def _left(owner: Tensor, have: Tensor | None) -> Tensor:
    """What is left of the owners of an axis, int64 [size], where only the units `have`, bool [F], are there."""
    return owner if have is None else owner[(owner < 0) | have[owner.clamp(min=0)]]


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:  # torch's old weight_norm, modules that hold locks or files
        raise UserError(
            f"network {type(network).__name__}",
            expected="a network that copy.deepcopy can copy",
            got=f"{type(error).__name__}: {first_line(error)}",
            remedy="use torch.nn.utils.parametrizations instead of the old weight_norm, or mend its state",
        ) from error


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every convolution and linear layer, also of one that is computed from other parameters."""
    return {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, PRODUCERS)}


def _unnamed(
    model: nn.Module, layers: Sequence[Layer], left_out: Mapping[str, str], positions: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """(module, reason) for each convolution and linear layer that the graph does not show at all."""
    named = {module for layer in layers for module in layer.modules} | set(left_out)
    for name, module in model.named_modules():
        if isinstance(module, PRODUCERS) and name not in named:
            called = f"{name}.weight" in positions
            yield (
                name,
                (
                    "no gradient reaches it, so that what reads it is not known"
                    if called
                    else "the network does not call it in eval mode: what else reads its weights is not known"
                ),
            )


def _used(model: nn.Module, example: Tensor) -> tuple[dict[str, int], int]:
    """How often each weight of a convolution or linear layer is used for one input, and the MACs of everything.

    A weight is used once for each output position; the second count is torch's own, of whatever is called.
    """
    positions: dict[str, int] = defaultdict(int)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PRODUCERS):

            def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                # a transposed convolution uses each weight once per *input* position
                seen = inputs[0] if isinstance(module, TRANSPOSED) else output
                channels = seen.shape[-1] if isinstance(module, nn.Linear) else seen.shape[1]
                # not by the module's own batch: a forward may fold patches of the one image into it
                positions[f"{name}.weight"] += seen.numel() // channels

            handles.append(module.register_forward_hook(count))
    # with gradients: without them attention takes a path that the counter does not know
    with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(example.clone())
    for handle in handles:
        handle.remove()
    return dict(positions), counter.get_total_flops() // 2
