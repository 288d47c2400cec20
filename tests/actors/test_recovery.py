"""A recovery away from the driver: the same network as one beside it, also from another process's checkpoint."""

from dataclasses import replace

import pytest
import torch

from actors.metrics import PLAYER_IMAGES, Metric
from actors.recovery import RecoveryOrder, RecoveryRun
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_bytes, network_to_bytes
from env.data import DataConfig, Dataset
from env.errors import NonFiniteError, UserError
from env.networks import NetworkConfig
from env.training import TrainConfig, train

DATA = DataConfig(train_limit=100, validation_share=0.1)
FORM = NetworkForm(network=NetworkConfig(width=0.25), channels=1, classes=10, image_size=8)
TRAINING = TrainConfig(epochs=3, batch_size=16, learning_rate=0.05, distillation=0.5)
TEACHER = network_to_bytes(FORM.build(seed=7), FORM)


class Told:
    """Metrics that remember what was counted."""

    def __init__(self) -> None:
        self.images = 0.0

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        assert counter is PLAYER_IMAGES
        assert not labels
        self.images += amount

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        raise AssertionError(gauge)


@pytest.fixture(scope="module")
def compact() -> bytes:
    """A network that lacks every second filter."""
    network = FORM.build(seed=1)
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    return network_to_bytes(plan.compact(network, torch.arange(plan.units) % 2 == 0), FORM)


@pytest.fixture(scope="module")
def order(compact: bytes) -> RecoveryOrder:
    return RecoveryOrder(
        name="search 50%", form=FORM, network=compact, data=DATA, training=TRAINING, seed=5,
        checkpoint=b"", kept_as="out/recovered/search-0.5.pt",
    )  # fmt: skip


def test_it_is_the_training_that_the_driver_would_do(order: RecoveryOrder, dataset: Dataset) -> None:
    network, teacher = network_from_bytes(order.network, FORM), network_from_bytes(TEACHER, FORM)
    train(network, dataset, DATA, TRAINING, seed=5, teacher=teacher)
    lines: list[str] = []
    run = RecoveryRun(order, device="cpu", log=lines.append)
    assert run.run(dataset, TEACHER) == network_to_bytes(network, FORM)
    assert [line.split(",")[0] for line in lines] == [f"search 50%: epoch {epoch}/3" for epoch in (1, 2, 3)]
    assert run.news(0).epochs == 3.0


def test_what_it_has_reached_is_handed_over_and_gone_on_with(order: RecoveryOrder, dataset: Dataset) -> None:
    checkpoints: list[bytes] = []
    told = Told()

    def listen(_line: str) -> None:
        news = run.news(len(checkpoints))
        checkpoints.append(news.checkpoint)
        assert (news.version, news.epochs) == (len(checkpoints), len(checkpoints))
        assert run.news(news.version).checkpoint == b""  # known already

    run = RecoveryRun(order, device="cpu", log=listen, metrics=told)
    assert run.news(0).checkpoint == b""
    whole = run.run(dataset, TEACHER)
    assert len(checkpoints) == len(set(checkpoints)) == 3
    assert told.images == 2 * len(dataset.train) // 16 * 16  # the first report adds nothing
    for reached in checkpoints:
        lines: list[str] = []
        again = RecoveryRun(replace(order, checkpoint=reached), device="cpu", log=lines.append)
        assert again.run(dataset, TEACHER) == whole
        assert len(lines) == 2 - checkpoints.index(reached)


def test_messages_name_the_driver_s_file(order: RecoveryOrder, dataset: Dataset) -> None:
    run = RecoveryRun(order, device="cpu", log=lambda _line: None)
    run.run(dataset, TEACHER)
    other = replace(order, checkpoint=run.news(0).checkpoint, training=replace(TRAINING, momentum=0.5))
    with pytest.raises(UserError, match=r"^checkpoint out/recovered/search-0\.5\.pt: .* recovery\.momentum 0\.5"):
        RecoveryRun(other, device="cpu", log=lambda _line: None).run(dataset, TEACHER)


def test_a_loss_that_is_not_finite_is_its_error(order: RecoveryOrder, dataset: Dataset) -> None:
    network = network_from_bytes(order.network, FORM)
    with torch.no_grad():
        next(network.parameters()).fill_(torch.inf)
    broken = replace(order, network=network_to_bytes(network, FORM))
    with pytest.raises(NonFiniteError, match="not finite in epoch 1"):
        RecoveryRun(broken, device="cpu", log=lambda _line: None).run(dataset, TEACHER)
