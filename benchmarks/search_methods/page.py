"""The page of benchmarks/search.py: the table, paired differences, and the curves."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paired import difference, spread

__all__ = ["write_page"]

Row = Mapping[str, Any]
#: Whom the others are compared with: the first that is there.
OURS = ("controller", "fresh")
#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    "controller": "#D55E00",
    "frozen": "#8B3A00",
    "fresh": "#CC79A7",
    "untrained": "#7A4966",
    "cem": "#009E73",
    "balanced": "#56B4E9",
    "balanced-l1": "#2B6E8F",
    "profile": "#6A3D9A",
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
    ours = next((name for name in OURS if name in by_method), "")
    lines = [
        f"# {cell}: who finds the better small network",
        "",
        f"`{command}` (`--help` says what the methods are)",
        "",
        f"machine: {', '.join(sorted({row['machine'] for row in rows}))}. Accuracies in per cent: mean over seeds",
        "(standard deviation), on validation as chosen by and on test as opened once. Change: from the baseline of the",
        "same seed, in points of validation accuracy.",
        *([f"Ours, {ours}, less theirs: paired by seed, on test; p of a paired t test, two-sided."] if ours else []),
        "",
        "| method | n | test | validation | change | ours less theirs | p | MACs left, millions | images retrained | "
        "episodes' seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(name, by_method, ours) for name in order),
        "",
        "## Return of the later half of the episodes",
        "",
        "Minus the nats of validation cross-entropy lost, after the short recovery: mean over the later half of each",
        "campaign's episodes, where a learner has something to show, then over seeds (standard deviation).",
        "",
        "| method | return | ours less theirs | p |",
        "|---|---|---|---|",
        *(_returns_line(name, by_method, ours) for name in order if _later_returns(by_method[name])),
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


def _line(name: str, by_method: Mapping[str, Mapping[int, Row]], ours: str) -> str:
    mine = by_method[name]
    change = [100 * (row["validation"] - row["baseline_validation"]) for row in mine.values()]
    validation = {seed: 100 * row["validation"] for seed, row in mine.items()}
    macs = _mean(mine, "macs") / 1e6
    images, seconds = _mean(mine, "images"), _mean(mine, "seconds")
    paired = _paired(_test(by_method.get(ours, {})), {} if name == ours else _test(mine))
    return (
        f"| {name} | {len(mine)} | {spread(_test(mine))} | {spread(validation)} | "
        f"{statistics.fmean(change):+.2f} | {paired} | {macs:.1f} | {images:,.0f} | {seconds:,.0f} |"
    )


def _returns_line(name: str, by_method: Mapping[str, Mapping[int, Row]], ours: str) -> str:
    mine = _later_returns(by_method[name])
    paired = _paired(_later_returns(by_method.get(ours, {})), {} if name == ours else mine, 3)
    return f"| {name} | {spread(mine, 3)} | {paired} |"


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float], digits: int = 2) -> str:
    apart = difference(ours, theirs)
    if apart is None:
        return "- | -"
    return f"{apart.mean:+.{digits}f} ({apart.wins} of {apart.n} seeds) | {apart.p_text or '-'}"


def _later_returns(rows: Mapping[int, Row]) -> dict[int, float]:
    """By seed; without those that play no episodes."""
    returns = {seed: [episode[2] for episode in row["episodes"]] for seed, row in rows.items() if row["episodes"]}
    return {seed: statistics.fmean(played[len(played) // 2 :]) for seed, played in returns.items()}


def _test(rows: Mapping[int, Row]) -> dict[int, float]:
    """Per cent by seed."""
    return {seed: 100 * row["test"] for seed, row in rows.items()}


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
