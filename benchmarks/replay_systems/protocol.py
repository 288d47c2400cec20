"""What a worker of `benchmarks/replay.py` is: one replay behind a few verbs, measured in a process of its own.

Requests and replies are lines of JSON on stdin and stdout, so that a worker can run under any interpreter: this file
needs numpy only. Each file beside it that ends in `serve(...)` is one worker.
"""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

FILL_BATCH = 256
SPARE_BYTES = 4 << 30  # of the machine's memory, below which filling stops
SETTLE_S = 60.0
WARM_UP = 0.2  # of the time measured, before it: also uses up what was fetched ahead meanwhile
LEAST_CALLS = 3  # of each measurement, however long they take


class Store(ABC):
    """One replay under test. `insert` and `update` return when the store has acknowledged what it was given, or else
    `acknowledge` waits for it, in the time that is measured.
    """

    prioritized = True
    takes_empty_arrays = False  # others are spared the arrays without elements
    sequences: list[Arrays]

    @abstractmethod
    def open(self, capacity: int) -> None:
        """Begin empty, for `capacity` sequences, the oldest of which then make room; `sequences` is set."""

    @abstractmethod
    def insert(self, chosen: list[int], priorities: list[float]) -> None:
        """Add `sequences[i]` for each i of `chosen`: arrays go in, turning them into the wire's form is part of it."""

    @abstractmethod
    def sample(self, count: int) -> Any:
        """Draw `count` sequences; their arrays are in this process's memory when it returns."""

    @abstractmethod
    def update(self, drawn: Any, priorities: np.ndarray) -> None:
        """Give what `sample` returned new priorities, float64 [count]."""

    @abstractmethod
    def unpack(self, drawn: Any) -> list[Arrays]:
        """The sequences of what `sample` returned, for the check that they are those which went in."""

    def acknowledge(self) -> None:  # noqa: B027 - most stores have nothing to wait for
        """Return when everything given so far is acknowledged."""

    def server_pid(self) -> int | None:
        """The process that holds the data; None where it is this one."""
        return None

    def used_bytes(self) -> int | None:
        """What the server says that it uses, where it says so."""
        return None

    def counters(self) -> dict[str, int]:
        """Growing counts of bytes and commands, where the server keeps them."""
        return {}

    def busy(self) -> bool:
        """Whether the server still has work left over from what was done before."""
        return False


