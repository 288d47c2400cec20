"""A network moves to other classes: which of its tensors are its head, and what comes along."""

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from env.errors import UserError
from env.networks import NetworkConfig, build_network
from env.transfer import TransferConfig, head_of, with_new_head

SMALL = NetworkConfig(name="small", width=0.1)


class ConvolutionHead(nn.Module):
    """Answers by a 1x1 convolution with a batch-norm; a scale stays the same for any number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.answer = nn.Sequential(nn.Conv2d(4, classes, 1, bias=False), nn.BatchNorm2d(classes))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.body(images)).mean((2, 3)) * self.scale
        return logits


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `own:network` make a ConvolutionHead, and `own:fixed` one of three classes whatever is asked."""
    made = types.SimpleNamespace(
        network=lambda *, channels, classes: ConvolutionHead(classes),
        fixed=lambda *, channels, classes: ConvolutionHead(3),
    )
    monkeypatch.setitem(sys.modules, "own", made)  # type: ignore[arg-type]


def weights_of(config: NetworkConfig, classes: int, path: Path) -> dict[str, Tensor]:
    """Save weights of a network for so many classes, every tensor unlike a fresh one's; returns them."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 7
        for name, tensor in build_network(config, channels=1, classes=classes).state_dict().items()
    }
    save_file(state, path)
    return state


def moved(config: NetworkConfig, path: Path, *, seed: int = 0, before: int = 5, classes: int = 5) -> dict[str, Tensor]:
    given = NetworkConfig(name=config.name, width=config.width, factory=config.factory, weights=str(path))
    return with_new_head(given, channels=1, before=before, classes=classes, seed=seed).state_dict()


@pytest.mark.parametrize("name", ["small", "vgg16", "resnet56"])
def test_the_head_of_our_networks_is_the_classifier(name: str) -> None:
    head = head_of(NetworkConfig(name=name, width=0.1), channels=1, classes=5)
    assert head == {"classifier.weight": (0,), "classifier.bias": (0,)}


@pytest.mark.usefixtures("own")
def test_the_head_is_all_of_the_modules_whose_size_follows_the_classes() -> None:
    head = head_of(NetworkConfig(factory="own:network"), channels=1, classes=5)
    norm = ("weight", "bias", "running_mean", "running_var")
    follow = dict.fromkeys(("answer.0.weight", *(f"answer.1.{key}" for key in norm)), (0,))
    assert head == {**follow, "answer.1.num_batches_tracked": ()}


@pytest.mark.usefixtures("own")
def test_a_network_that_is_the_same_for_any_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"last layer: .* got the same sizes for 5 and 6 classes; .*use classes="):
        head_of(NetworkConfig(factory="own:fixed"), channels=1, classes=5)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("config", [SMALL, NetworkConfig(factory="own:network")], ids=["small", "own"])
@pytest.mark.parametrize("classes", [5, 3])
def test_all_but_the_head_comes_along_also_where_the_number_of_classes_stays(
    tmp_path: Path, config: NetworkConfig, classes: int
) -> None:
    given = weights_of(config, 5, tmp_path / "w.safetensors")
    state = moved(config, tmp_path / "w.safetensors", classes=classes)
    fresh = build_network(config, channels=1, classes=classes, seed=0).state_dict()
    head = head_of(config, channels=1, classes=5)
    for name, tensor in state.items():
        assert torch.equal(tensor, fresh[name] if name in head else given[name]), name


def test_the_seed_decides_the_head_alone(tmp_path: Path) -> None:
    weights_of(SMALL, 5, tmp_path / "w.safetensors")
    one, same, other = (moved(SMALL, tmp_path / "w.safetensors", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    unlike = {name for name in one if not torch.equal(one[name], other[name])}
    assert unlike == {"classifier.weight", "classifier.bias"}


def test_weights_of_another_number_of_classes_are_told_from_those_of_another_network(tmp_path: Path) -> None:
    weights_of(SMALL, 7, tmp_path / "w.safetensors")
    line = r"transfer\.classes: .*w\.safetensors was trained for, got another: its classifier\.weight is \[7, 10\]"
    with pytest.raises(UserError, match=line):
        moved(SMALL, tmp_path / "w.safetensors")
    weights_of(NetworkConfig(name="small", width=0.2), 5, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"expected the \d+ entries of SequentialNetwork, got .* misshapen"):
        moved(SMALL, tmp_path / "w.safetensors")


def test_a_transfer_needs_weights() -> None:
    with pytest.raises(UserError, match=r"network\.weights: expected the weights of the network that moves"):
        with_new_head(SMALL, channels=1, before=5, classes=5, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": 1}, "transfer.classes: expected a whole number of at least 2, or 0 for no transfer, got 1"),
        ({"how": "1"}, "transfer.classes: expected how many classes the network was trained for, because"),
        ({"classes": 5, "how": "4"}, "transfer.how: expected one of none, prune, reinit, noise, 1, 2, 3, got '4'"),
        ({"classes": 5, "share": 1.0}, "transfer.share: expected a share above 0 and below 1, got 1.0"),
        ({"classes": 5, "how": "1", "share": 0.6}, "transfer.share: expected at most 0.5 for replacement 1"),
        ({"importance": "age"}, "transfer.importance: expected one of rank, "),
        ({"images": 0}, "transfer.images: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TransferConfig(**given)  # type: ignore[arg-type]
    assert message in str(caught.value)
