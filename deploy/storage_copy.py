"""What lies at a URI and what lies here: fetched, and pushed, file by file.

Called by deploy/storage.py. A campaign runs in one folder of this machine and is looked at in another, so that a look
never touches what a driver works with, or goes on from.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow
from pyarrow import fs

from deploy.folder import disk_trouble_named, hold_lock, is_locked, uri_file, write_atomic
from deploy.storage_hold import HELD, Hold, Holder, holder_at
from env.errors import UserError

__all__ = ["TROUBLE", "Copy"]

_log = logging.getLogger("zeroout")

TROUBLE = (OSError, pyarrow.ArrowException)  # of a storage
_CAMPAIGN, _CHECKPOINTS, _EXPORTS = "campaign.toml", "checkpoints/", "export/"
_APART = ("redis", "lock", HELD)
_HALF_WRITTEN = re.compile(r"\..*")  # of env.files.replace_file, and of checkpoints
#: They say that something else is whole, and go after it.
_LAST = ("manifest.json", "episodes.jsonl", "frontier.json", "result.json")
#: Storages in which a file is there when it is written to its end; elsewhere it is moved into place.
_AT_ONCE_WHOLE = ("s3", "gcs", "abfs")
_State = tuple[int, int]  # of a file: when it was changed, in ns, and how long it is, in bytes


class Copy:
    """A campaign's folders here, and what is at its URI."""

    def __init__(self, uri: str) -> None:
        """Touch nothing yet; UserError where the URI means nothing."""
        self.uri = uri.rstrip("/")
        try:
            self._there, self._root = fs.FileSystem.from_uri(self.uri)
        except (*TROUBLE, ValueError) as error:
            raise self.unusable(error) from error
        key = hashlib.sha256(f"{self._there.type_name} {self._root}".encode()).hexdigest()[:12]
        self._home, name = _cache() / key, self._root.rpartition("/")[2] or "campaign"
        self.folder, self._looked_at = self._home / "run" / name, self._home / "look" / name
        self._lock = self._home / "lock"
        self._runs = self._home / "runs"  # after which of them `folder` has all that came of the campaign
        self._pushed: dict[str, _State] = {}
        self._gaps = 0  # of the hold, that have been made good

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process of this machine from working in `folder`; UserError when one does."""
        _make(self._home)
        with hold_lock(self._lock, self.uri):
            yield

    # ---- before a campaign is run ----

    def begin(self, last: Holder | None, run: str, *, existing: bool) -> None:
        """Have in `folder` what the campaign has come to after the driver `last`; in `run` it goes on here.

        UserError where other things lie at the URI, or with `existing` no campaign.
        """
        there = self._listed()
        if _CAMPAIGN not in there:
            self._check_place(there, existing=existing)
        elif self._is_newest(last, there):
            # what an earlier run of this machine had not come to delete there
            self._pushed = {name: (0, 0) for name in there if name.startswith(_CHECKPOINTS)}
        else:
            self._mirror(there, self.folder)
            self._pushed = {name: state for name in there if (state := _state(self.folder / name)) is not None}
        self._name(self.folder)
        # Another driver's run may still go on, which its next renewal shows; this one is written here alone.
        known = [run] if last is None else [run, f"{last.run} {last.renewals}"]
        write_atomic(self._runs, "".join(f"{line}\n" for line in known))

    def _check_place(self, there: Mapping[str, fs.FileInfo], *, existing: bool) -> None:
        foreign = sorted(name for name in there if not _stays(name))
        if foreign:
            raise UserError(
                self.uri,
                expected="nothing there, or a campaign",
                got=f"{len(foreign)} other files, such as {foreign[0]!r}",
                remedy="give a URI of its own to each campaign, e.g. one level below",
            )
        if (self.folder / _CAMPAIGN).is_file():
            _log.warning("%s: nothing is there; what this machine has goes there again, from %s", self.uri, self.folder)
        elif existing:
            raise self._is_none()

    def _is_newest(self, last: Holder | None, there: Mapping[str, fs.FileInfo]) -> bool:
        """Whether `folder` has all that is there, and perhaps more, if that driver was the last."""
        if not (self.folder / _CAMPAIGN).is_file():
            return False
        if last is None or not last.is_known:
            return self._extends(there)
        known = self._runs.read_text(errors="replace").splitlines() if self._runs.is_file() else []
        return last.run in known or f"{last.run} {last.renewals}" in known

    def _extends(self, there: Mapping[str, fs.FileInfo]) -> bool:
        """Whether `folder` has every file that is there, and begins with the same episodes."""
        wanted = {name for name in there if not _stays(name) and not name.startswith(_CHECKPOINTS)}
        if wanted - _names(self.folder):
            return False
        with self.trouble_named(), contextlib.suppress(FileNotFoundError):
            return (self.folder / "episodes.jsonl").read_bytes().startswith(self.read("episodes.jsonl"))
        return True

    # ---- to look at ----

    def look(self) -> Path:
        """A folder with what the campaign has come to; what is at the URI is fetched without its checkpoints."""
        if is_locked(self._lock) and (self.folder / _CAMPAIGN).is_file():
            return self.folder
        try:
            last, there = holder_at(self), self._listed()
        except TROUBLE as error:
            return self._had_before(error)
        if _CAMPAIGN not in there:
            raise self._is_none()
        if self._is_newest(last, there):
            return self.folder
        wanted = {name: info for name, info in there.items() if not name.startswith(_CHECKPOINTS)}
        self._mirror(wanted, self._looked_at, spared=_EXPORTS)
        self._name(self._looked_at)
        if last is not None:
            write_atomic(self._looked_at / HELD, last.as_bytes())
        return self._looked_at

    def _had_before(self, error: Exception) -> Path:
        """What this machine has, where the storage does not answer."""
        had = [folder for folder in (self.folder, self._looked_at) if (folder / _CAMPAIGN).is_file()]
        if not had:
            raise self.unusable(error) from error
        newest = max(had, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("*.*")))
        _log.warning("%s cannot be read (%s); what this machine had of it is shown", self.uri, _line(error))
        return newest

    # ---- while it runs ----

    def push(self, hold: Hold) -> None:
        """Copy there what has changed, and delete there what has gone; UserError where the URI is another's by now."""
        names = _names(self.folder)
        if _CAMPAIGN not in names:
            return  # not begun yet, or somebody cleans up here
        if hold.gaps != self._gaps:
            self._gaps, self._pushed = hold.gaps, dict.fromkeys(self._pushed, (0, 0))
        for name in sorted(names, key=lambda name: (name != _CAMPAIGN, _order(name))):
            hold.raise_if_lost()
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint that goes while we look
                self._push_one(name)
        for name in self._pushed.keys() - names:
            hold.raise_if_lost()
            with contextlib.suppress(FileNotFoundError):
                self.delete(name)
            del self._pushed[name]

    def _push_one(self, name: str) -> None:
        now = _state(self.folder / name)
        if now is not None and self._pushed.get(name) != now:
            self.write(name, (self.folder / name).read_bytes())
            self._pushed[name] = now

    # ---- the storage ----

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

    def _listed(self) -> dict[str, fs.FileInfo]:
        found = self._there.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        return {info.path[len(self._root) :].lstrip("/"): info for info in found if info.is_file}

    def _mirror(self, there: Mapping[str, fs.FileInfo], folder: Path, *, spared: str | None = None) -> None:
        """Have in a folder what is there, and nothing else but what begins with `spared`."""
        wanted = {name: info for name, info in there.items() if not _stays(name)}
        for name in sorted(wanted, key=lambda name: (name == _CAMPAIGN, _order(name))):
            self._fetch_one(name, wanted[name], folder)
        for name in _names(folder) - wanted.keys():
            if spared is None or not name.startswith(spared):
                (folder / name).unlink(missing_ok=True)

    def _fetch_one(self, name: str, info: fs.FileInfo, folder: Path) -> None:
        """Fetch a file, unless that has been done and neither has changed since, or it has gone."""
        path, when_ns = folder / name, info.mtime_ns or 0
        if _state(path) == (when_ns, info.size):
            return
        with self.trouble_named():
            try:
                content = self.read(name)
            except FileNotFoundError:
                return
        _make(path.parent)
        write_atomic(path, content)
        os.utime(path, ns=(when_ns, when_ns))  # people are told how long ago the last episode was

    def _name(self, folder: Path) -> None:
        """Have whoever gives the folder get the URI."""
        _make(folder.parent)
        write_atomic(uri_file(folder), self.uri)

    # ---- what is said ----

    @contextlib.contextmanager
    def trouble_named(self) -> Iterator[None]:
        """UserError where the storage cannot be used."""
        try:
            yield
        except TROUBLE as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> UserError:
        """What to say of a URI where nothing can be done."""
        return UserError(
            self.uri,
            expected="a storage URI that can be read and written, e.g. s3://BUCKET/FOLDER",
            got=_line(error),
            remedy="correct the URI, the credentials (as of the cloud's own tools) or the network",
        )

    def _is_none(self) -> UserError:
        return UserError(
            self.uri,
            expected="a campaign (it holds a campaign.toml)",
            got="none",
            remedy="give the URI of `zeroout run --out URI`",
        )


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _stays(name: str) -> bool:
    """Whether a file is not copied."""
    parts = name.split("/")
    return parts[0] in _APART or any(_HALF_WRITTEN.fullmatch(part) for part in parts) or name.endswith(".part")


def _order(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (_LAST.index(last) + 1 if last in _LAST else 0), name


def _names(folder: Path) -> set[str]:
    """Of the files in a folder that are copied; it may change meanwhile."""
    found = (Path(path, file).relative_to(folder) for path, _, files in os.walk(folder) for file in files)
    return {name for name in map(str, found) if not _stays(name)}


def _state(path: Path) -> _State | None:
    """None where there is no such file."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_mtime_ns, state.st_size


def _make(folder: Path) -> None:
    with disk_trouble_named(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "zeroout" / "campaigns"
    try:
        return Path.home() / ".cache" / "zeroout" / "campaigns"
    except RuntimeError as error:  # a container's user without a name
        raise UserError(
            "$HOME",
            expected="a home folder, for copies of what is at URIs",
            got="none",
            remedy="set HOME or XDG_CACHE_HOME to a folder that can be written",
        ) from error
