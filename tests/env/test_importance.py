import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import CLASSES, EXAMPLE, PRUNABLE

from env.channels import ChannelPlan
from env.importance import FEATURES, gamma, l1, log_scores, taylor
from env.networks import resnet18

Batches = list[tuple[Tensor, Tensor]]


def normed() -> nn.Sequential:
    """Two layers of 5 and 3 filters; the first with batch-norm, the second without."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )
    norm = network[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.3, 0.1, -0.2, 0.0, 0.4]))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return network.eval()


def plan_of(network: nn.Module) -> ChannelPlan:
    return ChannelPlan(network, torch.zeros(1, 2, 6, 6))


def batches(sizes: tuple[int, ...] = (7, 5)) -> Batches:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 2, 6, 6, generator=generator), torch.randint(4, (size,), generator=generator))
        for size in sizes
    ]


def everything(plan: ChannelPlan) -> Tensor:
    return torch.ones(plan.units, dtype=torch.bool)


def slope(network: nn.Module, gates: list[tuple[str, int]], images: Tensor, labels: Tensor) -> float:
    """Derivative of the loss as all these gates' (tensor, index) are silenced together, by central differences."""
    losses, step = [], 1e-4
    for scale in (1 + step, 1 - step):
        trial = copy.deepcopy(network).double()
        with torch.no_grad():
            for name, index in gates:
                trial.get_parameter(name)[index] *= scale
            losses.append(float(F.cross_entropy(trial(images.double()), labels)))
    return (losses[0] - losses[1]) / (2 * step)


