"""The average of the weights is worked out by hand."""

import pytest
import torch
from torch import nn

from env.averaging import averaged


def test_the_average_is_worked_out_by_hand() -> None:
    model = nn.BatchNorm1d(1)
    average = averaged(model, 0.25)
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
