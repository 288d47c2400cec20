import math

import pytest
import torch
from torch import Tensor, nn

from agents.balance import UsualShapes, balanced
from env.channels import ChannelPlan
from env.measure import log_freed

PLAN = ChannelPlan(
    nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
    torch.zeros(1, 2, 8, 8),
)


def freed(alive: Tensor, plan: ChannelPlan, measure: str = "parameters") -> Tensor:
    return log_freed(measure, plan, plan.kept_per_layer(alive))


def test_what_is_freed_for_each_nat_of_harm_by_hand() -> None:
    alive = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]).bool()
    quality = torch.tensor([[0.4, 0.1, 0.0, 0.3, 0.2, -1.0, 0.25, 2.0]])
    log_harm = torch.tensor([[0.0, math.log(2.0)]])
    found = balanced(quality, alive, log_harm, freed(alive, PLAN), PLAN)[0]
    # 203 parameters: a filter of layer one frees 46 of them, one of layer two 41, which does twice the harm
    first, second = math.log(46 / 203), math.log(41 / 203)
    expected = {
        1: first - math.log(1 / 3 - 1 / 4),
        4: first - math.log(1 / 2 - 1 / 3),
        3: first - math.log(1 - 1 / 2),
        0: first - math.log(1 / 0.5 - 1),
        5: second - math.log(2 * (1 / 2 - 1 / 3)),
        6: second - math.log(2 * (1 - 1 / 2)),
        7: second - math.log(2 * (1 / 0.5 - 1)),
    }
    assert {i: float(found[i]) for i in expected} == pytest.approx(expected, abs=1e-5)


class ReadTwice(nn.Module):
    """A convolution that two others read, whose outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.last = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        return self.last((self.second(first) + self.third(first)).mean((2, 3)))


def test_a_layer_does_its_harm_on_each_way_through_it() -> None:
    plan = ChannelPlan(ReadTwice(), torch.zeros(1, 2, 4, 4))
    assert plan.paths.tolist() == [2, 2]  # one writer and two readers, then two writers and one reader
    alive, quality, alike = torch.ones(1, 12, dtype=torch.bool), torch.arange(12.0)[None], torch.zeros(1, 2)
    found = balanced(quality, alive, alike, freed(alive, plan), plan)[0]
    # 18 + 42 + 42 + 28 = 130 parameters; a filter of the first frees 3 + 6 + 6, one of the joined 7 + 7 + 4
    harm = 2 * (1 / 5 - 1 / 6)
    assert float(found[0]) == pytest.approx(math.log(15 / 130 / harm), abs=1e-5)
    assert float(found[6]) == pytest.approx(math.log(18 / 130 / harm), abs=1e-5)
    assert UsualShapes(plan, "parameters").widths[1].tolist() == [6, 5]


def test_rows_are_apart_and_what_all_layers_share_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    alive = torch.rand(6, 8, generator=generator) < 0.8
    alive[:, [0, 5]] = True
    quality, log_harm = torch.randn(6, 8, generator=generator), torch.randn(6, 2, generator=generator)
    together = balanced(quality, alive, log_harm, freed(alive, PLAN, "macs"), PLAN)
    for row in range(6):
        here = slice(row, row + 1)
        cost = freed(alive[here], PLAN, "macs")
        one = balanced(quality[here], alive[here], log_harm[here] + 3.0, cost, PLAN)
        torch.testing.assert_close(one[0, alive[row]] + 3.0, together[row, alive[row]])


def test_a_prefix_of_the_ranking_leaves_layers_whose_harm_for_a_parameter_is_alike() -> None:
    layers = [nn.Conv2d(3, 40, 1), nn.Conv2d(40, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4)]
    wide = ChannelPlan(nn.Sequential(*layers), torch.zeros(1, 3, 4, 4))
    alive = torch.ones(1, 80, dtype=torch.bool)
    log_harm = torch.tensor([[math.log(4.0), 0.0]])
    scores = balanced(torch.arange(80.0)[None], alive, log_harm, freed(alive, wide), wide)[0]
    gone = scores.argsort(descending=True)[:40]
    left = 40 - (gone < 40).sum(), 40 - (gone >= 40).sum()
    # c / w ** 2 divided by what a filter frees is the same in both: w ~ sqrt(c / freed), freed 44 and 45
    assert float(left[0] / left[1]) == pytest.approx(math.sqrt(4 / 44 * 45), rel=0.06)


def test_the_usual_shapes_by_hand() -> None:
    made = UsualShapes(PLAN, "parameters")
    # 249 parameters; a filter of layer one frees 19, and 9 for each of layer two's; one of layer two 5, and 9 for each
    # of layer one's. Parameters for the harm 1 / (w - 1) - 1 / w: 46 * 20 beats 50 * 6, then 46 * 12 beats 41 * 6,
    # 46 * 6 beats 32 * 6, 23 * 6 of layer two beats 46 * 2, then 37 * 2 beats 23 * 2, and layer two's last frees 14
    assert made.widths.tolist() == [[5, 3], [4, 3], [3, 3], [2, 3], [2, 2], [1, 2], [1, 1]]
    assert made.removed.tolist() == pytest.approx([gone / 249 for gone in (0, 46, 92, 138, 161, 198, 212)])


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_where_as_much_is_removed_the_usual_shape_is_as_large(measure: str) -> None:
    layers = [nn.Conv2d(3, 40, 1), nn.Conv2d(40, 60, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, 4)]
    plan = ChannelPlan(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
    made = UsualShapes(plan, measure)
    assert bool((made.removed.diff() >= 0).all())
    kept = torch.tensor([[40, 60], [40, 9], [7, 60], [20, 20], [1, 1]])
    usual = made(kept)
    assert usual.shape == (5, 2)
    sizes, wanted = plan.cost(measure, usual.round().long()), plan.cost(measure, kept)
    torch.testing.assert_close(sizes.float(), wanted.float(), rtol=0.05, atol=0.0)
    assert usual[0].tolist() == [40, 60]
    assert usual[-1].tolist() == [1, 1]
