"""The real command with tiny numbers: a whole campaign, and campaigns whose processes are killed."""

import json
import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_campaign
import torch
from tiny_campaign import (
    LIMIT_S,
    ROOT,
    command,
    descendants,
    episodes,
    kill_with_descendants,
    started,
    tiny,
    wait_until,
)

from deploy.frontier import PEERS

pytestmark = pytest.mark.slow


@pytest.fixture
def environment() -> dict[str, str]:
    return tiny_campaign.environment()


def zeroout(environment: dict[str, str], *arguments: object) -> str:
    ended = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def assert_every_episode_exactly_once(out: Path, total: int) -> None:
    counted = Counter(record["id"] for record in episodes(out))
    assert counted == Counter(range(total))


def assert_finished(out: Path, total: int) -> None:
    assert_every_episode_exactly_once(out, total)
    result = json.loads((out / "result.json").read_text())
    assert result["episodes"] == total
    assert [point["target"] for point in result["points"]] == [0.5, 0.8]
    for point in result["points"]:
        assert point["compression"] >= point["target"]


def test_a_campaign_delivers_what_the_contract_promises(tmp_path: Path, environment: dict[str, str]) -> None:
    from env.compact_file import network_from_file

    out, controls = tmp_path / "out", ("random", "taylor", "gamma", "balanced-l1", "cem", "untrained")
    config = tiny(tmp_path / "tiny.toml", episodes=6)
    text = zeroout(environment, "run", config, "--out", out, "--controls")
    assert "baseline" in text
    assert str(out / "report.html") in text
    assert_finished(out, 6 * (1 + len(controls)))
    for name in ("campaign.toml", "versions.json", "frontier.json", "frontier.png", "report.html"):
        assert (out / name).stat().st_size > 0
    result = json.loads((out / "result.json").read_text())
    assert {"baseline", "points", "episodes", "seconds", "seed"} <= result.keys()
    assert result["baseline"].keys() >= {"val_accuracy", "test_accuracy", "parameters", "macs"}
    assert {(point["group"], point["target"]) for point in result["comparison"]} == {
        (group, target) for group in ("search", *controls, *PEERS) for target in (0.5, 0.8)
    }
    images = torch.zeros(2, 1, 8, 8)
    for point in result["points"]:
        # never worse, on validation, than a simpler method of the same campaign
        rivals = [other for other in result["comparison"] if other["target"] == point["target"]]
        assert point["val_accuracy"] == max(rival["val_accuracy"] for rival in rivals)
        network = network_from_file(str(out / point["model"]))
        assert sum(parameter.numel() for parameter in network.parameters()) == point["parameters"]
        assert 1 - point["parameters"] / result["baseline"]["parameters"] == pytest.approx(point["compression"])
        exported = network_from_file(str(out / "export" / f"{point['target']}.safetensors"))
        assert torch.equal(exported(images), network(images))
        assert onnx_logits(out / "export" / f"{point['target']}.onnx", images) == pytest.approx(
            network(images).detach().numpy(), abs=1e-4
        )
    assert_learned_on_the_way(out)
    before = {path: path.stat().st_mtime_ns for path in (out / "recovered").iterdir()}
    assert "baseline" in zeroout(environment, "resume", out)  # a finished campaign only prints its table
    assert {path: path.stat().st_mtime_ns for path in (out / "recovered").iterdir()} == before
    status = json.loads(zeroout(environment, "status", out, "--json"))
    assert (status["stage"], status["episodes"]) == ("done", 42)


def assert_learned_on_the_way(out: Path) -> None:
    """The learner made updates, and checkpoints of them; the same place has the same luck in every group."""
    assert list((out / "checkpoints").glob("update-*/manifest.json"))
    assert (out / "controller.safetensors").is_file()
    seeds = {}
    for record in episodes(out):
        seeds.setdefault(record["id"] % 6, set()).add(record["seed"])
        assert np.isfinite(record["return"])
        assert record["curve"][0][0] == pytest.approx(0.0)
    assert all(len(group) == 1 for group in seeds.values())


def onnx_logits(path: Path, images: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(None, {"images": images.numpy()})[0]
    return logits


def test_a_driver_killed_in_the_middle_is_resumed_with_every_episode_exactly_once(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    out, total = tmp_path / "out", 10
    config = tiny(tmp_path / "tiny.toml", episodes=total, step_minibatches=12)
    with started(environment, tmp_path / "log", "run", config, "--out", out) as driver:
        wait_until(lambda: len(episodes(out)) >= 4 or driver.poll() is not None, "four episodes are recorded")
        kill_with_descendants(driver)
    kept = (out / "episodes.jsonl").read_text()
    assert 4 <= len(episodes(out)) < total, (tmp_path / "log").read_text()
    zeroout(environment, "resume", out)
    assert (out / "episodes.jsonl").read_text().startswith(kept)
    assert_finished(out, total)


def test_actors_learner_and_server_killed_in_the_middle_lose_no_episode(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    out, total, log = tmp_path / "out", 20, tmp_path / "log"
    config = tiny(tmp_path / "tiny.toml", episodes=total, step_minibatches=12)
    mask_only = "controller.observation=mask"  # the source's Controller, whose campaign must run as well
    with started(environment, log, "run", config, "--out", out, "--set", mask_only) as driver:
        victims = ("ray::EpisodeActor", "ray::Learner", "-server unixsocket", "ray::EpisodeActor")
        for count, victim in enumerate(victims):
            wait_until(lambda: len(episodes(out)) >= 2 + 3 * count or driver.poll() is not None, "episodes go on")  # noqa: B023
            assert driver.poll() is None, log.read_text()
            kill_one(driver.pid, victim)
        assert driver.wait(LIMIT_S) == 0, log.read_text()
    assert len(re.findall(r"(actor-\d|learner) died; it is started again", log.read_text())) >= 2
    assert_finished(out, total)


def kill_one(leader: int, victim: str) -> None:
    """kill -9 the first process whose command line holds `victim`."""
    found = {pid: line for pid, line in descendants(leader).items() if victim in line}
    assert found, descendants(leader)
    os.kill(min(found), signal.SIGKILL)


def test_an_interrupted_campaign_says_how_to_go_on(tmp_path: Path, environment: dict[str, str]) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    config = tiny(tmp_path / "tiny.toml", episodes=40, step_minibatches=12)
    with started(environment, log, "run", config, "--out", out) as driver:
        wait_until(lambda: len(episodes(out)) >= 1 or driver.poll() is not None, "an episode is recorded")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(LIMIT_S) == 130, log.read_text()
    assert f"zeroout resume {out}" in log.read_text()
    assert episodes(out)
