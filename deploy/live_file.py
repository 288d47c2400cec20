"""How a search stands, as its driver sees it, kept in the campaign's folder for whoever looks (`zeroout status`).

Learner, replay, and what each actor does now are in no record; whoever looks shall need neither Redis nor Ray.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from deploy.folder import write_json
from deploy.progress import SearchSnapshot
from env.errors import UserError

__all__ = ["LiveFile", "read_live"]

_PERIOD_S = 2.0
_FIELDS = {field.name for field in fields(SearchSnapshot)}


class LiveFile:
    """The file, replaced every few seconds at the most."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock, self._due_s = path, clock, float("-inf")

    def write(self, snapshot: SearchSnapshot) -> None:
        """Keep a snapshot; what cannot be written is left out, as nothing depends on it."""
        if self._clock() < self._due_s:
            return
        self._due_s = self._clock() + _PERIOD_S
        with contextlib.suppress(OSError, UserError):
            write_json(self._path, asdict(snapshot))


def read_live(path: Path) -> dict[str, Any] | None:
    """The newest snapshot, with the fields of `SearchSnapshot`; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.keys() >= _FIELDS:
            return found
    return None