def test_taylor_is_the_slope_of_the_loss_as_the_gate_closes() -> None:
    network = normed()
    data = batches()
    scores = taylor(network, plan_of(network), everything(plan_of(network)), data)
    for unit in range(8):
        module, index = ("1", unit) if unit < 5 else ("3", unit - 5)
        gates = [(f"{module}.weight", index), (f"{module}.bias", index)]
        slopes = [slope(network, gates, images, labels) for images, labels in data]
        expected = math.sqrt(sum(s * s for s in slopes) / len(slopes))
        assert float(scores[unit]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_taylor_by_hand_on_a_linear_network() -> None:
    # mean of the map x is 1: gates w_i x + 0, logits v_i w_i; loss of class 0 has the gradient p - (1, 0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
        network[3].weight.copy_(torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
        network[3].bias.zero_()
    plan = ChannelPlan(network, torch.ones(1, 1, 2, 2))
    scores = taylor(network, plan, everything(plan), [(torch.ones(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))])
    second = math.exp(-1) / (math.exp(1) + math.exp(-1))  # logits 1 and -1
    torch.testing.assert_close(scores, torch.tensor([second * 1.0, second * 1.0]))


def test_a_closed_gate_has_no_taylor_score_and_the_smallest_logarithm() -> None:
    network = normed()
    plan = plan_of(network)
    assert float(taylor(network, plan, everything(plan), batches())[3]) == 0.0
    assert float(log_scores(network, plan, everything(plan), batches())[3, 0]) == pytest.approx(math.log(1e-10))


def test_taylor_leaves_the_network_as_it_was() -> None:
    network = normed().train()
    before = copy.deepcopy(network.state_dict())
    taylor(network, plan_of(network), everything(plan_of(network)), batches())
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_gamma_is_the_scale_and_where_there_is_no_norm_l1() -> None:
    network = normed()
    plan = plan_of(network)
    scores = gamma(network, plan, everything(plan))
    assert scores[:5].tolist() == [0.5, 2.0, 1.0, 0.0, 3.0]
    torch.testing.assert_close(scores[5:], network[3].weight.detach().abs().mean((1, 2, 3)))


def test_l1_is_the_mean_absolute_weight_of_each_kernel() -> None:
    network = normed()
    with torch.no_grad():
        network[3].weight.copy_(torch.tensor([[1.0, -1, 0, 0, 0], [2, 2, 2, 2, 2], [0, 0, -5, 0, 0]])[..., None, None])
    plan = plan_of(network)
    scores = l1(network, plan, everything(plan))
    torch.testing.assert_close(scores[:5], network[0].weight.detach().abs().mean((1, 2, 3)))
    torch.testing.assert_close(scores[5:], torch.tensor([0.4, 2.0, 1.0]))


def test_dead_filters_score_0_and_the_kept_as_on_the_compact_network_alone() -> None:
    network = normed()
    plan = plan_of(network)
    keep_mask = torch.tensor([1, 0, 1, 0, 1, 0, 1, 1]).bool()
    compact = plan.compact(network, keep_mask)
    alone = plan_of(compact)
    for score, score_alone in (
        (taylor(compact, plan, keep_mask, batches()), taylor(compact, alone, everything(alone), batches())),
        (gamma(compact, plan, keep_mask), gamma(compact, alone, everything(alone))),
        (l1(compact, plan, keep_mask), l1(compact, alone, everything(alone))),
    ):
        assert score[~keep_mask].tolist() == [0.0, 0.0, 0.0]
        assert torch.equal(score[keep_mask], score_alone)
        assert int((score_alone > 0).sum()) == 5


def test_coupled_channels_are_one_unit_whose_gates_close_together() -> None:
    torch.manual_seed(0)
    network = resnet18(channels=2, classes=4, width=0.05).eval()
    plan = plan_of(network)
    data = batches((5,))
    stage = plan.layers[0]
    norms = ["bn", "stages.0.0.bn2", "stages.0.1.bn2"]
    with torch.no_grad():
        for place, name in enumerate(norms):
            network.get_parameter(f"{name}.weight").fill_(place + 1.0)
            network.get_parameter(f"{name}.bias").fill_(0.1)
    assert set(norms) <= set(stage.modules)
    gammas = gamma(network, plan, everything(plan))[: stage.units]
    torch.testing.assert_close(gammas, torch.full((stage.units,), 2.0))
    scores = taylor(network, plan, everything(plan), data)
    gates = [(f"{name}.{key}", 1) for name in norms for key in ("weight", "bias")]
    assert float(scores[1]) == pytest.approx(abs(slope(network, gates, *data[0])), rel=1e-3)


def test_log_scores_are_the_scores_in_the_order_of_their_names() -> None:
    network = normed()
    plan = plan_of(network)
    keep_mask = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1]).bool()
    compact = plan.compact(network, keep_mask)
    scores = log_scores(compact, plan, keep_mask, batches())
    assert FEATURES == ("log_taylor", "log_gamma", "log_l1")
    assert scores.shape == (8, 3)
    assert scores.dtype == torch.float32
    expected = [
        taylor(compact, plan, keep_mask, batches()),
        gamma(compact, plan, keep_mask),
        l1(compact, plan, keep_mask),
    ]
    for column, score in enumerate(expected):
        torch.testing.assert_close(scores[keep_mask, column], score[keep_mask].log())
    assert bool((scores[~keep_mask] == 0).all())


def test_without_any_images_taylor_is_0() -> None:
    network = normed()
    assert taylor(network, plan_of(network), everything(plan_of(network)), []).tolist() == [0.0] * 8


@pytest.mark.parametrize("name", PRUNABLE)
def test_every_unit_of_any_network_is_scored_and_none_that_is_gone(name: str) -> None:
    torch.manual_seed(3)
    network = PRUNABLE[name]().eval()
    plan = ChannelPlan(network, EXAMPLE)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % CLASSES
    everything = torch.ones(plan.units, dtype=torch.bool)
    assert (gamma(network, plan, everything) > 0).all()
    assert (l1(network, plan, everything) > 0).all()
    assert (taylor(network, plan, everything, [(images, labels)]) >= 0).all()
    keep_mask = everything.clone()
    keep_mask[[layer.first + 1 for layer in plan.layers]] = False
    scores = log_scores(plan.compact(network, keep_mask), plan, keep_mask, [(images, labels)])
    assert scores.isfinite().all()
    assert ((scores != 0).any(dim=1) == keep_mask).all()
