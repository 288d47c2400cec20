"""The real command with tiny numbers, in the background; and how everything that it started is ended."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import command_line, descendants

ROOT = Path(__file__).parents[2]
TINY = """
seed = 3
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 2
batch_size = 64
[episode]
targets = [0.5, 0.8]
waypoints = 4
batch_size = 32
step_minibatches = {step_minibatches}
recovery_minibatches = 4
score_images = 64
step_images = 100
[search]
actors = 2
episodes = {episodes}
controls = {controls}
[sequence]
burn_in = 1
unroll_length = 2
sequence_period = 2
[replay]
min_sequences = 4
[learner]
batch_size = 4
checkpoint_period = 5
[controller]
hidden_size = 16
[recovery]
epochs = 1
batch_size = 64
[cluster]
dashboard = {dashboard}
lease_s = 60
"""
LIMIT_S = 240.0


def tiny(
    path: Path,
    *,
    episodes: int,
    controls: tuple[str, ...] = (),
    step_minibatches: int = 2,
    dashboard: bool = False,
) -> Path:
    """Write the configuration of a campaign of tiny episodes."""
    text = TINY.format(
        episodes=episodes,
        controls=json.dumps(list(controls)),
        step_minibatches=step_minibatches,
        dashboard=json.dumps(dashboard),
    )
    path.write_text(text)
    return path


def environment() -> dict[str, str]:
    """The environment of the command: no token file in the user's home, one thread, no Redis but its own."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "ZEROOUT_REDIS_URL": ""}


def command(*arguments: object) -> list[str]:
    """The command line of `zeroout` with these arguments."""
    return [sys.executable, "-m", "deploy.cli", *map(str, arguments)]


@contextlib.contextmanager
def started(environment: dict[str, str], log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command in the background, in a session of its own; killed at the end if it still runs."""
    with log.open("wb") as output:
        driver = subprocess.Popen(
            command(*arguments), cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield driver
    finally:
        kill_with_descendants(driver)


def kill_with_descendants(driver: subprocess.Popen[bytes]) -> None:
    """kill -9 the driver alone, and see that everything that it started goes by itself."""
    started_by_it = descendants(driver.pid)
    driver.kill()
    driver.wait()
    wait_until(
        lambda: not [pid for pid, line in started_by_it.items() if command_line(pid) == line],
        f"everything that the driver started is gone: {started_by_it}",
    )


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait for a condition; AssertionError that says for what when it does not come."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s until {what}"
        time.sleep(0.05)


def episodes(out: Path) -> list[dict[str, Any]]:
    """The episodes that are recorded in a campaign's folder."""
    path = out / "episodes.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
