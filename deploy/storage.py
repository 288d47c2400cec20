"""A campaign's folder that is kept at a URI: s3://, gs://, abfs://, hdfs://, or file:// of a shared disk.

The campaign runs in a folder of this machine, since its embedded server, its lock and its appends need one. A thread
copies what has changed to the URI every few seconds, and once more at the end; whoever gives the same URI on another
machine first fetches it from there. What only this machine can use stays here: the lock, the embedded server's data
(another machine then resumes with --refill-replay, or all share a --redis), and what is half written.

One driver at a time has the URI (deploy/storage_hold.py). Where the last one was of this machine its folder is the
newest there is, also after a crash; everywhere else what is at the URI takes the place of what is in the folder.
"""

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import fs

from deploy.folder import URI_FILE, CampaignFolder, write_atomic
from deploy.storage_hold import HELD, Hold, Holder, holder_at
from env.errors import UserError

__all__ = ["fetched", "kept", "probe"]

_log = logging.getLogger("zeroout")

PERIOD_S = 10.0
_APART = ("redis", "lock", HELD)
_CAMPAIGN = "campaign.toml"
_HALF_WRITTEN = re.compile(r"\..*")  # of env.files.replace_file, and of checkpoints
#: They say that something else is whole, and go after it.
_LAST = ("manifest.json", "episodes.jsonl", "frontier.json", "result.json")
_AT_ONCE_WHOLE = (
    "s3",
    "gcs",
    "abfs",
)  # a file is there when it is written to its end; elsewhere it is moved into place
_TROUBLE = (OSError, pyarrow.ArrowException)


@contextlib.contextmanager
def kept(uri: str) -> Iterator[Path]:
    """The folder in which to run the campaign of a URI; what changes in it is copied there.

    The main thread is sent a SIGTERM where another driver takes the URI meanwhile.

    Raises:
        UserError: the URI cannot be read or written, or another driver has it.

    """
    copy = _Copy(uri)
    hold = Hold(copy, _TROUBLE)
    with copy.trouble_named():
        before = hold.await_silence()
        copy.begin(before, hold.run)
        hold.take(before)
    over = threading.Event()
    thread = threading.Thread(target=copy.keep, args=(hold, over), name="storage", daemon=True)
    thread.start()
    whole = False
    try:
        yield copy.folder
    finally:
        over.set()
        thread.join()
        try:
            copy.push_all(hold)
            whole = True
        finally:
            hold.end(whole=whole)


def fetched(uri: str) -> Path:
    """A folder with what is at the URI but the learner's checkpoints, to look at.

    It is fetched but for what is here already; where this machine runs the campaign or was the last to, it is its own.
    """
    copy = _Copy(uri)
    if not CampaignFolder(copy.folder).is_held:
        with copy.trouble_named():
            copy.look()
    return copy.folder


def probe(uri: str) -> None:
    """Write a file at the URI, read it and delete it; UserError where that cannot be done."""
    copy, content = _Copy(uri), os.urandom(16)
    name = f"probe-{content.hex()}"  # every node of a cluster may do so at the same time
    with copy.trouble_named():
        copy.write(name, content)
        if copy.read(name) != content:
            raise OSError("what was written is not what was read")
        copy.delete(name)


