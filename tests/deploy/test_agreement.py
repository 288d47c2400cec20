"""What importances would have kept, by hand."""

import base64
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy.agreement import agreement, keep_mask_of
from env.channels import ChannelPlan

PLAN = ChannelPlan(
    nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.Conv2d(4, 5, 1),
        nn.Conv2d(5, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ),
    torch.zeros(1, 1, 2, 2),
)
#: Two of four, three of five, and all of a layer that does not count.
KEPT = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1]).bool()


def test_the_share_that_an_importance_would_have_kept_too() -> None:
    found = agreement(
        PLAN,
        KEPT,
        {
            "alike": KEPT.float(),
            "opposite": -KEPT.float(),  # of five, keeping three: one of the two that went stays out
            "half": torch.tensor([9.0, 1.0, 8.0, 2.0, 0.0, 9.0, 8.0, 7.0, 1.0, 5.0, 6.0]),
        },
    )
    assert found.pop("alike") == 1.0
    assert found.pop("opposite") == pytest.approx((0 + 1) / 5)
    assert found.pop("half") == pytest.approx((1 + 2) / 5)
    assert found.pop("chance") == pytest.approx((2 * 2 / 4 + 3 * 3 / 5) / 5)
    assert not found


def test_where_nothing_was_lost_there_is_nothing_to_agree_on() -> None:
    assert agreement(PLAN, torch.ones(11, dtype=torch.bool), {"alike": KEPT.float()}) == {}


@pytest.mark.parametrize(
    ("bits", "found"),
    [
        (base64.b64encode(np.packbits(KEPT.numpy()).tobytes()).decode(), True),
        ("!", False),
        (base64.b64encode(b"123").decode(), False),
    ],
)
def test_the_mask_is_that_of_the_points_own_episode(bits: str, found: bool) -> None:
    records: list[dict[str, Any]] = [
        {"id": 3, "targets": [{"target": 0.5, "keep_bits": "AAA="}, {"target": 0.9, "keep_bits": bits}]},
        {"id": 4, "targets": []},
    ]
    mask = keep_mask_of(records, {"episode": 3, "target": 0.9}, 11)
    assert (mask is not None) == found
    if mask is not None:
        assert torch.equal(mask, KEPT)
    assert keep_mask_of(records, {"episode": 4, "target": 0.9}, 11) is None
    assert keep_mask_of(records, {"episode": 5, "target": 0.9}, 11) is None
