"""Recorded updates do what unrecorded ones do. Most of it needs a GPU, and is left out where there is none."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_training import FEW, network
from torch import Tensor, nn

from env.augment import augment
from env.captured import captured, is_static
from env.data import DataConfig
from env.errors import UserError
from env.networks import resnet18, small, vgg16
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


def with_a_hook() -> nn.Module:
    model = network()
    model.register_forward_hook(lambda module, inputs, output: output)
    return model


def with_a_hook_on_a_weight() -> nn.Module:
    model = network()
    next(model.parameters()).register_hook(lambda gradient: gradient)
    return model


def with_another_forward() -> nn.Module:
    model = network()
    model.forward = lambda images: images.flatten(1)[:, :10]  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "static"),
    [
        (network(dropout=True), True),
        (resnet18(channels=1, width=0.05), True),
        (nn.Sequential(network(), Moody()), False),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None)), False),  # it reads its own count
        (with_a_hook(), False),
        (with_a_hook_on_a_weight(), False),
        (with_another_forward(), False),
    ],
)
def test_what_may_decide_anew_each_time_is_not_static_unless_it_says_so(model: nn.Module, static: bool) -> None:
    assert is_static(model) == static
    model.static = True  # type: ignore[assignment]
    assert is_static(model)


@gpu
def test_all_networks_of_an_update_must_be_static() -> None:
    model = network().cuda()
    _, once = trained(model)
    assert captured(once, model) is not once
    assert captured(once, model, nn.Sequential(network(), Moody()).cuda()) is once  # a teacher, say


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
def test_many_trainings_one_after_the_other_learn_alike_and_pile_nothing_up() -> None:
    digits, held, losses = FEW.to("cuda"), [], []
    for _ in range(40):
        wide = vgg16(channels=1, width=0.5).cuda()
        loss = retrain(
            wide, digits, DataConfig(), minibatches=64, batch_size=64, learning_rate=0.02, seed=0, decay=True
        )  # fmt: skip
        losses.append(loss)
        held.append(torch.cuda.memory_reserved())
    assert max(losses) < 2.0  # chance is 2.3
    assert held[-1] <= held[4] + 64 * 2**20


@gpu
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_calls_itself_static_and_is_not_is_named() -> None:
    # the last, as torch is not itself any more after a recording that has failed
    model = network().cuda().train()
    _, once = trained(model)

    def reads_a_number(images: Tensor, labels: Tensor) -> Tensor:
        loss = once(images, labels)
        loss.item()
        return loss

    play = captured(reads_a_number, model)
    given = minibatches(4, "cuda")
    for images, labels in given[:3]:
        play(images, labels)
    with pytest.raises(UserError, match=r"the network: expected one whose updates can be recorded.*take static = True"):
        play(*given[3])
