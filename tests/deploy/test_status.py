"""The status is read from the folder alone, at every stage."""

import contextlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy import status as module
from deploy.folder import CampaignFolder, write_json
from deploy.live_file import LiveFile, read_live
from deploy.progress import ActorLine, SearchSnapshot
from deploy.status import STAGES, read_status, render_status, watch, watch_json
from env.errors import UserError


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    return CampaignFolder.create(tmp_path / "campaign", "seed = 1\n")


def record(id: int, actor: str, seconds: float = 20.0) -> dict[str, Any]:
    loss = 1.5 - 0.01 * id
    point = {
        "target": 0.9, "compression": 0.9002, "parameters": 9, "macs": 9, "accuracy": 0.5,
        "cross_entropy": loss, "keep_bits": "AA==",
    }  # fmt: skip
    return {
        "id": id, "group": "search", "actor": actor, "policy": "[controller]", "seed": id, "steps": 8,
        "seconds": seconds, "return": -loss, "curve": [[0.0, 0.8], [0.9, 0.5]], "targets": [point],
    }  # fmt: skip


RESULT = {
    "baseline": {"val_accuracy": 0.8, "test_accuracy": 0.79, "parameters": 1, "macs": 1},
    "points": [{"compression": 0.9002, "val_accuracy": 0.75, "test_accuracy": 0.7437, "policy": "[controller]"}],
}


def rendered(status: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=110)
    render_status(status, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_stage_follows_from_the_products(campaign: CampaignFolder) -> None:
    stages = [read_status(campaign)["stage"]]
    campaign.baseline.mkdir()
    (campaign.baseline / "network.safetensors").touch()
    stages.append(read_status(campaign)["stage"])  # its manifest comes last and is not there
    write_json(campaign.baseline / "baseline.json", {})
    stages.append(read_status(campaign)["stage"])
    campaign.append_episode([record(0, "actor-0")])
    stages.append(read_status(campaign, episodes_total=2)["stage"])
    campaign.append_episode([record(1, "actor-0")])
    stages.append(read_status(campaign, episodes_total=2)["stage"])
    campaign.recovered.mkdir()
    (campaign.recovered / "90.safetensors").touch()
    stages.append(read_status(campaign)["stage"])
    campaign.export.mkdir()
    (campaign.export / "90.onnx").touch()
    stages.append(read_status(campaign)["stage"])
    write_json(campaign.result_json, RESULT)
    stages.append(read_status(campaign)["stage"])
    assert stages == ["prepare", "prepare", "search", "search", "recover", "recover", "export", "done"]
    assert set(stages) == set(STAGES)


def test_the_throughput_of_each_actor_comes_from_its_episodes(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(0, "actor-0"), record(1, "actor-1", 30.0), record(2, "actor-0", 10.0)])
    assert read_status(campaign)["actors"] == [
        {"name": "actor-0", "episodes": 2, "steps": 16, "seconds": 30.0, "episodes_per_minute": 4.0, "state": None},
        {"name": "actor-1", "episodes": 1, "steps": 8, "seconds": 30.0, "episodes_per_minute": 2.0, "state": None},
    ]


def test_the_status_is_json_and_holds_no_masks(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(0, "actor-0"), record(5, "actor-1")])
    found = read_status(str(campaign.path))
    assert json.loads(json.dumps(found)) == found
    assert found["frontier"][0]["episode"] == 5
    assert "keep_bits" not in found["frontier"][0]
    assert found["episodes"] == 2
    assert found["seconds_since_episode"] < 60


def test_the_total_is_the_callers_or_the_recorded_one(campaign: CampaignFolder) -> None:
    assert read_status(campaign)["episodes_total"] is None
    write_json(campaign.frontier_json, {"episodes_total": 40})
    assert read_status(campaign)["episodes_total"] == 40
    assert read_status(campaign, episodes_total=8)["episodes_total"] == 8
    write_json(campaign.frontier_json, [])
    assert read_status(campaign)["episodes_total"] is None


