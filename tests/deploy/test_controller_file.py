from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from actors.schedule import TAUGHT_SIGMA, UNTAUGHT_SIGMA
from agents.controller import TAUGHT, Controller, ControllerConfig
from deploy.config import parse
from deploy.controller_file import check_controller, read_controller
from env.channels import ChannelPlan
from env.compact_file import NetworkForm
from env.errors import UserError
from env.networks import NetworkConfig

CONFIG = ControllerConfig(hidden_size=5, layer_size=4)


def plan(*widths: int) -> ChannelPlan:
    """Convolutions of these widths in a row, and a classifier."""
    layers = [nn.Conv2d(before, after, 1) for before, after in zip((2, *widths), widths, strict=False)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)]
    return ChannelPlan(nn.Sequential(*layers, *head), torch.zeros(1, 2, 4, 4))


def saved(path: Path, *widths: int, config: ControllerConfig = CONFIG) -> Path:
    """A file of a Controller for such a network."""
    torch.manual_seed(3)
    path.write_bytes(save_tensors(Controller(config, plan(*widths)).state_dict()))
    return path


def test_without_a_file_there_is_nothing_to_start_from() -> None:
    assert read_controller(None) == b""
    assert check_controller(None, CONFIG, plan(4, 6)) == []


@pytest.mark.parametrize("name", TAUGHT)
def test_what_comes_with_zeroout_fits_the_networks_that_it_was_taught_on(name: str) -> None:
    start = parse(f'network.name = "{name}"').controller_start
    assert start == TAUGHT[name]
    form = NetworkForm(network=NetworkConfig(name=name, width=0.1), channels=3, classes=10, image_size=32)
    own = ChannelPlan(form.build(), torch.zeros(1, 3, 32, 32))
    assert check_controller(start, ControllerConfig(), own) == []


def test_no_other_campaign_begins_with_what_comes_with_zeroout() -> None:
    for other in ('network.name = "resnet34"', "controller.hidden_size = 8", 'controller.observation = "mask"'):
        assert parse(other, ['network.name="vgg16"'] if "network" not in other else []).controller_start is None


def test_a_controller_that_has_been_taught_explores_less_where_nothing_is_said() -> None:
    vgg16 = 'network.name = "vgg16"'
    assert parse(vgg16).schedule.exploration == TAUGHT_SIGMA
    assert parse(vgg16, ['controller.weights=""']).schedule.exploration == UNTAUGHT_SIGMA
    assert parse("", ["controller.weights=some.safetensors"]).schedule.exploration == TAUGHT_SIGMA
    assert parse('network.name = "resnet34"').schedule.exploration == UNTAUGHT_SIGMA
    assert parse(vgg16, ["search.sigma=0"]).schedule.exploration == 0.0


def test_everything_fits_every_network_but_what_reads_the_mask(tmp_path: Path) -> None:
    file = saved(tmp_path / "controller.safetensors", 4, 6)
    assert check_controller(file, CONFIG, plan(9, 5)) == []
    assert check_controller(file, CONFIG, plan(4, 6, 5)) == []
    mask = replace(CONFIG, observation="mask")
    file = saved(tmp_path / "mask.safetensors", 4, 6, config=mask)
    assert check_controller(file, mask, plan(6, 4)) == []  # as many filters
    assert check_controller(file, mask, plan(4, 6, 5)) == ["torso.0.weight", "advantage.2.weight", "advantage.2.bias"]


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "No such file"), (b"hello", "no safetensors file"), (save_tensors({"a": torch.ones(2)}), "none fits")],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, content: bytes | None, got: str) -> None:
    path = tmp_path / "controller.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"controller.safetensors: expected .*, got .*{got}"):
        check_controller(path, CONFIG, plan(4, 6))


def test_another_size_fits_where_shapes_do_not_depend_on_it_and_nan_is_not_taken_over(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", 4, 6, config=replace(CONFIG, layer_size=7))
    assert "layer_input.weight" in check_controller(file, CONFIG, plan(4, 6))
    made = Controller(CONFIG, plan(4, 6))
    poisoned = {name: torch.full_like(value, torch.nan) for name, value in made.state_dict().items()}
    assert len(made.adopt(poisoned)) == len(poisoned)
    assert all(bool(parameter.isfinite().all()) for parameter in made.parameters())
