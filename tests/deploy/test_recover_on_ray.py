"""Recoveries side by side on a Ray with invented GPUs: the driver's networks, whatever is killed on the way."""

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private import state as ray_state
from rich.console import Console

from deploy import recover_on_ray
from deploy.candidates import candidate_path
from deploy.config import CampaignConfig, dump, parse
from deploy.folder import CampaignFolder, read_json, write_json
from deploy.prepare import Baseline, preflight, prepare
from deploy.progress import PlainProgress
from deploy.recover import Recovery
from deploy.recover_on_ray import may_share
from env.channels import ChannelPlan
from env.compact_file import network_to_bytes
from env.errors import NonFiniteError

pytestmark = pytest.mark.slow

CAMPAIGN = """
seed = 3
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 2
batch_size = 64
[episode]
targets = [0.4, 0.5, 0.6]
[recovery]
epochs = 10
batch_size = 64
learning_rate = 0.05
[cluster]
dashboard = false
"""


class Listening(PlainProgress):
    """Keeps the lines, and calls `on_share` with what is done."""

    def __init__(self) -> None:
        self.said = io.StringIO()
        super().__init__(Console(file=self.said, width=200))
        self.on_share: Callable[[int], None] = lambda _done: None

    def share(self, stage: str, done: int, total: int) -> None:
        super().share(stage, done, total)
        self.on_share(done)

    @property
    def text(self) -> str:
        return self.said.getvalue()


@dataclass(frozen=True)
class Ready:
    """A campaign whose search is over."""

    folder: CampaignFolder
    config: CampaignConfig
    baseline: Baseline
    progress: Listening

    def recovery(self) -> Recovery:
        return Recovery(self.folder, self.config, preflight(self.config), self.baseline, self.progress)

    def made(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.recovered.glob("*.safetensors"))}


def actors() -> list[int]:
    """The processes of recoveries."""
    found = ray_state.actors().values()
    return [each["Pid"] for each in found if each["State"] == "ALIVE" and "RecoveryActor" in each["ActorClassName"]]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60.0
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def ready(path: Path) -> Ready:
    config = parse(CAMPAIGN)
    folder = CampaignFolder.create(path, dump(config))
    dataset, progress = preflight(config), Listening()
    baseline = prepare(folder, config, dataset, progress)
    plan = ChannelPlan(baseline.network, torch.zeros(1, *dataset.image_shape))
    candidate_path(folder, "search", 0.5).parent.mkdir()
    for place, target in enumerate(config.episode.targets):
        network = plan.compact(baseline.network, torch.arange(plan.units) % (2 + place) != 0)
        candidate_path(folder, "search", target).write_bytes(network_to_bytes(network, baseline.form))
        write_json(candidate_path(folder, "search", target).with_suffix(".json"), {"policy": "taylor", "episode": 0})
    return Ready(folder, config, baseline, progress)


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    """A local Ray that a campaign would have started, with GPUs that are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(recover_on_ray, "ray_session", lambda *_: contextlib.nullcontext())
        patch.setattr(recover_on_ray, "_POLL_S", 0.1)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """What the driver makes by itself."""
    campaign = ready(tmp_path_factory.mktemp("alone"))
    campaign.recovery().run()
    assert sorted(campaign.made()) == [f"search-{target}.safetensors" for target in (0.4, 0.5, 0.6)]
    return campaign


@pytest.mark.usefixtures("two_gpus")
def test_they_are_the_networks_that_the_driver_makes(alone: Ready, tmp_path: Path) -> None:
    campaign = ready(tmp_path / "out")
    campaign.recovery().run()
    assert campaign.made() == alone.made()
    for target in campaign.config.episode.targets:
        name = f"search-{target}.json"
        assert read_json(campaign.folder.recovered / name) == read_json(alone.folder.recovered / name)
    assert "recover: 3 networks, 10 epochs each, up to 2 at a time" in campaign.progress.text
    assert campaign.progress.text.count(": recovered, accuracy ") == 3
    assert actors() == []


@pytest.mark.usefixtures("two_gpus")
def test_a_recovery_whose_actor_is_killed_goes_on_from_its_checkpoint(alone: Ready, tmp_path: Path) -> None:
    campaign = ready(tmp_path / "out")
    checkpoint, killed = campaign.folder.recovered / "search-0.4.pt", list[int]()

    def kill_once(_done: int) -> None:
        if not killed and checkpoint.exists():
            for pid in actors():
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

    campaign.progress.on_share = kill_once
    campaign.recovery().run()
    assert killed
    assert campaign.made() == alone.made()


@pytest.mark.usefixtures("two_gpus")
def test_a_driver_that_is_stopped_goes_on_where_its_recoveries_were(alone: Ready, tmp_path: Path) -> None:
    campaign = ready(tmp_path / "out")

    def stop(_done: int) -> None:
        if list(campaign.folder.recovered.glob("*.pt")):
            raise KeyboardInterrupt

    campaign.progress.on_share = stop
    with pytest.raises(KeyboardInterrupt):
        campaign.recovery().run()
    wait_until(lambda: actors() == [])
    campaign.progress.on_share = lambda _done: None
    campaign.recovery().run()
    assert campaign.made() == alone.made()


@pytest.mark.usefixtures("two_gpus")
def test_what_fails_there_time_and_again_is_made_by_the_driver(
    alone: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def run(self, *_: object) -> bytes:
            raise MemoryError("no room on this GPU")

        def news(self, _version: int) -> None:
            raise MemoryError

    def start(_name: str, _order: object, *, gpus: float, **_others: object) -> Any:
        return ray.remote(Failing).options(num_gpus=gpus).remote()

    monkeypatch.setattr(recover_on_ray, "start_recovery", start)
    monkeypatch.setattr(recover_on_ray, "_MAX_FAILURES", 2)
    campaign = ready(tmp_path / "out")
    campaign.recovery().run()
    assert campaign.made() == alone.made()
    said = "search 40.00%: failed 2 times in a row (MemoryError: no room on this GPU); it is made here later"
    assert said in campaign.progress.text


@pytest.mark.usefixtures("two_gpus")
def test_that_nobody_has_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_on_ray, "_NOBODY_S", 0.0)
    campaign = ready(tmp_path / "out")

    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    campaign.progress.on_share = stop
    with pytest.raises(KeyboardInterrupt):
        campaign.recovery().run()
    assert "no recovery has begun yet: each asks for 1 GPUs and 1 cores; ray status" in campaign.progress.text


@pytest.mark.usefixtures("two_gpus")
def test_a_training_s_own_error_ends_them_and_says_how_to_go_on(tmp_path: Path) -> None:
    campaign = ready(tmp_path / "out")
    with torch.no_grad():
        next(campaign.baseline.network.parameters()).fill_(torch.inf)  # the teacher's
    with pytest.raises(NonFiniteError, match=r"^search .*%: .* To go on: change that in .*campaign\.toml"):
        campaign.recovery().run()
    assert campaign.made() == {}


@pytest.mark.parametrize(
    ("setting", "gpus", "asked"),
    [
        ("", 0, False), ("", 1, False), ("", 2, True),
        ('cluster.ray_address="host:6379"', 0, True),
        ("search.actors=1", 2, False), ("cluster.gpus_per_actor=0", 2, False), ('search.method="taylor"', 2, False),
    ],
)  # fmt: skip
def test_ray_is_asked_only_where_it_may_have_several_gpus(
    monkeypatch: pytest.MonkeyPatch, setting: str, gpus: int, asked: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = parse("", [setting] if setting else [])
    assert may_share(config) == asked
    assert not may_share(replace(config, search=replace(config.search, actors=1)))
