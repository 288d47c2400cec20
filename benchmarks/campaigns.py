"""Campaigns as benchmarks run them: resumable, in folders told apart by their content.

`python -m benchmarks.campaigns CONFIG.toml --out DIR` is `zeroout run` without export and report.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.campaign import run_campaign
from deploy.config import CampaignConfig, dump, load
from deploy.folder import write_atomic
from deploy.progress import PlainProgress
from env.errors import ZerooutError

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".search"


def campaign(config: CampaignConfig, out: Path, overrides: Sequence[str], what: str, *, deliver: bool = True) -> bool:
    """`zeroout run`, which goes on where it was stopped; whether it has finished.

    `what` is for the message; without `deliver` nothing is exported or reported.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = beside(out, ".toml")
    write_atomic(path, dump(config))
    sets = [word for override in overrides for word in ("--set", override)]
    command = ["-m", "deploy.cli", "run"] if deliver else ["-m", "benchmarks.campaigns"]
    process([*command, str(path), "--out", str(out), *sets], out, what)
    return (out / "result.json").is_file()


def process(command: Sequence[str], out: Path, what: str) -> None:
    """Run Python with one thread of torch; what it prints stands beside its folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    with beside(out, ".log").open("ab") as log:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        print(f"{what}: ended with {done.returncode}; see {beside(out, '.log')}", flush=True)


def beside(out: Path, suffix: str) -> Path:
    """A file of a campaign's own beside its folder, whose name has dots in it."""
    return out.with_name(out.name + suffix)


def commit() -> str:
    """Of the code that makes a row; a row is not made again because the code has changed."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def fingerprint(
    config: CampaignConfig, *, without: Collection[str] = (), beyond: Mapping[str, Any] | None = None
) -> str:
    """Of what a campaign's result depends on: all values that are not the default, but those of sections `without`.

    A key that a later version adds changes nothing until it is used. `beyond` is what the configuration does not say.
    """
    values, defaults = _flat(asdict(config)), _flat(asdict(CampaignConfig()))
    chosen = {
        key: value for key, value in values.items() if value != defaults[key] and key.partition(".")[0] not in without
    }
    text = json.dumps({**chosen, **(beyond or {})}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found


def main() -> None:
    """Run one campaign's stages up to result.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaigns", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    try:
        progress = PlainProgress(Console())
        run_campaign(given.out, load(given.config, given.set), redis_url="", progress=progress, deliver=False)
    except ZerooutError as error:
        sys.exit(f"zeroout: {error}")


if __name__ == "__main__":
    main()