class Worker:
    """Answers the requests of the benchmark about one store."""

    def __init__(self, store: Store) -> None:
        self._store, self._random = store, np.random.default_rng(0)

    def open(self, payload: str, capacity: int) -> dict[str, Any]:
        """Begin anew with the sequences of the file `payload` as what is inserted."""
        store = self._store
        store.sequences = _read(Path(payload), keep_empty=store.takes_empty_arrays)
        before = self._memory()
        store.open(capacity)
        self._empty = before if store.server_pid() is None else self._memory()
        return {"prioritized": store.prioritized}

    def fill(self, count: int, limit_s: float) -> dict[str, Any]:
        """Insert `count` sequences; says so where time or memory did not allow it."""
        started, done, stopped = time.monotonic(), 0, ""
        while done < count and not stopped:
            batch = min(FILL_BATCH, count - done)
            self._insert(batch)
            done += batch
            if time.monotonic() - started > limit_s:
                stopped = f"{done:,} in {limit_s:.0f} s"
            elif _available_bytes() < SPARE_BYTES:
                stopped = f"{done:,}, then the machine's memory ran short"
        self._store.acknowledge()
        self._settle()
        memory = self._memory()
        per_sequence = {name: (memory[name] - self._empty[name]) / done for name in memory}
        return {"stopped": stopped if done < count else "", "seconds": time.monotonic() - started, **per_sequence}

    def check(self, batch: int) -> dict[str, Any]:
        """Raise unless what is drawn is what was inserted."""
        known = {_fingerprint(sequence) for sequence in self._store.sequences}
        drawn = self._store.unpack(self._store.sample(batch))
        strange = sum(_fingerprint(sequence) not in known for sequence in drawn)
        if strange or len(drawn) != batch:
            raise ValueError(
                f"expected {batch} sequences that were inserted, got {len(drawn)}, {strange} of them others"
            )
        return {}

    def measure(self, what: str, batch: int, seconds: float) -> dict[str, Any]:
        """Repeat `what` ("insert" or "sample", the latter with its update) for about `seconds`."""
        store = self._store
        self._settle()
        step = self._insert if what == "insert" else self._sample_and_update
        self._repeat(step, batch, seconds * WARM_UP)
        counted, server, client = store.counters(), self._server_cpu_s(), time.process_time()
        laps, wall_s = self._repeat(step, batch, seconds)
        sequences = len(laps) * batch
        reply = {
            "per_s": sequences / wall_s,
            "calls": len(laps),
            "client_cpu_us": (time.process_time() - client) / sequences * 1e6,
            "server_cpu_us": (self._server_cpu_s() - server) / sequences * 1e6 if store.server_pid() else None,
            "latency_us": _quantiles(np.array(laps) * 1e6, ("insert",) if what == "insert" else ("sample", "update")),
            "counted": {name: (count - counted[name]) / sequences for name, count in store.counters().items()},
        }
        self._settle()  # so that what it left behind is not done in another system's time
        return reply

    def _repeat(
        self, step: Callable[[int], tuple[float, ...]], batch: int, seconds: float
    ) -> tuple[list[tuple[float, ...]], float]:
        """(what `step` returned each time, seconds that it took)."""
        laps: list[tuple[float, ...]] = []
        started = time.perf_counter()
        while len(laps) < LEAST_CALLS or time.perf_counter() - started < seconds:
            laps.append(step(batch))
        self._store.acknowledge()
        return laps, time.perf_counter() - started

    def _insert(self, batch: int) -> tuple[float]:
        chosen = self._random.integers(len(self._store.sequences), size=batch).tolist()
        priorities = self._priorities(batch).tolist()
        return (_seconds(lambda: self._store.insert(chosen, priorities)),)

    def _sample_and_update(self, batch: int) -> tuple[float, ...]:
        priorities = self._priorities(batch)
        started = time.perf_counter()
        drawn = self._store.sample(batch)
        sampled = time.perf_counter()
        if not self._store.prioritized:
            return (sampled - started,)
        self._store.update(drawn, priorities)
        return sampled - started, time.perf_counter() - sampled

    def _priorities(self, count: int) -> np.ndarray:
        return np.abs(self._random.standard_normal(count)) + 0.01

    def _settle(self) -> None:
        """Wait until the server has caught up; it is measured all the same if it never does."""
        deadline = time.monotonic() + SETTLE_S
        while self._store.busy() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _memory(self) -> dict[str, int]:
        used = self._store.used_bytes()
        resident = _resident_bytes(self._store.server_pid() or os.getpid())
        return {"resident_bytes": resident} | ({} if used is None else {"used_bytes": used})

    def _server_cpu_s(self) -> float:
        pid = self._store.server_pid()
        return _cpu_s(pid) if pid else 0.0


def serve(store: Store) -> None:
    """Answer requests until stdin ends. Whatever libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(store)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # of any library: it becomes the system's line in the table
            reply = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
        print(json.dumps(reply), file=replies, flush=True)


def options() -> dict[str, Any]:
    """What the benchmark tells this worker on its command line."""
    told: dict[str, Any] = json.loads(sys.argv[1])
    return told


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _quantiles(laps: np.ndarray, names: tuple[str, ...]) -> dict[str, list[float]]:
    """{name: [p50, p99]} of the columns of `laps` [calls, columns]; a column that is missing has no entry."""
    return {name: np.percentile(column, (50, 99)).tolist() for name, column in zip(names, laps.T, strict=False)}


def _read(path: Path, *, keep_empty: bool) -> list[Arrays]:
    """Sequences from a file of their arrays stacked, each then with memory of its own."""
    with np.load(path) as file:
        stacked = {name: file[name] for name in file.files}
    names = [name for name, array in stacked.items() if array.size or keep_empty]
    return [{name: stacked[name][i].copy() for name in names} for i in range(len(stacked[names[0]]))]


def _fingerprint(sequence: Arrays) -> tuple[tuple[str, str, bytes], ...]:
    return tuple((n, sequence[n].dtype.name, sequence[n].tobytes()) for n in sorted(sequence) if sequence[n].size)


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended; to 10 ms (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return SPARE_BYTES