def test_reading_changes_nothing(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(0, "actor-0")])
    with campaign.episodes_jsonl.open("a") as file:
        file.write('{"id": 1, "torn')
    before = {path.name: path.read_bytes() for path in campaign.path.iterdir()}
    assert read_status(campaign)["episodes"] == 1
    assert {path.name: path.read_bytes() for path in campaign.path.iterdir()} == before


def test_a_wrong_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_status(tmp_path / "nowhere")


def test_the_rendering_shows_stage_actors_frontier_and_result(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(0, "[actor-0]")])
    text = rendered(read_status(campaign, episodes_total=9))
    for words in ("[search]", "1 of 9 episodes, the last", "[actor-0]", "3.00", "90.02%", "1.500"):
        assert words in text
    write_json(campaign.result_json, RESULT)
    text = rendered(read_status(campaign))
    for words in ("[done]", "baseline", "79.00%", "[controller]", "74.37%"):
        assert words in text


def test_the_networks_that_are_recovered_are_shown_while_the_others_are_not(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(0, "actor-0")])
    for folder, names in (
        (campaign.candidates, ("search-0.5", "search-0.9", "taylor-0.5", "taylor-0.9", "uniform-0.9")),
        (campaign.recovered, ("search-0.9", "taylor-0.5", "search-0.5")),
    ):
        folder.mkdir()
        for name in names:
            group, target = name.split("-")
            facts = {"group": group, "policy": f"[{group}]", "target": float(target), "compression": float(target)}
            write_json(folder / f"{name}.json", facts | {"validation": {"accuracy": 0.77, "cross_entropy": 0.5}})
            (folder / f"{name}.safetensors").touch()
    (campaign.candidates / "uniform-0.9.safetensors").unlink()  # a peer that failed leaves its reason alone
    (campaign.recovered / "search-0.5.json").unlink()  # written last, and not there yet
    found = read_status(campaign, episodes_total=1)
    assert (found["stage"], found["to_recover"]) == ("recover", 4)
    assert found["recovered"] == [
        {"group": "search", "policy": "[search]", "target": 0.9, "compression": 0.9, "val_accuracy": 0.77},
        {"group": "taylor", "policy": "[taylor]", "target": 0.5, "compression": 0.5, "val_accuracy": 0.77},
    ]
    lines = rendered(found).splitlines()
    assert "1 of 1 episodes, 2 of 4 networks recovered, the last " in lines[2]
    table = [line.split() for line in lines[lines.index(next(line for line in lines if "recovered of" in line)) + 1 :]]
    assert [cells[:1] + cells[-2:] for cells in table] == [
        ["taylor:", "50.00%", "77.00%"], ["search:", "90.00%", "77.00%"],
    ]  # fmt: skip
    write_json(campaign.result_json, RESULT)
    assert "recovered of" not in rendered(read_status(campaign))


def test_a_network_after_replacement_stands_between_the_baseline_and_the_result(campaign: CampaignFolder) -> None:
    write_json(campaign.result_json, RESULT | {"replacement": {"how": "2", "val_accuracy": 0.7, "test_accuracy": 0.68}})
    lines = rendered(read_status(campaign)).splitlines()
    (place,) = [number for number, line in enumerate(lines) if "after replacement 2" in line]
    assert "70.00%" in lines[place]
    assert "68.00%" in lines[place]
    assert "baseline" in lines[place - 1]


def test_an_empty_campaign_can_be_rendered(campaign: CampaignFolder) -> None:
    assert "[prepare]" in rendered(read_status(campaign))


