"""Recorded updates do what unrecorded ones do. Most of it needs a GPU, and is left out where there is none."""

import copy
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_training import FEW, network
from torch import Tensor, nn

from env.augment import augment
from env.captured import captured
from env.data import DataConfig
from env.networks import small, vgg16
from env.retraining import make_optimizer, retrain, set_rate, update
from env.training import TrainConfig, train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
Update = Callable[[Tensor, Tensor], Tensor]


class Moody(nn.Module):
    """A module of somebody's own, whose Python may decide anew each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def trained(model: nn.Module) -> tuple[torch.optim.SGD, Update]:
    """An optimizer, and one update with it."""
    optimizer = make_optimizer(model, 0.1, momentum=0.9, weight_decay=0.0)

    def once(images: Tensor, labels: Tensor) -> Tensor:
        return update(model, optimizer, images, partial(F.cross_entropy, target=labels), precision="float32")

    return optimizer, once


def minibatches(count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 16, 1, 8, 8, generator=generator).to(device)
    return list(zip(images, torch.randint(10, (count, 16), generator=generator).to(device), strict=True))


@gpu
def test_a_cpu_generator_gives_the_same_pictures_on_a_gpu() -> None:
    pictures = torch.randint(256, (512, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shown: dict[str, list[Tensor]] = {"cpu": [], "cuda": []}
    for device, batches in shown.items():
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):  # without a pause, so that a copy that is overtaken would show
            batches.append(
                augment(
                    pictures.to(device), flip=True, shift_pixels=4, mean=(0.5,) * 3, std=(0.25,) * 3,
                    generator=generator,
                )
            )  # fmt: skip
    for mine, theirs in zip(shown["cuda"], shown["cpu"], strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)


def test_on_the_cpu_nothing_is_recorded() -> None:
    model = network()
    _, once = trained(model)
    assert captured(once, model) is once


@gpu
def test_a_module_of_the_users_own_is_not_recorded() -> None:
    model = nn.Sequential(network(), Moody()).cuda()
    _, once = trained(model)
    assert captured(once, model) is once
    model.static = True
    assert captured(once, model) is not once


@gpu
def test_a_hook_of_the_users_own_is_not_left_out() -> None:
    model = network().cuda()
    model.register_forward_hook(lambda module, inputs, output: output)
    _, once = trained(model)
    assert captured(once, model) is once


@gpu
def test_recorded_updates_and_rates_are_those_of_the_same_without_recording() -> None:
    plain = network().cuda().train()
    recorded = copy.deepcopy(plain)
    losses: list[list[float]] = []
    for model, wrapped in ((plain, False), (recorded, True)):
        optimizer, once = trained(model)
        play = captured(once, model) if wrapped else once
        assert (play is once) != wrapped
        losses.append([])
        for index, (images, labels) in enumerate(minibatches(12, "cuda")):
            set_rate(optimizer, 0.1 / (1 + index))
            losses[-1].append(float(play(images, labels)))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # TF32, and sums in another order
    for mine, theirs in zip(recorded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-3)


@gpu
def test_a_rate_of_0_after_recording_leaves_the_weights_as_they_are() -> None:
    model = network().cuda().train()
    optimizer, once = trained(model)
    play = captured(once, model)
    given = minibatches(8, "cuda")
    set_rate(optimizer, 0.1)
    for images, labels in given:
        play(images, labels)
    before = [parameter.clone() for parameter in model.parameters()]
    set_rate(optimizer, 0.0)
    play(*given[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@gpu
def test_what_cannot_be_recorded_is_said_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = network().cuda().train()
    _, once = trained(model)
    losses: list[float] = []

    def reads_a_number(images: Tensor, labels: Tensor) -> Tensor:
        loss = once(images, labels)
        losses.append(loss.item())
        return loss

    play = captured(reads_a_number, model)
    with caplog.at_level(logging.WARNING):
        for images, labels in minibatches(8, "cuda"):
            play(images, labels)
    assert "cannot be recorded" in caplog.text
    assert len(losses) == 8
    assert all(loss > 0 for loss in losses)


@gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_whole_training_and_a_retraining_on_a_gpu_learn(precision: str) -> None:
    digits = FEW.to("cuda")
    model = small(width=0.5).cuda()
    metrics = train(model, digits, DataConfig(), TrainConfig(epochs=30, batch_size=32, precision=precision), seed=0)
    assert metrics.accuracy > 0.8
    loss = retrain(
        model, digits, DataConfig(), minibatches=100, batch_size=32, learning_rate=0.01, seed=1, decay=True,
        precision=precision,
    )  # fmt: skip
    assert loss < 0.2


@gpu
def test_two_trainings_one_after_the_other_do_not_disturb_each_other() -> None:
    digits = FEW.to("cuda")
    for seed in range(2):
        wide = vgg16(channels=1, width=0.1).cuda()
        train(wide, digits, DataConfig(), TrainConfig(epochs=2, batch_size=32), seed=seed)
        assert all(bool(parameter.isfinite().all()) for parameter in wide.parameters())
