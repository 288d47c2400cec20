"""A campaign's folder that is kept at a URI: s3://, gs://, abfs://, hdfs://, or file:// of a shared disk.

The campaign runs in a folder of this machine, since its embedded server, its lock and its appends need one. A thread
copies what has changed to the URI every few seconds, and once more at the end; whoever gives the same URI on another
machine first fetches it from there. What only this machine can use stays here: the lock, the embedded server's data
(another machine then resumes with --refill-replay, or all share a --redis), and what is half written.

One driver at a time has the URI (deploy/storage_hold.py). Where the last one was of this machine, its folder has all
that is at the URI and what a crash kept from going there; everywhere else what is at the URI takes its place.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.storage_copy import Copy
from deploy.storage_hold import Hold
from deploy.storage_remote import TROUBLE, Remote
from env.errors import UserError

__all__ = ["kept", "looker", "probe"]

_log = logging.getLogger("zeroout")

PERIOD_S = 10.0  # between two copies
_TRIES = 5  # of the last one


@contextlib.contextmanager
def kept(uri: str, *, existing: bool = False) -> Iterator[Path]:
    """The folder in which to run the campaign of a URI; what changes in it is copied there.

    Where another driver takes the URI meanwhile, this process's handler of SIGTERM is called.

    Raises:
        UserError: the URI cannot be read or written, another driver has it, other things lie there, or with `existing`
            no campaign.

    """
    copy = Copy(uri)
    with copy.held():
        hold = Hold(copy.remote, TROUBLE)
        with copy.remote.trouble_named():
            last = hold.await_silence()
            copy.begin(last, hold.run, existing=existing)
            hold.take(last)
        with _copied(copy, hold):
            yield copy.folder


def looker(uri: str) -> Callable[[], Path]:
    """Where a campaign at a URI can be looked at: what is called for each look, which fetches what is new there.

    Each raises UserError where no campaign is there. Where the storage does not answer, what was seen last is returned,
    which is logged once.
    """
    return Copy(uri).look


def probe(uri: str) -> None:
    """Write a file at the URI, read it and delete it; UserError where that cannot be done."""
    remote, content = Remote(uri), os.urandom(16)
    name = f"probe-{content.hex()}"  # every node of a cluster may do so at the same time
    with remote.trouble_named():
        remote.make()
        remote.write(name, content)
        if remote.read(name) != content:
            raise OSError("what was written is not what was read")
        remote.delete(name)


@contextlib.contextmanager
def _copied(copy: Copy, hold: Hold) -> Iterator[None]:
    """Copy while it lasts, and once more at the end, and then let go."""
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(copy, hold, over), name="storage", daemon=True)
    thread.start()
    whole = False
    try:
        yield
    finally:
        over.set()
        try:
            thread.join()
            whole = _push_all(copy, hold)
        except KeyboardInterrupt:
            hold.raise_if_lost()
            _log.warning(
                "%s: not all has come there; it lies in %s, for the next resume here", copy.remote.uri, copy.folder
            )
            raise
        finally:
            hold.end(whole=whole)


def _keep(copy: Copy, hold: Hold, over: threading.Event) -> None:
    """Push every few seconds until it is over; a URI that is away for a while is told of once."""
    told = False
    while not over.wait(PERIOD_S):
        try:
            hold.check()
            copy.push(hold)
            told = False
        except UserError:  # another's by now, which ends the campaign
            return
        except TROUBLE as error:
            if not told:
                _log.warning("%s cannot be written (%s); it is tried again", copy.remote.uri, error)
            told = True


def _push_all(copy: Copy, hold: Hold) -> bool:
    """Push what is left until it stays there; False where there is no campaign to push, UserError where that fails."""
    try:
        for _ in range(_TRIES):
            hold.check()
            gaps, pushed = hold.gaps, copy.push(hold)
            hold.check()
            if hold.gaps == gaps:
                return pushed
        raise OSError("what is written there does not stay")
    except TROUBLE as error:
        uri = copy.remote.uri
        raise UserError(
            uri,
            expected="that the campaign's folder can be copied there",
            got=str(error),
            remedy=f"nothing is lost, it lies in {copy.folder}; mend the storage, then zeroout resume {uri}",
        ) from error
