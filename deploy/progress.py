"""Live progress of long work: a panel that is redrawn on a terminal, timestamped lines anywhere else.

The campaign speaks to a `Progress` and does not know which. Plain lines are for log files and CI: one at most
every ten seconds for what repeats, so that a campaign of days stays readable.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # torch takes seconds to import, and `zeroout status` needs none of it
    from env.training_reports import BatchReport, EpochReport

__all__ = [
    "ActorLine",
    "PlainProgress",
    "Progress",
    "RichProgress",
    "SearchSnapshot",
    "duration",
    "loss_text",
    "make_progress",
]

_PLAIN_PERIOD_S = 10.0
# With nothing finished a line still shows, now and then, that the campaign is alive.
_PLAIN_HEARTBEAT_S = 60.0
_PLAIN_BATCH_S = 30.0  # within an epoch of training


@dataclass(frozen=True, kw_only=True)
class ActorLine:
    """One actor as it stands now."""

    name: str
    episodes: int
    episodes_per_minute: float
    state: str


@dataclass(frozen=True, kw_only=True)
class SearchSnapshot:
    """The search as it stands now."""

    done: int  # episodes finished
    total: int  # episodes to play
    actors: list[ActorLine]
    learner_updates: int
    learner_loss: float | None
    replay_size: int  # sequences
    best: list[tuple[float, str, float, float]]  # (target, policy, cross_entropy, accuracy) per target
    seconds_elapsed: float
    seconds_left: float | None  # None while it cannot be estimated


class Progress(Protocol):
    """Where long work reports to. Calls are cheap and may come as often as the caller likes."""

    def stage(self, name: str, detail: str = "") -> None:
        """Begin a stage (prepare, search, peers, recover, export)."""

    def share(self, stage: str, done: int, total: int) -> None:
        """Report how much is done of something that is only counted: images decoded, bytes downloaded."""

    def batch(self, stage: str, report: "BatchReport") -> None:
        """Report a training in the middle of an epoch."""

    def epoch(self, stage: str, report: "EpochReport") -> None:
        """Report a finished training epoch."""

    def search(self, snapshot: SearchSnapshot) -> None:
        """Report the search as it stands."""

    def note(self, text: str) -> None:
        """Say something that must stay readable: a lost actor, a limiter that holds."""

    def close(self) -> None:
        """Leave the terminal in order; calling it twice is fine."""


def make_progress(console: Console) -> Progress:
    """Return a live panel when `console` is a terminal, else plain lines."""
    return RichProgress(console) if console.is_terminal else PlainProgress(console)


def duration(seconds: float | None) -> str:
    """Return "45 s", "12 min", "3 h 05 min" or "2 d 03 h"; "?" for what is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


