"""A campaign's folder that is kept at a URI: s3://, gs://, abfs://, hdfs://, or file:// of a shared disk.

The campaign runs in a folder of this machine, since its embedded server, its lock and its appends need one. A thread
copies what has changed to the URI every few seconds, and once more at the end; whoever gives the same URI on another
machine first fetches it from there. What only this machine can use stays here: the lock, the embedded server's data
(another machine then resumes with --refill-replay, or all share a --redis), and what is half written.

One machine at a time runs a campaign: the lock is this machine's, and a URI has none.
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

from deploy.folder import CampaignFolder
from env.errors import UserError

__all__ = ["fetched", "kept", "probe"]

_log = logging.getLogger("zeroout")

PERIOD_S = 10.0
_HERE_ONLY = ("redis", "lock")
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

    Raises UserError where the URI cannot be read, or could not be written at the end.
    """
    copy = _Copy(uri)
    copy.fetch()
    over = threading.Event()
    thread = threading.Thread(target=copy.keep, args=(over,), name="storage", daemon=True)
    thread.start()
    try:
        yield copy.folder
    finally:
        over.set()
        thread.join()
        copy.push_all()


def fetched(uri: str) -> Path:
    """A folder with what is at the URI, to look at; where a process of this machine runs the campaign, its own."""
    copy = _Copy(uri)
    if not CampaignFolder(copy.folder).is_held:
        copy.fetch()
    return copy.folder


def probe(uri: str) -> None:
    """Write a file at the URI, read it and delete it; UserError where that cannot be done."""
    copy, content = _Copy(uri), os.urandom(16)
    name = f"probe-{content.hex()}"  # every node of a cluster may do so at the same time
    try:
        copy.write(name, content)
        if copy.read(name) != content:
            raise OSError("what was written is not what was read")
        copy.delete(name)
    except _TROUBLE as error:
        raise copy.unusable(error) from error


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
        self._pushed: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Bring here what is there, unless the same campaign has come further here."""
        try:
            found = self._there.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        except _TROUBLE as error:
            raise self.unusable(error) from error
        sizes = {info.path[len(self._root) :].lstrip("/"): info.size for info in found if info.is_file}
        if self._has_come_further(sizes):
            return  # this machine ran it last; all that is newer here goes there with the next push
        for name in sorted(sizes, key=_order):
            if not _stays_here(name):
                self._fetch_one(name)

    def _has_come_further(self, there: dict[str, int]) -> bool:
        """Whether the campaign here has as many episodes as there, and as many products of them."""
        if not (self.folder / "campaign.toml").is_file():
            return False
        names = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        here = {name: (self.folder / name).stat().st_size for name in names if not _stays_here(name)}
        return (here.get("episodes.jsonl", 0), len(here)) >= (there.get("episodes.jsonl", 0), len(there))

    def keep(self, over: threading.Event) -> None:
        """Push every few seconds until it is over; a URI that is away for a while is told of once."""
        told = False
        while not over.wait(PERIOD_S):
            try:
                self._push()
                told = False
            except _TROUBLE as error:
                if not told:
                    _log.warning("%s cannot be written (%s); it is tried again", self.uri, error)
                told = True

    def push_all(self) -> None:
        """Push what is left; UserError where that fails."""
        try:
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
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        names = {str(path.relative_to(self.folder)) for path in files}
        for name in sorted((name for name in names if not _stays_here(name)), key=_order):
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

    def _fetch_one(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        try:
            partial.write_bytes(self.read(name))
        except _TROUBLE as error:
            raise self.unusable(error) from error
        partial.replace(path)
        state = path.stat()
        self._pushed[name] = (state.st_mtime_ns, state.st_size)

    def unusable(self, error: Exception) -> UserError:
        """What to say of a URI where nothing can be done."""
        return UserError(
            self.uri,
            expected="a storage URI that can be read and written, e.g. s3://BUCKET/FOLDER",
            got=str(error).splitlines()[0],
            remedy="correct the URI, the credentials (as of the cloud's own tools) or the network",
        )


def _stays_here(name: str) -> bool:
    parts = name.split("/")
    return parts[0] in _HERE_ONLY or any(_HALF_WRITTEN.fullmatch(part) for part in parts) or name.endswith(".part")


def _order(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (_LAST.index(last) + 1 if last in _LAST else 0), name


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "zeroout" / "campaigns"
