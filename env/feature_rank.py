"""Mean rank of a filter's feature maps: HRank's importance (Lin et al., "HRank", CVPR 2020, section 3.2).

A map of low rank holds little, whatever the images, so its filter can go. Called by env/importance.py.

What is measured is the map after the activation. Where channels of several convolutions live or die together, as in a
residual sum, those are also the maps that the next convolutions read; a unit's score is the mean over all its maps.
"""

import contextlib
from collections.abc import Iterable, Iterator
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
    watch = _Watch(network, plan, keep_mask)
    with torch.inference_mode():
        for number, (images, _) in enumerate(batches):
            if number == 0:
                watch.unseen = watch.layers_unseen_in(images[:1])
            watch.look(images)
    network.train(was_training)
    return watch.total / watch.maps.clamp(min=1), watch.maps


class _Watch:
    """Looks on while a network runs, and adds up the ranks of its units' maps.

    Which map is whose is told call by call, by the tensors themselves: a module may be called in many places.

    Attributes:
        total: float64 [F], the sum of each unit's ranks.
        maps: float64 [F], of how many maps.
        unseen: layers whose activation is no module, and whose maps are no sum that a convolution reads: theirs are
            looked at where they are made, as a ReLU would leave them.

    """

    def __init__(self, network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> None:
        self._network, self._plan = network, plan
        self.total, self.maps = torch.zeros(2, plan.units, dtype=torch.float64)
        self.unseen: set[int] = set()
        self._made: dict[int, Tensor] = {}  # by the identity of a tensor that an end returned, whose its channels are
        self._counted: set[int] = set()
        self._kept: list[Tensor] = []  # all of these, so that none has the identity of one that is gone
        self._ends = {
            path: output_owner(path, network.get_submodule(path), plan, keep_mask)
            for path in dict.fromkeys(path for layer in plan.layers for path in layer.modules)
        }
        self._readers = dict(_readers(network, plan, keep_mask))

    def layers_unseen_in(self, image: Tensor) -> set[int]:
        """Layers none of whose maps is seen behind an activation, or by a reader, when `image` [1, C, H, W] is run."""
        self.look(image)
        unseen = {
            number
            for number, layer in enumerate(self._plan.layers)
            if not bool(self.maps[layer.first : layer.first + layer.units].any())
        }
        self.total.zero_()
        self.maps.zero_()
        return unseen

    def look(self, images: Tensor) -> None:
        """Run the network on images [B, C, H, W], and count."""
        self._made, self._counted, self._kept = {}, set(), []
        with contextlib.ExitStack() as hooks:
            for path, owner in self._ends.items():
                module = self._network.get_submodule(path)
                hooks.callback(module.register_forward_hook(self._on_end(path, owner)).remove)
            for module, owner in self._readers.items():
                hooks.callback(module.register_forward_pre_hook(self._on_reader(owner)).remove)
            for module in self._network.modules():
                if type(module).__module__ == _ACTIVATIONS:
                    hooks.callback(module.register_forward_hook(self._on_activation).remove)
            self._network(images)
        self._kept = []

    def _on_end(self, path: str, owner: Tensor) -> Any:
        layers = enumerate(self._plan.layers)
        here = torch.tensor([number in self.unseen and layer.modules[-1] == path for number, layer in layers])
        unseen = torch.where((owner >= 0) & here[self._plan.layer_of[owner.clamp(min=0)]], owner, -1)

        def look(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._made[id(output)] = owner
            self._kept.append(output)
            if bool((unseen >= 0).any()):
                maps = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output
                self._count(maps.relu(), unseen)

        return look

    def _on_activation(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        owner = self._made.get(id(inputs[0])) if inputs else None
        if owner is not None and isinstance(output, Tensor):
            self._count(output, owner)

    def _on_reader(self, owner: Tensor) -> Any:
        return lambda _module, inputs: self._count(inputs[0], owner)

    def _count(self, maps: Tensor, owner: Tensor) -> None:
        """Add the ranks of maps [B, C, ...], once for each tensor; `owner` is int64 [C]."""
        if id(maps) in self._counted:
            return
        self._counted.add(id(maps))
        self._kept.append(maps)
        owned, ranks = owner >= 0, _ranks(maps)
        self.total.index_add_(0, owner[owned], ranks.sum(0)[owned])
        self.maps.index_add_(0, owner[owned], torch.full((int(owned.sum()),), len(ranks), dtype=torch.float64))


def _readers(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """The ordinary convolutions that read the sum of several others' maps, with the unit of each channel, or -1.

    Such a sum is made by no module, so its activation cannot be told from others.
    """
    joined = torch.tensor([_several(network, layer.modules) for layer in plan.layers])
    for path, module in network.named_modules():
        if isinstance(module, CONVOLUTIONS) and module.groups == 1:
            owner = dict(plan.axes(f"{path}.weight", keep_mask)).get(1)
            if owner is not None:
                mine = (owner >= 0) & joined[plan.layer_of[owner.clamp(min=0)]]
                if bool(mine.any()):
                    yield module, torch.where(mine, owner, -1)


def _several(network: nn.Module, modules: tuple[str, ...]) -> bool:
    """Whether more than one convolution makes the units, which a sum then joins."""
    made = [network.get_submodule(path) for path in modules]
    return sum(isinstance(module, CONVOLUTIONS) and not is_depthwise(module) for module in made) > 1


def _ranks(maps: Tensor) -> Tensor:
    """Rank of each map: [B, C, H, W] or [B, C] -> float64 [B, C] on the CPU."""
    flat = maps.float().reshape(maps.shape[0] * maps.shape[1], *(maps.shape[2:] if maps.dim() > 3 else (1, -1)))
    lot = max(1, _AT_ONCE // max(1, flat[0].numel()))
    ranks = torch.cat([torch.linalg.matrix_rank(part) for part in torch.split(flat, lot)])
    return ranks.view(maps.shape[:2]).to("cpu", torch.float64)
