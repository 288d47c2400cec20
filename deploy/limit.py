"""The smallest network that loses no more validation accuracy than the user allows (`max_drop`).

The campaign's targets are its first guesses. Between the highest that holds and the next that does not, the network is
pruned further by a rule and recovered like every other, halving the gap each time. Called by `deploy/campaign.py` after
the recovery; its product is `recovered/limit.json`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.ladder import Ladder
from agents.policies import SCORING, heuristic, importance_of
from deploy.folder import write_json
from deploy.recover import LIMIT, Recovery
from env.compact_file import network_from_file
from env.recognizer import Body, Recognizer
from env.seeds import derive_seed

__all__ = ["within_drop"]

#: Compressions nearer than this are not told apart, nor losses (in points): the validation split is finite.
_RESOLUTION, _CLOSE_POINTS = 0.002, 0.2


def within_drop(recovery: Recovery) -> None:
    """Find the limit, and write which network it is and why; what was found before is kept.

    `limit.json` holds "model" (a path in the folder, or "" where nothing but the baseline holds) and "reason".
    """
    product = recovery.folder.recovered / LIMIT
    if product.is_file():
        return
    low, high = _bracket(recovery)
    stuck = False
    while high is not None and not stuck and not _close(recovery, low, high):
        probe = _probe(recovery, low, high)
        if probe is None:
            stuck = True
        elif _holds(recovery, probe):
            low = probe
        else:
            high = probe
    model = "" if low is None else str(_model(recovery, low).relative_to(recovery.folder.path))
    write_json(product, {"model": model, "reason": _reason(recovery, low, high, stuck=stuck)})


def _bracket(recovery: Recovery) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The smallest network that holds, and the largest beyond it that does not; None where there is none."""
    rows = recovery.facts()
    low = max((row for row in rows if _holds(recovery, row)), key=_preference, default=None)
    beyond = [row for row in rows if not _holds(recovery, row) and (low is None or _is_beyond(row, low))]
    return low, min(beyond, key=lambda row: float(row["compression"]), default=None)


def _preference(row: dict[str, Any]) -> tuple[int, float]:
    """The smaller network, and of those that are as small the better."""
    return int(row["compression"] / _RESOLUTION), row["validation"]["accuracy"]


def _is_beyond(row: dict[str, Any], low: dict[str, Any]) -> bool:
    return bool(row["target"] > low["target"] and row["compression"] > low["compression"])


def _holds(recovery: Recovery, row: dict[str, Any]) -> bool:
    return recovery.drop(row) <= recovery.config.max_drop


def _removed(row: dict[str, Any] | None) -> float:
    return 0.0 if row is None else float(row["compression"])


def _middle(low: dict[str, Any] | None, high: dict[str, Any]) -> float:
    return round((_removed(low) + float(high["compression"])) / 2, 4)


def _close(recovery: Recovery, low: dict[str, Any] | None, high: dict[str, Any]) -> bool:
    """Whether there is nothing left to look for between the two."""
    spare = recovery.config.max_drop - (0.0 if low is None else recovery.drop(low))
    return spare <= _CLOSE_POINTS or float(high["compression"]) - _removed(low) <= _RESOLUTION


def _model(recovery: Recovery, row: dict[str, Any]) -> Path:
    name = f"limit-{row['target']}" if row.get("probe") else f"{row['group']}-{row['target']}"
    return recovery.folder.recovered / f"{name}.safetensors"


def _probe(recovery: Recovery, low: dict[str, Any] | None, high: dict[str, Any]) -> dict[str, Any] | None:
    """A network half-way between the two, made of the lower one and recovered; None where filters allow none."""
    target = _middle(low, high)
    start = recovery.baseline.start if low is None else network_from_file(str(_model(recovery, low)))
    network = _pruned(recovery, start, target, below=float(high["compression"]))
    if network is None:
        return None
    rule = _rule(recovery)
    origin = {
        "target": target,
        "group": high["group"] if low is None else low["group"],
        "policy": rule if low is None or low["policy"] == rule else f"{low['policy']}, then {rule}",
        "episode": None if low is None else low["episode"],
        "probe": True,
    }
    return recovery.recovered(network, _model(recovery, origin), origin)


def _rule(recovery: Recovery) -> str:
    """Who prunes further: the campaign's own rule, where it scores by the features alone, or the Controller's prior."""
    method = recovery.config.search.method
    return method if method in SCORING and not importance_of(method) else "balanced"


def _pruned(recovery: Recovery, start: nn.Module, target: float, *, below: float) -> nn.Module | None:
    """`start` cut to at least `target` and to less than `below`, not yet retrained; None where that cannot be."""
    config, dataset = recovery.config, recovery.dataset
    device = str(dataset.train.images.device)
    recognizer = Recognizer(
        start,
        dataset,
        config.data,
        measure=recovery.baseline.measure,
        precision=config.episode.precision,
        device=device,
    )
    body = recognizer.full()
    seed = derive_seed(config.seed, "limit", str(target))
    scores = recognizer.log_scores(
        body, images=config.episode.score_images, batch_size=config.episode.batch_size, seed=seed
    )
    ladder = Ladder(
        recognizer.plan,
        measure=recognizer.measure,
        targets=(target,),
        waypoints=1,
        min_width=config.episode.min_width,
    )
    rule = _rule(recovery)
    allocation = config.search.allocation if rule == config.search.method else ""
    policy = heuristic(rule, recognizer.plan, seed=seed, measure=recognizer.measure.name, allocation=allocation)
    ranking = policy.rank({"features": scores.numpy(), "keep_mask": body.keep_mask.numpy()})
    cut = ladder.cut(ranking[None], body.keep_mask[None], torch.zeros(1, dtype=torch.int64))[0]
    if not target <= recognizer.compression(~cut) < below:
        return None
    pruned: Body = recognizer.zero(body, ~cut)
    return pruned.network


def _reason(recovery: Recovery, low: dict[str, Any] | None, high: dict[str, Any] | None, *, stuck: bool) -> str:
    lost = "nothing but the baseline holds"
    if low is not None:
        lost = f"{low['compression']:.2%} removed {_change(recovery.drop(low))} points"
    if high is None:
        return f"{lost}; that is the highest of episode.targets: raise it to go further"
    between = "; no filters allow a step between" if stuck else ""
    return f"{lost}, {high['compression']:.2%} {_change(recovery.drop(high))}{between}"


def _change(drop: float) -> str:
    return f"{'gains' if drop < 0 else 'loses'} {abs(drop):.2f}"
