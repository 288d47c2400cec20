"""What a campaign has reached, read from its folder alone: while it runs, after it, and after a crash.

Called by `zeroout status` and the report. It asks neither Redis nor Ray, so it answers where neither runs: what they
know of a search, its driver keeps in the folder.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.folder import CampaignFolder, read_json
from deploy.frontier import frontier, targets_of
from deploy.live_file import read_live
from deploy.progress import duration, loss_text
from deploy.storage_hold import HELD, parsed

__all__ = ["STAGES", "read_status", "render_status", "watch", "watch_json"]

STAGES = ("prepare", "search", "recover", "export", "done")


def read_status(folder: CampaignFolder | Path | str, *, episodes_total: int | None = None) -> dict[str, Any]:
    """Return the campaign's state, fit for JSON; UserError when `folder` is no campaign.

    Keys: "folder", "stage" (one of STAGES: the one in work, or "done"), "running" (whether a process of this machine,
    or of one that shares its locks, runs it, or did when the folder was fetched from a URI), "elsewhere" (which process
    of another machine that is, or None), "episodes", "episodes_total" (as given, else frontier.json's key of that
    name, else None), "seconds_since_episode" (None before the first), "actors" (name, episodes, steps, seconds,
    episodes_per_minute while playing, and what it does now or None), "learner" (updates, loss), "replay" (sequences)
    and "seconds_left" (each None where no search runs or none has run on Ray), "frontier" (best per target, without
    masks), "to_recover" (networks that the search and the peers have left), "recovered" (of those that are: group,
    policy, target, compression, val_accuracy) and "result" (result.json, or None).
    """
    campaign = CampaignFolder.open(folder.path if isinstance(folder, CampaignFolder) else folder)
    records = campaign.read_episodes()
    total = episodes_total if episodes_total is not None else _recorded_total(campaign)
    result = read_json(campaign.result_json) if campaign.result_json.is_file() else None
    elsewhere = _elsewhere(campaign)
    stage, running = _stage(campaign, len(records), total, result), campaign.is_held or elsewhere is not None
    live = read_live(campaign.live_json) or {}
    now = live if running and stage == "search" else {}
    return {
        "folder": str(campaign.path),
        "stage": stage,
        "running": running,
        "elsewhere": elsewhere,
        "episodes": len(records),
        "episodes_total": total,
        "seconds_since_episode": _age_s(campaign.episodes_jsonl),
        "actors": _actors(records, {str(line["name"]): str(line["state"]) for line in now.get("actors", [])}),
        "learner": {"updates": live["learner_updates"], "loss": live["learner_loss"]} if live else None,
        "replay": live.get("replay_size"),
        "seconds_left": now.get("seconds_left"),
        "frontier": _best_points(records),
        "to_recover": len(_written(campaign.candidates)),
        "recovered": [_recovered(read_json(facts)) for facts in _written(campaign.recovered)],
        "result": result,
    }


def render_status(status: dict[str, Any], console: Console) -> None:
    """Print what `read_status` returned."""
    console.print(_renderable(status))


def watch(
    look: Callable[[], CampaignFolder],
    console: Console,
    interval_s: float,
    *,
    episodes_total: int | None = None,
) -> None:
    """Show the status again every `interval_s` seconds while the campaign runs; each time `look` says where it lies.

    Redraws in place on a terminal, elsewhere prints when something changed. Ctrl-C passes to the caller.
    """
    looks = _looks(look, interval_s, episodes_total)
    if not console.is_terminal:
        for status in _news(looks):
            render_status(status, console)
        return
    with Live(console=console, auto_refresh=False) as live:
        for status in looks:
            live.update(_renderable(status), refresh=True)


def watch_json(
    look: Callable[[], CampaignFolder], interval_s: float, *, episodes_total: int | None = None
) -> Iterator[str]:
    """The same as lines of JSON, one whenever there is news."""
    return map(json.dumps, _news(_looks(look, interval_s, episodes_total)))


def _looks(
    look: Callable[[], CampaignFolder], interval_s: float, episodes_total: int | None
) -> Iterator[dict[str, Any]]:
    """The status now and every few seconds, the last when nobody runs the campaign any more."""
    while True:
        status = read_status(look(), episodes_total=episodes_total)
        yield status
        if not status["running"]:
            return
        time.sleep(interval_s)


def _news(looks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those that say something new of stage, episodes, recovered networks or whether it runs."""
    before = None
    for status in looks:
        shown = status["stage"], status["episodes"], len(status["recovered"]), status["running"]
        if shown != before:
            yield status
        before = shown


