"""The campaign folder: the name of every file in it, and how they are written so that a crash hurts none.

Called by everything in `deploy/`. The names are the contract of design.md ("deploy/: contracts that scripts
rely on"). Whole files are replaced atomically; `episodes.jsonl` only grows, and its commit mark is the
newline: a last line without one is what a crash left and counts as not written.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from env.errors import UserError
from env.files import replace_file, sync

__all__ = [
    "CampaignFolder", "copy_of", "disk_trouble_named", "flat", "hold_lock", "is_locked", "read_json", "uri_file",
    "versions", "write_atomic", "write_json",
]  # fmt: skip

# What the user can mend, in words; any other failure of the operating system is ours and passes through.
_DISK_TROUBLE = {
    errno.ENOSPC: "a full disk",
    errno.EDQUOT: "a used-up disk quota",
    errno.EROFS: "a read-only file system",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOENT: "no folder, and none that can be made",
    errno.ENOTDIR: "a file where a folder is to be",
    errno.EISDIR: "a folder where a file is to be",
    errno.EEXIST: "a file where a folder is to be",
}

# between one try for the lock and the next
_LOOKS_S = (0.0, 0.01, 0.05, 0.2)

# what a crash leaves of env.files.replace_file
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8): it holds all of it or is as it was, also after a crash.

    Raises UserError when the disk is full or not writable; the old file is then untouched.
    """
    payload = data.encode() if isinstance(data, str) else data
    with disk_trouble_named(path), replace_file(path) as temporary, temporary.open("wb", buffering=0) as file:
        _write_durably(file, payload)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities become null (JSON lacks them)."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in `path`; UserError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            str(path), expected="a JSON file", got="no file", remedy="check the path of the campaign folder"
        ) from None
    except ValueError as error:
        raise UserError(
            str(path),
            expected="valid JSON",
            got=str(error),
            remedy="restore the file, or move it away and resume: the stage that makes it runs again",
        ) from error


@contextlib.contextmanager
def hold_lock(lock: Path, campaign: str) -> Iterator[None]:
    """Hold a file's lock; UserError where another process does. Let go by the kernel at a kill."""
    with lock.open("a") as file:
        if not _locked(file):
            raise UserError(
                f"campaign {campaign}",
                expected="that nobody runs it",
                got="another process that does",
                remedy=f"wait for it or end it; zeroout status {campaign} shows how far it is",
            )
        yield


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine, or of one that shares its locks, holds that file's lock."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is another user's
        return False
    return False


def uri_file(folder: Path) -> Path:
    """What lies beside a folder that is a copy: a file with the URI of what it is a copy of."""
    return folder.with_name(f".{folder.name}.uri")


