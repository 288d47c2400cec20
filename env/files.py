"""Files that survive a crash: written beside, synced, renamed. Used by every room that saves something."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_file", "sync"]


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving it is synced and takes the name `path`.

    A crash leaves the old file or the new one, never half of one. After an exception nothing is replaced.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
