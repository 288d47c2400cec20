"""What a Controller plays where it does not explore: one episode up to its short recovery, nothing delivered.

`python -m benchmarks.search_methods.greedy CONFIG.toml --out DIR`; called by benchmarks/search.py for its curve.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.campaigns import ended_as_a_command
from benchmarks.paired import difference, spread
from deploy.alone import play_alone
from deploy.config import dump, load, resolved
from deploy.folder import CampaignFolder
from deploy.prepare import preflight, prepare
from deploy.progress import make_progress

__all__ = ["Taught", "write_curve"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Taught:
    """A Controller, and how many episodes it has learned from; no file is one that knows nothing."""

    episodes: int
    weights: Path | None


def write_curve(cell: str, rows: Sequence[Row], folder: Path, command: str) -> str:
    """Write CELL-greedy.md and CELL-greedy.png into `folder`; returns the page."""
    returns: dict[int, dict[int, float]] = {}
    macs: dict[int, dict[int, float]] = {}
    for row in rows:
        returns.setdefault(row["learned"], {})[row["seed"]] = row["return"]
        macs.setdefault(row["learned"], {})[row["seed"]] = row["macs"] / 1e6
    first = returns[min(returns)]
    lines = [
        f"# {cell}: the Controller's own episodes get better with training",
        "",
        f"`{command}`",
        "",
        f"machine: {', '.join(sorted({row['machine'] for row in rows}))}. One episode without exploration on each of",
        f"{len(first)} networks that it was not taught on. Return: minus the nats of validation cross-entropy lost,",
        "after the short recovery; mean over networks (standard deviation). Gain: on the untaught one, paired by",
        "network; p of a paired t test, two-sided.",
        "",
        "| episodes learned from | n | return | MACs, millions | gain | p |",
        "|---|---|---|---|---|---|",
        *(_line(learned, returns[learned], macs[learned], first) for learned in sorted(returns)),
        "",
        f"![greedy return by episodes learned from]({cell}-greedy.png)",
        "",
    ]
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cell}-greedy.md").write_text(text)
    _draw(returns, folder / f"{cell}-greedy.png")
    return text


def _line(learned: int, mine: Mapping[int, float], macs: Mapping[int, float], first: Mapping[int, float]) -> str:
    gain = None if mine is first else difference(mine, first)
    said = "- | -"
    if gain is not None:
        said = f"{gain.mean:+.3f} ({gain.wins} of {gain.n}) | {gain.p_text or '-'}"
    return f"| {learned} | {len(mine)} | {spread(mine, 3)} | {spread(macs)} | {said} |"


def _draw(returns: Mapping[int, Mapping[int, float]], path: Path) -> None:
    """The mean over networks, a band of one deviation, and each network faint behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes, learned = figure.subplots(), sorted(returns)
    for seed in sorted({seed for one in returns.values() for seed in one}):
        points = [(count, returns[count][seed]) for count in learned if seed in returns[count]]
        axes.plot(*zip(*points, strict=True), color="#8A8A8A", linewidth=0.8, alpha=0.6)
    means = [statistics.fmean(returns[count].values()) for count in learned]
    around = [statistics.stdev(returns[count].values()) if len(returns[count]) > 1 else 0.0 for count in learned]
    low, high = zip(*((mean - one, mean + one) for mean, one in zip(means, around, strict=True)), strict=True)
    axes.plot(learned, means, color="#D55E00", marker="o")
    axes.fill_between(learned, low, high, color="#D55E00", alpha=0.15, linewidth=0)
    axes.set(xlabel="episodes learned from", ylabel="greedy return (nats lost, negative)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Play the episode that is not yet recorded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_methods.greedy", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with ended_as_a_command():
        config, progress = load(given.config), make_progress(Console())
        dataset = preflight(config)
        folder = CampaignFolder.create(given.out, dump(config), resolved)
        play_alone(folder, config, dataset, prepare(folder, config, dataset, progress), progress)


if __name__ == "__main__":
    main()
