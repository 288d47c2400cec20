"""The campaign's report: one self-contained HTML file, written from what the campaign folder holds.

Called by the campaign at its end and by `zeroout report DIR` at any time; an unfinished campaign's report says
that it is one. Every number of a finished network is result.json's own, every text is escaped.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deploy.folder import CampaignFolder, read_json, write_atomic
from deploy.frontier import Comparison, compare, groups_of, groups_table, measure_name, targets_of
from deploy.progress import duration
from deploy.status import read_status

__all__ = ["comparison_sentence", "verdict_sentence", "write_report"]

Record = dict[str, Any]

_NAMES = {
    "search": "the Controller's search",
    "taylor": "Taylor",
    "balanced": "Taylor per parameter",
    "random": "random search",
    "cem": "evolution (CEM)",
    "untrained": "the untrained Controller",
}


def write_report(folder: CampaignFolder | Path | str) -> Path:
    """Write report.html and frontier.png into the campaign folder and return the report's path.

    Works with whatever is there; UserError when the folder is no campaign or one of its files is broken.
    """
    # matplotlib takes most of a second to import, and `zeroout status` imports no report's pictures.
    from deploy.charts import frontier_image, learning_image

    campaign = CampaignFolder.open(folder.path if isinstance(folder, CampaignFolder) else folder)
    status = read_status(campaign)
    records, result = campaign.read_episodes(), status["result"]
    light = frontier_image(records, result)
    alone = len(groups_of(records)) == 1 and "search" not in groups_of(records)  # one rule: nothing was learned
    body = [
        _head(status, records),
        _result_section(result),
        _comparison_section(records, result) if not alone else "",
        _picture("Accuracy against compression", light, frontier_image(records, result, dark=True)),
        _picture("Learning", learning_image(records), learning_image(records, dark=True)) if not alone else "",
        _settings_section(campaign),
    ]
    write_atomic(campaign.frontier_png, light)
    write_atomic(campaign.report_html, _page(campaign.path.resolve().name, body))
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
        f"At {_percent(c.target, 1)} removed, the best of {c.episodes} {_plural(c.episodes)} each (the search's "
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


def _head(status: Record, records: Sequence[Record]) -> str:
    result = status["result"] or {}
    total = "" if status["episodes_total"] is None else f" of {status['episodes_total']}"
    facts = [f"{result.get('episodes', len(records))}{total} episodes"]
    if result.get("seconds") is not None:
        facts.append(duration(result["seconds"]))
    if result.get("seed") is not None:
        facts.append(f"seed {result['seed']}")
    title = f"<h1>{_text(Path(status['folder']).resolve().name)}</h1><p class=dim>{_text(', '.join(facts))}</p>"
    if status["stage"] == "done":
        return title
    return title + (
        f"<p class=notice><b>This campaign is not finished</b> (stage: {_text(status['stage'])}). What follows "
        f"is how it stands now; continue it with <code>zeroout resume {_text(status['folder'])}</code>.</p>"
    )


def _result_section(result: Record | None) -> str:
    if result is None:
        return "<h2>Result</h2><p>No network has been recovered and tested yet.</p>"
    baseline = result.get("baseline") or {}
    rows = [_baseline_row(baseline), *(_point_row(p, baseline) for p in result.get("points") or [])]
    header = (
        "target", f"{measure_name(result)} removed", "parameters", "MACs", "validation", "change", "test", "change",
        "chosen by", "model",
    )  # fmt: skip
    note = (
        "Accuracies after recovery; changes in points from the baseline. Every choice was made on the "
        "validation images, the test images were opened once, at the end."
    )
    if "limit" in result:
        note = f"At most {result['max_drop']:g} points were to be lost on validation: {result['limit']}. {note}"
    return f"<h2>Result</h2>{_table(header, rows)}<p class=dim>{_text(note)}</p>"


def _baseline_row(baseline: Record) -> list[str]:
    accuracies = [_percent(baseline.get("val_accuracy")), "", _percent(baseline.get("test_accuracy")), ""]
    sizes = [_count(baseline.get("parameters")), _count(baseline.get("macs"))]
    return ["baseline", "", *sizes, *accuracies, "", ""]


def _point_row(point: Record, baseline: Record) -> list[str]:
    accuracies = [
        cell
        for key in ("val_accuracy", "test_accuracy")
        for cell in (_percent(point.get(key)), _change(point.get(key), baseline.get(key)))
    ]
    group, policy = point.get("group"), str(point.get("policy", ""))
    chosen_by = policy if group is None or group == policy else f"{group}: {policy}"
    return [
        _percent(point.get("target"), 1),
        _percent(point.get("compression")),
        _count(point.get("parameters")),
        _count(point.get("macs")),
        *accuracies,
        chosen_by,
        str(point.get("model") or ""),
    ]


def _comparison_section(records: Sequence[Record], result: Record | None) -> str:
    targets = targets_of(records)
    comparisons = [c for target in targets if (c := compare(records, target)) is not None]
    parts = ["<h2>Who chose better?</h2>", f"<p class=verdict>{_text(verdict_sentence(comparisons))}</p>"]
    if len(comparisons) > 1:
        items = "".join(f"<li>{_text(comparison_sentence(c))}</li>" for c in comparisons)
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
    return f"<h3>After recovery</h3>{_table(header, rows)}<p class=dim>{note}</p>"


def _group_table(records: Sequence[Record], target: float) -> str:
    header = (
        "group", "episodes", "cross-entropy, best", "mean ± sd", "accuracy, best", "mean ± sd", "seconds",
    )  # fmt: skip
    rows = [_group_row(row) for row in groups_table(records, target)]
    title = f"<h3>All episodes at {_percent(target, 1)} removed</h3>"
    note = (
        "On the validation images, after the short recovery of an episode; mean and standard deviation over "
        "episodes; cross-entropy: lower is better."
    )
    return f"{title}{_table(header, rows)}<p class=dim>{note}</p>"


def _group_row(row: Record) -> list[str]:
    loss, accuracy = row["cross_entropy"], row["accuracy"]
    reached = "" if row["reached"] == row["episodes"] else f" ({row['reached']} reached it)"
    return [
        row["group"] if row["policy"] is None else f"  · {row['policy']}",
        f"{row['episodes']}{reached}",
        _fixed(loss["best"]),
        _spread(_fixed(loss["mean"]), _fixed(loss["sd"])),
        _percent(accuracy["best"]),
        _spread(_percent(accuracy["mean"]), _percent(accuracy["sd"])),
        "" if row["seconds"] is None else f"{row['seconds']:.1f}",
    ]


def _settings_section(campaign: CampaignFolder) -> str:
    config = campaign.campaign_toml.read_text(errors="replace")
    parts = ["<h2>Made with</h2>"]
    if campaign.versions_json.is_file():
        versions = read_json(campaign.versions_json)
        rows = [[str(name), "not known" if value is None else str(value)] for name, value in versions.items()]
        parts.append(_table(("", "version"), rows))
    parts.append(f"<h3>campaign.toml</h3><pre>{_text(config)}</pre>")
    return "".join(parts)


def _picture(title: str, light: bytes, dark: bytes) -> str:
    return (
        f"<h2>{_text(title)}</h2><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{_text(title)}"></picture>'
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _page(title: str, body: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)} · Zeroout</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _name(group: str) -> str:
    return _NAMES.get(group, group)


def _plural(episodes: int) -> str:
    return "episode" if episodes == 1 else "episodes"


def _percent(value: float | None, decimals: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{decimals}f} %"


def _change(value: float | None, baseline: float | None) -> str:
    return "" if value is None or baseline is None else f"{100 * (value - baseline):+.2f}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spread(mean: str, deviation: str) -> str:
    return f"{mean} ± {deviation}" if mean and deviation else mean


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #23272e; --dim: #646c77; --line: #e3e6ea;
  --soft: #f5f6f8; --mark: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #d7dbe0; --dim: #949da9;
  --line: #2b3038; --soft: #1c2026; --mark: #f58a3c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
.dim { color: var(--dim); font-size: .875rem; margin-top: .4rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--mark); padding-left: .9rem; }
.notice { background: var(--soft); border: 1px solid var(--mark); border-radius: 6px; padding: .7rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 24rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
td:first-child { white-space: pre; }
picture img { width: 100%; height: auto; display: block; border-radius: 6px; }
pre { background: var(--soft); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .8125rem; }
"""