def copy_of(folder: str) -> str:
    """The URI of which a folder is this machine's copy (deploy/storage.py), or the folder, or URI, itself."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return uri_file(Path(folder).resolve()).read_text()
    return folder


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) for every value of a configuration."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def versions() -> dict[str, str | None]:
    """Return the versions a campaign ran with; None for what is not installed or not known."""
    return {
        "zeroout": _version_of("zeroout") or _version_of_checkout(),
        "python": platform.python_version(),
        "torch": _version_of("torch"),
        "ray": _version_of("ray"),
        "redis-py": _version_of("redis"),
        "gymnasium": _version_of("gymnasium"),
        "platform": platform.platform(),
        "commit": _git_commit(),
    }


@dataclass(frozen=True)
class CampaignFolder:
    """A campaign's folder by its path; making this object touches no disk, `open` and `create` check it."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Return the existing campaign at `path`; UserError when there is none."""
        folder = cls(Path(path))
        if not folder.campaign_toml.is_file():
            raise UserError(
                str(path),
                expected="a campaign folder (it holds a campaign.toml)",
                got="a folder without one" if folder.path.is_dir() else "no such folder",
                remedy="give the DIR of `zeroout run --out DIR`",
            )
        return folder

    @classmethod
    def check(cls, path: Path | str, campaign_toml: str, resolve: Callable[[str], str] = str) -> Self:
        """Return the folder if `create` would take it; UserError when it holds another campaign or foreign files.

        `resolve` writes out what a campaign.toml leaves to defaults: an older version did not know every key.
        """
        folder = cls(Path(path))
        nearest = next(place for place in (folder.path, *folder.path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise UserError(str(nearest), expected="a folder", got="a file", remedy="give another --out")
        if folder.campaign_toml.is_file():
            folder._check_same_campaign(campaign_toml, resolve)
        else:
            folder._check_no_foreign_files()
        return folder

    @classmethod
    def create(cls, path: Path | str, campaign_toml: str, resolve: Callable[[str], str] = str) -> Self:
        """Start the campaign described by the resolved TOML text, or find the very same one to resume.

        Raises UserError as `check` does, with nothing touched.
        """
        folder = cls.check(path, campaign_toml, resolve)
        if folder.campaign_toml.is_file():
            return folder
        with disk_trouble_named(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        write_atomic(folder.campaign_toml, campaign_toml)
        return folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from running this campaign; UserError when one does. Let go by the kernel at a kill.

        Looking (status, report, export) needs no hold.
        """
        with hold_lock(self.path / "lock", str(self.path)):
            yield

    @property
    def is_held(self) -> bool:
        """Whether a process runs this campaign, as far as this machine's locks tell."""
        return is_locked(self.path / "lock")

    @property
    def campaign_toml(self) -> Path:
        """The resolved configuration; a folder is a campaign when this is there."""
        return self.path / "campaign.toml"

    @property
    def controller(self) -> Path:
        """The Controller when the search was over, for another campaign to start from."""
        return self.path / "controller.safetensors"

    @property
    def versions_json(self) -> Path:
        """What `versions()` returned when the campaign was started."""
        return self.path / "versions.json"

    @property
    def baseline(self) -> Path:
        """The folder of the prepared Recognizer."""
        return self.path / "baseline"

    @property
    def episodes_jsonl(self) -> Path:
        """One episode record a line."""
        return self.path / "episodes.jsonl"

    @property
    def frontier_json(self) -> Path:
        """The best mask for each target compression."""
        return self.path / "frontier.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of the learner's checkpoints."""
        return self.path / "checkpoints"

    @property
    def live_json(self) -> Path:
        """How the search stood last, as its driver saw it (deploy/live_file.py)."""
        return self.path / "live.json"

    @property
    def result_json(self) -> Path:
        """The numbers of the finished campaign."""
        return self.path / "result.json"

    @property
    def report_html(self) -> Path:
        """The report, one self-contained file."""
        return self.path / "report.html"

    @property
    def frontier_png(self) -> Path:
        """Accuracy against compression, as a picture."""
        return self.path / "frontier.png"

    @property
    def export(self) -> Path:
        """The folder of the networks to take away."""
        return self.path / "export"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def redis(self) -> Path:
        """The folder of the embedded server's data."""
        return self.path / "redis"

    @property
    def candidates(self) -> Path:
        """The folder of the best networks of the search and the peers, not yet recovered."""
        return self.path / "candidates"

    @property
    def recovered(self) -> Path:
        """The folder of the networks retrained after the search."""
        return self.path / "recovered"

    def redis_prefix(self) -> str | None:
        """Return the prefix of this campaign's keys in Redis; None before its search has begun."""
        path = self.path / "id"
        return f"zeroout:{path.read_text().strip()}" if path.is_file() else None

    def make_redis_prefix(self) -> str:
        """Return that prefix, drawn now where there is none yet, and kept in the folder."""
        if self.redis_prefix() is None:
            write_atomic(self.path / "id", uuid.uuid4().hex[:16])
        return str(self.redis_prefix())

    def shown_name(self) -> str:
        """What people who watch several campaigns call this one: a folder may be named runs/demo more than once."""
        return f"{self.path.resolve().name}-{self.make_redis_prefix()[-4:]}"

    def adopt_redis_prefix(self, prefix: str) -> None:
        """Go on with another campaign's keys in Redis: `prefix` is its `redis_prefix()`."""
        write_atomic(self.path / "id", prefix.removeprefix("zeroout:"))

    def append_episode(self, records: list[dict[str, Any]]) -> None:
        """Add finished episodes durably (each needs an int `id`); a torn last line is cut off first.

        Raises UserError on a full disk; the file then ends where it ended before. One writer at a time.
        """
        lines = "".join(_line(record) for record in records).encode()
        if not lines:
            return
        with disk_trouble_named(self.episodes_jsonl):
            is_new = not self.episodes_jsonl.exists()
            with self.episodes_jsonl.open("ab+", buffering=0) as file:
                end = _committed_end(file)
                file.truncate(end)
                try:
                    _write_durably(file, lines)
                except OSError:
                    # Half-written lines must not stay: the caller will append the same records again.
                    file.truncate(end)
                    raise
            if is_new:
                sync(self.path)

    def read_episodes(self) -> list[dict[str, Any]]:
        """Return all episode records in the order written, the first of each id; a torn last line is ignored.

        Raises UserError naming the line when a line that was completed is not an episode record.
        """
        try:
            data = self.episodes_jsonl.read_bytes()
        except FileNotFoundError:
            return []
        lines = data.split(b"\n")[:-1]  # behind the last newline stands nothing, or a torn line
        unique: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            record = self._parse(line, number)
            unique.setdefault(record["id"], record)
        return list(unique.values())

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._bad_line(number, str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("id"), int):
            raise self._bad_line(number, "a value without an integer id")
        return record

    def _bad_line(self, number: int, got: str) -> UserError:
        return UserError(
            f"{self.episodes_jsonl}, line {number}",
            expected="an episode record in JSON",
            got=got,
            remedy="remove that line: its episode counts as not played",
        )

    def _check_same_campaign(self, campaign_toml: str, resolve: Callable[[str], str]) -> None:
        try:
            there = tomllib.loads(resolve(self.campaign_toml.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(
                str(self.campaign_toml), expected="valid TOML", got=str(error), remedy="give another --out"
            ) from error
        difference = _first_difference(tomllib.loads(campaign_toml), there)
        if difference is not None:
            key, asked, found = difference
            raise UserError(
                f"{self.path} holds another campaign; {key}",
                expected=f"{asked} (as asked now)",
                got=f"{found} (in its campaign.toml)",
                remedy=f"give another --out, or continue that one: zeroout resume {self.path}",
            )

    def _check_no_foreign_files(self) -> None:
        if not self.path.exists():
            return
        # A crash between our temporary file and its rename leaves only the former: still an empty folder.
        foreign = sorted(entry.name for entry in self.path.iterdir() if not _TEMPORARY.match(entry.name))
        if foreign:
            raise UserError(
                str(self.path),
                expected="a new or empty folder, or a campaign's",
                got=f"a folder with {foreign[0]!r} and no campaign.toml",
                remedy="give another --out",
            )


def _locked(lock: io.IOBase) -> bool:
    """Take the lock; whoever only looks whether it is held has it for a moment, and is waited for."""
    for pause_s in _LOOKS_S:
        time.sleep(pause_s)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@contextlib.contextmanager
def disk_trouble_named(path: Path) -> Iterator[None]:
    """UserError for what the user can mend of writing `path`; any other failure passes."""
    try:
        yield
    except OSError as error:
        trouble = _DISK_TROUBLE.get(error.errno or 0)
        if trouble is None:
            raise
        raise UserError(
            f"writing {path}",
            expected="a disk that takes it",
            got=trouble,
            remedy="make room (or allow writing) and resume: nothing saved before is lost",
        ) from error


def _write_durably(file: io.FileIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file (what failed is not retried by close) and await the disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def _committed_end(file: io.FileIO, block_bytes: int = 1 << 16) -> int:
    """Return the position just after the last newline (0 without one), searched from the end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block_bytes)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _line(record: dict[str, Any]) -> str:
    if not isinstance(record.get("id"), int):
        raise ValueError(f"an episode record needs an int id, got {record.get('id')!r}")
    return json.dumps(_finite(record), separators=(",", ":"), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Copy a JSON value with null for every float that is not finite (a collapsed network's loss)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _first_difference(asked: dict[str, Any], found: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return (key, asked, found) of the first key that differs, in the order asked, or None."""
    left, right = dict(flat(asked)), dict(flat(found))
    for key in [*left, *(key for key in right if key not in left)]:
        sides = [repr(side[key]) if key in side else "nothing" for side in (left, right)]
        if sides[0] != sides[1]:
            return key, sides[0], sides[1]
    return None


def _version_of(distribution: str) -> str | None:
    # From the metadata: importing torch and ray for a number would cost seconds.
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_of_checkout() -> str | None:
    """Return the version in pyproject.toml: `ray job submit --working-dir .` runs a checkout, uninstalled."""
    try:
        project = tomllib.loads((_root() / "pyproject.toml").read_text())["project"]
    except (OSError, KeyError, ValueError):
        return None
    return str(project.get("version")) if project.get("name") == "zeroout" else None


def _git_commit() -> str | None:
    if not (_root() / ".git").exists():
        return None  # an installed copy inside somebody else's repository must not report that one's commit
    try:
        answer = subprocess.run(
            ["git", "-C", str(_root()), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _root() -> Path:
    return Path(__file__).resolve().parent.parent
