"""The page of benchmarks/search.py: the table, paired differences, and the curves."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

__all__ = ["write_page"]

Row = Mapping[str, Any]
OURS = "controller"
#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    "controller": "#D55E00",
    "frozen": "#8B3A00",
    "fresh": "#CC79A7",
    "untrained": "#7A4966",
    "cem": "#009E73",
    "balanced": "#56B4E9",
    "taylor": "#0072B2",
    "gamma": "#E69F00",
    "random": "#8A8A8A",
}


def write_page(cell: str, rows: Sequence[Row], folder: Path, command: str) -> str:
    """Write CELL.md and CELL.png into `folder`; returns the page."""
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["seed"]] = row
    order = sorted(by_method, key=lambda name: -_mean(by_method[name], "test"))
    lines = [
        f"# {cell}: who finds the better small network",
        "",
        f"`{command}` (`--help` says what the methods are)",
        "",
        f"machine: {', '.join(sorted({row['machine'] for row in rows}))}. Accuracies in per cent: mean over seeds",
        "(standard deviation), on validation as chosen by and on test as opened once. Change: from the baseline of the",
        "same seed, in points of validation accuracy. Ours less theirs: paired by seed, on test; p of a paired t",
        "test, two-sided.",
        "",
        "| method | n | test | validation | change | ours less theirs | p | images retrained | episodes' seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(name, by_method) for name in order),
        "",
        "## By seed, test",
        "",
        *_by_seed(order, by_method),
        "",
        f"![returns by episode]({cell}.png)",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (folder / f"{cell}.md").write_text(text)
    _draw(by_method, folder / f"{cell}.png")
    return text


def _line(name: str, by_method: Mapping[str, Mapping[int, Row]]) -> str:
    mine = by_method[name]
    change = [100 * (row["validation"] - row["baseline_validation"]) for row in mine.values()]
    images = statistics.fmean(row["images"] for row in mine.values())
    seconds = statistics.fmean(row["seconds"] for row in mine.values())
    return (
        f"| {name} | {len(mine)} | {_spread(mine, 'test')} | {_spread(mine, 'validation')} | "
        f"{statistics.fmean(change):+.2f} | {_paired(name, by_method)} | {images:,.0f} | {seconds:,.0f} |"
    )


def _paired(name: str, by_method: Mapping[str, Mapping[int, Row]]) -> str:
    ours, theirs = by_method.get(OURS, {}), by_method[name]
    common = sorted(set(ours) & set(theirs))
    if name == OURS or not common:
        return "- | -"
    pairs = [(100 * ours[seed]["test"], 100 * theirs[seed]["test"]) for seed in common]
    difference = statistics.fmean(one - other for one, other in pairs)
    wins = sum(one > other for one, other in pairs)
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue) if len(pairs) > 1 else float("nan")
    return f"{difference:+.2f} ({wins} of {len(pairs)} seeds) | {'-' if np.isnan(p) else f'{p:.3f}'}"


def _by_seed(order: Sequence[str], by_method: Mapping[str, Mapping[int, Row]]) -> list[str]:
    seeds = sorted({seed for rows in by_method.values() for seed in rows})
    head = f"| method | {' | '.join(str(seed) for seed in seeds)} |"
    body = [
        f"| {name} | "
        + " | ".join(f"{100 * by_method[name][s]['test']:.2f}" if s in by_method[name] else "" for s in seeds)
        + " |"
        for name in order
    ]
    return [head, "|---" * (len(seeds) + 1) + "|", *body]


def _mean(rows: Mapping[int, Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows.values())


def _spread(rows: Mapping[int, Row], key: str) -> str:
    values = [100 * row[key] for row in rows.values()]
    deviation = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def _draw(by_method: Mapping[str, Mapping[int, Row]], path: Path) -> None:
    """Left the best return so far, right the mean of the last eight: mean over seeds, a band of one deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    best, mean = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        played = [[episode[2] for episode in row["episodes"]] for row in by_method.get(name, {}).values()]
        if not played:
            continue
        returns = np.array([row[: min(map(len, played))] for row in played])
        for axes, values in ((best, np.maximum.accumulate(returns, axis=1)), (mean, _smooth(returns))):
            middle, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
            episodes = np.arange(1, values.shape[1] + 1)
            axes.plot(episodes, middle, color=colour, label=name)
            axes.fill_between(episodes, middle - spread, middle + spread, color=colour, alpha=0.12, linewidth=0)
    best.set(xlabel="episodes", ylabel="return (nats lost, negative)", title="best so far")
    mean.set(xlabel="episodes", title="mean of the last eight")
    best.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _smooth(returns: np.ndarray) -> np.ndarray:
    """Mean over the last eight episodes, fewer at the start: [seeds, episodes] -> the same."""
    return np.stack([returns[:, max(0, n - 7) : n + 1].mean(1) for n in range(returns.shape[1])], axis=1)
