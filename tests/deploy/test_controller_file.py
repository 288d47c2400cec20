from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from agents.controller import Controller, ControllerConfig
from deploy.controller_file import check_controller, read_controller
from env.channels import ChannelPlan
from env.errors import UserError

CONFIG = ControllerConfig(hidden_size=5, layer_size=4, weights="")


def plan(*widths: int) -> ChannelPlan:
    """Convolutions of these widths in a row, and a classifier."""
    layers = [nn.Conv2d(before, after, 1) for before, after in zip((2, *widths), widths, strict=False)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)]
    return ChannelPlan(nn.Sequential(*layers, *head), torch.zeros(1, 2, 4, 4))


def saved(path: Path, *widths: int, config: ControllerConfig = CONFIG) -> ControllerConfig:
    """A file of a Controller for such a network, and a configuration that starts from it."""
    torch.manual_seed(3)
    path.write_bytes(save_tensors(Controller(config, plan(*widths)).state_dict()))
    return replace(CONFIG, weights=str(path))


def test_without_a_file_there_is_nothing_to_start_from() -> None:
    assert read_controller(CONFIG) == b""
    assert check_controller(CONFIG, plan(4, 6)) == []


def test_what_comes_with_zeroout_fits_its_own_network_and_is_otherwise_left_out_in_silence() -> None:
    payload, vgg = load_tensors(read_controller(ControllerConfig())), plan(*[4] * 13)
    assert Controller(ControllerConfig(), vgg).adopt(payload) == []
    assert Controller(ControllerConfig(), plan(4, 6)).adopt(payload) == [
        "torso.0.weight",
        "layer_term.weight",
        "layer_term.bias",
    ]
    assert check_controller(replace(CONFIG, weights="taught"), plan(4, 6)) == []


def test_of_the_same_network_everything_fits_and_of_another_what_layers_share(tmp_path: Path) -> None:
    config = saved(tmp_path / "controller.safetensors", 4, 6)
    assert check_controller(config, plan(9, 5)) == []  # as many layers
    left = check_controller(config, plan(4, 6, 5))
    assert left == ["torso.0.weight", "layer_term.weight", "layer_term.bias"]


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "No such file"), (b"hello", "no safetensors file"), (save_tensors({"a": torch.ones(2)}), "none fits")],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, content: bytes | None, got: str) -> None:
    path = tmp_path / "controller.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"controller.safetensors: expected .*, got .*{got}"):
        check_controller(replace(CONFIG, weights=str(path)), plan(4, 6))


def test_another_size_fits_where_shapes_do_not_depend_on_it_and_nan_is_not_taken_over(tmp_path: Path) -> None:
    config = saved(tmp_path / "a.safetensors", 4, 6, config=replace(CONFIG, layer_size=7))
    assert "layer_input.weight" in check_controller(config, plan(4, 6))
    made = Controller(CONFIG, plan(4, 6))
    poisoned = {name: torch.full_like(value, torch.nan) for name, value in made.state_dict().items()}
    assert len(made.adopt(poisoned)) == len(poisoned)
    assert all(bool(parameter.isfinite().all()) for parameter in made.parameters())
