"""Weights that people bring: read, checked, copied, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from env.errors import UserError
from env.networks import small
from env.weights import load_weights


@pytest.mark.parametrize("value", [torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.complex64)])
def test_weights_that_no_layer_has_are_refused(tmp_path: Path, value: torch.Tensor) -> None:
    torch.save({"odd": value}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="entry odd: expected a tensor of finite numbers"):
        load_weights(small(width=0.1), tmp_path / "weights.pt")


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    network = small(width=0.1)
    state = {name: value.to(torch.int64) for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"misshapen \(first features.0.weight: whole numbers \[3, 1, 3, 3\] for"):
        load_weights(network, tmp_path / "weights.pt")


def test_weights_that_do_not_fit_name_the_first_of_each_kind(tmp_path: Path) -> None:
    state = small(width=0.2).state_dict()
    del state["features.1.bias"], state["classifier.bias"]
    state["features.0.extra"] = torch.zeros(2)
    state["classifier.weight"] = torch.zeros(10, 7)
    save_file(state, tmp_path / "odd.safetensors")
    network = small(width=0.2)
    before = network.classifier.weight.clone()
    with pytest.raises(UserError) as caught:
        load_weights(network, tmp_path / "odd.safetensors")
    assert "2 missing (first features.1.bias)" in str(caught.value)
    assert "1 unexpected (first features.0.extra)" in str(caught.value)
    assert "1 misshapen (first classifier.weight: [10, 7] for [10, 19])" in str(caught.value)
    assert torch.equal(network.classifier.weight, before)


@pytest.mark.parametrize("name", ["missing.pt", "junk.pt", "junk.safetensors", "list.pt", "object.pt", "nan.pt"])
def test_weights_that_cannot_be_read_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    for junk in ("junk.pt", "junk.safetensors"):
        (tmp_path / junk).write_bytes(b"these are no weights at all, and long enough to be looked into")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "object.pt")
    torch.save({"weight": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=name) as caught:
        load_weights(small(), tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_under_the_usual_names(tmp_path: Path, name: str) -> None:
    saved, network = small(width=0.1), small(width=0.1)
    others = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save({**others, name: saved.state_dict()}, tmp_path / "weights.pt")
    load_weights(network, tmp_path / "weights.pt")
    assert torch.equal(network.classifier.weight, saved.classifier.weight)


@pytest.mark.parametrize(
    ("stored", "got"),
    [
        ({"net": {"weight": torch.ones(1)}, "epoch": 3}, r"a dict of net \(dict\), epoch \(int\); save it again"),
        (
            {"model": {"weight": torch.ones(1)}, "state_dict": {"weight": torch.ones(1)}},
            r"a dict of model \(dict\), state_dict \(dict\); save it again",
        ),
        ([1, 2], "a list; save it again"),
    ],
)
def test_what_is_nested_otherwise_is_named(tmp_path: Path, stored: Any, got: str) -> None:
    torch.save(stored, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=rf"exactly one under state_dict, model or model_state_dict, got {got}"):
        load_weights(small(width=0.1), tmp_path / "weights.pt")


def test_a_name_that_is_no_string_is_refused(tmp_path: Path) -> None:
    torch.save({3: torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"entry 3: expected a tensor of finite numbers, .* got a name of type int"):
        load_weights(small(width=0.1), tmp_path / "weights.pt")


def test_a_whole_network_in_a_file_is_told_without_colours(tmp_path: Path) -> None:
    torch.save(small(width=0.1), tmp_path / "weights.pt")
    line = r"it holds a env\.networks\.SequentialNetwork, which could run code and is not read; save it again"
    with pytest.raises(UserError, match=line) as caught:
        load_weights(small(width=0.1), tmp_path / "weights.pt")
    assert str(caught.value).isprintable()


class Twice(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = self.first


def test_a_tensor_of_two_names_need_be_stored_under_one(tmp_path: Path) -> None:
    saved, network = Twice(), Twice()
    save_model(saved, str(tmp_path / "weights.safetensors"))
    load_weights(network, tmp_path / "weights.safetensors")
    assert torch.equal(network.second.weight, saved.second.weight)
    assert network.second is network.first
