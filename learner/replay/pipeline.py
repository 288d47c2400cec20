"""A replay that works while its owner computes: samples are fetched ahead, inserts and priorities written behind.

Wrapped around a `Replay` by whoever owns the learner; to the learner it is a replay like any other, whose samples may
come as finished batches. One background thread owns the replay inside, and carries out the commands in the order in
which the learner's calls gave them: with one sample ahead

    S0 S1 | U0 S2 | U1 S3 | ...

where a bar is a call of `sample`. The order does not depend on timing, so a seeded run repeats exactly. The price is
that a sample does not yet know the priorities of the update that is being computed. A process that is killed loses
what is not yet written: updates, which leaves some sequences with the priority they had, and inserts, which are
acknowledged by `flush` only. Inserts in a row that wait to be written go to the server together.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from learner.replay.replay import Item, ReplayStats, Sample

__all__ = ["PipelinedReplay"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TOGETHER = 256  # sequences of several inserts that go to the replay in one call
_UPDATES_BEHIND = 8  # beyond the samples asked for; a learner that is further ahead waits


class _Replay(Protocol):
    """What is needed of the replay inside."""

    def check(self, items: Sequence[Item]) -> list[float]: ...
    def insert(self, items: Iterable[Item]) -> int: ...
    def sample(self, batch_size: int) -> Sample | None: ...
    def update(self, keys: Sequence[str], priorities: Sequence[float] | npt.NDArray[Any]) -> int: ...
    def reject(self, keys: Sequence[str]) -> int: ...
    def stats(self) -> ReplayStats: ...


class PipelinedReplay:
    """`replay` with `depth` samples of `batch_size` fetched ahead; a context manager that ends the thread.

    An error of the thread is raised, once and as it is, by the next call: of a sample, by the call that would have
    returned it. What was asked for after the failed command is carried out all the same.

    Args:
        replay: used by the background thread alone until `close`, apart from `stats`.
        batch_size: of every sample.
        depth: samples fetched ahead, at least 1.

    Attributes:
        prepare: what the thread makes of each sample before it hands it out (`Learner.prepare`); None: nothing.

    """

    def __init__(self, replay: _Replay, batch_size: int, *, depth: int = 1) -> None:
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        self._replay, self._batch_size, self._depth = replay, batch_size, depth
        self.prepare: Callable[[Sample], Any] | None = None
        self._commands: queue.Queue[Callable[[], None] | None] = queue.Queue(depth + _UPDATES_BEHIND)
        self._ahead: list[_Answer] = []
        self._open: list[Item] | None = None  # the last command's, while it is an insert that has not begun
        self._opening = threading.Lock()
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="replay-pipeline", daemon=True)
        self._thread.start()

    def insert(self, items: Sequence[Item]) -> int:
        """Add items behind, as `Replay.insert`; waits only when many are still unwritten. Returns how many there are.

        They are on the server, and safe, when `flush` returns. Raises ValueError as `Replay.insert`, at once.
        """
        self._raise_failure()
        self._replay.check(items)  # one that cannot be inserted must not take others with it
        with self._opening:
            if self._open is not None and len(self._open) + len(items) <= _TOGETHER:
                self._open.extend(items)
                return len(items)
        together = list(items)
        self._put(partial(self._write, partial(self._insert, together)), together)
        return len(items)

    def sample(self, batch_size: int) -> Any:
        """Return the next sample, prepared, or None when it is not the learner's turn; the next call then asks again.

        Raises ValueError unless `batch_size` is that of the pipeline.
        """
        if batch_size != self._batch_size:
            raise ValueError(f"batch_size must be the pipeline's {self._batch_size}, got {batch_size}")
        self._raise_failure()
        sample = self._next_fetched() or self._ask().result()
        while sample is not None and len(self._ahead) < self._depth:
            self._ahead.append(self._ask())
        return sample

    def update(self, keys: Sequence[str], priorities: Sequence[float] | npt.NDArray[Any]) -> int:
        """Write new priorities behind; waits only when many are still unwritten. Returns how many there are.

        Whether the sequences are still there will only be known when they are written.
        """
        self._raise_failure()
        values = np.array(priorities, np.float64)  # a copy: the learner may use its memory again
        self._put(partial(self._write, partial(self._replay.update, list(keys), values)))
        return len(keys)

    def reject(self, keys: Sequence[str]) -> int:
        """Remove sampled `keys`, behind; returns how many there are."""
        self._raise_failure()
        self._put(partial(self._write, partial(self._replay.reject, list(keys))))
        return len(keys)

    def stats(self) -> ReplayStats:
        """Return the counters as they are on the server now; unwritten updates are not in them."""
        return self._replay.stats()

    def flush(self) -> None:
        """Wait until everything is written, as before a checkpoint and at the end."""
        self._commands.join()
        self._raise_failure()

    def close(self) -> None:
        """Write what is left and end the thread; the replay inside may then be used again. Twice is fine."""
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join()
        self._ahead.clear()
        self._raise_failure()

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; a failure of the thread does not hide the error that ended the context."""
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            _log.warning("replay: what was left could not be written: %s", failure)

    def _next_fetched(self) -> Any:
        """Return the first sample fetched ahead that was not refused, or None."""
        while self._ahead:
            sample = self._ahead.pop(0).result()
            if sample is not None:
                return sample
        return None

    def _ask(self) -> "_Answer":
        answer = _Answer()
        self._put(partial(answer.fill, self._draw))
        return answer

    def _draw(self) -> Any:
        sample = self._replay.sample(self._batch_size)
        return sample if sample is None or self.prepare is None else self.prepare(sample)

    def _put(self, command: Callable[[], None], items: list[Item] | None = None) -> None:
        """Give the thread a command; further inserts may join its `items` until it begins or another one follows."""
        if not self._thread.is_alive():
            raise RuntimeError("the replay pipeline is closed")
        with self._opening:
            self._open = items
        self._commands.put(command)

    def _insert(self, together: list[Item]) -> int:
        with self._opening:
            if self._open is together:
                self._open = None
        return self._replay.insert(together)

    def _write(self, command: Callable[[], int]) -> None:
        try:
            command()
        except Exception as error:  # raised in the learner's thread
            self._failures.put(error)

    def _raise_failure(self) -> None:
        """Raise the first failed update, if there is one; the others are only logged."""
        failures = []
        while not self._failures.empty():
            failures.append(self._failures.get())
        for failure in failures[1:]:
            _log.warning("replay: another update could not be written: %s", failure)
        if failures:
            raise failures[0]

    def _work(self) -> None:
        while (command := self._commands.get()) is not None:
            command()
            self._commands.task_done()
        self._commands.task_done()


class _Answer:
    """A sample that will be there; filled by the background thread, taken once by the learner's."""

    def __init__(self) -> None:
        self._there = threading.Event()
        self._sample: Any = None
        self._error: Exception | None = None

    def fill(self, draw: Callable[[], Any]) -> None:
        """Hold what `draw` returns or raises."""
        try:
            self._sample = draw()
        except Exception as error:  # raised in the learner's thread
            self._error = error
        self._there.set()

    def result(self) -> Any:
        """Wait for the sample and return it; raises what the draw raised."""
        self._there.wait()
        if self._error is not None:
            raise self._error
        return self._sample
