"""What a campaign has reached, read from its folder alone: while it runs, after it, and after a crash.

Called by `zeroout status` and the report. It asks neither Redis nor Ray, so it answers where neither runs.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.folder import CampaignFolder, read_json
from deploy.frontier import frontier, targets_of
from deploy.progress import duration

__all__ = ["STAGES", "read_status", "render_status", "watch"]

STAGES = ("prepare", "search", "recover", "export", "done")


def read_status(folder: CampaignFolder | Path | str, *, episodes_total: int | None = None) -> dict[str, Any]:
    """Return the campaign's state, fit for JSON; UserError when `folder` is no campaign.

    Keys: "folder", "stage" (one of STAGES: the one in work, or "done"), "episodes", "episodes_total" (as
    given, else frontier.json's key of that name, else None), "seconds_since_episode" (None before the first),
    "actors" (name, episodes, steps, seconds, episodes_per_minute while playing), "frontier" (best per target,
    without masks) and "result" (result.json, or None).
    """
    campaign = CampaignFolder.open(folder.path if isinstance(folder, CampaignFolder) else folder)
    records = campaign.read_episodes()
    total = episodes_total if episodes_total is not None else _recorded_total(campaign)
    result = read_json(campaign.result_json) if campaign.result_json.is_file() else None
    return {
        "folder": str(campaign.path),
        "stage": _stage(campaign, len(records), total, result),
        "episodes": len(records),
        "episodes_total": total,
        "seconds_since_episode": _age_s(campaign.episodes_jsonl),
        "actors": _actors(records),
        "frontier": _best_points(records),
        "result": result,
    }


def render_status(status: dict[str, Any], console: Console) -> None:
    """Print what `read_status` returned."""
    console.print(_renderable(status))


def watch(
    folder: CampaignFolder | Path | str,
    console: Console,
    interval_s: float = 2.0,
    *,
    episodes_total: int | None = None,
) -> None:
    """Show the status again every `interval_s` seconds until the campaign is done.

    Redraws in place on a terminal, elsewhere prints when something changed. Ctrl-C passes to the caller.
    """
    status = read_status(folder, episodes_total=episodes_total)
    if not console.is_terminal:
        _watch_plain(status, console, interval_s)
        return
    with Live(_renderable(status), console=console, auto_refresh=False) as live:
        while status["stage"] != "done":
            time.sleep(interval_s)
            status = read_status(folder, episodes_total=episodes_total)
            live.update(_renderable(status), refresh=True)


def _watch_plain(status: dict[str, Any], console: Console, interval_s: float) -> None:
    render_status(status, console)
    shown = (status["stage"], status["episodes"])
    while status["stage"] != "done":
        time.sleep(interval_s)
        status = read_status(status["folder"], episodes_total=status["episodes_total"])
        if shown != (status["stage"], status["episodes"]):
            render_status(status, console)
            shown = (status["stage"], status["episodes"])


def _stage(campaign: CampaignFolder, episodes: int, total: int | None, result: object) -> str:
    if result is not None:
        return "done"
    if _holds(campaign.export, "*"):
        return "export"
    if _holds(campaign.recovered, "*") or (total is not None and episodes >= total > 0):
        return "recover"
    # A manifest is written after what it describes, so a half-written baseline does not count.
    if episodes or _holds(campaign.baseline, "*.json"):
        return "search"
    return "prepare"


def _holds(folder: Path, pattern: str) -> bool:
    return any(not entry.name.startswith(".") for entry in folder.glob(pattern))


def _recorded_total(campaign: CampaignFolder) -> int | None:
    if not campaign.frontier_json.is_file():
        return None
    recorded = read_json(campaign.frontier_json)
    total = recorded.get("episodes_total") if isinstance(recorded, dict) else None
    return total if isinstance(total, int) else None


def _age_s(path: Path) -> float | None:
    try:
        return round(max(0.0, time.time() - path.stat().st_mtime), 1)
    except FileNotFoundError:
        return None


def _actors(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = sorted({str(record["actor"]) for record in records})
    return [_actor(name, [record for record in records if record["actor"] == name]) for name in names]


def _actor(name: str, played: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(float(record["seconds"]) for record in played)
    return {
        "name": name,
        "episodes": len(played),
        "steps": sum(int(record["steps"]) for record in played),
        "seconds": seconds,
        "episodes_per_minute": 60 * len(played) / seconds if seconds > 0 else None,
    }


def _best_points(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    best = [entry["best"] for entry in frontier(records, targets_of(records))]
    return [{key: value for key, value in point.items() if key != "keep_bits"} for point in best if point]


def _renderable(status: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_headline(status)]
    if status["actors"]:
        parts += [Text(), _actor_table(status["actors"])]
    if status["frontier"]:
        parts += [Text(), _frontier_table(status["frontier"])]
    if status["result"]:
        parts += [Text(), _result_table(status["result"])]
    return Group(*parts)


def _headline(status: dict[str, Any]) -> Text:
    total = "" if status["episodes_total"] is None else f" of {status['episodes_total']}"
    text = Text(f"{status['folder']}\n")
    for stage in STAGES:
        here = stage == status["stage"]
        text.append(f"[{stage}]" if here else stage, style="bold cyan" if here else "dim").append("  ")
    text.append(f"\n{status['episodes']}{total} episodes")
    if status["stage"] != "done" and status["seconds_since_episode"] is not None:
        text.append(f", the last {duration(status['seconds_since_episode'])} ago")
    return text


def _actor_table(actors: Sequence[dict[str, Any]]) -> Table:
    table = _table("actor", "episodes", "steps", "per minute while playing")
    for actor in actors:
        rate = actor["episodes_per_minute"]
        cells = str(actor["episodes"]), str(actor["steps"]), "-" if rate is None else f"{rate:.2f}"
        table.add_row(Text(actor["name"]), *cells)
    return table


def _frontier_table(points: Sequence[dict[str, Any]]) -> Table:
    table = _table("best so far by", "removed", "accuracy", "cross-entropy", "episode")
    for point in points:
        table.add_row(
            Text(f"{point['group']}: {point['policy']}"), _percent(point["compression"]),
            _percent(point["accuracy"]), _fixed(point["cross_entropy"]), str(point["episode"]),
        )  # fmt: skip
    return table


def _result_table(result: dict[str, Any]) -> Table:
    table = _table("result by", "removed", "validation", "test")
    baseline = result.get("baseline") or {}
    table.add_row(
        Text("baseline"), "-", _percent(baseline.get("val_accuracy")), _percent(baseline.get("test_accuracy"))
    )
    if replacement := result.get("replacement"):
        trained = _percent(replacement.get("val_accuracy")), _percent(replacement.get("test_accuracy"))
        table.add_row(Text(f"after replacement {replacement.get('how')}"), "-", *trained)
    for point in result.get("points") or []:
        accuracies = _percent(point.get("val_accuracy")), _percent(point.get("test_accuracy"))
        table.add_row(Text(str(point.get("policy"))), _percent(point.get("compression")), *accuracies)
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(first)
    for header in numbers:
        table.add_column(header, justify="right")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
