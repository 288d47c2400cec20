import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.compact_file import (
    NetworkForm,
    describe_layers,
    describe_modules,
    form_of_file,
    network_from_bytes,
    network_from_file,
    network_to_bytes,
)
from env.errors import UserError
from env.networks import NetworkConfig

FORMS = {
    "small": NetworkForm(network=NetworkConfig(name="small", width=0.2), channels=1, classes=7, image_size=8),
    "resnet18": NetworkForm(
        network=NetworkConfig(name="resnet18", width=0.05, skips="convolution"), channels=3, classes=5, image_size=8
    ),
}


def compacted(form: NetworkForm) -> tuple[nn.Module, Tensor]:
    """A compact network of random weights and statistics, in eval mode, and images for it."""
    torch.manual_seed(3)
    network = form.build(seed=5)
    images = torch.randn(5, form.channels, form.image_size, form.image_size)
    network.train()(images)  # batch-norm statistics that differ from those of a fresh network
    plan = ChannelPlan(network, images[:1])
    keep_mask = torch.rand(plan.units) < 0.6
    keep_mask[[layer.first for layer in plan.layers]] = True
    return plan.compact(network, keep_mask).eval(), images


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_compact_network_comes_back_from_its_file(form: NetworkForm, tmp_path: Path) -> None:
    network, images = compacted(form)
    path = tmp_path / "compact.safetensors"
    path.write_bytes(network_to_bytes(network, form))
    back = network_from_file(str(path))
    assert not back.training
    assert repr(back) == repr(network)
    assert torch.equal(back(images), network(images))
    assert form_of_file(str(path)) == form


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_compact_network_comes_back_from_bytes_and_can_be_trained(form: NetworkForm) -> None:
    network, images = compacted(form)
    back = network_from_bytes(network_to_bytes(network, form), form)
    assert torch.equal(back(images), network(images))
    back.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in back.parameters())


def test_the_file_holds_the_kept_weights_only() -> None:
    form = FORMS["small"]
    network, _ = compacted(form)
    stored = load(network_to_bytes(network, form))
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }


def test_the_same_network_makes_the_same_bytes_with_its_description_inside(tmp_path: Path) -> None:
    form = FORMS["small"]
    network, images = compacted(form)
    path = tmp_path / "described.safetensors"
    data = network_to_bytes(network, form, description={"mean": [0.5], "what": "a network"})
    assert data == network_to_bytes(network, form, description={"mean": [0.5], "what": "a network"})
    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["zeroout"])["description"] == {"mean": [0.5], "what": "a network"}
    assert torch.equal(network_from_file(str(path))(images), network(images))
    assert form_of_file(str(path)) == form


#: What users' networks hold beside ordinary parameters.
BROUGHT = """
import torch
from torch import nn


class Brought(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.rate = torch.linspace(0.1, 0.5, 3)[1].item()
        self.twice = torch.tensor(2.0)
        self.register_buffer("scale", torch.arange(1.0, 13.0).view(1, 12, 1, 1), persistent=False)
        self.stem = nn.Conv2d(channels, 12, 3, padding=1)
        self.first = nn.Conv2d(12, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.second.weight = self.first.weight
        self.classifier = nn.Linear(12, classes)

    def forward(self, images):
        maps = torch.relu(self.stem(images)) * self.scale * self.twice * self.rate
        maps = torch.relu(self.second(torch.relu(self.first(maps))))
        return self.classifier(maps.mean((2, 3)))


def brought(*, channels, classes):
    return Brought(channels, classes)
"""


def test_values_read_in_a_factory_unsaved_buffers_and_shared_weights_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brought_by_a_user.py").write_text(BROUGHT)
    monkeypatch.syspath_prepend(tmp_path)
    form = NetworkForm(network=NetworkConfig(factory="brought_by_a_user:brought"), channels=1, classes=3, image_size=8)
    network, images = form.build(seed=1).eval(), torch.randn(3, 1, 8, 8)
    network.get_buffer("scale").mul_(0.5)  # as a sliced one differs from what the factory makes
    back = network_from_bytes(network_to_bytes(network, form), form)
    monkeypatch.delitem(sys.modules, "brought_by_a_user")
    assert torch.equal(back(images), network(images))
    assert back.get_parameter("second.weight") is back.get_parameter("first.weight")


def test_layers_are_described_by_their_filters_before_and_after() -> None:
    torch.manual_seed(0)
    network = FORMS["small"].build()
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    keep_mask = torch.ones(plan.units, dtype=torch.bool)
    keep_mask[[1, 3]] = False  # of the first layer, which has 6 filters
    compact = plan.compact(network, keep_mask)
    first, second, *_ = describe_layers(plan, network, compact, keep_mask)
    assert first == {
        "name": "features.0", "modules": ["features.0", "features.1"], "before": 6, "after": 4, "kept": [0, 2, 4, 5]
    }  # fmt: skip
    assert (second["before"], second["after"], second["kept"]) == (6, 6, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("mask", ["none", "of another network", "of another length"])
def test_filters_are_not_told_as_kept_by_a_mask_that_is_not_the_networks(mask: str) -> None:
    network = FORMS["small"].build()
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    keep_mask = torch.ones(plan.units, dtype=torch.bool)
    keep_mask[0] = False
    compact = plan.compact(network, keep_mask)
    wrong = {
        "none": None,
        "of another network": torch.ones(plan.units, dtype=torch.bool),
        "of another length": keep_mask[:-1],
    }[mask]
    layers = describe_layers(plan, network, compact, wrong)
    assert [layer["kept"] for layer in layers] == [None] * len(plan.layers)
    assert [layer["after"] for layer in layers] == plan.kept_per_layer(keep_mask).tolist()


def test_modules_are_described_with_their_sizes() -> None:
    described = describe_modules(nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 1)), nn.ReLU()))
    assert described == {"0.0": "Conv2d(3, 5, kernel_size=(1, 1), stride=(1, 1))", "1": "ReLU()"}


def test_building_a_form_reads_no_weights() -> None:
    form = NetworkForm(
        network=NetworkConfig(width=0.1, weights="/nowhere.safetensors"), channels=1, classes=3, image_size=8
    )
    assert form.build()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_what_is_not_our_file_is_a_user_error_with_its_path(tmp_path: Path) -> None:
    missing, broken, foreign = (str(tmp_path / f"{name}.safetensors") for name in ("missing", "broken", "foreign"))
    Path(broken).write_bytes(b"no safetensors at all")
    save_file({"weight": torch.zeros(3)}, foreign)
    for path in (missing, broken, foreign):
        for read in (network_from_file, form_of_file):
            with pytest.raises(UserError, match=rf"model {path}: expected a compact network saved by zeroout"):
                read(path)
    with pytest.raises(UserError, match="got a safetensors file of another kind"):
        network_from_file(foreign)


def test_a_truncated_file_is_a_user_error(tmp_path: Path) -> None:
    network, _ = compacted(FORMS["small"])
    path = tmp_path / "half.safetensors"
    data = network_to_bytes(network, FORMS["small"])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"half\.safetensors"):
        network_from_file(str(path))
