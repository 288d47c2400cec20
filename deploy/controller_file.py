"""A campaign's Controller as a file: written when its search is over, given to another campaign by `--controller`."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from agents.controller import Controller, ControllerConfig
from env.channels import ChannelPlan
from env.errors import UserError

__all__ = ["check_controller", "read_controller"]


def read_controller(path: Path | None) -> bytes:
    """Return the file that a new campaign's Controller starts from; nothing where there is none.

    Raises UserError when it is missing or no safetensors file.
    """
    if path is None:
        return b""
    try:
        payload = path.read_bytes()
        load_tensors(payload)
    except OSError as error:
        raise _unfit(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _unfit(path, f"no safetensors file ({error})") from error
    return payload


def check_controller(path: Path | None, config: ControllerConfig, plan: ChannelPlan) -> list[str]:
    """Return the names of the parameters that the file cannot start, as they have other shapes there.

    Raises UserError as `read_controller`, and when nothing of it fits.
    """
    payload = read_controller(path)
    if path is None:
        return []
    with torch.random.fork_rng(devices=[]):
        made = Controller(config, plan)
    left = made.adopt(load_tensors(payload))
    if len(left) == len(made.state_dict()):
        raise _unfit(path, "tensors of which none fits, in name and shape")
    return left


def _unfit(path: Path, got: str) -> UserError:
    return UserError(
        f"controller.weights {path}",
        expected="the controller.safetensors of a campaign, made with the same controller.* sizes",
        got=got,
        remedy="check the path, or leave it out and start afresh",
    )
