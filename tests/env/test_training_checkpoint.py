"""A training goes on from its checkpoint as if it had not been interrupted, and from no other's."""

import dataclasses
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import ALL_ON, AUGMENTED, FEW, TINY, network, same
from torch import nn

from env.errors import UserError
from env.networks import small
from env.retraining import Metrics
from env.training import RecoveryConfig, TrainConfig, train
from env.training_reports import EpochReport


class KilledError(Exception):
    """Stands for kill -9 between two epochs."""


def kill_after(epoch: int) -> Callable[[EpochReport], None]:
    def on_epoch(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise KilledError

    return on_epoch


@pytest.fixture(scope="module", params=[TINY, ALL_ON], ids=["plain", "distilled and averaged"])
def uninterrupted(request: pytest.FixtureRequest) -> tuple[TrainConfig, nn.Module, Metrics]:
    """A configuration, and what a training by it ends in."""
    whole = network(dropout=True)
    metrics = train(whole, FEW, AUGMENTED, request.param, seed=7, teacher=network(5, dropout=True))
    return request.param, whole, metrics


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, killed_after: int, uninterrupted: tuple[TrainConfig, nn.Module, Metrics]
) -> None:
    config, whole, expected = uninterrupted
    resumed, teacher = network(dropout=True), network(5, dropout=True)
    path = tmp_path / "folder" / "training.pt"
    with pytest.raises(KilledError):
        train(
            resumed, FEW, AUGMENTED, config, seed=7, teacher=teacher, checkpoint=path, on_epoch=kill_after(killed_after)
        )
    fresh = network(99, dropout=True)
    torch.rand(5)  # the global generator must not matter
    got = train(fresh, FEW, AUGMENTED, config, seed=7, teacher=teacher, checkpoint=path)
    assert same(fresh, whole)
    assert got == expected
    assert list(path.parent.iterdir()) == [path]


