"""What lies at a URI and what lies here: fetched, and pushed, file by file.

Called by deploy/storage.py. A campaign runs in one folder of this machine. It is looked at there, as any folder is,
where this machine runs it or has all that came of it; else in another, which is never gone on from.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pyarrow import fs

from deploy.folder import disk_trouble_named, hold_lock, is_locked, uri_file, write_atomic
from deploy.storage_hold import HELD, Hold, Holder, holder_at
from deploy.storage_remote import TROUBLE, Remote
from env.errors import UserError, first_line

__all__ = ["Copy"]

_log = logging.getLogger("zeroout")

_CAMPAIGN, _CHECKPOINTS = "campaign.toml", "checkpoints/"
_TELLING = (_CAMPAIGN, "id")  # files that no two campaigns have alike
_APART = ("redis", "lock", HELD)
_HALF_WRITTEN = re.compile(r"\..*")  # of env.files.replace_file, and of checkpoints
#: They say that something else is whole, and go after it.
_LAST = ("manifest.json", "episodes.jsonl", "frontier.json", "result.json")
_State = tuple[int, int]  # of a file: when it was changed, in ns, and how long it is, in bytes


class Copy:
    """A campaign's folders here, and what is at its URI."""

    def __init__(self, uri: str) -> None:
        """Touch nothing yet; UserError where the URI means nothing."""
        self.remote = Remote(uri)
        self._home = _cache() / self.remote.key
        self.folder, self._looked_at = (self._home / use / self.remote.name for use in ("run", "look"))
        self._runs = self._home / "runs"  # after which of them `folder` has all that came of the campaign
        self._pushed: dict[str, _State] = {}
        self._gaps = 0  # of the hold, that have been made good
        self._told = False  # that the storage does not answer

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process of this machine from working in `folder`; UserError when one does."""
        self._check_home()
        with hold_lock(self._home / "lock", self.remote.uri):
            yield

    # ---- before a campaign is run ----

    def begin(self, last: Holder | None, run: str, *, existing: bool) -> None:
        """Have in `folder` what the campaign has come to after the driver `last`; in `run` it goes on here.

        UserError where other things lie at the URI, or with `existing` no campaign.
        """
        there = _listed(self.remote)
        if _CAMPAIGN not in there:
            self._check_place(there, existing=existing)
        elif self._is_newest(last, there):
            # what an earlier run of this machine had not come to delete there
            self._pushed = {name: (0, 0) for name in there if name.startswith(_CHECKPOINTS)}
            here = _names(self.folder)
            self._fetch({name: there[name] for name in there if name not in here | self._pushed.keys()}, self.folder)
        else:
            self._fetch(there, self.folder)
            _remove(self.folder, _names(self.folder) - there.keys())
            self._pushed = {name: state for name in there if (state := _state(self.folder / name)) is not None}
        self._name(self.folder)
        self.remote.make()
        # Another driver's run may still go on, which its next renewal shows; this one is written here alone.
        known = [run] if last is None else [run, f"{last.run} {last.renewals}"]
        _write_lines(self._runs, known)

    def _check_place(self, there: Mapping[str, fs.FileInfo], *, existing: bool) -> None:
        if there:
            raise UserError(
                self.remote.uri,
                expected="nothing there, or a campaign",
                got=f"{len(there)} other files, such as {min(there)!r}",
                remedy="give a URI of its own to each campaign, e.g. one level below",
            )
        if (self.folder / _CAMPAIGN).is_file():
            _log.warning(
                "%s: nothing is there; what this machine has goes there again, from %s", self.remote.uri, self.folder
            )
        elif existing:
            raise self._is_none()

    def _is_newest(self, last: Holder | None, there: Mapping[str, fs.FileInfo]) -> bool:
        """Whether `folder` has all that is there, and perhaps more, if that driver was the last."""
        if not _names(self.folder):
            return False
        known = self._runs.read_text(errors="replace").splitlines() if self._runs.is_file() else []
        if last is not None and (last.run in known or f"{last.run} {last.renewals}" in known):
            return True
        # Nobody can tell who was last, or one was that has done nothing.
        smallest_first = sorted(there.items(), key=lambda item: int(item[1].size))
        return all(self._has(name, info) for name, info in smallest_first)

    def _has(self, name: str, info: fs.FileInfo) -> bool:
        """Whether `folder` has a file that is there, or has gone on with it; old checkpoints it need not have."""
        path = self.folder / name
        state = _state(path)
        if state is None or name.startswith(_CHECKPOINTS):
            return name.startswith(_CHECKPOINTS)
        if name == "episodes.jsonl":
            return path.read_bytes().startswith(self.remote.read(name))
        if state[0] > (info.mtime_ns or 0):
            return True
        return state[1] == info.size and path.read_bytes() == self.remote.read(name)

    # ---- to look at ----

    def look(self) -> Path:
        """A folder with what the campaign has come to; what is at the URI is fetched without its checkpoints.

        UserError where no campaign is there.
        """
        if is_locked(self.folder / "lock"):
            return self.folder
        self._check_home()
        try:
            found = self._look()
            self._told = False
            return found
        except TROUBLE as error:
            return self._had_before(error)

    def _look(self) -> Path:
        last, there = holder_at(self.remote), _listed(self.remote)
        if _CAMPAIGN not in there:
            raise self._is_none()
        if (self.folder / _CAMPAIGN).is_file() and self._is_newest(last, there):
            return self.folder
        wanted = {name: info for name, info in there.items() if not name.startswith(_CHECKPOINTS)}
        if any(self._is_another(name, wanted) for name in _TELLING):
            shutil.rmtree(self._looked_at)
        self._name(self._looked_at)
        listed = self._looked_at.with_name(f".{self._looked_at.name}.fetched")
        had = set(listed.read_text().splitlines()) if listed.is_file() else set[str]()
        if wanted.keys() - had:
            _write_lines(listed, had | wanted.keys())  # all else was made here from them, and stays
        self._fetch(wanted, self._looked_at, may_have_gone=True)
        if gone := had - wanted.keys():
            _remove(self._looked_at, gone)
            _write_lines(listed, wanted.keys())
        (self._looked_at / HELD).unlink(missing_ok=True)
        if last is not None:
            write_atomic(self._looked_at / HELD, last.as_bytes())
        return self._looked_at

    def _is_another(self, name: str, there: Mapping[str, fs.FileInfo]) -> bool:
        """Whether a file that never changes is another there than the one that was fetched."""
        state = _state(self._looked_at / name)
        if state is None or name not in there or state == (there[name].mtime_ns, there[name].size):
            return False
        return (self._looked_at / name).read_bytes() != self.remote.read(name)

    def _had_before(self, error: Exception) -> Path:
        """What this machine has, where the storage does not answer."""
        had = [folder for folder in (self.folder, self._looked_at) if (folder / _CAMPAIGN).is_file()]
        if not had:
            raise self.remote.unusable(error) from error
        if not self._told:
            said = first_line(error) or repr(error)
            _log.warning("%s cannot be read (%s); what this machine had of it is shown", self.remote.uri, said)
        self._told = True
        return max(had, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("*.*")))

    # ---- while it runs ----

    def push(self, hold: Hold) -> bool:
        """Copy there what has changed, and delete old checkpoints there; False where there is no campaign to copy.

        UserError where the URI is another's by now.
        """
        names = _names(self.folder)
        if _CAMPAIGN not in names:
            return False  # not begun yet, or somebody cleans up here
        if hold.gaps != self._gaps:
            self._gaps, self._pushed = hold.gaps, dict.fromkeys(self._pushed, (0, 0))
        for name in sorted(names, key=lambda name: (name != _CAMPAIGN, _order(name))):
            hold.raise_if_lost()
            self._push_one(name)
        # All else that goes here has been taken away, by somebody who cleans up.
        old = {name for name in self._pushed.keys() - names if name.startswith(_CHECKPOINTS)}
        for name in old if any(name.startswith(_CHECKPOINTS) for name in names) else ():
            hold.raise_if_lost()
            with contextlib.suppress(FileNotFoundError):
                self.remote.delete(name)
            del self._pushed[name]
        return True

    def _push_one(self, name: str) -> None:
        now = _state(self.folder / name)
        if now is None or self._pushed.get(name) == now:
            return
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:  # an old checkpoint that goes while we look
            return
        self.remote.write(name, content)
        self._pushed[name] = now

    def _fetch(self, wanted: Mapping[str, fs.FileInfo], folder: Path, *, may_have_gone: bool = False) -> None:
        """Fetch files, but for what has been and has changed nowhere since; the campaign's last."""
        for name in sorted(wanted, key=lambda name: (name == _CAMPAIGN, _order(name))):
            path, when_ns = folder / name, wanted[name].mtime_ns or 0
            if _state(path) == (when_ns, wanted[name].size):
                continue
            try:
                content = self.remote.read(name)
            except FileNotFoundError:
                if may_have_gone:
                    continue
                raise
            _make(path.parent)
            write_atomic(path, content)
            os.utime(path, ns=(when_ns, when_ns))  # people are told how long ago the last episode was

    def _check_home(self) -> None:
        """UserError where this machine's copies cannot be kept."""
        _make(self._home)
        probe = self._home / f".probe-{os.getpid()}"
        write_atomic(probe, b"")
        probe.unlink()

    def _name(self, folder: Path) -> None:
        """Have whoever gives the folder get the URI."""
        _make(folder.parent)
        write_atomic(uri_file(folder), self.remote.uri)

    def _is_none(self) -> UserError:
        return UserError(
            self.remote.uri,
            expected="a campaign (it holds a campaign.toml)",
            got="none",
            remedy="give the URI of `zeroout run --out URI`",
        )


def _listed(remote: Remote) -> dict[str, fs.FileInfo]:
    """The files there that are a campaign's, or somebody else's."""
    return {name: info for name, info in remote.files().items() if not _stays(name)}


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
    except (FileNotFoundError, NotADirectoryError):
        return None
    return state.st_mtime_ns, state.st_size


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


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
