import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from env.data import DataConfig, load_dataset
from env.errors import NonFiniteError, UserError
from env.networks import small
from env.retraining import evaluate, retrain
from env.training import EpochReport, TrainConfig, train

DIGITS = load_dataset(DataConfig())
FEW = load_dataset(DataConfig(train_limit=200))
AUGMENTED = DataConfig(flip=True, shift_pixels=1)
TINY = TrainConfig(epochs=3, batch_size=32, label_smoothing=0.1)


def network(seed: int = 0, *, dropout: bool = False, width: float = 0.2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(small(width=width), nn.Dropout(0.1)) if dropout else small(width=width)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class KilledError(Exception):
    """Stands for kill -9 between two epochs."""


def kill_after(epoch: int) -> Callable[[EpochReport], None]:
    def on_epoch(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KilledError

    return on_epoch


def test_digits_reach_97_5_percent_within_seconds() -> None:
    model = network(width=1.0)
    reports: list[EpochReport] = []
    config = TrainConfig(epochs=8)
    metrics = train(model, DIGITS, DataConfig(), config, seed=0, on_epoch=reports.append)
    assert evaluate(model, DIGITS.test, DIGITS.mean, DIGITS.std).accuracy >= 0.975
    assert metrics == reports[-1].validation
    assert [report.epoch for report in reports] == list(range(1, 9))
    assert reports[-1].train_loss < 0.1 < reports[0].train_loss
    assert 0 < reports[-1].learning_rate < 0.01
    assert reports[-1].images_per_s > 0


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path, killed_after: int) -> None:
    whole, resumed = network(dropout=True), network(dropout=True)
    expected = train(whole, FEW, AUGMENTED, TINY, seed=7)
    path = tmp_path / "folder" / "training.pt"
    with pytest.raises(KilledError):
        train(resumed, FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(killed_after))
    fresh = network(99, dropout=True)
    torch.rand(5)  # the global generator must not matter
    got = train(fresh, FEW, AUGMENTED, TINY, seed=7, checkpoint=path)
    assert same(fresh, whole)
    assert got == expected
    assert list(path.parent.iterdir()) == [path]


def test_training_leaves_the_global_generator_as_it_was() -> None:
    model = network()
    before = torch.get_rng_state()
    train(model, FEW, AUGMENTED, dataclasses.replace(TINY, epochs=1), seed=7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "another file"])
def test_a_broken_checkpoint_starts_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "training.pt"
    config = dataclasses.replace(TINY, epochs=1)
    whole = network()
    train(whole, FEW, AUGMENTED, config, seed=7, checkpoint=path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    broken = {
        "truncated": content[:-50],
        "flipped bit": content,
        "empty": bytearray(),
        "another file": bytearray(b"x" * 500),
    }
    path.write_bytes(broken[damage])
    again = network()
    with caplog.at_level(logging.WARNING):
        train(again, FEW, AUGMENTED, config, seed=7, checkpoint=path)
    assert "is broken" in caplog.text
    assert same(again, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 8}, "seed"), ({"config": TrainConfig(epochs=4, batch_size=32, label_smoothing=0.1)}, "train.epochs")],
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "training.pt"
    with pytest.raises(KilledError):
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(1))
    with pytest.raises(UserError, match=f"with {named}"):
        train(network(), FEW, AUGMENTED, **{"config": TINY, "seed": 7, **change}, checkpoint=path)


def test_a_diverging_training_names_epoch_and_rate_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    model = network()

    def poison(report: EpochReport) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"epoch 2 at learning rate .*train\.learning_rate"):
        train(model, FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=poison)
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_split_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="at least one batch of 201"):
        train(network(), FEW, AUGMENTED, TrainConfig(batch_size=201), seed=0)
    with pytest.raises(UserError, match="at least one batch of 201"):
        retrain(network(), FEW, AUGMENTED, minibatches=1, batch_size=201, learning_rate=0.1, seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1e-9),
        ("label_smoothing", 1.0),
        ("warmup_share", -0.1),
        ("precision", "float16"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(**{field: value})
    assert caught.value.what == f"train.{field}"
    assert caught.value.got == repr(value)