class PlainProgress:
    """Timestamped lines, at most one every ten seconds of what repeats."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Print on `console`; `clock` returns seconds and only its differences count."""
        self._console, self._clock = console, clock
        self._last_line_s = -math.inf  # of what repeats
        self._last_sign_s = -math.inf  # of anything
        self._last_done = -1

    def stage(self, name: str, detail: str = "") -> None:
        """Print the stage; the first line of what repeats may follow at once."""
        self._line(f"{name}: {detail}" if detail else name)
        self._last_line_s, self._last_done = -math.inf, -1

    def share(self, stage: str, done: int, total: int) -> None:
        """Print the share at most every ten seconds."""
        if self._is_due(_PLAIN_PERIOD_S):
            self._line(f"{stage}: {done / max(total, 1):.0%}")
            self._last_line_s = self._clock()

    def batch(self, stage: str, report: "BatchReport") -> None:
        """Print how the epoch goes when nothing was printed for half a minute."""
        if self._clock() - self._last_sign_s >= _PLAIN_BATCH_S:
            self._line(f"{stage}: {_batch_text(report)}")

    def epoch(self, stage: str, report: "EpochReport") -> None:
        """Print the first and the last epoch, and between them one at most every ten seconds."""
        if report.epoch == report.epochs or self._is_due(_PLAIN_PERIOD_S):
            self._line(f"{stage}: {_epoch_text(report)}")
            self._last_line_s = self._clock()

    def search(self, snapshot: SearchSnapshot) -> None:
        """Print newly finished episodes at most every ten seconds, the last at once, and a sign of life."""
        is_news = snapshot.done != self._last_done
        is_end = is_news and snapshot.done >= snapshot.total
        if is_end or self._is_due(_PLAIN_PERIOD_S if is_news else _PLAIN_HEARTBEAT_S):
            self._line(_search_text(snapshot))
            self._last_line_s, self._last_done = self._clock(), snapshot.done

    def note(self, text: str) -> None:
        """Print the text."""
        self._line(text)

    def close(self) -> None:
        """Do nothing: every line is already out."""

    def _is_due(self, period_s: float) -> bool:
        return self._clock() - self._last_line_s >= period_s

    def _line(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._console.print(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)
        self._last_sign_s = self._clock()


class RichProgress:
    """A panel at the bottom of the terminal; stages and notes scroll away above it."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`, which must be a terminal."""
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._is_open = False
        self._summary = ""  # of what the panel shows, printed once when its stage is over

    def stage(self, name: str, detail: str = "") -> None:
        """Leave the last numbers of the stage before above the panel, and begin the next."""
        self._leave_summary()
        self._console.print(f"[bold cyan]●[/] [bold]{escape(name)}[/] {escape(detail)}", highlight=False)

    def share(self, stage: str, done: int, total: int) -> None:
        """Move the bar."""
        self._show(_bar(stage, done, total, f"{done / max(total, 1):.0%}"))

    def batch(self, stage: str, report: "BatchReport") -> None:
        """Move the bar within the epoch, above what the last finished epoch said."""
        done = report.epoch - 1 + report.minibatch / report.minibatches
        bar = _bar(stage, done, report.epochs, _batch_text(report))
        self._show(Group(bar, Text(self._summary, style="dim")) if self._summary else bar)

    def epoch(self, stage: str, report: "EpochReport") -> None:
        """Move the bar."""
        self._summary = _epoch_text(report)
        self._show(_bar(stage, report.epoch, report.epochs, self._summary))

    def search(self, snapshot: SearchSnapshot) -> None:
        """Redraw the search: the bar, the actors, the best so far."""
        self._summary = _search_text(snapshot)
        self._show(_search_panel(snapshot))

    def note(self, text: str) -> None:
        """Print the text above the panel."""
        self._console.print(f"[yellow]![/] {escape(text)}", highlight=False)

    def close(self) -> None:
        """Take the panel away, leaving its last numbers."""
        self._leave_summary()

    def _show(self, renderable: RenderableType) -> None:
        self._live.update(renderable)
        if not self._is_open:
            self._live.start(refresh=True)
            self._is_open = True

    def _leave_summary(self) -> None:
        if self._is_open:
            self._live.stop()  # it is transient: the panel vanishes
            self._is_open = False
        if self._summary:
            self._console.print(f"  {escape(self._summary)}", style="dim", highlight=False, soft_wrap=True)
            self._summary = ""


def _batch_text(report: "BatchReport") -> str:
    return (
        f"epoch {report.epoch}/{report.epochs} at {report.minibatch / report.minibatches:.0%}, "
        f"loss {report.train_loss:.3f}, accuracy in training {report.train_accuracy:.2%}, "
        f"{duration(report.seconds_left)} left"
    )


def _epoch_text(report: "EpochReport") -> str:
    left = f", {duration(report.seconds_left)} left" if report.epoch < report.epochs else ""
    return (
        f"epoch {report.epoch}/{report.epochs}, loss {report.train_loss:.3f}, "
        f"accuracy {report.validation.accuracy:.2%}{left}"
    )


def loss_text(loss: float | None) -> str:
    """Return a learner's loss, "-" before the first."""
    return "-" if loss is None else f"{loss:.4f}"


def _search_text(snapshot: SearchSnapshot) -> str:
    rate = sum(actor.episodes_per_minute for actor in snapshot.actors)
    loss = loss_text(snapshot.learner_loss)
    parts = [
        f"search: {snapshot.done}/{snapshot.total} episodes",
        f"{len(snapshot.actors)} actors, {rate:.1f} episodes/min",
        f"{snapshot.learner_updates} updates, loss {loss}",
        f"replay {snapshot.replay_size}",
        *(f"best at {t:.1%}: {accuracy:.2%} ({policy})" for t, policy, _, accuracy in snapshot.best),
        f"{duration(snapshot.seconds_elapsed)} so far, {duration(snapshot.seconds_left)} left",
    ]
    return "; ".join(parts)


def _bar(title: str, done: float, total: int, text: str) -> Table:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1, total), completed=done, width=30)
    grid.add_row(Text(title, style="bold"), bar, Text(text))
    return grid


def _search_panel(snapshot: SearchSnapshot) -> Group:
    loss = loss_text(snapshot.learner_loss)
    left = f"{duration(snapshot.seconds_elapsed)} so far, {duration(snapshot.seconds_left)} left"
    head = _bar("search", snapshot.done, snapshot.total, f"{snapshot.done}/{snapshot.total} episodes, {left}")
    learner = Text(
        f"learner: {snapshot.learner_updates} updates, loss {loss}, replay {snapshot.replay_size} sequences",
        style="dim",
    )
    return Group(head, learner, _tables(snapshot))


def _tables(snapshot: SearchSnapshot) -> Table:
    side_by_side = Table.grid(padding=(0, 3))
    side_by_side.add_row(_actor_table(snapshot.actors), _best_table(snapshot.best))
    return side_by_side


def _actor_table(actors: list[ActorLine]) -> Table:
    table = Table(box=None, header_style="dim")
    for header in ("actor", "episodes", "per minute", "state"):
        table.add_column(header, justify="right" if header in ("episodes", "per minute") else "left")
    for actor in actors:
        rate = f"{actor.episodes_per_minute:.2f}"
        table.add_row(Text(actor.name), str(actor.episodes), rate, Text(actor.state))
    return table


def _best_table(best: list[tuple[float, str, float, float]]) -> Table:
    table = Table(box=None, header_style="dim")
    for header in ("removed", "accuracy", "cross-entropy", "by"):
        table.add_column(header, justify="left" if header == "by" else "right")
    for target, policy, cross_entropy, accuracy in best:
        table.add_row(f"{target:.1%}", f"{accuracy:.2%}", f"{cross_entropy:.3f}", Text(policy))
    return table
