"""Copies of a network: whole, or its modules alone, which then get other tensors.

Called wherever a network is kept while a copy of it is masked, cut or trained; by `ChannelPlan.compact` for each.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from env.groups import CONVOLUTIONS, NORMS, TRANSPOSED, is_depthwise, module_tensors

__all__ = ["adopt", "duplicate", "structure_of", "tensors_of"]

_DICTS = (dict, OrderedDict)
_PLAIN = (bool, int, float, str, type(None))


def duplicate(network: nn.Module) -> nn.Module:
    """Return a copy of `network` that shares nothing with it: as `copy.deepcopy`, in a third of the time."""
    tensors = tensors_of(network)
    return adopt(structure_of(network, tensors), {name: tensor.detach().clone() for name, tensor in tensors.items()})


def adopt(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give `network` these tensors, by name, and set each module's sizes to fit them; returns `network`.

    This is all that rebuilding a compact network takes, so a saved one needs its tensors and its factory only.
    A tensor that several modules share is named once, as `named_parameters` does, and stays shared.
    """
    replaced: dict[int, Tensor] = {}
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for kind in (module._parameters, module._buffers):
            for key, old in kind.items():
                if old is None:
                    continue
                new = replaced.get(id(old), tensors.get(prefix + key))
                if new is None:
                    continue
                if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
                    new = nn.Parameter(new, old.requires_grad)
                kind[key] = replaced[id(old)] = new
        _fit(module)
    return network


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


def structure_of(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the modules, whose `tensors` are still those of `network`.

    Ordinary layers and the dozen empty dictionaries of hooks in all others are copied here: they are nearly all of the
    time that `copy.deepcopy` takes.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in tensors.values()}
    for module in network.modules():
        layer = _copied_layer(module)
        if layer is not None:
            memo[id(module)] = layer
        else:
            memo |= {id(value): type(value)() for value in vars(module).values() if type(value) in _DICTS and not value}
    return copy.deepcopy(network, memo)


def _copied_layer(module: nn.Module) -> nn.Module | None:
    """Return a copy, with the same tensors, of one of torch's own layers that holds nothing but them and plain values.

    None for any other: what somebody else's module needs, or one with hooks, only `copy.deepcopy` knows.
    """
    if not type(module).__module__.startswith("torch.nn.modules."):
        return None
    state = dict(vars(module))
    for name, value in state.items():
        plain = type(value) in (list, set, tuple) and all(type(item) in _PLAIN for item in value)
        empty = type(value) in _DICTS and not value
        if plain or empty or name in ("_parameters", "_buffers"):
            state[name] = type(value)(value)
        elif type(value) not in _PLAIN:
            return None
    layer = type(module).__new__(type(module))
    vars(layer).update(state)
    return layer


def _fit(module: nn.Module) -> None:
    """Set a module's sizes from its own tensors."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        first, second = module.weight.shape[:2]
        if is_depthwise(module):
            module.groups = module.in_channels = module.out_channels = first
        elif isinstance(module, CONVOLUTIONS):
            module.out_channels, module.in_channels = first, second * module.groups
        else:
            module.in_channels, module.out_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        module.num_features = next(
            (len(t) for t in module_tensors(module).values() if t.dim() == 1), module.num_features
        )
