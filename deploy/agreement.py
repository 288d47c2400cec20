"""What the importances would have kept: does whoever chose the filters agree with any of them?

Written into result.json at a campaign's end (deploy/recover.py), and shown by the report beside what was kept.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy.config import CampaignConfig
from deploy.prepare import Baseline, default_device
from env.channels import ChannelPlan
from env.copies import duplicate
from env.data import Dataset
from env.importance import IMPORTANCES
from env.recognizer import Recognizer
from env.seeds import derive_seed

__all__ = ["CHANCE", "agreement", "importances", "keep_mask_of", "unpacked_mask"]

CHANCE = "chance"  # the name of what a random choice of as many filters in each layer would agree on


def importances(config: CampaignConfig, dataset: Dataset, baseline: Baseline) -> tuple[ChannelPlan, dict[str, Tensor]]:
    """The plan of the network that episodes start from, and each importance of its units, float32 [F], by name."""
    recognizer = Recognizer(
        duplicate(baseline.start), dataset, config.data, measure=baseline.measure, device=default_device()
    )
    whole, seed = recognizer.full(), derive_seed(config.seed, "agreement")
    images = dict.fromkeys(IMPORTANCES, config.episode.score_images) | {"rank": config.episode.rank_images}
    scores = {
        name: recognizer.importance(name, whole, images=images[name], batch_size=config.episode.batch_size, seed=seed)
        for name in IMPORTANCES
    }
    return recognizer.plan, scores


def agreement(plan: ChannelPlan, keep_mask: Tensor, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of the kept units that each importance would have kept too, given as many units in each layer.

    Of the layers that lost something. `CHANCE` is what choosing at random agrees on, in the mean. Empty where nothing
    was lost.

    Args:
        plan: its units.
        keep_mask: bool [F].
        scores: float [F] each, larger = more important.

    """
    cut = [layer for layer in plan.layers if not bool(keep_mask[layer.first : layer.first + layer.units].all())]
    kept = [keep_mask[layer.first : layer.first + layer.units] for layer in cut]
    total = sum(int(mask.sum()) for mask in kept)
    if not total:
        return {}
    chance = sum(float(mask.sum()) ** 2 / len(mask) for mask in kept) / total
    alike = {
        name: sum(
            int(mask[score[layer.first : layer.first + layer.units].topk(int(mask.sum())).indices].sum())
            for layer, mask in zip(cut, kept, strict=True)
        )
        for name, score in scores.items()
    }
    return {CHANCE: chance, **{name: count / total for name, count in alike.items()}}


def keep_mask_of(records: Sequence[Mapping[str, Any]], point: Mapping[str, Any], units: int) -> Tensor | None:
    """The mask bool [units] of the episode that a point of result.json comes from, where a record has it."""
    for record in records:
        if record["id"] == point["episode"]:
            for reached in record["targets"]:
                if reached["target"] == point["target"]:
                    return unpacked_mask(reached.get("keep_bits", ""), units)
    return None


def unpacked_mask(text: str, units: int) -> Tensor | None:
    """The mask bool [units] in a record's `keep_bits` (actors/records.py); None where it is no such mask."""
    try:
        packed = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    if len(packed) != (units + 7) // 8:
        return None
    return torch.from_numpy(np.unpackbits(np.frombuffer(packed, np.uint8))[:units].astype(bool))
