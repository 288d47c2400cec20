"""The campaign folder survives crashes, full disks and wrong paths."""

import errno
import fcntl
import json
import os
import threading
import uuid
from pathlib import Path

import pytest

from deploy.folder import CampaignFolder, read_json, versions, write_atomic, write_json
from env.errors import UserError

TOML = '[search]\nepisodes = 24\nseed = 7\n[network]\nname = "vgg16"\n'


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    return CampaignFolder.create(tmp_path / "campaign", TOML)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_names_are_those_of_the_contract(tmp_path: Path) -> None:
    folder = CampaignFolder(tmp_path)
    paths = [
        folder.campaign_toml, folder.versions_json, folder.baseline, folder.episodes_jsonl, folder.frontier_json,
        folder.checkpoints, folder.result_json, folder.report_html, folder.frontier_png, folder.export,
        folder.redis, folder.recovered,
    ]  # fmt: skip
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "campaign.toml", "versions.json", "baseline", "episodes.jsonl", "frontier.json",
        "checkpoints", "result.json", "report.html", "frontier.png", "export",
        "redis", "recovered",
    ]  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "Größe")
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_the_users_to_mend_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    full_disk(monkeypatch)
    with pytest.raises(UserError, match="full disk"):
        write_atomic(path, "new")
    assert everything(tmp_path) == {"a.txt": b"old"}


def test_an_unknown_failure_of_the_disk_is_not_blamed_on_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="broken"):
        write_atomic(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == []


def test_json_comes_back_and_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, float("nan")], "b": {"c": float("inf")}, "d": ("x", True, None)})
    assert read_json(path) == {"a": [1, 2.5, None], "b": {"c": None}, "d": ["x", True, None]}


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe"])
def test_broken_json_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json"):
        read_json(tmp_path / "result.json")


def test_missing_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"result\.json.*no file"):
        read_json(tmp_path / "result.json")


def test_episodes_come_back_in_order_and_once_each(campaign: CampaignFolder) -> None:
    campaign.append_episode([{"id": 3, "return": -1.0}, {"id": 1, "return": float("nan")}])
    campaign.append_episode([{"id": 3, "return": 99.0}, {"id": 2, "policy": "a\nb"}])
    campaign.append_episode([])
    assert campaign.read_episodes() == [
        {"id": 3, "return": -1.0},
        {"id": 1, "return": None},
        {"id": 2, "policy": "a\nb"},
    ]


def test_no_episodes_file_means_no_episodes(campaign: CampaignFolder) -> None:
    assert campaign.read_episodes() == []


@pytest.mark.parametrize("torn", [b'{"id": 2, "poli', b'{"id": 2}', b"\x00\x00\x00", b"\xc3"])
def test_a_torn_last_line_is_ignored_and_cut_off_before_the_next(campaign: CampaignFolder, torn: bytes) -> None:
    campaign.append_episode([{"id": 1}])
    with campaign.episodes_jsonl.open("ab") as file:
        file.write(torn)
    assert campaign.read_episodes() == [{"id": 1}]
    campaign.append_episode([{"id": 2, "whole": True}])
    assert campaign.read_episodes() == [{"id": 1}, {"id": 2, "whole": True}]


def test_a_torn_line_longer_than_a_block_is_cut_off_whole(campaign: CampaignFolder) -> None:
    campaign.append_episode([{"id": 1}])
    with campaign.episodes_jsonl.open("ab") as file:
        file.write(b'{"keep_bits": "' + b"A" * 200_000)
    campaign.append_episode([{"id": 2}])
    assert campaign.episodes_jsonl.read_bytes() == b'{"id":1}\n{"id":2}\n'


def test_a_file_that_is_one_torn_line_is_cut_to_nothing(campaign: CampaignFolder) -> None:
    campaign.episodes_jsonl.write_bytes(b'{"id"')
    campaign.append_episode([{"id": 2}])
    assert campaign.read_episodes() == [{"id": 2}]


