from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.compact_file import NetworkForm, form_of_file, network_from_bytes, network_from_file, network_to_bytes
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


def test_a_truncated_file_is_a_user_error(tmp_path: Path) -> None:
    network, _ = compacted(FORMS["small"])
    path = tmp_path / "half.safetensors"
    data = network_to_bytes(network, FORMS["small"])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"half\.safetensors"):
        network_from_file(str(path))
