import copy
import dataclasses
import logging
import math
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
import torch.nn.functional as F
from torch import nn

from env import training
from env.augment import normalise
from env.data import DataConfig, load_dataset
from env.errors import NonFiniteError, UserError
from env.networks import small
from env.retraining import evaluate, retrain
from env.training import BatchReport, EpochReport, TrainConfig, distillation_loss, train

DIGITS = load_dataset(DataConfig())
FEW = load_dataset(DataConfig(train_limit=200))
AUGMENTED = DataConfig(flip=True, shift_pixels=1)
TINY = TrainConfig(epochs=3, batch_size=32, label_smoothing=0.1)
ALL_ON = dataclasses.replace(TINY, distillation=0.5, average=0.9)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    assert reports[-1].train_accuracy > 0.97 > reports[0].train_accuracy > 0.1
    assert reports[0].seconds_left > reports[-1].seconds_left == 0


@pytest.mark.parametrize("config", [TINY, ALL_ON], ids=["plain", "distilled and averaged"])
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    tmp_path: Path, killed_after: int, config: TrainConfig
) -> None:
    whole, resumed, teacher = network(dropout=True), network(dropout=True), network(5, dropout=True)
    expected = train(whole, FEW, AUGMENTED, config, seed=7, teacher=teacher)
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

torch.set_num_threads(1)
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


