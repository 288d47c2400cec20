import pytest
import torch
from torch import nn

from env.channels import MEASURES, ChannelPlan
from env.measure import Measure, and_narrower, log_freed


def plan() -> ChannelPlan:
    """5 filters of 2x3x3 with batch-norm, read by 4 outputs."""
    network = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )
    return ChannelPlan(network, torch.zeros(1, 2, 6, 6))


def test_compression_by_hand_in_every_measure() -> None:
    kept = torch.tensor([[5], [2]])
    # parameters k (18 + 2 + 4) + 4; macs 16 positions * 18 k + 4 k; bytes 4 (parameters + 2 k) + 8 of the counter
    costs = {"parameters": (124, 52), "macs": (1460, 584), "bytes": (544, 232)}
    assert set(costs) == set(MEASURES)
    for name, (full, left) in costs.items():
        assert plan().cost(name, kept).tolist() == [full, left]
        assert Measure(name, full).compression(plan(), kept).tolist() == [0.0, pytest.approx(1 - left / full)]
        assert float(Measure(name, 2 * full).compression(plan(), kept)[0]) == 0.5


@pytest.mark.parametrize(("name", "given"), [("grams", 5), ("parameters", 0)])
def test_a_measure_that_is_none_is_refused(name: str, given: int) -> None:
    with pytest.raises(ValueError, match=name):
        Measure(name, given)


def test_what_a_filter_frees_by_hand() -> None:
    # one of k filters is 24 of 24 k + 4 parameters, and 292 of 292 k MACs
    for kept in (5, 2):
        assert log_freed("parameters", plan(), torch.tensor([kept])).exp().tolist() == pytest.approx(
            [24 / (24 * kept + 4)]
        )
        assert log_freed("macs", plan(), torch.tensor([kept])).exp().tolist() == pytest.approx([1 / kept])
    assert log_freed("parameters", plan(), torch.tensor([[0], [1]])).exp().tolist() == [
        [pytest.approx(1e-6)],
        [pytest.approx(24 / 28)],
    ]


def test_a_shape_comes_with_those_that_are_a_filter_narrower_in_one_layer() -> None:
    shapes = and_narrower(torch.tensor([[3, 5], [0, 1]]))
    assert shapes.tolist() == [[[3, 5], [2, 5], [3, 4]], [[0, 1], [0, 1], [0, 0]]]
