"""A whole training: what it reaches, what it leaves behind, and what it says when it cannot go on."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import ALL_ON, AUGMENTED, FEW, TINY, network, same

from env.augment import normalise
from env.data import DataConfig, load_dataset
from env.errors import NonFiniteError, UserError
from env.retraining import evaluate, retrain
from env.training import TrainConfig, distillation_loss, train
from env.training_reports import EpochReport

DIGITS = load_dataset(DataConfig())


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


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("linear", [0.5, 1.0, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1.0, 0.853553, 0.5, 0.146447])],
)
def test_the_rate_rises_to_its_height_and_falls_as_the_schedule_says(schedule: str, shares: list[float]) -> None:
    reports: list[EpochReport] = []
    config = TrainConfig(
        epochs=5, batch_size=len(FEW.train), learning_rate=0.01, warmup_share=1 / 3, schedule=schedule
    )  # an update an epoch, after each sixth of the way
    train(network(), FEW, AUGMENTED, config, seed=7, on_epoch=reports.append)
    assert [report.learning_rate for report in reports] == pytest.approx([0.01 * share for share in shares], rel=1e-5)


def test_batch_norm_and_biases_decay_by_their_own_weight_decay() -> None:
    free, decayed = network(), network()
    before = {name: value.clone() for name, value in free.named_parameters()}
    config = TrainConfig(epochs=1, batch_size=len(FEW.train), learning_rate=0.1, warmup_share=0.0, momentum=0.0)
    train(free, FEW, AUGMENTED, config, seed=7)
    train(decayed, FEW, AUGMENTED, dataclasses.replace(config, norm_weight_decay=0.5), seed=7)
    for (name, without), parameter in zip(free.named_parameters(), decayed.parameters(), strict=True):
        pulled = 0.05 * 0.5 * before[name] if without.ndim == 1 else 0.0  # the only update has half of the rate
        torch.testing.assert_close(parameter, without - pulled)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        train(network(), FEW, AUGMENTED, ALL_ON, seed=7)


def test_averaged_weights_are_what_is_judged_and_what_remains() -> None:
    plain, averaged = network(), network()
    config = dataclasses.replace(TINY, average=0.9)
    train(plain, FEW, AUGMENTED, TINY, seed=7)
    metrics = train(averaged, FEW, AUGMENTED, config, seed=7)
    assert metrics == evaluate(averaged, FEW.validation, FEW.mean, FEW.std)
    assert not same(plain, averaged)


def test_training_leaves_the_global_generator_as_it_was() -> None:
    model = network()
    before = torch.get_rng_state()
    train(model, FEW, AUGMENTED, dataclasses.replace(TINY, epochs=1), seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_diverging_training_names_epoch_and_rate_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    model = network()

    def poison(report: EpochReport) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    with pytest.raises(
        NonFiniteError,
        match=r"epoch 2 at learning rate [\d.e-]+; try a lower recovery\.learning_rate or a longer "
        r"recovery\.warmup_share; the state after epoch 1 is kept in .*training\.pt, and training goes on from there$",
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
        ("norm_weight_decay", -1e-9),
        ("norm_weight_decay", 1.5),
        ("label_smoothing", 1.0),
        ("warmup_share", -0.1),
        ("schedule", "step"),
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