def test_the_loss_of_a_student_is_worked_out_by_hand() -> None:
    # at temperature 4 the teacher says 3/4 and 1/4, the student 1/2 and 1/2
    logits, teacher_logits = torch.zeros(1, 2), torch.tensor([[4 * math.log(3), 0.0]])
    expected = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(distillation_loss(logits, teacher_logits, 4.0)) == pytest.approx(expected)
    assert float(distillation_loss(teacher_logits + 3, teacher_logits, 4.0)) == pytest.approx(0.0, abs=1e-6)
    two = distillation_loss(logits.repeat(2, 1), torch.cat([teacher_logits, logits]), 4.0)
    assert float(two) == pytest.approx(expected / 2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_training_mixes_the_hard_and_the_soft_loss_in_the_share_asked(share: float) -> None:
    student, teacher = network(), network(5, dropout=True)
    images = normalise(FEW.train.images, FEW.mean, FEW.std)
    with torch.no_grad():
        logits = copy.deepcopy(student).train()(images)
        hard = float(F.cross_entropy(logits, FEW.train.labels, label_smoothing=0.1))
        soft = float(distillation_loss(logits, teacher.eval()(images), 2.0))
    config = TrainConfig(epochs=1, batch_size=len(FEW.train), distillation=share, temperature=2.0, label_smoothing=0.1)
    weights = copy.deepcopy(teacher.state_dict())
    teacher.train()
    reports: list[EpochReport] = []
    train(student, FEW, DataConfig(), config, seed=7, teacher=teacher, on_epoch=reports.append)
    assert reports[0].train_loss == pytest.approx((1 - share) * hard + share * soft, rel=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distillation_pulls_the_outputs_towards_the_teachers() -> None:
    teacher = network(1, width=0.5)
    train(teacher, DIGITS, DataConfig(), TrainConfig(epochs=3, batch_size=64), seed=1)
    images = normalise(DIGITS.validation.images, DIGITS.mean, DIGITS.std)
    distances = []
    for share in (0.0, 0.9):
        student = network()
        config = TrainConfig(epochs=3, batch_size=64, distillation=share)
        train(student, DIGITS, DataConfig(), config, seed=7, teacher=teacher)
        with torch.no_grad():
            distances.append(float(distillation_loss(student.eval()(images), teacher(images), 4.0)))
    assert distances[1] < distances[0] / 2


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        train(network(), FEW, AUGMENTED, ALL_ON, seed=7)


def test_the_average_is_worked_out_by_hand() -> None:
    model = nn.BatchNorm1d(1)
    average = training._averaged(model, 0.25)
    seen = []
    for value in (1.0, 2.0, 4.0, 8.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(-value)  # type: ignore[union-attr]
            model.num_batches_tracked += 1  # type: ignore[operator]
        average.update_parameters(model)
        seen.append(average.module.weight.item())
    # the first is taken as it is; then the decay is 2/11, 3/12 and min(0.25, 4/13)
    second = 2 / 11 * 1 + 9 / 11 * 2
    third = second / 4 + 4 * 3 / 4
    assert seen == pytest.approx([1, second, third, third / 4 + 8 * 3 / 4])
    assert average.module.running_mean.item() == pytest.approx(-seen[-1])
    assert average.module.num_batches_tracked.item() == 4


def test_averaged_weights_are_what_is_judged_and_what_remains() -> None:
    plain, averaged = network(), network()
    config = dataclasses.replace(TINY, average=0.9)
    train(plain, FEW, AUGMENTED, TINY, seed=7)
    metrics = train(averaged, FEW, AUGMENTED, config, seed=7)
    assert metrics == evaluate(averaged, FEW.validation, FEW.mean, FEW.std)
    assert not same(plain, averaged)


def test_reports_within_an_epoch_come_now_and_then_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, watched, told_often = network(), network(), network()
    train(silent, FEW, AUGMENTED, TINY, seed=7)
    monkeypatch.setattr(training, "_REPORT_PERIOD_S", 1e9)
    rare: list[BatchReport] = []
    train(watched, FEW, AUGMENTED, TINY, seed=7, on_batch=rare.append)
    assert rare == []
    monkeypatch.setattr(training, "_REPORT_PERIOD_S", 0.0)
    reports: list[BatchReport] = []
    epochs: list[EpochReport] = []
    train(told_often, FEW, AUGMENTED, TINY, seed=7, on_batch=reports.append, on_epoch=epochs.append)
    assert same(silent, watched)
    assert same(silent, told_often)
    assert [(report.epoch, report.minibatch) for report in reports] == [(e, m) for e in (1, 2, 3) for m in range(1, 7)]
    assert all(report.minibatches == 6 and 0 <= report.train_accuracy <= 1 for report in reports)
    assert all(report.seconds_left > 0 for report in reports[:-1])
    assert reports[-1].seconds_left == 0
    # an epoch's last look and its report tell the same
    assert [(r.train_loss, r.train_accuracy) for r in reports[5::6]] == [
        (e.train_loss, e.train_accuracy) for e in epochs
    ]


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


def test_a_checkpoint_older_than_a_setting_is_taken_where_that_is_off(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    whole, resumed = network(), network()
    train(whole, FEW, AUGMENTED, TINY, seed=7)
    with pytest.raises(KilledError):
        train(resumed, FEW, AUGMENTED, TINY, seed=7, checkpoint=path, on_epoch=kill_after(1))
    state = torch.load(path, weights_only=True)
    for younger in ("distillation", "temperature", "average"):
        del state["identity"][f"train.{younger}"]
    del state["average"]
    torch.save(state, path)
    train(resumed, FEW, AUGMENTED, TINY, seed=7, checkpoint=path)
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


def test_a_diverging_training_names_epoch_and_rate_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    model = network()

    def poison(report: EpochReport) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    with pytest.raises(
        NonFiniteError,
        match=r"epoch 2 at learning rate [\d.e-]+; try a lower recovery\.learning_rate or a longer "
        r"recovery\.warmup_share; the state after epoch 1 is kept in .*training\.pt$",
    ):
        train(model, FEW, AUGMENTED, TINY, seed=7, section="recovery", checkpoint=path, on_epoch=poison)
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_training_that_diverges_at_once_keeps_nothing_and_also_names_its_precision(tmp_path: Path) -> None:
    model = network()
    model.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    config = dataclasses.replace(TINY, precision="bfloat16")
    with pytest.raises(NonFiniteError, match=r"epoch 1 at .*warmup_share or train\.precision float32$"):
        train(model, FEW, AUGMENTED, config, seed=7, checkpoint=tmp_path / "training.pt")
    assert list(tmp_path.iterdir()) == []


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
        ("learning_rate", float("inf")),
        ("learning_rate", 10.5),
        ("momentum", 1.0),
        ("momentum", float("nan")),
        ("weight_decay", -1e-9),
        ("weight_decay", 1.5),
        ("label_smoothing", 1.0),
        ("warmup_share", -0.1),
        ("precision", "float16"),
        ("distillation", 1.1),
        ("distillation", True),
        ("temperature", 0.0),
        ("temperature", 101.0),
        ("average", 1.0),
        ("average", -0.5),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(**{field: value})
    assert caught.value.what == f"train.{field}"
    assert caught.value.got == repr(value)
