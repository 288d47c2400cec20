"""Weights that people bring: a state dict read from a file, checked, and copied into a network.

Called by env/networks.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from env.errors import UserError, first_line

__all__ = ["fill", "load_weights", "read_weights"]

_USUAL = ("state_dict", "model", "model_state_dict")  # where trainings put the state dict among other things
_SAVE_AGAIN = "save it again with torch.save(network.state_dict(), path)"


def load_weights(network: nn.Module, path: Path | str) -> None:
    """Copy the state dict in `path` into `network`; every name and shape must agree.

    UserError names the first missing, the first unexpected and the first misshapen entry.
    """
    fill(network, read_weights(Path(path)), Path(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict stored in `path` (.safetensors; else torch.load with weights_only=True), on the CPU.

    One that stands under a usual name in a larger dict (`_USUAL`) is found. UserError for a file that is missing,
    unreadable, or holds anything but finite tensors by name.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"weights {path}", expected="a file", got=got, remedy="correct network.weights")
    try:
        stored = load_file(path) if path.suffix == ".safetensors" else _load_pickled(path)
    except Exception as error:  # foreign bytes make torch's unpickler raise nearly anything
        raise UserError(
            f"weights {path}",
            expected="a readable state dict (.safetensors, or written by torch.save)",
            got=f"{type(error).__name__}{_said(error)}",
            remedy=_SAVE_AGAIN,
        ) from error
    state = _unwrapped(stored, path)
    _check_entries(state, path)
    return state


def _load_pickled(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _said(error: Exception) -> str:
    """What an error says, in short; not torch's advice to load pickles that may run code."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is not None:
        return f": it holds a {refused[1]}, which could run code and is not read"
    text = first_line(error)
    return "" if "weights only" in text.lower().replace("_", " ") else f": {text}"


def _unwrapped(stored: object, path: Path) -> dict[str, Tensor]:
    """The state dict itself, or the only one under a usual name; UserError names what is there instead."""
    if isinstance(stored, dict) and not any(isinstance(value, dict) for value in stored.values()):
        return dict(stored)
    nested = stored if isinstance(stored, dict) else {}
    found = [nested[name] for name in _USUAL if _is_state(nested.get(name))]
    if len(found) == 1:
        return dict(found[0])
    entries = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(nested.items())[:6])
    raise UserError(
        f"weights {path}",
        expected=f"a state dict, or exactly one under {', '.join(_USUAL[:-1])} or {_USUAL[-1]}",
        got=f"a dict of {entries}" if nested else f"a {type(stored).__name__}",
        remedy=_SAVE_AGAIN,
    )


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())


def _check_entries(state: Mapping[Any, object], path: Path) -> None:
    for name, value in state.items():
        problem = _problem(name, value)
        if problem is not None:
            raise UserError(
                f"weights {path}, entry {name}",
                expected="a tensor of finite numbers, by the name of its place in the network",
                got=problem,
                remedy="give the state dict of a sound training",
            )


def _problem(name: object, value: object) -> str | None:
    """Why this is no entry of a state dict, or None."""
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.is_complex():
        return f"a tensor that is {'complex' if value.is_complex() else value.layout}"
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return "values that are NaN or infinite"
    return None


def fill(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy `state`, which came from `path`, into `network`; UserError as `load_weights`.

    A tensor that stands at several places of the network need be there under one of its names only.
    """
    wanted = network.state_dict()
    state = {**_shared(wanted, state), **state}
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    misshapen = [name for name in wanted if name in state and not _fits(state[name], wanted[name])]
    if not (missing or unexpected or misshapen):
        network.load_state_dict(state)
        return
    found = []
    if missing:
        found.append(f"{len(missing)} missing (first {missing[0]})")
    if unexpected:
        wrapped = (
            "; saved from a DataParallel network" if all(name.startswith("module.") for name in unexpected) else ""
        )
        found.append(f"{len(unexpected)} unexpected (first {unexpected[0]}{wrapped})")
    if misshapen:
        name = misshapen[0]
        shapes = f"{_kind(state[name])} for {_kind(wanted[name])}"
        found.append(f"{len(misshapen)} misshapen (first {name}: {shapes})")
    raise UserError(
        f"weights {path}",
        expected=f"the {len(wanted)} entries of {type(network).__name__}",
        got=", ".join(found),
        remedy="give weights of the same network, width, channels and classes",
    )


def _shared(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of `state` by all the names that their tensors have in the network."""
    by_place = {_place(wanted[name]): value for name, value in state.items() if name in wanted}
    return {name: by_place[_place(tensor)] for name, tensor in wanted.items() if _place(tensor) in by_place}


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where in memory a tensor is, and how it is read there; an empty one is nowhere but with itself."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _fits(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{'' if tensor.is_floating_point() else 'whole numbers '}{list(tensor.shape)}"
