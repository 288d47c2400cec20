"""Who has a campaign's URI: a file there that its driver renews, as a lock of one machine means nothing on another.

Called by deploy/storage.py. A driver whose file has not changed for a while is taken for dead, whatever the clocks of
the two machines say. One that finds another's file there was taken for dead, and ends: whoever took it last has it.
"""

import contextlib
import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from env.errors import UserError

__all__ = ["HELD", "Hold", "Holder", "Place", "holder_at", "parsed", "refuse_held"]

_log = logging.getLogger("zeroout")

HELD = "held.json"  # the file
PERIOD_S = 10.0  # between two renewals
_FRESH_S = 120.0  # two machines' clocks may differ by as much
_BOOT_ID, _PROCESS_NUMBERS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class Place(Protocol):
    """Where the file lies: what is needed of a storage. OSError and the like where it cannot be reached."""

    uri: str

    def read(self, name: str) -> bytes:
        """What a file holds; FileNotFoundError where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Replace a file."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What the file says: a driver, and when it was last known to live."""

    run: str  # random; of a file that cannot be read, what it holds
    host: str  # its name, for people
    machine: str  # what tells where `process` is the number of a process; "" where that is not known
    process: int  # 0: not known
    renewals: int
    time: float  # of the last of them, Unix, in seconds, by its own clock
    over: bool  # it has ended, and all that it had is there

    @property
    def is_known(self) -> bool:
        """Whether the file could be read."""
        return self.process > 0

    def is_fresh(self) -> bool:
        """Whether it seems to live, as far as this machine's clock can be compared with its own."""
        return not self.over and abs(time.time() - self.time) < _FRESH_S

    def as_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" if self.is_known else f"somebody who cannot be read in {HELD}"


def parsed(content: bytes) -> Holder:
    """The holder of a file's content; keys of other versions are passed over."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        told = json.loads(content)
        told["time"] = float(told["time"])
        found = Holder(**{field.name: told[field.name] for field in fields(Holder)})
        if (
            all(type(getattr(found, field.name)) is field.type for field in fields(Holder))
            and 0 < found.process < 2**31
        ):
            return found
    return Holder(run=content.hex(), host="", machine="", process=0, renewals=0, time=0.0, over=False)


def refuse_held(folder: Path) -> None:
    """UserError for a folder that a driver seems to run by its URI, as one on a shared disk (file://) may be."""
    with contextlib.suppress(OSError):
        holder = parsed((folder / HELD).read_bytes())
        if holder.is_fresh():
            raise UserError(
                f"campaign {folder}",
                expected="that nobody runs it",
                got=str(holder),
                remedy=f"wait for it or end it, and give its URI then ({folder.resolve().as_uri()})",
            )


def holder_at(place: Place) -> Holder | None:
    """Who had `place` last; None where nobody is known to."""
    try:
        return parsed(place.read(HELD))
    except FileNotFoundError:
        return None


class Hold:
    """One driver's hold of a campaign's URI. Two threads may ask for it."""

    def __init__(self, place: Place, trouble: tuple[type[Exception], ...]) -> None:
        """Take nothing yet; `trouble` is what `place` may raise."""
        self._place, self._trouble = place, trouble
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="hold", daemon=True)
        self._mine = Holder(
            run=uuid.uuid4().hex,
            host=platform.node(),
            machine=_machine(),
            process=os.getpid(),
            renewals=0,
            time=0.0,
            over=False,
        )
        self._guard = threading.RLock()  # of the file there
        self._lost_to: Holder | None = None
        self.gaps = 0  # how often what had been written there was seen to have gone

    @property
    def run(self) -> str:
        """What tells this hold from all others."""
        return self._mine.run

    def await_silence(self) -> Holder | None:
        """Who had the URI last, once that is known to be over; UserError where somebody runs the campaign now."""
        last = holder_at(self._place)
        if last is None or last.over or _is_gone(last):
            return last
        _log.warning("%s: %s had it last and has not ended; %g s for a sign of it", self._place.uri, last, 3 * PERIOD_S)
        until_s = time.monotonic() + 3 * PERIOD_S
        while time.monotonic() < until_s:
            time.sleep(PERIOD_S / 10)
            now = holder_at(self._place)
            if now is None or now.over:
                return now
            if now != last:
                raise self._is_held(now)
        return last

    def take(self, last: Holder | None) -> None:
        """Take the URI after `last`, and keep it; UserError where another has been quicker."""
        now = holder_at(self._place)
        if now is not None and now != last:
            raise self._is_held(now)
        self._write()
        self._thread.start()

    def check(self) -> None:
        """UserError where another has taken the URI: it is the other's to write there from then on."""
        with self._guard:
            now = holder_at(self._place)
            if now is None or (now.run == self.run and now.renewals < self._mine.renewals):
                self.gaps += 1
                self._write()  # at once: what was away and comes back then tells that it lacks this
            elif now.is_known and now.run != self.run:
                self._lost_to = now
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """The same, by what is known without looking there."""
        if self._lost_to is not None:
            raise self._is_held(self._lost_to)

    def end(self, *, whole: bool) -> None:
        """Let go; where all that there is has been written (`whole`) and stays there, whoever comes next need not wait.

        UserError where another has taken the URI.
        """
        self._over.set()
        self._thread.join()
        if not whole:
            return
        with contextlib.suppress(*self._trouble):
            gaps = self.gaps
            self.check()
            if self.gaps == gaps:
                self._write(over=True)

    def _renew(self) -> None:
        while not self._over.wait(PERIOD_S):
            try:
                with self._guard:  # what is lost after the check is not written over
                    self.check()
                    self._write()
            except UserError:
                _end_the_campaign()  # what is played from here on would be kept nowhere
                return
            except self._trouble as error:
                _log.debug("%s: %s", self._place.uri, error)  # who copies the files there says so

    def _write(self, *, over: bool = False) -> None:
        now = replace(self._mine, renewals=self._mine.renewals + 1, time=time.time(), over=over)
        self._place.write(HELD, now.as_bytes())
        self._mine = now  # only then: where it is not known to have arrived, both counts are right

    def _is_held(self, by: Holder) -> UserError:
        return UserError(
            f"campaign {self._place.uri}",
            expected="that nobody else runs it",
            got=str(by),
            remedy=f"wait for it or end it; zeroout status {self._place.uri} shows how far it is",
        )


def _end_the_campaign() -> None:
    """As a SIGTERM would, where that is handled; without, the next copy says what is wrong."""
    main = threading.main_thread().ident
    if main is not None and callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(main, signal.SIGTERM)


def _is_gone(holder: Holder) -> bool:
    """Whether it was a process of this machine that is no more."""
    if not holder.machine or holder.machine != _machine():
        return False
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def _machine() -> str:
    """This machine since it was started, and the container in it that numbers its processes anew."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {_PROCESS_NUMBERS.readlink()}"
    except OSError:  # no Linux
        return ""