KILLED_IN_EPOCH_2 = """
import os, signal, sys
from pathlib import Path
import torch
from env.data import DataConfig, load_dataset
from env.networks import small
from env.training import TrainConfig, train

torch.manual_seed(0)
network = small(width=0.2)
teacher = small(width=0.2)
config = TrainConfig(epochs=3, batch_size=32, label_smoothing=0.1, distillation=0.5, average=0.9)
seen = 0


def die(module, inputs):
    global seen
    seen += module.training
    if seen == 6 + 3:  # of 6 minibatches an epoch
        os.kill(os.getpid(), signal.SIGKILL)


network.register_forward_pre_hook(die)
dataset = load_dataset(DataConfig(train_limit=200))
augmented = DataConfig(flip=True, shift_pixels=1)
train(network, dataset, augmented, config, seed=7, teacher=teacher, checkpoint=Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_process_killed_within_an_epoch_is_resumed_from_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_IN_EPOCH_2, str(path)],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert torch.load(path, weights_only=True)["epoch"] == 1
    whole = network()
    teacher = small(width=0.2)  # the next draw of the same generator, as in that process
    resumed = network(99)
    reports: list[EpochReport] = []
    expected = train(whole, FEW, AUGMENTED, ALL_ON, seed=7, teacher=teacher)
    assert (
        train(resumed, FEW, AUGMENTED, ALL_ON, seed=7, teacher=teacher, checkpoint=path, on_epoch=reports.append)
        == expected
    )
    assert [report.epoch for report in reports] == [2, 3]
    assert same(resumed, whole)


def test_a_large_file_is_not_written_after_every_short_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "training.pt"
    monkeypatch.setattr("env.training_checkpoint._LARGE_BYTES", 0)
    with pytest.raises(KilledError):
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(2))
    assert torch.load(path, weights_only=True)["epoch"] == 1
    whole, resumed = network(), network(99)
    expected = train(whole, FEW, AUGMENTED, TINY, seed=7)
    assert train(resumed, FEW, AUGMENTED, TINY, seed=7, checkpoint=path) == expected
    assert same(resumed, whole)
    assert torch.load(path, weights_only=True)["epoch"] == 3  # the last is kept in any case
    monkeypatch.setattr("env.training_checkpoint._REST_S", 0.0)
    path.unlink()
    with pytest.raises(KilledError):
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(2))
    assert torch.load(path, weights_only=True)["epoch"] == 2


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
    [
        ({"seed": 8}, "seed"),
        ({"config": dataclasses.replace(TINY, epochs=4)}, "train.epochs"),
        ({"config": dataclasses.replace(TINY, average=0.9)}, "train.average"),
        ({"config": dataclasses.replace(TINY, temperature=1.0)}, "train.temperature"),
        ({"config": dataclasses.replace(TINY, distillation=0.5), "teacher": small(width=0.2)}, "train.distillation"),
        ({"config": dataclasses.replace(TINY, epochs=4), "section": "recovery"}, r"recovery\.epochs"),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "training.pt"
    with pytest.raises(KilledError):
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(1))
    with pytest.raises(UserError, match=rf"with {named} .*remove that file to train anew"):
        train(network(), FEW, AUGMENTED, **{"config": TINY, "seed": 7, **change}, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.01}, "recovery.learning_rate 0.01, before it was 0.1"),
        ({"warmup_share": 0.5}, "recovery.warmup_share 0.5, before it was 0.2"),
        ({"precision": "bfloat16"}, 'recovery.precision "bfloat16", before it was "float32"'),
    ],
)
def test_a_training_goes_on_with_what_is_tried_after_a_loss_that_is_not_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], said: str
) -> None:
    path, changed = tmp_path / "training.pt", dataclasses.replace(TINY, **change)
    with pytest.raises(KilledError):
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(1))
    reports: list[EpochReport] = []
    with caplog.at_level(logging.WARNING):
        train(
            network(99), FEW, AUGMENTED, changed, seed=7, section="recovery", checkpoint=path, on_epoch=reports.append
        )
    assert [report.epoch for report in reports] == [2, 3]
    assert [record.message for record in caplog.records] == [f"checkpoint {path}: training goes on with {said}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # what it went on with is now what it is known by
        train(network(), FEW, AUGMENTED, changed, seed=7, checkpoint=path)
    assert not caplog.records


def test_a_changed_rate_does_not_hide_what_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, other = tmp_path / "training.pt", dataclasses.replace(TINY, learning_rate=0.01, momentum=0.5)
    with pytest.raises(KilledError):
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(1))
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match=r"with train\.momentum 0\.5, got 0\.9"):
        train(network(), FEW, AUGMENTED, other, seed=7, checkpoint=path)
    assert not caplog.records


@pytest.mark.parametrize("config", [TINY, RecoveryConfig(**dataclasses.asdict(TINY))])  # the second's default is on
def test_a_checkpoint_older_than_a_setting_is_taken_where_that_is_off(tmp_path: Path, config: TrainConfig) -> None:
    path = tmp_path / "training.pt"
    whole, resumed = network(), network()
    train(whole, FEW, AUGMENTED, config, seed=7)
    with pytest.raises(KilledError):
        train(resumed, FEW, AUGMENTED, config, seed=7, checkpoint=path, on_epoch=kill_after(1))
    state = torch.load(path, weights_only=True)
    for younger in ("distillation", "temperature", "average"):
        del state["identity"][f"train.{younger}"]
    del state["average"]
    torch.save(state, path)
    train(resumed, FEW, AUGMENTED, config, seed=7, checkpoint=path)
    assert same(resumed, whole)


@contextmanager
def file_limit_restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def let_no_file_grow(_report: EpochReport) -> None:
    """From now on the kernel refuses to write past 1,000 bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_checkpoint_that_the_disk_does_not_take_is_one_line_and_the_one_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    line = r"checkpoint .*training\.pt: expected .* bytes of disk.*, got File too large; make room"
    with pytest.raises(UserError, match=line) as caught, file_limit_restored():
        train(network(), FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=let_no_file_grow)
    assert "\n" not in str(caught.value)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]