class _Copy:
    """A folder here, and its copy at a URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        try:
            self._there, self._root = fs.FileSystem.from_uri(self.uri)
        except (*_TROUBLE, ValueError) as error:
            raise self.unusable(error) from error
        key = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
        self.folder = _cache() / key / (self.uri.rpartition("/")[2] or "campaign")
        self._runs = self.folder.parent / "runs"  # those after which the folder has all that came of the campaign
        self._pushed: dict[str, tuple[int, int]] = {}

    def begin(self, before: Holder | None, run: str) -> None:
        """Have here what the campaign has come to with the driver `before`; in `run` it goes on here."""
        there = self._listed()
        if _CAMPAIGN not in there or self._is_newest(before):
            self._pushed = {name: (0, 0) for name in there if not _stays(name)}  # what is gone here goes there too
        else:
            self._mirror(there)
        self._name()
        (self.folder / HELD).unlink(missing_ok=True)
        write_atomic(self._runs, "".join(f"{known}\n" for known in ([before.run] if before else []) + [run]))

    def look(self) -> None:
        """Have here what is there, unless here is more, and who runs the campaign."""
        holder = holder_at(self)
        if self._is_newest(holder):
            return
        self._name()
        there = self._listed()
        self._mirror({name: info for name, info in there.items() if not name.startswith("checkpoints/")})
        if holder is not None and _CAMPAIGN in there:
            write_atomic(self.folder / HELD, holder.as_bytes())

    def _name(self) -> None:
        """Have whoever gives the folder get the URI."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder.parent / URI_FILE, self.uri)

    def _is_newest(self, last: Holder | None) -> bool:
        """Whether the folder has all that came of the campaign, if that driver was the last."""
        known = self._runs.read_text().split() if self._runs.is_file() else []
        return last is not None and last.run in known and (self.folder / _CAMPAIGN).is_file()

    def _listed(self) -> dict[str, fs.FileInfo]:
        found = self._there.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        return {info.path[len(self._root) :].lstrip("/"): info for info in found if info.is_file}

    def _mirror(self, there: dict[str, fs.FileInfo]) -> None:
        """Have here what is there, and nothing else."""
        wanted = {name: info for name, info in there.items() if not _stays(name)}
        for name in sorted(wanted, key=_order):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                self._fetch_one(name, wanted[name])
        for name in self._names() - wanted.keys():
            (self.folder / name).unlink()

    def _names(self) -> set[str]:
        """Of the files here that are copied."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {name for name in (str(path.relative_to(self.folder)) for path in files) if not _stays(name)}

    def keep(self, hold: Hold, over: threading.Event) -> None:
        """Push every few seconds until it is over; a URI that is away for a while is told of once."""
        told = False
        while not over.wait(PERIOD_S):
            try:
                hold.check()
                self._push()
                told = False
            except UserError:  # another's now, which ends the campaign
                return
            except _TROUBLE as error:
                if not told:
                    _log.warning("%s cannot be written (%s); it is tried again", self.uri, error)
                told = True

    def push_all(self, hold: Hold) -> None:
        """Push what is left; UserError where that fails."""
        try:
            hold.check()
            self._push()
        except _TROUBLE as error:
            raise UserError(
                self.uri,
                expected="that the campaign's folder can be copied there",
                got=str(error),
                remedy=f"nothing is lost, it lies in {self.folder}; mend the storage, then zeroout resume {self.uri}",
            ) from error

    def _push(self) -> None:
        if not self.folder.is_dir():
            return
        names = self._names()
        for name in sorted(names, key=_order):
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint that goes while we look
                self._push_one(name)
        for name in self._pushed.keys() - names:
            self.delete(name)
            del self._pushed[name]

    def _push_one(self, name: str) -> None:
        state = (self.folder / name).stat()
        now = (state.st_mtime_ns, state.st_size)
        if self._pushed.get(name) == now:
            return
        self.write(name, (self.folder / name).read_bytes())
        self._pushed[name] = now

    def write(self, name: str, content: bytes) -> None:
        """Write a file there: all of it, or it is as it was."""
        final = f"{self._root}/{name}"
        whole = self._there.type_name in _AT_ONCE_WHOLE
        path = final if whole else f"{final}.part"
        if not whole:
            self._there.create_dir(final.rpartition("/")[0], recursive=True)
        with self._there.open_output_stream(path) as stream:
            stream.write(content)
        if not whole:
            self._there.move(path, final)

    def read(self, name: str) -> bytes:
        """Read a file there."""
        with self._there.open_input_stream(f"{self._root}/{name}") as stream:
            return bytes(stream.read())

    def delete(self, name: str) -> None:
        """Delete a file there."""
        self._there.delete_file(f"{self._root}/{name}")

    def _fetch_one(self, name: str, info: fs.FileInfo) -> None:
        """Fetch a file, unless that has been done and neither has changed since."""
        path, when_ns = self.folder / name, info.mtime_ns or 0
        if not path.is_file() or (path.stat().st_mtime_ns, path.stat().st_size) != (when_ns, info.size):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.part")
            partial.write_bytes(self.read(name))
            os.utime(partial, ns=(when_ns, when_ns))
            partial.replace(path)
        self._pushed[name] = (path.stat().st_mtime_ns, path.stat().st_size)

    @contextlib.contextmanager
    def trouble_named(self) -> Iterator[None]:
        """UserError where the storage cannot be used."""
        try:
            yield
        except _TROUBLE as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> UserError:
        """What to say of a URI where nothing can be done."""
        return UserError(
            self.uri,
            expected="a storage URI that can be read and written, e.g. s3://BUCKET/FOLDER",
            got=str(error).splitlines()[0],
            remedy="correct the URI, the credentials (as of the cloud's own tools) or the network",
        )


def _stays(name: str) -> bool:
    """Whether a file is not copied."""
    parts = name.split("/")
    return parts[0] in _APART or any(_HALF_WRITTEN.fullmatch(part) for part in parts) or name.endswith(".part")


def _order(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (_LAST.index(last) + 1 if last in _LAST else 0), name


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "zeroout" / "campaigns"
