"""Skip convolutions: the source's way to let each residual block choose its own width.

A residual sum joins channels of all blocks of a stage, so they live or die together. A 1x1 convolution on
an identity skip parts them. It starts as the identity, so the network's function is unchanged until it is
trained; its parameters count against us in every compression. Called by `env/networks.py`.
"""

from torch import nn

__all__ = ["add_skip_convolutions", "identity_convolution"]


def identity_convolution(channels: int) -> nn.Conv2d:
    """A 1x1 convolution without bias, [channels, channels, 1, 1], whose output equals its input."""
    convolution = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(convolution.weight)
    return convolution


def add_skip_convolutions(network: nn.Module) -> list[str]:
    """Put an identity convolution on every identity skip of `network`, in place.

    A skip is found by the convention of our ResNet: a block with an `nn.Identity` named `shortcut` and a
    first convolution named `conv1`, whose input channels the skip carries. Returns the names of the new
    convolutions, in the network's order: none for a network without such skips, or where it was done before.
    The new weights take the device and dtype of `conv1`, and the block's training mode.
    """
    added = []
    for name, block in list(network.named_modules()):
        first = getattr(block, "conv1", None)
        if not isinstance(getattr(block, "shortcut", None), nn.Identity) or not isinstance(first, nn.Conv2d):
            continue
        convolution = identity_convolution(first.in_channels).to(first.weight.device, first.weight.dtype)
        block.shortcut = convolution.train(block.training)
        added.append(f"{name}.shortcut" if name else "shortcut")
    return added
