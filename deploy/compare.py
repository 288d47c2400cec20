"""Several finished campaigns beside each other: a row for each network they gave back, and seeds summed up.

Called by `zeroout compare`; deploy/comparability.py says what makes them incomparable, deploy/compare_table.py and
deploy/compare_page.py show them. Pure functions. Accuracies and compressions are fractions in [0, 1], changes are
points (percent) from the campaign's own baseline.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.ladder import TOLERANCE
from deploy.finished import BASELINE_NUMBERS, POINT_NUMBERS, Campaign

__all__ = ["Series", "identity", "over_seeds", "rows"]

Record = dict[str, Any]

#: Settings that say where and when a campaign runs, not what it does. Its seed is another matter, and left out too.
_ELSEWHERE = ("seed", "data.cache", "replay.shards", "search.snapshot_period")
#: Of the paths of weights it counts whether there are any: each seed may bring its own.
_WEIGHTS = ("network.weights", "controller.weights")
_BEFORE_THE_SEED = re.compile(r"([-_. ]+(seed|s))?[-_./ \d]*$")  # at the end of a name that ends in the seed


@dataclass(frozen=True, kw_only=True)
class Series:
    """Campaigns that differ in nothing but their seeds, often one alone, and what they reached together."""

    name: str
    campaigns: tuple[Campaign, ...]
    points: tuple[Record, ...]  # one for each target, rising; see `over_seeds`


def rows(campaigns: Iterable[Campaign]) -> list[Record]:
    """Return a row for each network that the campaigns gave back.

    They rise by compression, and those of about the same fall by test accuracy. Keys: "campaign", "folder", "method"
    (who was to decide), "group" and "policy" (who did, in the end), "network", "width" (None for a user's own),
    "skips", "seed", "measure" (what the compression is a share of), "target" (None where it is not known),
    "compression", "parameters", "macs", "val_accuracy", "test_accuracy", "change" (of the latter), "baseline" (its
    parameters, macs, val_accuracy and test_accuracy) and "model" (a path in the folder, or None).
    """
    found = [_row(campaign, point) for campaign in campaigns for point in campaign.result["points"]]
    return sorted(found, key=lambda row: (_size(row), -row["test_accuracy"], row["campaign"]))


def over_seeds(campaigns: Sequence[Campaign]) -> list[Series]:
    """Return the campaigns in series, each of those that differ in nothing but their seeds.

    A point of a series: "target" (None where each seed found its own, as with max_drop), "n" (the campaigns that have a
    network there), and over those "compression", "parameters", "macs", "val_accuracy", "test_accuracy" and "change",
    each as {"mean", "sd"}; sd is the sample's, None for fewer than two. "policies" are those that decided.
    """
    groups: dict[str, list[Campaign]] = {}
    for campaign in campaigns:
        groups.setdefault(repr(sorted(identity(campaign.settings).items())), []).append(campaign)
    members = list(groups.values())
    return [
        Series(name=name, campaigns=tuple(group), points=tuple(_points(group)))
        for name, group in zip(_series_names(members), members, strict=True)
    ]


def identity(settings: Mapping[str, Any]) -> Record:
    """Return the settings that make a campaign what it is, whatever its seed and wherever it runs."""
    return {key: _told(key, value) for key, value in settings.items() if not _is_elsewhere(key, settings)}


def _is_elsewhere(key: str, settings: Mapping[str, Any]) -> bool:
    # Of embedded or official images the path says only where they lie; of a folder it says which they are.
    is_place = key == "data.path" and settings["data.source"] != "folder"
    return key in _ELSEWHERE or key.startswith("cluster.") or is_place


def _told(key: str, value: Any) -> Any:
    return ("given" if value else "none") if key in _WEIGHTS else value


def _row(campaign: Campaign, point: Record) -> Record:
    baseline = campaign.result["baseline"]
    return {
        "campaign": campaign.name,
        "folder": campaign.folder,
        "method": campaign.settings["search.method"],
        "group": point.get("group"),
        "policy": str(point.get("policy", "")),
        "network": campaign.network,
        "width": campaign.width,
        "skips": campaign.settings["network.skips"],
        "seed": campaign.seed,
        "measure": campaign.measure,
        "target": point.get("target"),
        **{key: point[key] for key in POINT_NUMBERS},
        "change": 100 * (point["test_accuracy"] - baseline["test_accuracy"]),
        "baseline": {key: baseline[key] for key in BASELINE_NUMBERS},
        "model": point.get("model"),
    }


def _size(row: Record) -> float:
    """The compression by which rows are sorted: the target where it was met, so that accuracy decides among equals."""
    target, reached = row["target"], float(row["compression"])
    return reached if target is None or abs(reached - target) > target * TOLERANCE else float(target)


def _points(group: Sequence[Campaign]) -> list[Record]:
    """What campaigns of one series reached, target by target."""
    reached: dict[float | int | None, list[Record]] = {}
    for campaign in group:
        for number, point in enumerate(campaign.result["points"]):
            target = None if "max_drop" in campaign.result else point.get("target", number)
            reached.setdefault(target, []).append(_row(campaign, point))
    points = [
        {"target": None if target is None else members[0]["target"], **_summed(members)}
        for target, members in reached.items()
    ]
    return sorted(points, key=lambda point: float(point["compression"]["mean"]))


def _summed(members: Sequence[Record]) -> Record:
    return {
        "n": len(members),
        "policies": sorted({str(row["policy"]) for row in members}),
        **{key: _mean_and_sd([float(row[key]) for row in members]) for key in (*POINT_NUMBERS, "change")},
    }


def _mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _series_names(groups: Sequence[Sequence[Campaign]]) -> list[str]:
    """What the names in a series have in common, and how many seeds they are; the first where that says nothing."""
    names = [_series_name(group, _common) for group in groups]
    return [
        name if names.count(name) == 1 else _series_name(group, _first)
        for name, group in zip(names, groups, strict=True)
    ]


def _series_name(group: Sequence[Campaign], short: Callable[[Sequence[str]], str]) -> str:
    names, seeds = [campaign.name for campaign in group], len({campaign.seed for campaign in group})
    if len(names) == 1:
        return names[0]
    counted = f"{seeds} seed{'' if seeds == 1 else 's'}"
    return f"{short(names)} ({counted if seeds == len(names) else f'{len(names)} runs, {counted}'})"


def _common(names: Sequence[str]) -> str:
    differs = (place for place, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1)
    return _BEFORE_THE_SEED.sub("", names[0][: next(differs, None)]) or _first(names)


def _first(names: Sequence[str]) -> str:
    return f"{names[0]} and others"
