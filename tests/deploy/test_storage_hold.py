"""Who has a campaign's URI: what a driver finds there, and what it does about it."""

import os
import platform
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from deploy import storage_hold
from deploy.storage_hold import HELD, Hold, Holder, holder_at, parsed
from env.errors import UserError

PERIOD_S = 0.1


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_hold, "PERIOD_S", PERIOD_S)


class Shelf:
    """A storage in memory."""

    uri = "mem://mine"

    def __init__(self) -> None:
        self.files = dict[str, bytes]()

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def write(self, name: str, content: bytes) -> None:
        self.files[name] = content


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def hold(shelf: Shelf) -> Hold:
    return Hold(shelf, (OSError,))


def left_by(shelf: Shelf, **changes: object) -> Holder:
    """What a driver has left that was killed on another machine."""
    facts = {"run": "a", "host": "far", "machine": "m", "process": 5, "renewals": 3, "time": time.time(), "over": False}
    holder = Holder(**{**facts, **changes})  # type: ignore[arg-type]
    shelf.write(HELD, holder.as_bytes())
    return holder


def test_a_uri_that_nobody_has_is_taken_at_once_and_renewed(shelf: Shelf) -> None:
    mine = hold(shelf)
    assert mine.await_silence() is None
    mine.take(None)
    first = holder_at(shelf)
    assert first is not None
    assert (first.run, first.host, first.process) == (mine.run, platform.node(), os.getpid())
    assert first.is_fresh()
    time.sleep(3 * PERIOD_S)
    later = holder_at(shelf)
    assert later is not None
    assert later.renewals > first.renewals
    mine.end(whole=True)
    last = holder_at(shelf)
    assert last is not None
    assert last.over
    assert not last.is_fresh()


@pytest.mark.parametrize("whole", [True, False])
def test_the_next_waits_only_where_the_last_has_not_come_to_its_end(
    shelf: Shelf, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    first = hold(shelf)
    first.take(None)
    first.end(whole=whole)
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds))
    before = hold(shelf).await_silence()
    assert before is not None
    assert before.run == first.run
    assert bool(waits) is not whole


def test_who_is_silent_for_three_periods_is_taken_for_dead(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    dead, since_s = left_by(shelf), time.monotonic()
    second = hold(shelf)
    assert second.await_silence() == dead
    assert time.monotonic() - since_s >= 3 * PERIOD_S
    assert "process 5 on far had it last and has not ended" in caplog.text
    second.take(dead)
    second.check()
    second.end(whole=True)


def test_a_process_of_this_machine_that_is_no_more_is_not_waited_for(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = left_by(shelf, machine=storage_hold._machine(), process=gone.pid)
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("waits"))
    assert hold(shelf).await_silence() == dead


@pytest.mark.parametrize("clock_s", [0.0, 1e10])
def test_who_shows_itself_has_it_whatever_its_clock_says(shelf: Shelf, clock_s: float) -> None:
    first = hold(shelf)
    first.take(None)
    try:
        shelf.write(HELD, replace(first._mine, time=clock_s).as_bytes())
        with pytest.raises(
            UserError, match=rf"mem://mine: expected that nobody else runs it, got process {os.getpid()}"
        ):
            hold(shelf).await_silence()
    finally:
        first.end(whole=True)


def test_of_two_who_begin_together_the_slower_is_refused(shelf: Shelf) -> None:
    first, second = hold(shelf), hold(shelf)
    assert first.await_silence() is second.await_silence() is None
    first.take(None)
    with pytest.raises(UserError, match="nobody else runs it"):
        second.take(None)
    first.check()
    first.end(whole=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": "a"}', b"\xff"])
def test_what_cannot_be_read_is_nobody(shelf: Shelf, content: bytes) -> None:
    shelf.write(HELD, content)
    assert parsed(content) is None
    assert hold(shelf).await_silence() is None


def test_a_storage_that_is_away_for_a_while_loses_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, calls = hold(shelf), list[int]()
    mine.take(None)

    def away(_name: str) -> bytes:
        calls.append(1)
        raise OSError("no route to host")

    with monkeypatch.context() as broken:
        broken.setattr(shelf, "read", away)
        while len(calls) < 2:
            time.sleep(0.01)
    before = holder_at(shelf)
    time.sleep(3 * PERIOD_S)
    after = holder_at(shelf)
    assert before is not None
    assert after is not None
    assert after.renewals > before.renewals
    mine.end(whole=True)
