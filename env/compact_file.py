"""A compact network as one safetensors file: its tensors, and what rebuilds the module around them.

The metadata holds the network's factory (env/networks.py) with its arguments; sizes follow from the tensors
(`env.channels.adopt`), so no pickle and no mask is needed to load it. Called by actors and by `zeroout export`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from env.channels import adopt
from env.errors import UserError
from env.networks import NetworkConfig, build_network

__all__ = ["NetworkForm", "form_of_file", "network_from_bytes", "network_from_file", "network_to_bytes"]


@dataclass(frozen=True, kw_only=True)
class NetworkForm:
    """What rebuilds a network's module: its configuration and the shape of its task."""

    network: NetworkConfig
    channels: int
    classes: int
    image_size: int

    def build(self, *, seed: int = 0) -> nn.Module:
        """The uncompressed network, freshly initialised; weights named in the config are not read."""
        bare = NetworkConfig(**{**asdict(self.network), "weights": ""})
        return build_network(bare, channels=self.channels, classes=self.classes, seed=seed)


def network_to_bytes(network: nn.Module, form: NetworkForm) -> bytes:
    """The network as a safetensors file; its tensors are copied to the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return save_tensors(state, {"format": "pt", "zeroout": json.dumps(asdict(form))})


def network_from_bytes(data: bytes, form: NetworkForm) -> nn.Module:
    """The network back, compact as it was saved, on the CPU and in eval mode."""
    # the form's own weights would only be thrown away: on `meta` they cost nothing
    with torch.device("meta"):
        shell = form.build()
    return adopt(shell, load_tensors(data)).eval()


def network_from_file(path: str) -> nn.Module:
    """Load a file that `network_to_bytes` made; the network is on the CPU and in eval mode.

    Raises:
        UserError: the file is missing, broken, or not one of ours.

    """
    with _opened(path) as file:
        form = _form(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    with torch.device("meta"):
        shell = form.build()
    return adopt(shell, tensors).eval()


def form_of_file(path: str) -> NetworkForm:
    """What rebuilds the network in a file; UserError as `network_from_file`."""
    with _opened(path) as file:
        return _form(file)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model {path}",
            expected="a compact network saved by zeroout",
            got=repr(error),
            remedy="give a .safetensors file from a campaign's export/ folder",
        ) from error


def _form(file: Any) -> NetworkForm:
    saved = json.loads((file.metadata() or {})["zeroout"])
    return NetworkForm(**{**saved, "network": NetworkConfig(**saved["network"])})
