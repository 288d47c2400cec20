"""A whole campaign with a password and a token, and then a search for both in everything that it has left behind."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared_server import program, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PASSWORD, TOKEN = "HushHush77Password", "ToKeN9988776655443322110000aabbcc"
SMALL = (
    "network.width=0.25", "data.validation_share=0.2", "baseline.epochs=1", "episode.waypoints=2",
    "episode.step_minibatches=1", "episode.recovery_minibatches=1", "search.episodes=3", "recovery.epochs=1",
    "cluster.dashboard=true", "replay.min_sequences=1", "learner.batch_size=2",
)  # fmt: skip
LIMIT_S = 400.0


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for the sockets of Ray and Redis."""
    folder = Path(tempfile.mkdtemp(prefix="zo-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def command_lines() -> list[str]:
    """Those of all processes, as `ps` shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def holding(folder: Path, secrets: tuple[str, ...]) -> list[Path]:
    """The files below `folder` that hold one of the secrets."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


def test_password_and_token_are_in_no_file_no_output_and_no_process_list(short: Path, tmp_path: Path) -> None:
    out, log, rays = tmp_path / "out", tmp_path / "log", short / "ray"
    rays.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(rays),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    environment.pop("ZEROOUT_REDIS_URL", None)
    url = f"unix://:{PASSWORD}@{short}/s"
    options = ("--port", "0", "--unixsocket", f"{short}/s", "--save", "")
    (short / "redis.conf").write_text(f"requirepass {PASSWORD}\n")
    words = [sys.executable, "-m", "deploy.cli", "run", "--out", str(out), "--redis", url]
    words += [word for override in SMALL for word in ("--set", override)]
    with serving(program("bundled"), short, "redis.conf", *options, url=url):
        with log.open("wb") as output:
            driver = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
        lines: set[str] = set()
        try:
            deadline = time.monotonic() + LIMIT_S
            while driver.poll() is None:
                assert time.monotonic() < deadline, log.read_text()
                if out.exists():  # the command has begun its work; before, Python itself was starting
                    lines |= set(command_lines())
                time.sleep(0.2)
        finally:
            driver.kill()
            driver.wait()
        assert driver.returncode == 0, log.read_text()
        looked = subprocess.run(
            [sys.executable, "-m", "deploy.cli", "doctor"],
            cwd=ROOT, env={**environment, "ZEROOUT_REDIS_URL": url}, capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
    secrets = (PASSWORD, TOKEN)
    assert any("deploy.cli run" in line for line in lines), "the driver was looked at"
    assert any("ray::" in line for line in lines), "and its workers"
    assert [line for line in lines if any(secret in line for secret in secrets)] == []
    assert holding(out, secrets) == []
    assert holding(rays, secrets) == []
    assert any(rays.rglob("gcs_server*")), "Ray's logs were among what was searched"
    assert not any(secret in log.read_text() + looked for secret in secrets)
    assert (out / "server").read_text() == f"unix://:***@{short}/s"
    assert f"{short}/s answers" in looked


def test_a_secret_that_is_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"\0redis://:HushHush77Password@host")
    assert holding(tmp_path, (PASSWORD, TOKEN)) == [tmp_path / "a/file"]