def _elsewhere(campaign: CampaignFolder) -> str | None:
    """Who runs it on another machine, by what was fetched with it."""
    with contextlib.suppress(FileNotFoundError):
        holder = parsed((campaign.path / HELD).read_bytes())
        return str(holder) if holder.is_fresh() else None
    return None


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


def _written(folder: Path) -> list[Path]:
    """What is known of each network in a folder, a .json beside it that comes last."""
    return [facts for facts in sorted(folder.glob("*.json")) if facts.with_suffix(".safetensors").is_file()]


def _recovered(facts: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: facts.get(key) for key in ("group", "policy", "target", "compression")}
    return {**known, "val_accuracy": facts.get("validation", {}).get("accuracy")}


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


def _actors(records: Sequence[dict[str, Any]], states: Mapping[str, str]) -> list[dict[str, Any]]:
    """Those that have played an episode, and those of the running search."""
    played: dict[str, list[dict[str, Any]]] = {name: [] for name in states}
    for record in records:
        played.setdefault(str(record["actor"]), []).append(record)
    return [_actor(name, played[name], states.get(name)) for name in sorted(played, key=_by_number)]


def _by_number(name: str) -> tuple[str, int]:
    """actor-9 before actor-10."""
    kind, _, number = name.rpartition("-")
    return (kind, int(number)) if number.isdigit() else (name, 0)


def _actor(name: str, played: Sequence[dict[str, Any]], state: str | None) -> dict[str, Any]:
    seconds = sum(float(record["seconds"]) for record in played)
    return {
        "name": name,
        "episodes": len(played),
        "steps": sum(int(record["steps"]) for record in played),
        "seconds": seconds,
        "episodes_per_minute": 60 * len(played) / seconds if seconds > 0 else None,
        "state": state,
    }


def _best_points(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    best = [entry["best"] for entry in frontier(records, targets_of(records))]
    return [{key: value for key, value in point.items() if key != "keep_bits"} for point in best if point]


def _renderable(status: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_headline(status)]
    if status["learner"] and status["stage"] == "search":
        parts.append(_learner_line(status))
    if status["actors"]:
        parts += [Text(), _actor_table(status["actors"])]
    if status["frontier"]:
        parts += [Text(), _frontier_table(status["frontier"])]
    if status["recovered"] and not status["result"]:
        parts += [Text(), _recovered_table(status["recovered"])]
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
    if status["stage"] == "recover" and status["to_recover"]:
        text.append(f", {len(status['recovered'])} of {status['to_recover']} networks recovered")
    if status["stage"] != "done" and status["seconds_since_episode"] is not None:
        text.append(f", the last {duration(status['seconds_since_episode'])} ago")
    if status["seconds_left"] is not None:
        text.append(f", {duration(status['seconds_left'])} left")
    if status["elsewhere"]:
        text.append(f"\nrun by {status['elsewhere']}")
    elif status["stage"] != "done" and not status["running"]:
        text.append(f"\nnobody runs it here now; zeroout resume {status['folder']} goes on", style="yellow")
    return text


def _learner_line(status: dict[str, Any]) -> Text:
    learner = status["learner"]
    loss = loss_text(learner["loss"])
    return Text(f"learner: {learner['updates']} updates, loss {loss}; replay: {status['replay']} sequences")


def _actor_table(actors: Sequence[dict[str, Any]]) -> Table:
    table = _table("actor", "episodes", "steps", "per minute while playing")
    table.add_column("now")
    for actor in actors:
        rate = actor["episodes_per_minute"]
        cells = str(actor["episodes"]), str(actor["steps"]), "-" if rate is None else f"{rate:.2f}"
        table.add_row(Text(actor["name"]), *cells, Text(actor["state"] or ""))
    return table


def _frontier_table(points: Sequence[dict[str, Any]]) -> Table:
    table = _table("best so far by", "removed", "accuracy", "cross-entropy", "episode")
    for point in points:
        table.add_row(
            Text(f"{point['group']}: {point['policy']}"), _percent(point["compression"]),
            _percent(point["accuracy"]), _fixed(point["cross_entropy"]), str(point["episode"]),
        )  # fmt: skip
    return table


def _recovered_table(networks: Sequence[dict[str, Any]]) -> Table:
    table = _table("recovered of", "removed", "validation")
    for network in sorted(networks, key=lambda network: (network["target"], network["group"])):
        who = Text(f"{network['group']}: {network['policy']}")
        table.add_row(who, _percent(network["compression"]), _percent(network["val_accuracy"]))
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
