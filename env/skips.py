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

    A skip is found by its block: one with a first convolution `conv1`, whose input channels the skip carries, and
    either a `shortcut` that is an `nn.Identity` or an empty `nn.Sequential`, or a `downsample` that is None (as
    torchvision's blocks have). Returns the names of the new convolutions, in the network's order: none for a network
    without such skips, or where it was done before. The new weights take the device and dtype of `conv1`, and the
    block's training mode.
    """
    added = []
    for name, block in list(network.named_modules()):
        first, place = getattr(block, "conv1", None), _free_skip(block)
        if place is None or not isinstance(first, nn.Conv2d):
            continue
        convolution = identity_convolution(first.in_channels).to(first.weight.device, first.weight.dtype)
        setattr(block, place, convolution.train(block.training))
        added.append(f"{name}.{place}" if name else place)
    return added


def _free_skip(block: nn.Module) -> str | None:
    """The attribute of `block` that passes its skip on unchanged, or None."""
    shortcut = getattr(block, "shortcut", None)
    if isinstance(shortcut, nn.Identity) or (isinstance(shortcut, nn.Sequential) and len(shortcut) == 0):
        return "shortcut"
    return "downsample" if hasattr(block, "downsample") and block.downsample is None else None
