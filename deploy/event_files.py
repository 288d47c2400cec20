"""TensorBoard's event files in the campaign folder: a run for each group of the campaign, and one for the learner.

Written by the driver (deploy/telemetry.py) and by campaigns that one rule plays alone (deploy/alone.py), who both know
of an episode before its events are written. Nothing reads them but TensorBoard, and a disk that does not take them
stops no campaign.
"""

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

__all__ = ["EventFiles"]

_log = logging.getLogger(__name__)

_LEARNER = "learner"
_LEARNER_PERIOD_S = 10.0  # between two points of the learner's curves: a campaign may learn for days
_FROM_BEAT = {
    "loss": "loss",
    "mean_priority": "mean_priority",
    "delta_q_first": "delta_q/first",
    "delta_q_last": "delta_q/last",
    "replay": "replay_sequences",
}


class EventFiles:
    """The files under `path`; a context manager.

    The groups' runs are written anew from `records` (those in the folder), so that resuming leaves nothing out and
    nothing twice. The learner's run grows: when the learner falls back to a checkpoint, TensorBoard is told to forget
    what came after.

    Args:
        path: the folder; made where there is none.
        records: lines of episodes.jsonl, in order of completion.
        clock: of the learner's points, in seconds; only differences count.

    """

    def __init__(
        self, path: Path, records: Iterable[Mapping[str, Any]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._clock = path, clock
        self._runs: dict[str, EventsWriter] = {}
        self._played: Counter[str] = Counter()
        self._updates = self._written_s = -math.inf
        self._newest: dict[str, float] = {}
        self._broken = False
        self._guarded(self._clear)
        self.episodes(records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._guarded(lambda: self._write_learner(self._newest))
        for run in self._runs.values():
            self._guarded(run.close)

    def episodes(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add finished episodes; the step of a point counts the episodes of its group."""
        self._guarded(lambda: self._write_episodes(records))

    def learner(self, beat: Mapping[str, float]) -> None:
        """Note the learner's heartbeat; the step of a point counts its updates."""
        if "loss" in beat:
            self._newest = dict(beat)
        fell_back = self._newest.get("updates", math.inf) < self._updates
        if fell_back or self._clock() - self._written_s >= _LEARNER_PERIOD_S:
            self._guarded(lambda: self._write_learner(self._newest))

    def _write_episodes(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            group = str(record["group"])
            if group not in self._runs:
                self._begin(group)
            self._played[group] += 1
            for tag, value in _points(record):
                if value is not None:  # what is not finite is null in the file
                    self._add(group, tag, value, self._played[group], record.get("finished", time.time()))
        for group in self._played:
            self._runs[group].flush()

    def _write_learner(self, beat: Mapping[str, float]) -> None:
        updates = beat.get("updates", self._updates)
        if updates == self._updates:
            return
        if updates < self._updates or _LEARNER not in self._runs:
            self._begin(_LEARNER, purge_step=int(updates))
        for name, tag in _FROM_BEAT.items():
            if name in beat:
                self._add(_LEARNER, tag, beat[name], int(updates), time.time())
        self._runs[_LEARNER].flush()
        self._updates, self._written_s = updates, self._clock()

    def _begin(self, run: str, purge_step: int | None = None) -> None:
        """Open a file of a run; TensorBoard forgets what earlier files of it say from `purge_step` on."""
        if run in self._runs:
            self._runs[run].close()
        folder = self._path / run
        folder.mkdir(parents=True, exist_ok=True)
        # names tell only seconds, and TensorBoard reads a run's files in the order of their names
        suffix = f".{len(list(folder.iterdir())):04d}"
        self._runs[run] = EventsWriter(str(folder / "events"), suffix)
        if purge_step is not None:
            begun = SessionLog(status=SessionLog.START)
            self._runs[run].write_event(Event(wall_time=time.time(), step=purge_step, session_log=begun))

    def _add(self, run: str, tag: str, value: float, step: int, wall_time: float) -> None:
        self._runs[run].write_event(Event(wall_time=wall_time, step=step, summary=scalar(tag, value)))

    def _clear(self) -> None:
        """Remove the groups' runs."""
        if self._path.is_dir():
            for run in self._path.iterdir():
                if run.is_dir() and run.name != _LEARNER:
                    shutil.rmtree(run)

    def _guarded(self, write: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            write()
        except OSError as error:
            self._broken = True
            _log.warning("no more event files for TensorBoard until the campaign is resumed: %s", error)


def _points(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The tags of an episode and their values."""
    yield "return", record["return"]
    yield "seconds/episode", record["seconds"]
    for phase, spent in record.get("phases", {}).items():
        yield f"seconds/{phase}", spent
    for point in record["targets"]:
        yield f"accuracy/{point['target']}", point["accuracy"]
        yield f"cross_entropy/{point['target']}", point["cross_entropy"]
        yield f"compression/{point['target']}", point["compression"]
