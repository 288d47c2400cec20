"""The rows of a benchmark: one JSON object a line, kept as soon as it is made, told apart by fingerprints."""

import json
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

__all__ = ["Ledger", "Row"]

Row = dict[str, Any]


class Ledger:
    """A file of rows, each with a "fingerprint" of what it depends on; several threads may add to it.

    Args:
        file: need not be there yet. A last line that was cut off while it was written is left out.

    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, Lock()
        text = file.read_text() if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]

    def row(self, fingerprint: str, **keys: Any) -> Row | None:
        """The last row of this very fingerprint, and of these values beside it."""
        wanted = {"fingerprint": fingerprint, **keys}.items()
        return next((row for row in reversed(self.rows) if wanted <= row.items()), None)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows, here and in the file."""
        added = list(rows)
        with self._lock:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._end_last_line()
            with self.file.open("a") as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in added))
            self.rows += added

    def _end_last_line(self) -> None:
        """Cut off what a killed process had left of a line."""
        text = self.file.read_bytes() if self.file.is_file() else b""
        if not text.endswith(b"\n"):
            self.file.write_bytes(text[: text.rfind(b"\n") + 1])
