"""What TensorBoard would show of a run's event files."""

import struct
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog


def events(run: Path) -> list[Event]:
    """Everything in a run's files, in the order in which TensorBoard reads it."""
    found = []
    for path in sorted(run.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, without what a restart has purged."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in events(run):
        if event.session_log.status == SessionLog.START:
            for kept in points.values():
                kept[:] = [point for point in kept if point[0] < event.step]
        for value in event.summary.value:
            points[value.tag].append((event.step, pytest.approx(value.simple_value)))
    return dict(points)
