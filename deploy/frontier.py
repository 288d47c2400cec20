"""What the episodes say: the best network per target, the groups beside each other, and who won.

Pure functions over episode records (the lines of `episodes.jsonl`), called by the campaign, the report, the
pictures and the status. A record's `group` is the arm of the campaign it belongs to, its `targets` hold one
point per target compression, measured on the validation split after the short recovery. Accuracy and
compression are fractions in [0, 1]; cross-entropy is in nats, lower is better, and null (a collapsed network)
counts as the worst.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "GROUPS",
    "PEERS",
    "Comparison",
    "compare",
    "frontier",
    "groups_of",
    "groups_table",
    "learning_curve",
    "measure_name",
    "targets_of",
    "transfer_sentence",
]

Record = dict[str, Any]

# The arms of a campaign, in the order every table and picture shows them; "search" is the Controller's.
GROUPS = ("search", "taylor", "balanced", "balanced-l1", "gamma", "random", "cem", "untrained")

#: What deploy/peers.py can make beside them; they play no episodes.
PEERS = ("torch-pruning", "uniform")

# A group must be this many standard deviations of one episode ahead to be called better. Simulated: the bests
# of twice n repetitions of one policy lie further apart in 1.6 % of cases at n = 20, 4 % at 10, 10 % at 5
# (the deviation estimated from the same n). Below five nothing is said.
_CLEARLY_AHEAD_SDS = 2.0
_EPISODES_FOR_SD = 5


def measure_name(result: Record | None) -> str:
    """Return what compression was counted in, in words: "parameters", "MACs" or "bytes"."""
    name = str((result or {}).get("measure", "parameters"))
    return {"macs": "MACs"}.get(name, name)


def transfer_sentence(result: Record) -> str:
    """Return how the baseline of a finished campaign came to its classes; "" where it was not moved to them."""
    transfer = result.get("transfer")
    if not transfer:
        return ""
    done = {
        "prune": "removed, which counts as compression",
        "reinit": "initialised anew",
        "noise": "given noise",
        **{how: f"replaced by copies of the strongest (replacement {how})" for how in "123"},
    }.get(transfer["how"])
    weakest = f"the weakest {transfer['share']:.0%} of each layer's filters by {transfer['importance']}"
    treated = "its filters were left as they are" if done is None else f"{weakest} were {done}"
    return (
        f"The baseline has the weights of a network for {transfer['classes']} classes and a new last layer; {treated}; "
        f"then its {transfer['parameters']:,} parameters were trained on these images."
    )


def groups_of(records: Iterable[Record]) -> list[str]:
    """Return the groups that occur: the known ones in the order of GROUPS, then any others by name."""
    there = {str(record["group"]) for record in records}
    return [*(group for group in GROUPS if group in there), *sorted(there - set(GROUPS))]


def targets_of(records: Iterable[Record]) -> list[float]:
    """Return the target compressions for which any episode has a point, ascending."""
    return sorted({round(float(p["target"]), 6) for record in records for p in record.get("targets", [])})


def frontier(records: Sequence[Record], targets: Iterable[float]) -> list[dict[str, Any]]:
    """Return for each target `{"target", "best", "groups": {group: point}}`.

    A point is the record's entry for the target (compression, parameters, macs, accuracy, cross_entropy,
    keep_bits) with "episode", "group", "policy" and "seed". The best has the lowest cross-entropy; ties go
    to the higher accuracy, then to the lower id. Where no episode got there, `best` is None and the group is
    left out.
    """
    return [_frontier_at(records, target) for target in targets]


def groups_table(records: Sequence[Record], target: float) -> list[dict[str, Any]]:
    """Return a row per group ("policy": None), each followed by a row per policy when it has several.

    A row: "group", "policy", "episodes" (played), "reached" (of them, those with a point at the target),
    "cross_entropy" and "accuracy" as {"best", "mean", "sd"} over those, "seconds" (mean per episode). What
    cannot be known (the sd of fewer than two) is None.
    """
    rows = []
    for group in groups_of(records):
        members = [record for record in records if record["group"] == group]
        rows.append(_row(group, None, members, target))
        policies = sorted({str(record["policy"]) for record in members})
        if len(policies) > 1:
            rows += [
                _row(group, policy, [record for record in members if record["policy"] == policy], target)
                for policy in policies
            ]
    return rows


def learning_curve(records: Iterable[Record], group: str, *, window: int = 10) -> list[dict[str, Any]]:
    """Return the group's returns in the order of episode ids.

    Each entry: "episode" (1, 2, ... within the group), "id", "return", "mean" (over the last `window`
    episodes, fewer at the start), "best" (so far). Episodes without a finite return are left out.
    """
    members = _members(records, group)
    returns: list[float] = []
    curve = []
    for number, record in enumerate(members, start=1):
        value = _number(record.get("return"))
        if value is None:
            continue
        returns.append(value)
        mean = statistics.fmean(returns[-window:])
        curve.append({"episode": number, "id": record["id"], "return": value, "mean": mean, "best": max(returns)})
    return curve


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The Controller's search against the controls at one target, each with its first `episodes` episodes."""

    target: float
    episodes: int  # per group; the smallest group's number
    best: dict[str, float]  # <group: lowest cross-entropy of its first episodes>
    policy: str  # which of the search's policies chose its best: the Controller, or one of its teachers
    rival: str  # the best control
    ahead: float  # rival's best cross-entropy - search's best; > 0 when the search is better
    noise: float | None  # standard deviation of one repeated episode's cross-entropy; None when not known

    @property
    def verdict(self) -> str:
        """Return "won", "lost", "noise" (within it) or "unknown" (too few episodes to know the noise)."""
        if self.noise is None:
            return "unknown"
        if abs(self.ahead) <= _CLEARLY_AHEAD_SDS * self.noise:
            return "noise"
        return "won" if self.ahead > 0 else "lost"


