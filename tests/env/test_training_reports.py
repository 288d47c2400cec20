"""A training tells where it is and how long it will take, and goes on the same whether anybody listens."""

from types import SimpleNamespace

import pytest
from tiny_training import AUGMENTED, FEW, TINY, network, same

from env import training_reports
from env.retraining import Metrics
from env.training import train
from env.training_reports import BatchReport, EpochReport, Means, Reporter


def test_paces_are_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, batches, epochs = 0.0, list[BatchReport](), list[EpochReport]()
    monkeypatch.setattr(training_reports, "time", SimpleNamespace(perf_counter=lambda: now_s))
    reporter = Reporter(
        epochs=4, minibatches=5, batch_size=32, finished=1, on_epoch=epochs.append, on_batch=batches.append
    )
    now_s = 0.9
    assert not reporter.batch_is_due()
    now_s = 3.0
    assert reporter.batch_is_due()
    means = Means(train_loss=0.5, train_accuracy=0.75, learning_rate=0.1)
    reporter.batch(3, means)
    assert not reporter.batch_is_due()
    # 3/5 of an epoch in 3 s: 5 s each, and 2.4 are left
    assert batches == [
        BatchReport(
            epoch=2, epochs=4, minibatch=3, minibatches=5, train_loss=0.5, train_accuracy=0.75, learning_rate=0.1,
            seconds_left=pytest.approx(12.0),
        )
    ]  # fmt: skip
    validation = Metrics(accuracy=0.7, cross_entropy=0.9)
    now_s = 10.0
    reporter.epoch(means, validation)
    now_s = 18.0
    reporter.epoch(means, validation)
    known = {"epochs": 4, "train_loss": 0.5, "train_accuracy": 0.75, "validation": validation, "learning_rate": 0.1}
    assert epochs == [
        EpochReport(epoch=2, seconds=10.0, images_per_s=16.0, seconds_left=20.0, **known),
        EpochReport(epoch=3, seconds=8.0, images_per_s=20.0, seconds_left=9.0, **known),
    ]


def test_reports_within_an_epoch_come_now_and_then_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, watched, told_often = network(), network(), network()
    train(silent, FEW, AUGMENTED, TINY, seed=7)
    monkeypatch.setattr(training_reports, "_PERIOD_S", 1e9)
    rare: list[BatchReport] = []
    train(watched, FEW, AUGMENTED, TINY, seed=7, on_batch=rare.append)
    assert rare == []
    monkeypatch.setattr(training_reports, "_PERIOD_S", 0.0)
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
