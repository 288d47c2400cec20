"""Progress is a panel on a terminal and few lines elsewhere."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from deploy.progress import (
    ActorLine,
    PlainProgress,
    RichProgress,
    SearchSnapshot,
    duration,
    make_progress,
)
from env.retraining import Metrics
from env.training_reports import BatchReport, EpochReport

SNAPSHOT = SearchSnapshot(
    done=3,
    total=40,
    actors=[
        ActorLine(name="actor-0", episodes=2, episodes_per_minute=1.5, state="playing [17]"),
        ActorLine(name="actor-1", episodes=1, episodes_per_minute=0.75, state="restarting"),
    ],
    learner_updates=120,
    learner_loss=0.0123,
    replay_size=44,
    best=[(0.9, "taylor", 1.234, 0.5678)],
    seconds_elapsed=125.0,
    seconds_left=None,
)

EPOCH = EpochReport(
    epoch=1,
    epochs=30,
    train_loss=1.25,
    train_accuracy=0.4,
    validation=Metrics(accuracy=0.5, cross_entropy=1.5),
    learning_rate=0.1,
    seconds=100.0,
    images_per_s=500.0,
    seconds_left=2900.0,
)
BATCH = BatchReport(
    epoch=2,
    epochs=30,
    minibatch=90,
    minibatches=200,
    train_loss=0.875,
    train_accuracy=0.625,
    learning_rate=0.1,
    seconds_left=2855.0,
)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def plain_console(screen: io.StringIO) -> Console:
    return Console(file=screen, force_terminal=False, width=60)


def terminal(screen: io.StringIO) -> Console:
    return Console(file=screen, force_terminal=True, width=110, height=40)


def lines(screen: io.StringIO) -> list[str]:
    return screen.getvalue().splitlines()


def test_a_terminal_gets_the_panel_and_anything_else_lines(screen: io.StringIO) -> None:
    assert isinstance(make_progress(plain_console(screen)), PlainProgress)
    assert isinstance(make_progress(terminal(screen)), RichProgress)


def test_plain_lines_carry_the_time_and_are_never_wrapped(screen: io.StringIO) -> None:
    progress = PlainProgress(plain_console(screen))
    progress.stage("prepare", "training the network [vgg16] " + "x" * 100)
    progress.note("actor-0 was lost; a new one took its episode")
    progress.close()
    assert len(lines(screen)) == 2
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines(screen))
    assert "[vgg16]" in lines(screen)[0]


def test_epochs_print_first_last_and_every_ten_seconds(screen: io.StringIO) -> None:
    clock = Clock()
    progress = PlainProgress(plain_console(screen), clock)
    progress.stage("prepare")
    for epoch in range(1, 31):
        clock.now_s += 1.0
        progress.epoch("prepare", replace(EPOCH, epoch=epoch))
    shown = [int(re.search(r"epoch (\d+)/30", line).group(1)) for line in lines(screen)[1:]]  # type: ignore[union-attr]
    assert shown == [1, 11, 21, 30]
    assert lines(screen)[1].endswith("prepare: epoch 1/30, loss 1.250, accuracy 50.00%, 48 min left")
    assert lines(screen)[-1].endswith("prepare: epoch 30/30, loss 1.250, accuracy 50.00%")


def test_a_long_epoch_prints_a_line_after_half_a_minute_of_silence(screen: io.StringIO) -> None:
    clock = Clock()
    progress = PlainProgress(plain_console(screen), clock)
    progress.stage("prepare")
    for second in range(1, 101):
        clock.now_s += 1.0
        progress.batch("baseline", replace(BATCH, epoch=1, minibatch=second))
    progress.epoch("baseline", EPOCH)
    clock.now_s += 29.0
    progress.batch("baseline", BATCH)
    shown = [line.partition("baseline: ")[2] for line in lines(screen)[1:]]
    assert shown == [
        *(f"epoch 1/30 at {at}%, loss 0.875, accuracy in training 62.50%, 48 min left" for at in (15, 30, 45)),
        "epoch 1/30, loss 1.250, accuracy 50.00%, 48 min left",
    ]


def test_short_epochs_are_not_hidden_by_lines_of_their_middle(screen: io.StringIO) -> None:
    clock = Clock()
    progress = PlainProgress(plain_console(screen), clock)
    progress.stage("prepare")
    for epoch in range(1, 31):
        clock.now_s += 2.0
        progress.batch("prepare", replace(BATCH, epoch=epoch))
        progress.epoch("prepare", replace(EPOCH, epoch=epoch))
    assert all("in training" not in line for line in lines(screen))
    assert len(lines(screen)) == 1 + 6 + 1


def test_a_live_line_moves_within_an_epoch_above_the_last_finished_one(screen: io.StringIO) -> None:
    progress = RichProgress(Console(file=screen, force_terminal=True, width=150, height=40))
    progress.stage("prepare", "vgg16")
    progress.epoch("baseline", EPOCH)
    before = len(screen.getvalue())
    progress.batch("baseline", BATCH)
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()[before:])
    live, finished = "epoch 2/30 at 45%, loss 0.875, accuracy in training 62.50%, 48 min left", "epoch 1/30, loss 1.250"
    assert 0 < text.index(live) < text.index(finished)
    assert text.rstrip().splitlines()[-1].strip() == f"{finished}, accuracy 50.00%, 48 min left"


def test_the_search_prints_at_most_every_ten_seconds_and_its_end_at_once(screen: io.StringIO) -> None:
    clock = Clock()
    progress = PlainProgress(plain_console(screen), clock)
    for done in range(41):
        progress.search(replace(SNAPSHOT, done=done))
        clock.now_s += 1.0
    shown = [int(re.search(r"(\d+)/40", line).group(1)) for line in lines(screen)]  # type: ignore[union-attr]
    assert shown == [0, 10, 20, 30, 40]


def test_a_search_without_news_only_shows_signs_of_life(screen: io.StringIO) -> None:
    clock = Clock()
    progress = PlainProgress(plain_console(screen), clock)
    for _ in range(1200):
        progress.search(SNAPSHOT)
        clock.now_s += 0.25
    assert len(lines(screen)) == 5


def test_a_finished_search_is_said_once(screen: io.StringIO) -> None:
    progress = PlainProgress(plain_console(screen), Clock())
    for _ in range(5):
        progress.search(replace(SNAPSHOT, done=40))
    assert len(lines(screen)) == 1


def test_the_search_line_says_everything(screen: io.StringIO) -> None:
    PlainProgress(plain_console(screen), Clock()).search(SNAPSHOT)
    assert lines(screen)[0].endswith(
        "search: 3/40 episodes; 2 actors, 2.2 episodes/min; 120 updates, loss 0.0123; replay 44; "
        "best at 90.0%: 56.78% (taylor); 2 min so far, ? left"
    )


def test_the_panel_shows_actors_learner_and_best_and_leaves_a_summary(screen: io.StringIO) -> None:
    progress = RichProgress(terminal(screen))
    progress.stage("prepare", "vgg16")
    progress.epoch("prepare", replace(EPOCH, epochs=8))
    progress.stage("search", "40 episodes")
    progress.search(replace(SNAPSHOT, learner_loss=None))
    progress.search(SNAPSHOT)
    progress.note("[actor-1] was lost")
    progress.close()
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for words in (
        "actor-0", "playing [17]", "restarting", "120 updates", "56.78%", "epoch 1/8", "[actor-1] was lost",
    ):  # fmt: skip
        assert words in text
    assert text.rstrip().splitlines()[-1].lstrip().startswith("search: 3/40 episodes")
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") > 0, "cursor hidden"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (float("nan"), "?"),
        (-3.0, "0 s"),
        (45.2, "45 s"),
        (700.0, "12 min"),
        (11_100.0, "3 h 05 min"),
        (183_600.0, "2 d 03 h"),
    ],
)
def test_durations_read_like_speech(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
