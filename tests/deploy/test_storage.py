"""A campaign's folder at a URI; the storage is a folder of this machine by its file:// URI."""

import json
import os
import platform
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_campaign
from rich.console import Console
from tiny_campaign import LIMIT_S, ROOT, command, tiny, wait_until

from deploy import doctor, storage, storage_hold
from deploy.campaign import interruptible
from deploy.config import CampaignConfig, dump
from deploy.folder import CampaignFolder, copy_of
from deploy.status import read_status
from deploy.storage import fetched, kept, probe
from deploy.storage_hold import HELD, Holder
from env.errors import UserError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine remembers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there" / "mine"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are copied, and the hold of the URI is renewed, without much waiting."""
    monkeypatch.setattr(storage, "PERIOD_S", 0.02)
    monkeypatch.setattr(storage_hold, "PERIOD_S", 0.2)


def holder(there: Path) -> Holder:
    found = storage_hold.parsed((there / HELD).read_bytes())
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    """The files of a campaign; who has it is another matter."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != HELD)


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
        write(here, {**WHOLE, "checkpoints/update-0/state.pt": "old"})
    write(here, {"episodes.jsonl": '{"id": 0}\n{"id": 1}\n'})
    (here / "checkpoints/update-0/state.pt").unlink()
    assert fetched(there.as_uri()) == here  # a look changes nothing there either
    with kept(there.as_uri()) as again:
        assert (again / "episodes.jsonl").read_text().count("\n") == 2
        assert names(again) == sorted(WHOLE)
    assert (there / "episodes.jsonl").read_text().count("\n") == 2
    assert names(there) == sorted(WHOLE)


def test_what_another_machine_has_gone_on_with_takes_the_place_of_what_is_here(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "frontier.json": "older"})
    write(here, {"episodes.jsonl": '{"id": 0}\n{"id": 1}\n{"id": 2}\n', "candidates/a.json": "{}"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with kept(there.as_uri()) as other:
        write(other, {"frontier.json": "newer", "checkpoints/update-2/manifest.json": "{}"})
        (other / "checkpoints/update-1/manifest.json").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    with kept(there.as_uri()) as again:
        assert again == here
        assert names(here) == ["campaign.toml", "checkpoints/update-2/manifest.json", "episodes.jsonl", "frontier.json"]
        assert (here / "episodes.jsonl").read_text() == WHOLE["episodes.jsonl"]
        assert (here / "frontier.json").read_text() == "newer"


def test_a_fetch_that_was_cut_off_is_made_whole_by_the_next(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    read = storage._Copy.read

    def cut_off(copy: storage._Copy, name: str) -> bytes:
        if name == "episodes.jsonl":
            raise OSError("connection reset")
        return read(copy, name)

    with monkeypatch.context() as broken:
        broken.setattr(storage._Copy, "read", cut_off)
        with pytest.raises(UserError, match="connection reset"), kept(there.as_uri()):
            pytest.fail("begun")
    with kept(there.as_uri()) as other:
        assert names(other) == sorted(WHOLE)


def test_nobody_else_runs_a_campaign_that_runs(there: Path, quick: None) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
        with (
            pytest.raises(UserError, match=rf"nobody else runs it, got process {os.getpid()} on"),
            kept(there.as_uri()),
        ):
            pytest.fail("two")
        assert names(here) == sorted(WHOLE)
    with kept(there.as_uri()):
        pass


def test_who_has_lost_the_uri_is_ended_and_writes_nothing_more_there(there: Path, quick: None) -> None:
    def lost() -> None:
        with interruptible(), kept(there.as_uri()) as here:
            write(here, WHOLE)
            wait_until(lambda: there.is_dir() and names(there) == sorted(WHOLE), "all is there", 20)
            (there / HELD).write_bytes(took(holder(there)))
            write(here, {"frontier.json": "of one who does not know"})
            # again and again, as the renewal that is under way may come after the first
            wait_until(lambda: (there / HELD).write_bytes(took(holder(there))) == 0, "it is interrupted", 20)

    def took(from_whom: Holder) -> bytes:
        return replace(from_whom, run="another", process=7, host="elsewhere").as_bytes()

    with pytest.raises(UserError, match="got process 7 on elsewhere"):
        lost()
    assert names(there) == sorted(WHOLE)
    assert holder(there).run == "another"


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


def test_a_look_from_elsewhere_fetches_what_has_changed_and_says_who_runs_it(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    texts = {"campaign.toml": dump(CampaignConfig()), "frontier.json": "{}", "checkpoints/update-1/state.pt": "s"}
    read, fetches = storage._Copy.read, list[str]()
    monkeypatch.setattr(storage._Copy, "read", lambda copy, name: (fetches.append(name), read(copy, name))[1])
    with kept(there.as_uri()) as here:
        write(here, texts)
        wait_until(lambda: there.is_dir() and names(there) == sorted(texts), "all is there", 20)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        other = fetched(there.as_uri())
        assert names(other) == ["campaign.toml", "frontier.json"]  # not what only the learner reads
        assert copy_of(str(other)) == there.as_uri()
        assert read_status(other)["elsewhere"] == f"process {os.getpid()} on {platform.node()}"
        assert read_status(other)["running"]
        write(here, {"frontier.json": '{"episodes_total": 3}'})
        wait_until(lambda: "3" in (there / "frontier.json").read_text(), "the news is there", 20)
        fetches.clear()
        fetched(there.as_uri())
        assert set(fetches) == {HELD, "frontier.json"}
        assert read_status(other)["episodes_total"] == 3
        # people are told how long ago it was
        assert (other / "frontier.json").stat().st_mtime == (there / "frontier.json").stat().st_mtime
    fetched(there.as_uri())
    assert read_status(other)["elsewhere"] is None
    assert not read_status(other)["running"]


def test_a_storage_that_is_away_for_a_while_is_told_of_once_and_tried_again(
    there: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = storage._Copy(there.as_uri())
    write(copy.folder, WHOLE)
    over, calls, push = threading.Event(), [], copy._push
    hold = storage.Hold(copy, storage._TROUBLE)

    def flaky() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise OSError("no route to host")
        push()
        over.set()

    monkeypatch.setattr(storage, "PERIOD_S", 0.01)
    monkeypatch.setattr(copy, "_push", flaky)
    copy.keep(hold, over)
    assert caplog.text.count("no route to host") == 1
    assert names(there) == sorted(WHOLE)


def test_a_storage_that_cannot_be_written_at_the_end_says_where_the_campaign_is(there: Path) -> None:
    def broken_at_the_end() -> None:
        with kept(there.as_uri()) as here:
            write(here, WHOLE)
            shutil.rmtree(there.parent)
            there.parent.write_text("")

    with pytest.raises(UserError, match="nothing is lost, it lies in") as caught:
        broken_at_the_end()
    here = Path(str(caught.value).split("it lies in ")[1].split(";")[0])
    assert names(here) == sorted(WHOLE)


def test_a_storage_that_cannot_be_written_is_told_of_before_anything_is_begun(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="expected a storage URI that can be read and written"),
        kept((tmp_path / "file" / "mine").as_uri()),
    ):
        pytest.fail("begun")


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
