"""The ZeroOut layer: a binary mask over filters, and the masked form of a network.

The mask stands after every module that carries a layer's channels, batch-norm included. Zeroing only the convolution
in front of a batch-norm would let its shift through, and the masked network would not equal the compact one; zeroing
only the batch-norm would miss whoever reads the convolution past it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from env.groups import TRANSPOSED, module_tensors

if TYPE_CHECKING:  # the plan itself checks with masks that it is right
    from env.channels import ChannelPlan

__all__ = ["ZeroOut", "attach_zero_out", "output_owner"]


class ZeroOut(nn.Module):
    """Multiplies channel c of its input by `keep_mask[c]`: [B, C, ...] -> [B, C, ...], or with the channels last."""

    keep_mask: Tensor

    def __init__(self, channels: int, *, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.register_buffer("keep_mask", torch.ones(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Silence the channels whose bit is 0."""
        mask = self.keep_mask.to(inputs.dtype)
        return inputs * (mask if self.last else mask.view(1, -1, *[1] * (inputs.dim() - 2)))


def attach_zero_out(network: nn.Module, plan: "ChannelPlan", keep_mask: Tensor) -> list[ZeroOut]:
    """Put a ZeroOut layer behind every module whose outputs are units, in place; returns the layers.

    Args:
        network: the full network the plan was made for.
        plan: its units.
        keep_mask: bool [F], 1 = kept.

    """
    attached = []
    for name in dict.fromkeys(name for layer in plan.layers for name in layer.modules):
        module = network.get_submodule(name)
        owner = output_owner(name, module, plan)
        zero_out = ZeroOut(len(owner), last=isinstance(module, nn.Linear))
        zero_out.keep_mask.copy_(((owner < 0) | keep_mask[owner.clamp(min=0)]).float())
        zero_out.to(next(iter(module_tensors(module).values())).device)
        module.register_forward_hook(lambda _module, _inputs, output, layer=zero_out: layer(output))
        attached.append(zero_out)
    return attached


def output_owner(name: str, module: nn.Module, plan: "ChannelPlan", have: Tensor | None = None) -> Tensor:
    """int64 [C], the unit that owns each output channel of the module, or -1; `have` are the units of a compact one."""
    own = module_tensors(module)
    owner = dict(plan.axes(f"{name}.{next(iter(own))}", have))[int(isinstance(module, TRANSPOSED))]
    return owner.repeat(module.groups) if isinstance(module, TRANSPOSED) else owner  # its weight holds one group's
