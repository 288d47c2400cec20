"""`zeroout replay-info`: what it shows of a running campaign, and one line when none runs."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import Zeroout
from rich.console import Console

import deploy.replay_info as module
from deploy.config import CampaignConfig, dump
from deploy.folder import CampaignFolder
from deploy.redis_server import EmbeddedServer, running_url
from deploy.replay_info import read_replay_info, render_replay_info, watch_replay_info
from env.errors import UserError
from learner.replay.connection import connect
from learner.replay.replay import Item
from learner.replay.shards import open_replay


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    return CampaignFolder.create(tmp_path / "campaign", dump(CampaignConfig()))


@pytest.fixture
def running(campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedServer]:
    """A campaign whose server runs, with 25 sequences."""
    config = CampaignConfig().replay_in_search
    with EmbeddedServer(campaign.redis) as server, connect(server.url) as client:
        replay = open_replay([client], campaign.make_redis_prefix(), config, np.random.default_rng(0))
        replay.insert([Item(f"s{i}", b"x" * 1024, 1.0 + i) for i in range(25)])
        monkeypatch.setattr(module, "_APART_S", 0.01)
        yield server


def _text(found: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=110)
    render_replay_info(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_running_server_is_found_by_the_folder(campaign: CampaignFolder, running: EmbeddedServer) -> None:
    def meanwhile(seconds: float) -> None:
        config, prefix = CampaignConfig().replay_in_search, campaign.make_redis_prefix()
        with connect(running.url) as client:
            replay = open_replay([client], prefix, config, np.random.default_rng(1))
            replay.insert([Item(f"new{i}", b"x" * 1024, 1.0) for i in range(5)])

    found = read_replay_info(campaign, sleep=meanwhile)
    assert json.loads(json.dumps(found)) == found
    assert found["server"] == running.url
    assert (found["size"], found["inserted"], found["bytes"]) == (30, 30, 30 * 1024)
    assert found["inserts_per_s"] > 0
    assert found["samples_per_s"] == 0
    assert found["ages"][0] == 0
    assert found["priorities"][-1] == pytest.approx(25.0)
    assert found["waiting"] == "actors"  # these sequences are enough, and none was sampled
    text = _text(found)
    for words in ("held", "30", "the actors wait for the learner", "age, in sequences inserted since", "25"):
        assert words in text


def test_the_server_may_be_given(campaign: CampaignFolder, running: EmbeddedServer) -> None:
    assert read_replay_info(campaign, running.url)["size"] == 25


def test_the_command_prints_a_table_or_json(
    zeroout: Zeroout, campaign: CampaignFolder, running: EmbeddedServer
) -> None:
    for option, word in (([], "inserted"), (["--json"], '"waiting": "actors"')):
        ended = zeroout("replay-info", campaign.path, *option)
        assert ended.code == 0
        assert word in ended.output


def test_watching_shows_it_anew_until_the_server_ends(
    campaign: CampaignFolder, running: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([running.url, running.url, None])
    monkeypatch.setattr(module, "running_url", lambda folder: next(looks))
    screen = io.StringIO()
    with pytest.raises(UserError, match="no server that answers"):
        watch_replay_info(campaign, Console(file=screen, width=110))
    assert screen.getvalue().count("the actors wait for the learner") == 2


def test_without_a_running_server_there_is_one_clear_line(campaign: CampaignFolder) -> None:
    with pytest.raises(UserError, match="expected a search in progress, with its Redis running, got no server"):
        read_replay_info(campaign)
    campaign.make_redis_prefix()
    (campaign.path / "server").write_text("redis://:***@host:1/0")
    with pytest.raises(UserError, match="got one that needs a password"):
        read_replay_info(campaign)
    (campaign.path / "server").write_text("redis://127.0.0.1:1/0")
    with pytest.raises(UserError, match=r"none that answers at redis://127\.0\.0\.1:1/0") as caught:
        read_replay_info(campaign)
    assert "\n" not in str(caught.value)


def test_a_server_killed_with_its_owner_does_not_count_as_running(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        url = server.url
        assert running_url(tmp_path) == url
    assert running_url(tmp_path) is None
    (tmp_path / "url").write_text(url)  # left behind
    assert running_url(tmp_path) is None
