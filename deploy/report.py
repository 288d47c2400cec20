"""The campaign's report: one self-contained HTML file, written from what the campaign folder holds.

Called by the campaign at its end and by `zeroout report DIR` at any time; an unfinished campaign's report says
that it is one. Every number of a finished network is result.json's own, every text is escaped.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.figures import change, count, fixed, percent, spread
from deploy.folder import CampaignFolder, read_json, write_atomic
from deploy.frontier import (
    PEERS,
    Comparison,
    compare,
    groups_of,
    groups_table,
    measure_name,
    targets_of,
    transfer_sentence,
)
from deploy.page import page, table, text
from deploy.progress import duration
from deploy.published import published_beside
from deploy.report_pictures import frontier_section, layers_section, learning_section, throughput_section
from deploy.status import read_status
from env.errors import UserError

__all__ = ["comparison_sentence", "verdict_sentence", "write_report"]

Record = dict[str, Any]

_NAMES = {
    "search": "the Controller's search",
    "taylor": "Taylor",
    "balanced": "Taylor, layers balanced",
    "balanced-l1": "L1, layers balanced",
    "gamma": "batch-norm gamma",
    "random": "random search",
    "cem": "evolution (CEM)",
    "untrained": "the Controller as it began, learner off",
    "torch-pruning": "Torch-Pruning",
    "uniform": "a smaller network from scratch",
}


def write_report(folder: CampaignFolder | Path | str) -> Path:
    """Write report.html and frontier.png into the campaign folder and return the report's path.

    Works with whatever is there; UserError when the folder is no campaign or one of its files is broken.
    """
    # matplotlib takes most of a second to import, and `zeroout status` draws no pictures
    from deploy.charts import frontier_png

    campaign = CampaignFolder.open(folder.path if isinstance(folder, CampaignFolder) else folder)
    status = read_status(campaign)
    records, result = campaign.read_episodes(), status["result"]
    config = campaign.campaign_toml.read_text(errors="replace")
    published = published_beside(_tree(config, campaign))
    learned = len(groups_of(records)) != 1 or "search" in groups_of(records)  # not one rule alone
    body = [
        _head(status, records),
        _result_section(result),
        _comparison_section(records, result) if learned else "",
        frontier_section(records, result, published),
        layers_section(campaign, result),
        learning_section(records) if learned else "",
        throughput_section(status["actors"], records),
        _settings_section(campaign, config),
    ]
    frontier_png(campaign.frontier_png, records, result, published)
    write_atomic(campaign.report_html, page(campaign.path.resolve().name, body))
    return campaign.report_html


def verdict_sentence(comparisons: Sequence[Comparison]) -> str:
    """Return one plain sentence on who won over all targets, honest when it was not the Controller."""
    if not comparisons:
        return (
            "There is nothing to compare yet: it needs episodes of the Controller's search and of a control "
            "at the same compression."
        )
    if len(comparisons) == 1:
        return comparison_sentence(comparisons[0])
    verdicts = [comparison.verdict for comparison in comparisons]
    counts = {word: verdicts.count(word) for word in ("won", "lost", "noise", "unknown")}
    parts = [
        f"beat the best control at {counts['won']}",
        f"lost to it at {counts['lost']}",
        f"lay within noise of it at {counts['noise']}",
    ]
    if counts["unknown"]:
        parts.append(f"had too few episodes to tell at {counts['unknown']}")
    return (
        f"Of {len(comparisons)} compression targets, each at an equal number of episodes, the Controller's "
        f"search {', '.join(parts[:-1])} and {parts[-1]}."
    )


def comparison_sentence(comparison: Comparison) -> str:
    """Return one plain sentence on who won at one target."""
    c, rival = comparison, _name(comparison.rival)
    start = (
        f"At {percent(c.target, 1)} removed, the best of {c.episodes} {_plural(c.episodes)} each (the search's "
        f"was chosen by {c.policy}):"
    )
    scores = f"{c.best['search']:.3f} against {c.best[c.rival]:.3f} cross-entropy on validation"
    if c.verdict == "unknown":
        return f"{start} the Controller's search {scores} of {rival}; too few episodes to tell them apart."
    noise = f"one repeated episode varies by {c.noise:.3f}"
    if c.verdict == "noise":
        return f"{start} the Controller's search and {rival} lie within noise, {scores} ({noise}): nobody won."
    if c.verdict == "won":
        return f"{start} the Controller's search won against {rival}, the best control, {scores} ({noise})."
    return f"{start} the Controller's search lost to {rival}, {scores} ({noise})."


def _tree(config: str, campaign: CampaignFolder) -> Record:
    try:
        return tomllib.loads(config)
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            str(campaign.campaign_toml), expected="valid TOML", got=str(error), remedy="mend that line"
        ) from error


def _head(status: Record, records: Sequence[Record]) -> str:
    result = status["result"] or {}
    total = "" if status["episodes_total"] is None else f" of {status['episodes_total']}"
    facts = [f"{result.get('episodes', len(records))}{total} episodes"]
    if result.get("seconds") is not None:
        facts.append(duration(result["seconds"]))
    if result.get("seed") is not None:
        facts.append(f"seed {result['seed']}")
    title = f"<h1>{text(Path(status['folder']).resolve().name)}</h1><p class=dim>{text(', '.join(facts))}</p>"
    if status["stage"] == "done":
        return title
    return title + (
        f"<p class=notice><b>This campaign is not finished</b> (stage: {text(status['stage'])}). What follows "
        f"is how it stands now; continue it with <code>zeroout resume {text(status['folder'])}</code>.</p>"
    )


def _result_section(result: Record | None) -> str:
    if result is None:
        return "<h2>Result</h2><p>No network has been recovered and tested yet.</p>"
    baseline = result.get("baseline") or {}
    rows = [_baseline_row(baseline), *_replacement_rows(result)]
    rows += [_point_row(point, baseline) for point in result.get("points") or []]
    header = (
        "target", f"{measure_name(result)} removed", "parameters", "MACs", "validation", "change", "test", "change",
        "chosen by", "model",
    )  # fmt: skip
    note = (
        "Accuracies after recovery; changes in points from the baseline. Every choice was made on the "
        "validation images, the test images were opened once, at the end."
    )
    if "transfer" in result:
        note = f"{transfer_sentence(result)} {note}"
    if "limit" in result:
        note = f"At most {result['max_drop']:g} points were to be lost on validation: {result['limit']}. {note}"
    return f"<h2>Result</h2>{table('Result', header, rows)}<p class=dim>{text(note)}</p>"


def _baseline_row(baseline: Record) -> list[str]:
    accuracies = [percent(baseline.get("val_accuracy")), "", percent(baseline.get("test_accuracy")), ""]
    sizes = [count(baseline.get("parameters")), count(baseline.get("macs"))]
    return ["baseline", "", *sizes, *accuracies, "", ""]


def _replacement_rows(result: Record) -> list[list[str]]:
    """The network after filter replacement, before anything was pruned; none where there was no replacement."""
    row, baseline = result.get("replacement"), result.get("baseline") or {}
    if not row:
        return []
    accuracies = [
        cell
        for key in ("val_accuracy", "test_accuracy")
        for cell in (percent(row.get(key)), change(row.get(key), baseline.get(key)))
    ]
    return [[f"after replacement {row['how']}", "", "", "", *accuracies, "", ""]]


def _point_row(point: Record, baseline: Record) -> list[str]:
    accuracies = [
        cell
        for key in ("val_accuracy", "test_accuracy")
        for cell in (percent(point.get(key)), change(point.get(key), baseline.get(key)))
    ]
    group, policy = point.get("group"), str(point.get("policy", ""))
    chosen_by = policy if group is None or policy.partition(" ")[0] == group else f"{group}: {policy}"
    return [
        percent(point.get("target"), 1),
        percent(point.get("compression")),
        count(point.get("parameters")),
        count(point.get("macs")),
        *accuracies,
        chosen_by,
        str(point.get("model") or ""),
    ]


def _comparison_section(records: Sequence[Record], result: Record | None) -> str:
    targets = targets_of(records)
    comparisons = [c for target in targets if (c := compare(records, target)) is not None]
    parts = ["<h2>Who chose better?</h2>", f"<p class=verdict>{text(verdict_sentence(comparisons))}</p>"]
    if len(comparisons) > 1:
        items = "".join(f"<li>{text(comparison_sentence(c))}</li>" for c in comparisons)
        parts.append(f"<ul>{items}</ul>")
    parts += [_recovered_alike(result or {}), *(_group_table(records, target) for target in targets)]
    return "".join(parts)


def _recovered_alike(result: Record) -> str:
    controls = result.get("comparison") or []
    if not controls:
        return ""
    baseline = result.get("baseline") or {}
    order = sorted(
        [
            *(("result", p) for p in result.get("points") or []),
            *(("beside it", p) for p in controls if p not in result["points"]),
        ],
        key=lambda pair: (float(pair[1].get("target", pair[1]["compression"])), pair[0] != "result"),
    )
    header = ("", "target", "chosen by", "validation", "change", "test", "change")
    rows = []
    for role, point in order:
        cells = _point_row(point, baseline)
        rows.append([role, cells[0], cells[8], *cells[4:8]])
    note = (
        "The result beside the best of every other group, recovered alike. One recovery each: another seed "
        "moves such a number by about a point."
    )
    if any(point["group"] in PEERS for point in controls):
        note += " What Torch-Pruning made, and a network from scratch, stand here alone, as they play no episodes."
    for missing in result.get("left_out") or []:
        note += f" Left out: {_name(missing['group'])} at {percent(missing['target'], 1)} ({missing['reason']})."
    return f"<h3>After recovery</h3>{table('After recovery', header, rows)}<p class=dim>{text(note)}</p>"


def _group_table(records: Sequence[Record], target: float) -> str:
    header = (
        "group", "episodes", "cross-entropy, best", "mean ± sd", "accuracy, best", "mean ± sd", "seconds",
    )  # fmt: skip
    rows = [_group_row(row) for row in groups_table(records, target)]
    title = f"All episodes at {percent(target, 1)} removed"
    note = (
        "On the validation images, after the short recovery of an episode; mean and standard deviation over "
        "episodes; cross-entropy: lower is better."
    )
    return f"<h3>{title}</h3>{table(title, header, rows)}<p class=dim>{note}</p>"


def _group_row(row: Record) -> list[str]:
    loss, accuracy = row["cross_entropy"], row["accuracy"]
    reached = "" if row["reached"] == row["episodes"] else f" ({row['reached']} reached it)"
    return [
        row["group"] if row["policy"] is None else f"  · {row['policy']}",
        f"{row['episodes']}{reached}",
        fixed(loss["best"]),
        spread(fixed(loss["mean"]), fixed(loss["sd"])),
        percent(accuracy["best"]),
        spread(percent(accuracy["mean"]), percent(accuracy["sd"])),
        "" if row["seconds"] is None else f"{row['seconds']:.1f}",
    ]


def _settings_section(campaign: CampaignFolder, config: str) -> str:
    parts = ["<h2>Made with</h2>"]
    if campaign.versions_json.is_file():
        versions = read_json(campaign.versions_json)
        rows = [[str(name), "not known" if value is None else str(value)] for name, value in versions.items()]
        parts.append(table("Versions", ("", "version"), rows))
    parts.append(f"<h3>campaign.toml</h3><pre tabindex=0>{text(config)}</pre>")
    return "".join(parts)


def _name(group: str) -> str:
    return _NAMES.get(group, group)


def _plural(episodes: int) -> str:
    return "episode" if episodes == 1 else "episodes"
