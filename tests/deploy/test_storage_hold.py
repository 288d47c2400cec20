"""Who has a campaign's URI: what a driver finds there, and what it does about it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import storage_hold
from deploy.storage_hold import HELD, Hold, Holder, holder_at, parsed, refuse_held
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


class Clock:
    """Time that goes on by sleeping alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_sleep: Callable[[], object] = lambda: None) -> None:
        self.slept_s, self._at_sleep = 0.0, at_sleep
        monkeypatch.setattr(time, "monotonic", lambda: self.slept_s)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self._at_sleep()


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
    first = hold(shelf)
    first.take(None)
    first.end(whole=whole)
    clock = Clock(monkeypatch)
    last = hold(shelf).await_silence()
    assert last is not None
    assert last.run == first.run
    assert (clock.slept_s >= 3 * PERIOD_S) is not whole


def test_who_is_silent_for_three_periods_is_taken_for_dead(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = left_by(shelf)
    second = hold(shelf)
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        assert second.await_silence() == dead
    assert 3 * PERIOD_S <= clock.slept_s < 4 * PERIOD_S
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


GOOD = {"run": "a", "host": "h", "machine": "m", "process": 5, "renewals": 1, "time": 2, "over": False}


def test_keys_of_other_versions_are_passed_over() -> None:
    holder = parsed(json.dumps({**GOOD, "more": 1}).encode())
    assert holder.is_known
    assert parsed(holder.as_bytes()) == holder


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"run": "a"}', b"[" * 200_000,
        *(json.dumps({**GOOD, **bad}).encode() for bad in (
            {"time": None}, {"time": 10**400}, {"process": "5"}, {"process": 10**30}, {"process": 0}, {"over": 0},
            {"renewals": True},
        )),
    ],
)  # fmt: skip
def test_who_cannot_be_read_is_waited_for_as_everybody_is(
    shelf: Shelf, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.write(HELD, content)
    clock = Clock(monkeypatch)
    last = hold(shelf).await_silence()
    assert clock.slept_s >= 3 * PERIOD_S
    assert last is not None
    assert not last.is_known
    assert not last.is_fresh()


def test_a_folder_on_a_shared_disk_is_not_run_beside_its_uri(tmp_path: Path) -> None:
    refuse_held(tmp_path)
    holder = parsed(json.dumps({**GOOD, "time": time.time()}).encode())
    (tmp_path / HELD).write_bytes(holder.as_bytes())
    with pytest.raises(UserError, match=rf"got process 5 on h.*{tmp_path.as_uri()}"):
        refuse_held(tmp_path)
    for gone in (replace(holder, over=True), replace(holder, time=holder.time - 200)):
        (tmp_path / HELD).write_bytes(gone.as_bytes())
        refuse_held(tmp_path)


def test_who_cannot_be_read_and_changes_has_it(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.write(HELD, b"{")
    Clock(monkeypatch, at_sleep=lambda: shelf.write(HELD, b"{{"))
    with pytest.raises(UserError, match="got somebody who cannot be read in"):
        hold(shelf).await_silence()


def test_a_file_that_is_damaged_while_its_driver_lives_is_written_again(shelf: Shelf) -> None:
    mine = hold(shelf)
    mine.take(None)
    shelf.write(HELD, b"{")
    mine.check()
    time.sleep(3 * PERIOD_S)
    found = holder_at(shelf)
    assert found is not None
    assert found.run == mine.run
    mine.end(whole=True)


def test_what_has_gone_or_is_as_it_was_before_is_counted_as_a_gap(shelf: Shelf) -> None:
    mine = hold(shelf)
    mine.take(None)
    mine._over.set()  # the test renews
    first = shelf.files[HELD]
    mine.check()
    mine._write()
    mine.check()
    assert mine.gaps == 0
    shelf.files[HELD] = first
    mine.check()
    assert mine.gaps == 1
    second = shelf.files.pop(HELD)
    mine.check()
    assert mine.gaps == 2
    shelf.files[HELD] = second  # as of a disk that was away
    mine.check()
    assert mine.gaps == 3
    mine.check()
    assert mine.gaps == 3
    mine.end(whole=True)


def test_a_renewal_that_fails_is_no_gap(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_name: str, content: bytes) -> None:
        shelf.files[HELD] = content if arrives else shelf.files[HELD]
        raise OSError("503")

    mine = hold(shelf)
    mine.take(None)
    mine._over.set()
    for arrives in (False, True):  # noqa: B007 (read in `lost`)
        with monkeypatch.context() as broken:
            broken.setattr(shelf, "write", lost)
            with pytest.raises(OSError, match="503"):
                mine._write()
        mine.check()
    assert mine.gaps == 0
    mine.end(whole=True)


def test_what_another_has_taken_is_not_written_at_the_end(shelf: Shelf) -> None:
    mine = hold(shelf)
    mine.take(None)
    mine._over.set()
    theirs = left_by(shelf)
    with pytest.raises(UserError, match="got process 5 on far"):
        mine.end(whole=True)
    assert holder_at(shelf) == theirs
    with pytest.raises(UserError, match="got process 5 on far"):
        mine.raise_if_lost()


def test_whoever_ends_while_another_waits_is_not_waited_for_longer(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = left_by(shelf)
    clock = Clock(monkeypatch, at_sleep=lambda: shelf.write(HELD, replace(last, renewals=4, over=True).as_bytes()))
    assert hold(shelf).await_silence() == replace(last, renewals=4, over=True)
    assert clock.slept_s < PERIOD_S


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
