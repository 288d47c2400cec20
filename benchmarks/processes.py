"""What runs below a process, by /proc; called by benchmarks/faults.py and by tests that kill what they started."""

import contextlib
from pathlib import Path

__all__ = ["command_line", "descendants"]


def command_line(pid: int) -> str:
    """Of a process that runs; empty for one that is gone or a zombie."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def descendants(ancestor: int) -> dict[int, str]:
    """The processes below one, with their command lines."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, waiting = {}, [ancestor]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found[pid] = command_line(pid)
            waiting.append(pid)
    return {pid: line for pid, line in found.items() if line}