def compare(records: Sequence[Record], target: float) -> Comparison | None:
    """Compare the search with the controls at equal number of episodes; None without both at the target."""
    scores = {group: _scores(records, group, target) for group in groups_of(records)}
    reached = {group: values for group, values in scores.items() if any(map(math.isfinite, values))}
    if "search" not in reached or len(reached) < 2:
        return None
    episodes = min(map(len, reached.values()))
    best = {group: min(values[:episodes]) for group, values in reached.items()}
    rival = min((group for group in best if group != "search"), key=lambda group: best[group])
    if not (math.isfinite(best["search"]) and math.isfinite(best[rival])):
        return None
    return Comparison(
        target=target,
        episodes=episodes,
        best=best,
        policy=str(_members(records, "search")[reached["search"].index(best["search"])]["policy"]),
        rival=rival,
        ahead=best[rival] - best["search"],
        noise=_noise(reached, rival),
    )


def _members(records: Iterable[Record], group: str) -> list[Record]:
    return sorted((r for r in records if r["group"] == group), key=lambda record: int(record["id"]))


def _noise(scores: dict[str, list[float]], rival: str) -> float | None:
    # These rules repeat one and the same policy, so their spread is noise and nothing else; the others' holds their
    # exploration too, which can only make the verdict more careful.
    for group in ("taylor", "balanced", "balanced-l1", "gamma", rival, "search"):
        values = [value for value in scores.get(group, []) if math.isfinite(value)]
        if len(values) >= _EPISODES_FOR_SD and (spread := statistics.stdev(values)) > 0:
            return spread
    return None


def _scores(records: Iterable[Record], group: str, target: float) -> list[float]:
    """Return the group's cross-entropies at the target in order of id, infinite where it was not reached."""
    members = _members(records, group)
    return [_worst_if_none(_point(record, target)) for record in members]


def _worst_if_none(point: Record | None) -> float:
    value = None if point is None else _number(point.get("cross_entropy"))
    return math.inf if value is None else value


def _frontier_at(records: Sequence[Record], target: float) -> dict[str, Any]:
    points = [
        {"episode": r["id"], "group": r["group"], "policy": r["policy"], "seed": r.get("seed")} | point
        for r in records
        if (point := _point(r, target)) is not None
    ]
    groups = {group: min((p for p in points if p["group"] == group), key=_order) for group in groups_of(points)}
    return {"target": target, "best": min(points, key=_order, default=None), "groups": groups}


def _order(point: Record) -> tuple[float, float, int]:
    accuracy = _number(point.get("accuracy"))
    return _worst_if_none(point), -(accuracy if accuracy is not None else -math.inf), int(point["episode"])


def _point(record: Record, target: float) -> Record | None:
    # Targets travel through TOML and JSON as decimal fractions: equal to six digits is the same target.
    for point in record.get("targets", []):
        if abs(point["target"] - target) < 1e-6:
            return dict(point)
    return None


def _row(group: str, policy: str | None, members: Sequence[Record], target: float) -> dict[str, Any]:
    points = [point for record in members if (point := _point(record, target)) is not None]
    return {
        "group": group,
        "policy": policy,
        "episodes": len(members),
        "reached": len(points),
        "cross_entropy": _summary([point.get("cross_entropy") for point in points], min),
        "accuracy": _summary([point.get("accuracy") for point in points], max),
        "seconds": _summary([record.get("seconds") for record in members], min)["mean"],
    }


def _summary(values: Iterable[object], best: Any) -> dict[str, float | None]:
    numbers = [number for value in values if (number := _number(value)) is not None]
    if not numbers:
        return {"best": None, "mean": None, "sd": None}
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"best": best(numbers), "mean": statistics.fmean(numbers), "sd": spread}


def _number(value: object) -> float | None:
    """Return a finite float, or None for null, NaN, infinities and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
