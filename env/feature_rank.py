"""Mean rank of a filter's feature maps: HRank's importance (Lin et al., "HRank", CVPR 2020, section 3.2).

A map of low rank holds little, whatever the images, so its filter can go. Called by env/importance.py.

What is measured is the map after the activation. Where channels of several convolutions live or die together, as in a
residual sum, those are also the maps that the next convolutions read; a unit's score is the mean over all its maps.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.groups import CONVOLUTIONS, is_depthwise
from env.zero_out import output_owner

__all__ = ["feature_rank"]

_AT_ONCE = 1 << 22  # elements of the maps whose ranks are computed together: bounds the memory of the decomposition
_ACTIVATIONS = "torch.nn.modules.activation"


def feature_rank(
    network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean rank of each unit's feature maps, and how many maps that is the mean of: float64 [F] each, 0 where gone.

    Args:
        network: compact for `keep_mask`; evaluated in eval mode.
        plan: its units.
        keep_mask: bool [F].
        batches: normalised images float32 [B, C, H, W], with labels that are not looked at.

    """
    was_training = network.training
    network.eval()
    total, maps = torch.zeros(2, plan.units, dtype=torch.float64)
    sources: list[_Source] = []
    with torch.inference_mode():
        for images, _ in batches:
            sources = sources or list(_sources(network, plan, keep_mask, images[:1]))
            with contextlib.ExitStack() as hooks:
                for source in sources:
                    hooks.enter_context(source.added_to(total, maps))
                network(images)
    network.train(was_training)
    return total / maps.clamp(min=1), maps


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A place in the network where units' maps can be seen: what `module` returns, or what it reads.

    `owner` is int64 [C], the unit of each channel or -1. `activated` is whether an activation has been there.
    """

    module: nn.Module
    reads: bool
    owner: Tensor
    activated: bool = True

    @contextlib.contextmanager
    def added_to(self, total: Tensor, maps: Tensor) -> Iterator[None]:
        """Add the ranks of what passes here to the units' `total`, and their number to `maps`; both float64 [F]."""

        def look(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0] if self.reads else output
            seen = seen.movedim(-1, 1) if isinstance(self.module, nn.Linear) and not self.reads else seen
            ranks = _ranks(seen if self.activated else seen.relu())
            owned = self.owner >= 0
            total.index_add_(0, self.owner[owned], ranks.sum(0)[owned])
            maps.index_add_(0, self.owner[owned], torch.full((int(owned.sum()),), len(ranks), dtype=torch.float64))

        handle = self.module.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()


def _sources(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, image: Tensor) -> Iterator[_Source]:
    """Where the maps of each layer are seen; `image` [1, C, H, W] is run to find out what follows what."""
    flow: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # what each module read and returned, at its last call

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            flow[module] = inputs[0], output

    handles = [module.register_forward_hook(note) for module in network.modules()]
    network(image)
    for handle in handles:
        handle.remove()
    for number in range(len(plan.layers)):
        yield from _of_layer(network, plan, keep_mask, number, flow)


def _of_layer(
    network: nn.Module,
    plan: ChannelPlan,
    keep_mask: Tensor,
    number: int,
    flow: Mapping[nn.Module, tuple[Tensor, Tensor]],
) -> Iterator[_Source]:
    """The places where one layer's maps are seen, each map once."""
    layer, found = plan.layers[number], dict[int, _Source]()
    ends = {path: network.get_submodule(path) for path in layer.modules}
    for path, end in ends.items():
        owner = _owned_by(plan, number, output_owner(path, end, plan, keep_mask))
        for module, (read, returned) in flow.items():
            if type(module).__module__ == _ACTIVATIONS and end in flow and read is flow[end][1]:
                found[id(returned)] = _Source(module=module, reads=False, owner=owner)
    if _several(ends.values()) or not found:
        for module, owner in _readers(network, plan, keep_mask, number):
            if module in flow:
                found.setdefault(id(flow[module][0]), _Source(module=module, reads=True, owner=owner))
    if not found:  # an activation that is no module, and no convolution after it
        last, end = list(ends.items())[-1]
        owner = _owned_by(plan, number, output_owner(last, end, plan, keep_mask))
        found[0] = _Source(module=end, reads=False, owner=owner, activated=False)
    yield from found.values()


def _several(ends: Iterable[nn.Module]) -> bool:
    """Whether more than one convolution makes the units, which a sum then joins."""
    return sum(isinstance(module, CONVOLUTIONS) and not is_depthwise(module) for module in ends) > 1


def _readers(
    network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, number: int
) -> Iterator[tuple[nn.Module, Tensor]]:
    """The ordinary convolutions that read channels of a layer, each with the owners of what it reads."""
    for path, module in network.named_modules():
        if isinstance(module, CONVOLUTIONS) and module.groups == 1:
            owner = dict(plan.axes(f"{path}.weight", keep_mask)).get(1)
            if owner is not None and bool((_owned_by(plan, number, owner) >= 0).any()):
                yield module, _owned_by(plan, number, owner)


def _owned_by(plan: ChannelPlan, number: int, owner: Tensor) -> Tensor:
    """The owners that are units of one layer; -1 for all others."""
    mine = (owner >= 0) & (plan.layer_of[owner.clamp(min=0)] == number)
    return torch.where(mine, owner, -1)


def _ranks(maps: Tensor) -> Tensor:
    """Rank of each map: [B, C, H, W] or [B, C] -> float64 [B, C] on the CPU."""
    flat = maps.float().reshape(maps.shape[0] * maps.shape[1], *(maps.shape[2:] if maps.dim() > 3 else (1, -1)))
    lot = max(1, _AT_ONCE // max(1, flat[0].numel()))
    ranks = torch.cat([torch.linalg.matrix_rank(part) for part in torch.split(flat, lot)])
    return ranks.view(maps.shape[:2]).to("cpu", torch.float64)
