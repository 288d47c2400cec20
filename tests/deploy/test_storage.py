"""A campaign's folder at a URI; the storage is a folder of this machine by its file:// URI."""

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest
import tiny_campaign
from rich.console import Console
from tiny_campaign import LIMIT_S, ROOT, command, tiny, wait_until

from deploy import doctor, storage
from deploy.folder import CampaignFolder
from deploy.storage import fetched, kept, probe
from env.errors import UserError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine remembers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there" / "mine"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


WHOLE = {"campaign.toml": "seed = 1", "episodes.jsonl": '{"id": 0}\n', "checkpoints/update-1/manifest.json": "{}"}


def test_what_is_whole_is_copied_and_what_only_this_machine_can_use_stays(there: Path) -> None:
    with kept(there.as_uri()) as here:
        assert here.name == "mine"  # by which those who watch know the campaign
        write(here, WHOLE)
        write(here, {"redis/appendonly.aof": "x", "lock": "", ".a.0.tmp": "", "checkpoints/.update-2.1/state.pt": ""})
    assert names(there) == sorted(WHOLE)
    assert {name: (there / name).read_text() for name in WHOLE} == WHOLE


def test_what_changes_is_copied_on_the_way_and_what_goes_is_removed(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PERIOD_S", 0.02)
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
        wait_until(lambda: there.is_dir() and names(there) == sorted(WHOLE), "all is there", 20)
        write(here, {"episodes.jsonl": '{"id": 0}\n{"id": 1}\n'})
        (here / "checkpoints/update-1/manifest.json").unlink()
        wait_until(lambda: names(there) == ["campaign.toml", "episodes.jsonl"], "the checkpoint is gone", 20)
        wait_until(lambda: (there / "episodes.jsonl").read_text().count("\n") == 2, "the episode is there", 20)


def test_a_record_goes_after_the_network_that_it_speaks_of(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    push = storage._Copy._push_one
    monkeypatch.setattr(storage._Copy, "_push_one", lambda copy, name: (pushed.append(name), push(copy, name)))
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "candidates/search-0.9.safetensors": "n", "result.json": "{}", "frontier.json": "{}"})
        write(here, {"checkpoints/update-1/state.pt": "s"})
    assert pushed.index("candidates/search-0.9.safetensors") < pushed.index("episodes.jsonl")
    assert pushed.index("checkpoints/update-1/state.pt") < pushed.index("checkpoints/update-1/manifest.json")
    assert pushed[-1] == "result.json"


def test_another_machine_goes_on_with_what_is_there(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with kept(there.as_uri()) as other:
        assert other != here
        assert names(other) == sorted(WHOLE)
        write(other, {"episodes.jsonl": '{"id": 0}\n{"id": 1}\n'})
    assert (there / "episodes.jsonl").read_text().count("\n") == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    assert fetched(there.as_uri()) == here  # behind: takes over what is there
    assert (here / "episodes.jsonl").read_text().count("\n") == 2


def test_a_machine_that_was_killed_before_its_last_copy_keeps_what_it_has(there: Path) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    write(here, {"episodes.jsonl": '{"id": 0}\n{"id": 1}\n'})
    with kept(there.as_uri()) as again:
        assert (again / "episodes.jsonl").read_text().count("\n") == 2
    assert (there / "episodes.jsonl").read_text().count("\n") == 2


def test_a_look_changes_nothing_where_the_campaign_runs(there: Path) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    with kept(there.as_uri()) as here, CampaignFolder(here).held():
        (here / "checkpoints/update-1/manifest.json").unlink()
        write(here, {"frontier.json": "newer"})
        write(there, {"frontier.json": "older", "checkpoints/update-0/state.pt": "s", "more": "m"})
        before = {name: (here / name).read_text() for name in names(here)}
        assert fetched(there.as_uri()) == here
        assert {name: (here / name).read_text() for name in names(here)} == before


def test_a_storage_that_is_away_for_a_while_is_told_of_once_and_tried_again(
    there: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = storage._Copy(there.as_uri())
    write(copy.folder, WHOLE)
    over, calls, push = threading.Event(), [], copy._push

    def flaky() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise OSError("no route to host")
        push()
        over.set()

    monkeypatch.setattr(storage, "PERIOD_S", 0.01)
    monkeypatch.setattr(copy, "_push", flaky)
    copy.keep(over)
    assert caplog.text.count("no route to host") == 1
    assert names(there) == sorted(WHOLE)


def test_a_storage_that_cannot_be_written_at_the_end_says_where_the_campaign_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = (tmp_path / "file" / "mine").as_uri()
    with pytest.raises(UserError, match="nothing is lost, it lies in") as caught, kept(uri) as here:
        write(here, WHOLE)
    assert str(here) in str(caught.value)
    assert names(here) == sorted(WHOLE)


def test_the_doctor_tries_a_uri_and_leaves_nothing_there(there: Path, tmp_path: Path) -> None:
    probe(there.as_uri())
    assert names(there) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a storage URI that can be read and written"):
        probe((tmp_path / "file" / "mine").as_uri())
    looks = dict(doctor._checks(Console(), None, "", None, None, there.as_uri()))
    assert looks["storage"]().detail == f"{there.as_uri()} can be written, read and deleted in"


@pytest.mark.parametrize("uri", ["nosuch://bucket/mine", "s3://", "://"])
def test_a_uri_that_means_nothing_is_the_users_to_correct(uri: str) -> None:
    with pytest.raises(UserError, match="expected a storage URI"):
        fetched(uri)


@pytest.mark.slow
def test_the_command_keeps_a_campaign_at_a_uri_and_shows_it_elsewhere(there: Path, tmp_path: Path) -> None:
    def zeroout(machine: str, *arguments: object) -> str:
        environment = {**tiny_campaign.environment(), "XDG_CACHE_HOME": str(tmp_path / machine)}
        ended = subprocess.run(
            command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    uri = there.as_uri()
    zeroout("one", "prune", tiny(tmp_path / "tiny.toml", episodes=1), "--out", uri, "--compression", "0.5")
    result = json.loads((there / "result.json").read_text())
    assert result["points"][0]["compression"] >= 0.5
    assert (there / result["points"][0]["model"]).is_file()
    assert json.loads(zeroout("two", "status", uri, "--json"))["stage"] == "done"
    before = os.stat(there / "result.json").st_mtime_ns
    assert "baseline" in zeroout("three", "resume", uri)  # finished: nothing is retrained
    assert json.loads((there / "result.json").read_text()) == result
    assert os.stat(there / "result.json").st_mtime_ns >= before
