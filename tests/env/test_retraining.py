import dataclasses
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from brought import Viewing
from torch import nn

from env.data import DataConfig, Dataset, load_dataset
from env.errors import NonFiniteError
from env.networks import resnet18, small, vgg16
from env.retraining import evaluate, retrain
from env.splits import Split
from env.training import TrainConfig

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


class Fixed(nn.Module):
    """Answers each image with the logits (x, 0, -x), x its only pixel as normalised."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)
        return torch.cat([x, torch.zeros_like(x), -x], dim=1)


def test_metrics_are_as_worked_by_hand() -> None:
    # Pixels 0 and 255 with mean 0.5 and deviation 0.5 are -1 and 1; three images in batches of two.
    images = torch.tensor([0, 255, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    split = Split(images, torch.tensor([2, 0, 1]))
    sure, unsure = 1.0, 0.0
    spread = torch.tensor([-1.0, 0.0, 1.0]).logsumexp(0).item()
    expected = (2 * (spread - sure) + (spread - unsure)) / 3
    metrics = evaluate(Fixed(), split, (0.5,), (0.5,), batch_size=2)
    assert metrics.accuracy == pytest.approx(2 / 3)
    assert metrics.cross_entropy == pytest.approx(expected)


def test_judging_uses_eval_mode_and_restores_each_modules_own() -> None:
    model = network(dropout=True).train()
    model[0].features[1].eval()  # type: ignore[index]
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, DIGITS.validation, DIGITS.mean, DIGITS.std)
    assert first == evaluate(model, DIGITS.validation, DIGITS.mean, DIGITS.std)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_bfloat16_judges_nearly_alike() -> None:
    model = network()
    single = evaluate(model, DIGITS.validation, DIGITS.mean, DIGITS.std)
    half = evaluate(model, DIGITS.validation, DIGITS.mean, DIGITS.std, precision="bfloat16")
    assert half.cross_entropy == pytest.approx(single.cross_entropy, rel=0.02)


def short(model: nn.Module, dataset: Dataset = FEW, **change: Any) -> float:
    given: dict[str, Any] = {"minibatches": 4, "batch_size": 20, "learning_rate": 0.01, "seed": 3}
    return retrain(model, dataset, AUGMENTED, **{**given, **change})


def test_retraining_is_repeatable_and_its_seed_decides() -> None:
    models = [network() for _ in range(3)]
    losses = [short(model, seed=seed) for model, seed in zip(models, (3, 3, 4), strict=True)]
    assert losses[0] == losses[1] != losses[2]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


class Recorder(nn.Module):
    """Keeps the pictures it is shown."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Dropout(), nn.Linear(width, 10))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        return self.linear(images)  # type: ignore[no-any-return]


def test_the_same_seed_shows_every_network_the_same_pictures() -> None:
    narrow, wide = Recorder(3), Recorder(7)
    short(narrow, minibatches=12)
    short(wide, minibatches=12)
    assert torch.equal(torch.stack(narrow.seen), torch.stack(wide.seen))


def test_no_image_comes_twice_before_all_came_once() -> None:
    model = Recorder(5)
    shown: list[int] = []
    split = Split(torch.arange(45, dtype=torch.uint8).view(45, 1, 1, 1).expand(45, 1, 8, 8), torch.zeros(45).long())
    data = dataclasses.replace(FEW, train=split, mean=(0.0,), std=(1.0,))
    retrain(model, data, DataConfig(), minibatches=5, batch_size=20, learning_rate=0.1, seed=0)
    for images in model.seen:
        shown += images[:, 0, 0, 0].mul(255).round().int().tolist()
    assert len(set(shown[:40])) == len(set(shown[40:80])) == 40
    assert shown[:40] != shown[40:80]


def test_retraining_learns_and_returns_the_mean_loss() -> None:
    model = network()
    first = short(model, minibatches=1)
    later = short(model, minibatches=60)
    assert later < first
    assert evaluate(model, DIGITS.test, DIGITS.mean, DIGITS.std).accuracy > 0.2


