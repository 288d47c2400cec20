import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from env.errors import UserError
from env.networks import NetworkConfig, build_network, resnet18, resnet34, resnet56, small, vgg16
from env.skips import add_skip_convolutions


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes_are_those_of_the_literature() -> None:
    # VGG16: 9 * (3*64 + 64*64 + 64*128 + ...) = 14,710,464, batch-norm 2 * 4,224, linear 5,130.
    assert parameters(vgg16()) == 14_710_464 + 8_448 + 5_130
    assert parameters(resnet18()) == 11_173_962
    assert parameters(resnet34()) == 21_282_122
    # 855,770 with projections; He et al., table 6, give 0.85 million with padded shortcuts
    assert parameters(resnet56()) == 853_018 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert 100_000 <= parameters(small()) <= 300_000


@pytest.mark.parametrize("make", [vgg16, resnet18, resnet34, resnet56])
@pytest.mark.parametrize("size", [8, 32, 45])
def test_large_networks_take_images_of_any_size(make: Any, size: int) -> None:
    network = make(channels=2, classes=7, width=0.05)
    assert network(torch.randn(3, 2, size, size + 1)).shape == (3, 7)


def test_the_small_network_takes_digits_at_any_width() -> None:
    for width in (0.1, 1.0, 1.5):
        assert small(width=width)(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_residual_networks_are_as_deep_as_their_names_say() -> None:
    for make, depth in ((resnet18, 18), (resnet34, 34), (resnet56, 56)):
        on_the_way = [m for n, m in make(width=0.1).named_modules() if "shortcut" not in n]
        assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in on_the_way) == depth


def broken_factory(*, channels: int, classes: int) -> nn.Module:
    raise KeyError(f"no network for {classes} classes")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken_factory",
            "expected a network for 3 channels and 4 classes .* got KeyError: 'no network for 4 classes'",
        ),
        ("parameters", "expected a function that takes channels= and classes="),
    ],
)
def test_a_factory_that_fails_is_told_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    own = types.SimpleNamespace(broken_factory=broken_factory, parameters=parameters)
    monkeypatch.setitem(sys.modules, "own_networks", own)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"network\.factory: {message}"):
        build_network(NetworkConfig(factory=f"own_networks:{name}"), channels=3, classes=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.jit.script, "got RecursiveScriptModule, which torch.jit made; return the module without torch.jit"),
        (torch.compile, "got OptimizedModule, which torch.compile made; return the module without torch.compile"),
        (
            lambda network: nn.Sequential(network, nn.LazyLinear(4)),
            "got LazyLinear 1, whose parameters have no sizes yet; give the sizes, or run it once on images of zeros",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_network_whose_filters_cannot_be_read_is_told_with_what_to_give_instead(
    monkeypatch: pytest.MonkeyPatch, make: Any, message: str
) -> None:
    def made(*, channels: int, classes: int) -> nn.Module:
        network: nn.Module = make(nn.Sequential(nn.Conv2d(channels, classes, 3), nn.Flatten()))
        return network

    monkeypatch.setitem(sys.modules, "own_networks", types.SimpleNamespace(made=made))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a plain torch.nn.Module from own_networks:made, " + message):
        build_network(NetworkConfig(factory="own_networks:made"), channels=3, classes=4)


def test_skip_convolutions_where_there_are_no_skips_are_refused() -> None:
    with pytest.raises(UserError, match=r"network\.skips: expected a network with identity skips"):
        build_network(NetworkConfig(name="vgg16", width=0.1, skips="convolution"), channels=3, classes=4)


def test_vgg16_has_13_convolutions_each_with_batch_norm() -> None:
    kinds = [type(module) for module in vgg16(width=0.1).features]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 13
    assert kinds.count(nn.MaxPool2d) == 5


@pytest.mark.parametrize("make", [vgg16, resnet18, resnet56, small])
def test_no_activation_works_in_place(make: Any) -> None:
    assert not any(module.inplace for module in make(width=0.1).modules() if isinstance(module, nn.ReLU))


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = NetworkConfig(width=0.2)
    first, again, other = (build_network(config, channels=1, classes=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))


def test_skip_convolutions_are_added_when_configured() -> None:
    config = NetworkConfig(name="resnet18", width=0.1, skips="convolution")
    built = build_network(config, channels=3, classes=4)
    with_skips = resnet18(width=0.1)
    add_skip_convolutions(with_skips)
    assert built.state_dict().keys() == with_skips.state_dict().keys()
    assert parameters(built) > parameters(resnet18(width=0.1, classes=4))


def test_a_users_network_is_built_by_its_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\ndef make(*, channels, classes):\n    return nn.Conv2d(channels, classes, 3)\n"
    (tmp_path / "users_own_networks.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = build_network(NetworkConfig(factory="users_own_networks:make"), channels=2, classes=3)
    assert isinstance(network, nn.Conv2d)
    assert network.weight.shape == (3, 2, 3, 3)


@pytest.mark.parametrize("factory", ["no_such_package:make", "torch.nn:no_such_function", "builtins:dict"])
def test_a_factory_that_cannot_be_used_is_told(factory: str) -> None:
    with pytest.raises(UserError, match=r"network\.factory"):
        build_network(NetworkConfig(factory=factory), channels=2, classes=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "alexnet"),
        ("width", 0),
        ("width", float("inf")),
        ("skips", "none"),
        ("factory", "module.function"),
        ("weights", 3),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        NetworkConfig(**{field: value})
    assert caught.value.what == f"network.{field}"
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "nested.pt"])
def test_weights_come_back_as_they_were_saved(tmp_path: Path, name: str) -> None:
    saved = build_network(NetworkConfig(width=0.2), channels=1, classes=5, seed=1)
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(saved.state_dict(), path)
    else:
        state = saved.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if name == "nested.pt" else state, path)
    config = NetworkConfig(width=0.2, weights=str(path))
    loaded = build_network(config, channels=1, classes=5, seed=2)
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_weights_without_skip_convolutions_start_a_network_with_them(tmp_path: Path) -> None:
    plain = resnet18(width=0.1).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    config = NetworkConfig(name="resnet18", width=0.1, skips="convolution", weights=str(tmp_path / "plain.safetensors"))
    images = torch.randn(3, 3, 16, 16)
    built = build_network(config, channels=3, classes=10, seed=9).eval()
    torch.testing.assert_close(built(images), plain(images), atol=1e-6, rtol=0)
