"""A compact network as one safetensors file: its tensors, and what rebuilds the module around them.

The metadata holds the network's factory (env/networks.py) with its arguments; sizes follow from the tensors
(`env.channels.adopt`), so no pickle and no mask is needed to load it. Called by actors and by `zeroout export`,
which also describes the network in words and numbers here, for people who have the file and not our code.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.copies import adopt
from env.errors import UserError
from env.networks import NetworkConfig, build_network

__all__ = [
    "NetworkForm",
    "describe_layers",
    "describe_modules",
    "form_of_file",
    "network_from_bytes",
    "network_from_file",
    "network_to_bytes",
]

_WIDTHS = ("out_channels", "out_features", "num_features")


@dataclass(frozen=True, kw_only=True)
class NetworkForm:
    """What rebuilds a network's module: its configuration and the shape of its task."""

    network: NetworkConfig
    channels: int
    classes: int
    image_size: int  # pixels; the height, where image_width says something else
    image_width: int = 0  # 0: square

    def build(self, *, seed: int = 0) -> nn.Module:
        """The uncompressed network, freshly initialised; weights named in the config are not read."""
        bare = NetworkConfig(**{**asdict(self.network), "weights": ""})
        return build_network(bare, channels=self.channels, classes=self.classes, seed=seed)


def network_to_bytes(network: nn.Module, form: NetworkForm, *, description: Mapping[str, Any] | None = None) -> bytes:
    """The network as a safetensors file, the same bytes each time; its tensors are copied to the CPU.

    Buffers that a state dict leaves out are in it too: pruning may have sliced them, and the factory makes whole ones.
    `description` (of JSON values) is kept in the metadata for people, inside the entry "zeroout".
    """
    tensors: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    entry = asdict(form) | ({"description": description} if description else {})
    # one entry only: safetensors writes several in a random order
    return save_tensors(stored, {"zeroout": json.dumps(entry)})


def network_from_bytes(data: bytes, form: NetworkForm) -> nn.Module:
    """The network back, compact as it was saved, on the CPU and in eval mode."""
    return _rebuilt(form, load_tensors(data))


def network_from_file(path: str) -> nn.Module:
    """Load a file that `network_to_bytes` made; the network is on the CPU and in eval mode.

    Raises:
        UserError: the file is missing, broken, or not one of ours.

    """
    with _opened(path) as file:
        form = _form(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return _rebuilt(form, tensors)


def form_of_file(path: str) -> NetworkForm:
    """What rebuilds the network in a file; UserError as `network_from_file`."""
    with _opened(path) as file:
        return _form(file)


def describe_layers(
    plan: ChannelPlan, full: nn.Module, compact: nn.Module, keep_mask: Tensor | None = None
) -> list[dict[str, Any]]:
    """What became of each prunable layer of `full`, the planned network, in `compact`.

    Returns for each layer `name`, `modules` (all whose outputs are cut alike), `before` and `after` in filters, and
    `kept`: the indices of the filters that stayed, or None where `keep_mask` (bool [F]) is not given or not compact's.
    """
    after = [
        layer.units * _width(compact.get_submodule(layer.name)) // _width(full.get_submodule(layer.name))
        for layer in plan.layers
    ]
    if keep_mask is not None and (len(keep_mask) != plan.units or plan.kept_per_layer(keep_mask).tolist() != after):
        keep_mask = None
    return [
        {
            "name": layer.name,
            "modules": list(layer.modules),
            "before": layer.units,
            "after": width,
            "kept": None
            if keep_mask is None
            else keep_mask[layer.first : layer.first + layer.units].nonzero().flatten().tolist(),
        }
        for layer, width in zip(plan.layers, after, strict=True)
    ]


def describe_modules(network: nn.Module) -> dict[str, str]:
    """Name and printed form, with its sizes, of every module that has no module inside, in the network's order."""
    return {name: repr(module) for name, module in network.named_modules() if not any(True for _ in module.children())}


def _width(module: nn.Module) -> int:
    """Channels that a convolution, linear layer or norm puts out."""
    return next(int(getattr(module, name)) for name in _WIDTHS if hasattr(module, name))


def _rebuilt(form: NetworkForm, tensors: dict[str, Tensor]) -> nn.Module:
    # not on `meta`: a factory may read the values of its tensors, or keep some that are in no state dict
    return adopt(form.build(), tensors).eval()


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        unknown = isinstance(error, (KeyError, TypeError))
        got = "a safetensors file of another kind" if unknown else (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            f"model {path}",
            expected="a compact network saved by zeroout",
            got=got,
            remedy="give a .safetensors file from a campaign's export/ folder",
        ) from error


def _form(file: Any) -> NetworkForm:
    saved = json.loads((file.metadata() or {})["zeroout"])
    saved.pop("description", None)
    return NetworkForm(**{**saved, "network": NetworkConfig(**saved["network"])})