def test_a_decaying_rate_moves_less_than_a_constant_one() -> None:
    start, constant, decaying = network(), network(), network()
    short(constant, minibatches=8)
    short(decaying, minibatches=8, decay=True)

    def moved(model: nn.Module) -> float:
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    assert 0 < moved(decaying) < moved(constant)


def test_the_first_update_is_plain_sgd_without_decay_on_biases() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    data = dataclasses.replace(FEW, train=Split(images, torch.tensor([0, 1])), mean=(0.5,), std=(0.5,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    linear = model[1]
    assert isinstance(linear, nn.Linear)
    before = {name: value.detach().clone() for name, value in linear.named_parameters()}
    loss = F.cross_entropy(linear(torch.tensor([[-1.0], [1.0]])), torch.tensor([0, 1]))
    gradients = dict(zip(before, torch.autograd.grad(loss, list(linear.parameters())), strict=True))
    how: dict[str, Any] = {"minibatches": 1, "batch_size": 2, "learning_rate": 0.5, "seed": 0}
    got = retrain(model, data, DataConfig(), **how, momentum=0.0, weight_decay=0.1)
    assert got == pytest.approx(loss.item())
    expected = before["weight"] - 0.5 * (gradients["weight"] + 0.1 * before["weight"])
    torch.testing.assert_close(linear.weight.detach(), expected)
    torch.testing.assert_close(linear.bias.detach(), before["bias"] - 0.5 * gradients["bias"])


@pytest.mark.parametrize("rate", [1e30, float("inf")])
def test_a_diverging_retraining_is_told(rate: float) -> None:
    with pytest.raises(NonFiniteError, match="learning rate"):
        short(network(), learning_rate=rate)


def test_retraining_needs_a_minibatch() -> None:
    with pytest.raises(ValueError, match="minibatches must be at least 1, got 0"):
        short(network(), minibatches=0)


def test_weights_keep_their_plain_layout() -> None:
    model = vgg16(channels=1, width=0.05)
    short(model, minibatches=1)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def seen_layouts(tested: nn.Module) -> list[bool]:
    """Whether each projection's images were channels_last in a short retraining."""
    seen: list[bool] = []
    projection = tested.get_submodule("stages.1.0.shortcut.0")
    projection.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    loss = retrain(tested, FEW, DataConfig(), minibatches=2, batch_size=32, learning_rate=0.05, seed=1)
    assert 0 < loss < 10
    return seen[-2:]  # before them it may have been tried whether it reads channels_last at all


@pytest.mark.parametrize("width", [0.06, 0.25])
def test_images_are_channels_last_in_wide_and_narrow_networks(width: float) -> None:
    torch.manual_seed(0)
    assert seen_layouts(resnet18(channels=1, width=width)) == [True, True]


def test_narrow_strided_1x1_convolutions_of_an_odd_kind_get_no_channels_last_images() -> None:
    # oneDNN issue 6035: their gradient would write past its memory
    class Odd(nn.Conv2d):
        pass

    torch.manual_seed(0)
    tested = resnet18(channels=1, width=0.06)
    tested.get_submodule("stages.1.0.shortcut.0").__class__ = Odd
    assert seen_layouts(tested) == [False, False]


class Reshaping(Viewing):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.classifier(self.maps(images).flatten(1)))


def test_a_forward_that_views_its_maps_gets_images_that_it_can_view() -> None:
    """Flattening by `view`, as many networks do, is the same as by `reshape`, in training and in judging."""
    viewing, reshaping = Viewing(1, 10), Reshaping(1, 10)
    reshaping.load_state_dict(viewing.state_dict())
    losses = [short(tested, minibatches=3) for tested in (viewing, reshaping)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    judged = [evaluate(tested, FEW.validation, FEW.mean, FEW.std) for tested in (viewing, reshaping)]
    assert judged[0].cross_entropy == pytest.approx(judged[1].cross_entropy, rel=1e-3)
    assert viewing.training
    assert reshaping.training


def test_what_is_wrong_with_a_forward_is_said_as_torch_says_it() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        short(nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), minibatches=1)
