"""The ZeroOut layer: a binary mask over filters, and the masked form of a network.

The mask stands after batch-norm where there is one. Zeroing only the convolution in front of it would let the
batch-norm's shift through, and the masked network would not equal the compact one.
"""

import torch
from torch import Tensor, nn

from env.channels import ChannelPlan

__all__ = ["ZeroOut", "attach_zero_out"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ZeroOut(nn.Module):
    """Multiplies channel c of its input by `keep_mask[c]`: [B, C, ...] -> [B, C, ...]."""

    keep_mask: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("keep_mask", torch.ones(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Silence the channels whose bit is 0."""
        return inputs * self.keep_mask.to(inputs.dtype).view(1, -1, *[1] * (inputs.dim() - 2))


def attach_zero_out(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> list[ZeroOut]:
    """Put a ZeroOut layer behind every masked output of `network`, in place; returns the layers.

    Args:
        network: the full network the plan was made for.
        plan: its units.
        keep_mask: bool [F], 1 = kept.

    """
    attached = []
    for name in _masked_modules(network, plan):
        module = network.get_submodule(name)
        axis, owner = next(iter(plan.axes(f"{name}.weight")))
        if not isinstance(module, _NORMS):
            axis, owner = next(pair for pair in plan.axes(f"{name}.weight") if pair[0] == _output_axis(module))
        zero_out = ZeroOut(len(owner))
        zero_out.keep_mask.copy_(((owner < 0) | keep_mask[owner.clamp(min=0)]).float())
        zero_out.to(module.weight.device)  # type: ignore[arg-type]
        module.register_forward_hook(lambda _module, _inputs, output, layer=zero_out: layer(output))
        attached.append(zero_out)
    return attached


def _masked_modules(network: nn.Module, plan: ChannelPlan) -> list[str]:
    """Where masks stand: after the norms of a layer, and after its convolutions too where some have no norm."""
    names: list[str] = []
    for layer in plan.layers:
        norms = [name for name in layer.modules if isinstance(network.get_submodule(name), _NORMS)]
        producers = [name for name in layer.modules if name not in norms]
        names += norms if len(norms) >= len(producers) else layer.modules
    return list(dict.fromkeys(names))


def _output_axis(module: nn.Module) -> int:
    return int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