def looked_at(campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens between one look and the next, of a campaign that somebody runs to its end; emptied by it."""
    runs = contextlib.ExitStack()
    runs.enter_context(campaign.held())
    acts: list[Callable[[], object]] = [
        lambda: None,
        lambda: campaign.append_episode([record(0, "actor-0")]),
        lambda: write_json(campaign.result_json, RESULT),
        runs.close,
    ]
    monkeypatch.setattr(module.time, "sleep", lambda seconds: acts.pop(0)())
    return acts


@pytest.mark.parametrize("is_terminal", [False, True])
def test_watching_ends_when_nobody_runs_the_campaign_any_more(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    screen, acts = io.StringIO(), looked_at(campaign, monkeypatch)
    watch(lambda: campaign, Console(file=screen, force_terminal=is_terminal, width=110), 0.01)
    assert not acts
    assert "[done]" in screen.getvalue() or is_terminal
    assert "74.37%" in screen.getvalue()
    if not is_terminal:
        assert screen.getvalue().count("prepare") == 4  # of five looks, one brought nothing new


def test_watching_as_json_is_a_line_whenever_there_is_news(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at(campaign, monkeypatch)
    found = [json.loads(line) for line in watch_json(lambda: campaign, 0.01)]
    assert [(status["stage"], status["episodes"], status["running"]) for status in found] == [
        ("prepare", 0, True), ("search", 1, True), ("done", 1, True), ("done", 1, False),
    ]  # fmt: skip


def test_a_campaign_that_was_stopped_is_said_to_be_and_watching_it_ends(campaign: CampaignFolder) -> None:
    with campaign.held():
        assert read_status(campaign)["running"]
    screen = io.StringIO()
    watch(lambda: campaign, Console(file=screen, width=200), 0.01)
    assert f"nobody runs it here now; zeroout resume {campaign.path} goes on" in screen.getvalue()


def test_what_the_driver_knows_of_a_running_search_is_shown(campaign: CampaignFolder) -> None:
    campaign.append_episode([record(0, "actor-10"), record(1, "actor-9")])
    actors = [ActorLine(name=f"actor-{n}", episodes=1, episodes_per_minute=1.0, state=f"step {n}") for n in (2, 9, 10)]
    LiveFile(campaign.live_json).write(
        SearchSnapshot(
            done=2, total=9, actors=actors, learner_updates=31, learner_loss=math.nan, replay_size=77, best=[],
            seconds_elapsed=60.0, seconds_left=210.0,
        )
    )  # fmt: skip
    with campaign.held():
        found = read_status(campaign, episodes_total=9)
    assert [(actor["name"], actor["episodes"], actor["state"]) for actor in found["actors"]] == [
        ("actor-2", 0, "step 2"), ("actor-9", 1, "step 9"), ("actor-10", 1, "step 10"),
    ]  # fmt: skip
    assert (found["learner"], found["replay"]) == ({"updates": 31, "loss": None}, 77)
    text = rendered(found)
    for words in ("learner: 31 updates, loss -; replay: 77 sequences", "4 min left", "step 10"):
        assert words in text
    stopped = read_status(campaign, episodes_total=9)
    assert (stopped["learner"], stopped["seconds_left"]) == ({"updates": 31, "loss": None}, None)
    assert [actor["state"] for actor in stopped["actors"]] == [None, None]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"done": 3}'])
def test_a_live_file_that_cannot_be_read_is_as_none(campaign: CampaignFolder, content: bytes) -> None:
    campaign.live_json.write_bytes(content)
    assert read_status(campaign)["learner"] is None


def test_the_live_file_is_written_every_two_seconds_and_where_it_cannot_be_nothing_is_said(tmp_path: Path) -> None:
    now = [0.0]
    live = LiveFile(tmp_path / "live.json", clock=lambda: now[0])
    snapshot = SearchSnapshot(
        done=0, total=9, actors=[], learner_updates=0, learner_loss=None, replay_size=0, best=[],
        seconds_elapsed=0.0, seconds_left=None,
    )  # fmt: skip
    for now[0], done in ((0.0, 1), (1.9, 2), (2.1, 3)):
        live.write(replace(snapshot, done=done))
    found = read_live(tmp_path / "live.json")
    assert found is not None
    assert found["done"] == 3
    LiveFile(tmp_path / "nowhere" / "live.json").write(snapshot)


def test_ctrl_c_reaches_the_caller(campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with campaign.held():
        monkeypatch.setattr(time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            watch(lambda: campaign, Console(file=io.StringIO()), 0.01)
