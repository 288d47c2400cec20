"""Checkpoints that survive a crash: written beside, hashed, renamed; the newest valid one loads.

A checkpoint is a folder `update-00000120/` with `state.pt` and, written last, `manifest.json` with its size and
sha256. A folder without a manifest, or whose file does not match it, is no checkpoint. One with as many updates as
another comes after it, as `update-00000120.1/`: nothing is removed before what replaces it is there.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from env.errors import UserError
from env.files import sync

__all__ = ["load_newest", "save"]

_log = logging.getLogger(__name__)
_KEPT = 3
# what reading, json and torch's weights_only unpickler raise over a file that is not what its name says
_NOT_VALID = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError)


def save(folder: Path, state: dict[str, Any], updates: int) -> Path:
    """Save a learner's state; of what else is in the folder only the two checkpoints before it are kept.

    A checkpoint with more updates is not valid, else the learner had started from it; it must not push out this one.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.

    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    manifest = {"updates": updates, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    final = _free(folder, f"update-{updates:08d}")
    partial = folder / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial / "state.pt", data)
        _write(partial / "manifest.json", json.dumps(manifest).encode())
        partial.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final}",
            expected=f"{len(data)} bytes of disk that can be written",
            got=str(error),
            remedy="make room there and resume; the checkpoints before it are untouched",
        ) from error
    _clear(folder, final)
    return final


def _free(folder: Path, name: str) -> Path:
    """The first of NAME, NAME.1, NAME.2, ... that comes after all that are there."""
    taken = [_place(path) for path in folder.glob(f"{name}*")]
    number = max(taken)[1] + 1 if taken else 0
    return folder / (f"{name}.{number}" if number else name)


def _place(path: Path) -> tuple[str, int]:
    """What checkpoints are sorted by: the number of updates as text, then which one of them."""
    name, _, number = path.name.partition(".")
    return name, int(number) if number.isdigit() else 0


def _clear(folder: Path, newest: Path) -> None:
    """Remove all but the last `_KEPT` up to `newest`, and what killed processes left half written."""
    found = sorted(folder.glob("update-*"), key=_place)
    kept = [path for path in found if _place(path) <= _place(newest)][-_KEPT:]
    for path in {*found, *folder.glob(".update-*")}.difference(kept):
        shutil.rmtree(path, ignore_errors=True)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest valid state, or None when there is none; each invalid one is named in the log."""
    for path in sorted(folder.glob("update-*"), key=_place, reverse=True):
        try:
            return _load(path)
        except _NOT_VALID as error:
            _log.warning("checkpoint %s is not valid (%s); trying the one before it", path, error)
    return None


def _load(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "state.pt").read_bytes()
    if len(data) != manifest["bytes"]:
        raise ValueError(f"state.pt: expected {manifest['bytes']} bytes, got {len(data)}")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ValueError("state.pt: its sha256 is not the manifest's")
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return state


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
