"""Campaigns as benchmarks run them: resumable, in folders told apart by their content.

`python -m benchmarks.campaigns CONFIG.toml --out DIR` is `zeroout run` without export and report, and with
`--baseline` the training of the baseline alone.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from agents.controller import ControllerConfig
from deploy.campaign import run_campaign
from deploy.config import CampaignConfig, dump, load, resolved
from deploy.folder import CampaignFolder, write_atomic
from deploy.prepare import preflight, prepare
from deploy.progress import PlainProgress
from env.errors import UserError, ZerooutError

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".search"
_INTERRUPTED = 130
#: Defaults that have changed since there are rows: fingerprints go on with what they were.
_FORMER = {"recovery.distillation": 0.0}
_RUNNING: set[subprocess.Popen[bytes]] = set()  # to be ended with us
_ENDING = threading.Event()  # nothing is begun any more
_TO_SAVE_S = 60.0  # for a campaign that is told to end, before it is killed


def campaign(
    config: CampaignConfig, out: Path, what: str, *, deliver: bool = True, deadline_s: float = math.inf
) -> bool:
    """`zeroout run`, which goes on where it was stopped and does nothing where it is through; whether it has finished.

    Without `deliver` nothing is exported or reported; see `run` for the others.
    """
    result = out / "result.json"
    if not result.is_file():
        run(["deploy.cli", "run"] if deliver else ["benchmarks.campaigns"], config, out, what, deadline_s)
    return result.is_file()


def run(module: Sequence[str], config: CampaignConfig, out: Path, what: str, deadline_s: float = math.inf) -> None:
    """Run a module and its first arguments on a configuration, which is written beside its folder.

    `what` is for the message. At `deadline_s`, in seconds since the epoch, it is told to save and end.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = beside(out, ".toml")
    write_atomic(path, dump(config))
    process(["-m", *module, str(path), "--out", str(out)], out, what, deadline_s)


def baseline(config: CampaignConfig, work: Path, deadline_s: float = math.inf) -> Path | None:
    """The weights of the network that `config` trains before it prunes; None where time was over before they were.

    All campaigns share them that have the same network, images, seed and training, of whatever benchmark.
    """
    only = CampaignConfig(
        seed=config.seed, network=replace(config.network, weights=""), data=config.data, baseline=config.baseline
    )
    name = f"{config.network.name}-{config.network.width:g}-{config.seed}"
    out = work / f"baseline-{name}-{fingerprint(only, without=('recovery',))}"
    weights = out / "baseline" / "model.safetensors"
    if not weights.is_file() and time.time() < deadline_s:
        run(["benchmarks.campaigns", "--baseline"], only, out, f"baseline of {name}", deadline_s)
    return weights.resolve() if weights.is_file() else None


def process(command: Sequence[str], out: Path, what: str, deadline_s: float = math.inf) -> None:
    """Run Python with one thread of torch, or $OMP_NUM_THREADS; what it prints stands beside its folder."""
    if _ENDING.is_set():
        return
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "RAY_AUTH_MODE": "disabled"}
    since, before = time.perf_counter(), seconds_of(out)
    with beside(out, ".log").open("ab") as log:
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log)
        _RUNNING.add(child)
        try:
            code = _ended(child, deadline_s)
        finally:
            _RUNNING.discard(child)
    write_atomic(beside(out, ".seconds"), f"{before + time.perf_counter() - since:.1f}")
    if code == _INTERRUPTED:
        print(f"{what}: stopped; the same command goes on with it", flush=True)
    elif code:
        print(f"{what}: ended with {code}; see {beside(out, '.log')}", flush=True)


def seconds_of(out: Path) -> float:
    """How long the processes of a campaign have run, over all calls."""
    kept = beside(out, ".seconds")
    return float(kept.read_text()) if kept.is_file() else 0.0


def _ended(child: subprocess.Popen[bytes], deadline_s: float) -> int:
    """The exit code of a process, which is ended at the deadline."""
    try:
        return child.wait(None if deadline_s == math.inf else max(0.0, deadline_s - time.time()))
    except subprocess.TimeoutExpired:
        child.terminate()
    except KeyboardInterrupt:  # it has been told to end, too
        _gone(child)
        raise
    _gone(child)
    return _INTERRUPTED


def _gone(child: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was told to end; kill it where it does not."""
    try:
        child.wait(_TO_SAVE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextlib.contextmanager
def ended_as_a_command() -> Iterator[None]:
    """What is raised becomes an exit code, and a line for a user's mistake; SIGTERM interrupts, as Ctrl+C does.

    The processes that `process` has started are told to end, and no others begun, before threads that wait for them are
    waited for.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        _ENDING.set()
        for child in list(_RUNNING):
            child.terminate()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except ZerooutError as error:
        print(f"zeroout: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    finally:
        _ENDING.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def require_all(failed: Sequence[str]) -> None:
    """Exit with 1 and a line where campaigns have failed, whose messages and logs were named before."""
    if failed:
        sys.exit(f"nothing came of {'; '.join(failed)}: the lines above name the logs; the same command tries again")


def beside(out: Path, suffix: str) -> Path:
    """A file of a campaign's own beside its folder, whose name has dots in it."""
    return out.with_name(out.name + suffix)


def commit() -> str:
    """Of the code that makes a row, "" where git cannot say; a row is not made again because the code has changed."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def fingerprint(
    config: CampaignConfig, *, without: Collection[str] = (), beyond: Mapping[str, Any] | None = None
) -> str:
    """Of what a campaign's result depends on: all values that are not the default, but those of sections `without`.

    Nor does it matter where things lie and where it runs: the paths of images and weights, and the cluster. A key that
    a later version adds changes nothing until it is used. `beyond` is what the configuration does not say.
    """
    values, defaults = _flat(asdict(_wherever(config))), _flat(asdict(CampaignConfig())) | _FORMER
    ignored = {"cluster", *without}
    chosen = {
        key: value for key, value in values.items() if value != defaults[key] and key.partition(".")[0] not in ignored
    }
    text = json.dumps({**chosen, **(beyond or {})}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest(path: Path) -> str:
    """Of a file that a result depends on, for fingerprints."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _wherever(config: CampaignConfig) -> CampaignConfig:
    """The same without the paths of its images and weights."""
    return replace(
        config,
        data=replace(config.data, path="as given" if config.data.path else "", cache=""),
        network=replace(config.network, weights=""),
        controller=replace(config.controller, weights=ControllerConfig().weights),
    )


def images_of(records: Iterable[Mapping[str, Any]], config: CampaignConfig) -> int:
    """Training images that recorded episodes were retrained with, each as often as it was seen."""
    images = config.episode.retrained_images
    return sum((int(record["steps"]) - 1) * images(0) + images(len(record["targets"])) for record in records)


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found


def main() -> None:
    """Run one campaign's stages up to result.json, or the first alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaigns", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baseline", action="store_true", help="end when it is there")
    given = parser.parse_args()
    with ended_as_a_command():
        config, progress = load(given.config), PlainProgress(Console())
        if given.baseline:
            prepare(CampaignFolder.create(given.out, dump(config), resolved), config, preflight(config), progress)
        else:
            run_campaign(given.out, config, redis_url="", progress=progress, deliver=False)


if __name__ == "__main__":
    main()