def test_a_full_disk_leaves_the_episodes_as_they_were(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign.append_episode([{"id": 1}])
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(UserError, match="full disk"):
            campaign.append_episode([{"id": 2}])
    assert campaign.episodes_jsonl.read_bytes() == b'{"id":1}\n'
    campaign.append_episode([{"id": 2}])
    assert [record["id"] for record in campaign.read_episodes()] == [1, 2]


@pytest.mark.parametrize("line", [b"{nonsense", b"[1]", b'{"id": "x"}', b""])
def test_a_completed_line_that_is_no_episode_is_an_error_that_names_it(campaign: CampaignFolder, line: bytes) -> None:
    campaign.episodes_jsonl.write_bytes(b'{"id": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"episodes\.jsonl, line 2"):
        campaign.read_episodes()


def test_an_episode_needs_an_id(campaign: CampaignFolder) -> None:
    with pytest.raises(ValueError, match="int id"):
        campaign.append_episode([{"id": 1}, {"policy": "taylor"}])
    assert campaign.read_episodes() == []


def test_a_wrong_path_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        CampaignFolder.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a folder without one"):
        CampaignFolder.open(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_same_campaign_again_is_resumed(campaign: CampaignFolder) -> None:
    campaign.append_episode([{"id": 1}])
    before = everything(campaign.path)
    again = CampaignFolder.create(campaign.path, "# a comment is no difference\n" + TOML)
    assert again == campaign == CampaignFolder.open(str(campaign.path))
    assert everything(campaign.path) == before


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (TOML.replace("24", "48").replace("vgg16", "small"), r"search\.episodes: expected 48 .*got 24"),
        (TOML.replace("vgg16", "small"), r"network\.name: expected 'small' .*got 'vgg16'"),
        (TOML.replace("seed = 7\n", ""), r"search\.seed: expected nothing .*got 7"),
        (TOML + "width = 0.5\n", r"network\.width: expected 0\.5 .*got nothing"),
    ],
)
def test_another_campaign_is_refused_and_stays_untouched(campaign: CampaignFolder, toml: str, message: str) -> None:
    before = everything(campaign.path)
    with pytest.raises(UserError, match=message):
        CampaignFolder.create(campaign.path, toml)
    assert everything(campaign.path) == before


def test_foreign_files_are_refused_and_stay_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        CampaignFolder.create(tmp_path, TOML)
    assert everything(tmp_path) == {"thesis.tex": b"ten years"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "campaign").write_text("x")
    with pytest.raises(UserError, match="got a file"):
        CampaignFolder.create(tmp_path / "campaign", TOML)


def test_what_a_crash_at_the_very_start_left_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / f".campaign.toml.{uuid.uuid4().hex}.tmp").write_text("[sea")
    assert CampaignFolder.create(tmp_path, TOML).campaign_toml.read_text() == TOML


def test_a_broken_campaign_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "campaign.toml").write_text("[")
    with pytest.raises(UserError, match=r"campaign\.toml.*valid TOML"):
        CampaignFolder.create(tmp_path, TOML)


def test_versions_name_what_a_campaign_ran_with() -> None:
    found = versions()
    assert list(found) == [
        "zeroout", "python", "torch", "ray", "redis-py", "gymnasium", "platform", "commit",
    ]  # fmt: skip
    assert all(found[name] for name in ("zeroout", "python", "torch", "ray", "redis-py", "gymnasium"))
    assert json.loads(json.dumps(found)) == found


def test_a_campaign_of_an_older_version_that_did_not_know_a_key_is_resumed(campaign: CampaignFolder) -> None:
    def resolve(toml: str) -> str:
        return toml if "brand_new" in toml else toml + "brand_new = 10\n"

    assert CampaignFolder.create(campaign.path, TOML + "brand_new = 10\n", resolve) == campaign
    assert campaign.campaign_toml.read_text() == TOML
    with pytest.raises(UserError, match=r"brand_new: expected 11 .*got 10"):
        CampaignFolder.create(campaign.path, TOML + "brand_new = 11\n", resolve)


def test_a_campaign_is_run_by_one_process_at_a_time_and_looked_at_by_all(campaign: CampaignFolder) -> None:
    with campaign.held():
        with pytest.raises(UserError, match="expected that nobody runs it, got another process"), campaign.held():
            pass
        assert CampaignFolder.open(campaign.path).read_episodes() == []
    with campaign.held():  # let go
        pass


def test_a_look_at_whether_a_campaign_runs_keeps_nobody_from_running_it(tmp_path: Path) -> None:
    campaign = CampaignFolder.create(tmp_path / "campaign", TOML)
    assert not campaign.is_held
    assert not (campaign.path / "lock").exists()
    with campaign.held():
        assert campaign.is_held
    assert not campaign.is_held
    with (campaign.path / "lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with campaign.held():
            assert campaign.is_held


def test_a_campaign_can_go_on_with_the_keys_of_another(campaign: CampaignFolder, tmp_path: Path) -> None:
    other = CampaignFolder.create(tmp_path / "other", TOML)
    other.adopt_redis_prefix(campaign.make_redis_prefix())
    assert other.redis_prefix() == other.make_redis_prefix() == campaign.redis_prefix()
