"""A campaign's folder at a URI; the storage is a folder of this machine by its file:// URI."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_campaign
from rich.console import Console
from tiny_campaign import LIMIT_S, ROOT, command, tiny, wait_until

from deploy import doctor, storage, storage_copy, storage_hold
from deploy.campaign import interruptible
from deploy.config import CampaignConfig, dump
from deploy.folder import copy_of
from deploy.status import read_status
from deploy.storage import kept, looker, probe
from deploy.storage_copy import Copy
from deploy.storage_hold import HELD, Hold, Holder
from deploy.storage_remote import TROUBLE, Remote
from env.errors import UserError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine remembers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be on another machine from there on."""
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there" / "mine"


def fetched(uri: str) -> Path:
    """One look."""
    return looker(uri)()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are copied, and the hold of the URI is renewed, without much waiting."""
    monkeypatch.setattr(storage, "PERIOD_S", 0.02)
    monkeypatch.setattr(storage_hold, "PERIOD_S", 0.2)


def holder(there: Path) -> Holder:
    return storage_hold.parsed((there / HELD).read_bytes())


def names(folder: Path) -> list[str]:
    """The files of a campaign; who has it is another matter."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != HELD)


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


TWO = '{"id": 0}\n{"id": 1}\n'
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
        write(here, {"episodes.jsonl": TWO, "checkpoints/update-2/manifest.json": "{}"})
        (here / "checkpoints/update-1/manifest.json").unlink()
        left = ["campaign.toml", "checkpoints/update-2/manifest.json", "episodes.jsonl"]
        wait_until(lambda: names(there) == left, "the checkpoint is gone", 20)
        wait_until(lambda: (there / "episodes.jsonl").read_text().count("\n") == 2, "the episode is there", 20)


def test_a_record_goes_after_the_network_that_it_speaks_of(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    push = Copy._push_one
    monkeypatch.setattr(Copy, "_push_one", lambda copy, name: (pushed.append(name), push(copy, name)))
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "candidates/search-0.9.safetensors": "n", "result.json": "{}", "frontier.json": "{}"})
        write(here, {"checkpoints/update-1/state.pt": "s"})
    assert pushed[0] == "campaign.toml"  # without which it is no campaign, and others' files
    assert pushed.index("candidates/search-0.9.safetensors") < pushed.index("episodes.jsonl")
    assert pushed.index("checkpoints/update-1/state.pt") < pushed.index("checkpoints/update-1/manifest.json")
    assert pushed[-1] == "result.json"


def test_another_machine_goes_on_with_what_is_there(there: Path, another: Callable[[str], None]) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    another("elsewhere")
    with kept(there.as_uri(), existing=True) as other:
        assert other != here
        assert names(other) == sorted(WHOLE)
        write(other, {"episodes.jsonl": TWO})
    assert (there / "episodes.jsonl").read_text() == TWO


def test_a_machine_that_was_killed_before_its_last_copy_keeps_what_it_has(there: Path) -> None:
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "checkpoints/update-0/state.pt": "old"})
    write(here, {"episodes.jsonl": TWO})
    (here / "checkpoints/update-0/state.pt").unlink()
    write(there, {"notes.txt": "of a colleague"})
    assert fetched(there.as_uri()) == here  # a look changes nothing there either
    with kept(there.as_uri()) as again:
        assert (again / "episodes.jsonl").read_text() == TWO
        assert set(names(again)) == {*WHOLE, "notes.txt"}  # nor can it be told from the campaign's own
    assert (there / "episodes.jsonl").read_text() == TWO
    assert names(there) == sorted([*WHOLE, "notes.txt"])


def test_what_another_machine_has_gone_on_with_takes_the_place_of_what_is_here(
    there: Path, another: Callable[[str], None]
) -> None:
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "frontier.json": "older"})
    write(here, {"episodes.jsonl": TWO, "candidates/a.json": "{}"})
    another("elsewhere")
    with kept(there.as_uri()) as other:
        write(other, {"frontier.json": "newer", "checkpoints/update-2/manifest.json": "{}"})
        (other / "checkpoints/update-1/manifest.json").unlink()
    another("here")
    with kept(there.as_uri()) as again:
        assert again == here
        assert names(here) == ["campaign.toml", "checkpoints/update-2/manifest.json", "episodes.jsonl", "frontier.json"]
        assert (here / "episodes.jsonl").read_text() == WHOLE["episodes.jsonl"]
        assert (here / "frontier.json").read_text() == "newer"


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError("connection reset"), "connection reset"), (FileNotFoundError("gone"), "expected a storage URI")],
    ids=["cut off", "vanished"],
)
def test_a_fetch_that_fails_is_not_gone_on_from_and_made_whole_by_the_next(
    there: Path, another: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    another("elsewhere")
    read = Remote.read

    def fails(remote: Remote, name: str) -> bytes:
        if name == "episodes.jsonl":
            raise error
        return read(remote, name)

    with monkeypatch.context() as broken:
        broken.setattr(Remote, "read", fails)
        with pytest.raises(UserError, match=said), kept(there.as_uri()):
            pytest.fail("begun")
    with kept(there.as_uri()) as other:
        assert names(other) == sorted(WHOLE)


def test_who_was_refused_at_the_last_moment_has_not_what_came_of_it(
    there: Path, another: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver was only slow; another had fetched all before that showed, and resumes when the first is through."""
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    left_behind = replace(holder(there), over=False, machine="far")
    (there / HELD).write_bytes(left_behind.as_bytes())
    another("elsewhere")
    with monkeypatch.context() as late:
        late.setattr(Hold, "await_silence", lambda _hold: left_behind)
        late.setattr(Hold, "take", lambda hold, last: hold._place.write(HELD, b"") or pytest.fail(str(last)))
        with pytest.raises(pytest.fail.Exception), kept(there.as_uri()):
            pytest.fail("begun")
    write(there, {"episodes.jsonl": TWO})
    (there / HELD).write_bytes(replace(left_behind, renewals=left_behind.renewals + 1, over=True).as_bytes())
    with kept(there.as_uri()) as other:
        assert (other / "episodes.jsonl").read_text() == TWO


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_where_nobody_knows_who_was_last_nothing_is_lost(
    there: Path, quick: None, another: Callable[[str], None], content: bytes | None
) -> None:
    def forget() -> None:
        (there / HELD).unlink() if content is None else (there / HELD).write_bytes(content)

    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    write(here, {"episodes.jsonl": TWO})  # which the last copy had not
    forget()
    with kept(there.as_uri()) as again:
        assert (again / "episodes.jsonl").read_text() == TWO
    another("elsewhere")
    with kept(there.as_uri()) as other:
        write(other, {"candidates/a.json": "{}"})
    forget()
    another("here")
    with kept(there.as_uri()) as again:
        assert (again / "candidates/a.json").is_file()  # here was less


def test_nobody_else_runs_a_campaign_that_runs(there: Path, quick: None, another: Callable[[str], None]) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
        with pytest.raises(UserError, match=f"{there.as_uri()}: expected that nobody runs it"), kept(there.as_uri()):
            pytest.fail("two")
        another("elsewhere")
        with (
            pytest.raises(UserError, match=rf"nobody else runs it, got process {os.getpid()} on"),
            kept(there.as_uri()),
        ):
            pytest.fail("two")
        assert names(here) == sorted(WHOLE)
    with kept(there.as_uri()):
        pass


@pytest.mark.parametrize("existing", [True, False])
def test_what_else_lies_at_a_uri_is_not_touched(there: Path, existing: bool) -> None:
    write(there, {"thesis.txt": "x", "other/campaign.toml": "y"})
    with (
        pytest.raises(UserError, match=r"got 2 other files, such as 'other/campaign.toml'"),
        kept(there.as_uri(), existing=existing),
    ):
        pytest.fail("begun")
    with pytest.raises(UserError, match="expected a campaign"):
        fetched(there.as_uri())
    assert names(there) == ["other/campaign.toml", "thesis.txt"]
    assert not (there / HELD).exists()


def test_a_resume_of_what_is_no_campaign_leaves_nothing_there(there: Path) -> None:
    with pytest.raises(UserError, match="expected a campaign"), kept(there.as_uri(), existing=True):
        pytest.fail("begun")
    assert not there.exists()


@pytest.mark.parametrize("left", [[], ["campaign.toml"], ["episodes.jsonl"], ["checkpoints/update-1/manifest.json"]])
def test_a_cache_that_is_cleaned_up_meanwhile_deletes_nothing_there(there: Path, quick: None, left: list[str]) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    with kept(there.as_uri()) as here:
        for name in WHOLE.keys() - set(left):
            (here / name).unlink()
        write(here, {"episodes.jsonl": TWO} if "episodes.jsonl" in left else {})
    assert names(there) == sorted(WHOLE)
    assert holder(there).over is (left == ["campaign.toml"])
    with kept(there.as_uri()) as here:  # what is gone is fetched, what is more is kept
        assert set(names(here)) >= WHOLE.keys() - {"checkpoints/update-1/manifest.json"}
        assert (here / "episodes.jsonl").read_text() == (TWO if left == ["episodes.jsonl"] else WHOLE["episodes.jsonl"])


def test_a_start_elsewhere_that_came_to_nothing_costs_nothing(there: Path, another: Callable[[str], None]) -> None:
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "frontier.json": "1"})
    write(here, {"episodes.jsonl": TWO, "frontier.json": "2", "candidates/a.json": "{}"})  # not copied any more
    another("elsewhere")
    with kept(there.as_uri()):
        pass
    another("here")
    with kept(there.as_uri()) as again:
        assert (again / "episodes.jsonl").read_text() == TWO
        assert (again / "frontier.json").read_text() == "2"
        assert (again / "candidates/a.json").is_file()


def test_a_start_that_was_killed_before_it_took_the_uri_is_of_no_account(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(there.as_uri()) as here:
        write(here, {**WHOLE, "old.json": "{}"})
    write(here, {"episodes.jsonl": TWO})
    (here / "old.json").unlink()
    write(there, {"old.json": "[1]"})
    with monkeypatch.context() as killed:
        killed.setattr(Hold, "take", lambda _hold, _last: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError), kept(there.as_uri()):
            pytest.fail("begun")
    with kept(there.as_uri()) as again:
        assert (again / "episodes.jsonl").read_text() == TWO


def test_a_storage_that_goes_during_a_copy_is_not_written_beside_it(
    there: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a shared disk that is not mounted for a moment."""
    push, away = Copy._push_one, there.with_name("away")

    def while_it_is_away(copy: Copy, name: str) -> None:
        there.rename(away)
        try:
            push(copy, name)
        finally:
            assert not there.exists()
            away.rename(there)
            monkeypatch.setattr(Copy, "_push_one", push)

    monkeypatch.setattr(storage, "PERIOD_S", 0.02)
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
        wait_until(lambda: there.is_dir() and names(there) == sorted(WHOLE), "all is there", 20)
        monkeypatch.setattr(Copy, "_push_one", while_it_is_away)
        write(here, {"a": ""})
        wait_until(lambda: names(there) == sorted([*WHOLE, "a"]), "the new one is there", 20)


def is_back(there: Path, away: Path) -> bool:
    """Put `away` in the place of what is `there`, unless something has come there meanwhile."""
    there.rename(there.with_name(f"below-{time.monotonic_ns()}"))
    with contextlib.suppress(OSError):
        away.rename(there)
    return not away.exists()


def test_a_storage_that_was_empty_for_a_while_has_all_in_the_end(
    there: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As a shared disk that is mounted just there, and is not: what is written goes to the empty folder below it."""
    away = there.with_name("away")
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
        wait_until(lambda: there.is_dir() and names(there) == sorted(WHOLE), "all is there", 20)
        there.rename(away)
        there.mkdir()
        write(here, {"frontier.json": "{}"})
        wait_until(lambda: there.is_dir() and "frontier.json" in names(there), "it is written there", 20)
        wait_until(lambda: is_back(there, away), "it is back", 20)
    assert names(there) == sorted([*WHOLE, "frontier.json"])
    there.rename(away)
    with pytest.raises(UserError, match="expected a campaign"):
        fetched(there.as_uri())
    with kept(there.as_uri()):
        pass
    assert names(there) == sorted([*WHOLE, "frontier.json"])
    assert "nothing is there; what this machine has goes there again" in caplog.text


def test_who_has_lost_the_uri_is_ended_and_writes_nothing_more_there(there: Path, quick: None) -> None:
    interrupted = list[str]()

    def lost() -> None:
        with interruptible(), kept(there.as_uri()) as here:
            write(here, WHOLE)
            wait_until(lambda: there.is_dir() and names(there) == sorted(WHOLE), "all is there", 20)
            (there / HELD).write_bytes(took(holder(there)))
            write(here, {"frontier.json": "of one who does not know"})
            try:
                # again and again, as the renewal that is under way may come after the first
                wait_until(lambda: (there / HELD).write_bytes(took(holder(there))) == 0, "it is interrupted", 20)
            except KeyboardInterrupt:
                interrupted.append("at once")
                raise

    def took(from_whom: Holder) -> bytes:
        return replace(from_whom, run="another", process=7, host="elsewhere").as_bytes()

    with pytest.raises(UserError, match="got process 7 on elsewhere"):
        lost()
    assert interrupted == ["at once"]
    assert names(there) == sorted(WHOLE)
    assert holder(there).run == "another"


@pytest.mark.parametrize("begins_with", ["c", "checkpoints"])
def test_a_loss_ends_a_copy_between_two_files(there: Path, begins_with: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(there.as_uri())
    hold = Hold(copy.remote, TROUBLE)
    copy.remote.make()
    write(copy.folder, {**WHOLE, "checkpoints/update-0/manifest.json": "{}", "checkpoints/update-0/b": ""})
    hold.take(None)
    assert copy.push(hold)
    hold.end(whole=False)
    if begins_with == "checkpoints":
        shutil.rmtree(copy.folder / "checkpoints/update-0")
    else:
        write(copy.folder, {f"c{number}": "" for number in range(4)})
    before = names(there)
    first = Remote.write if begins_with == "c" else Remote.delete

    def then_lost(remote: Remote, *what: Any) -> None:
        first(remote, *what)
        hold._lost_to = replace(hold._mine, run="another", process=7, host="elsewhere")

    monkeypatch.setattr(Remote, first.__name__, then_lost)
    with pytest.raises(UserError, match="got process 7 on elsewhere"):
        copy.push(hold)
    assert len(set(names(there)) ^ set(before)) == 1


def test_a_look_changes_nothing_where_the_campaign_runs(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
        write(there, {"frontier.json": "older", "checkpoints/update-0/state.pt": "s", "more": "m"})
        monkeypatch.setattr(storage_copy, "is_locked", lambda path: path == here / "lock")
        before = {name: (here / name).read_text() for name in names(here)}
        monkeypatch.setattr(Remote, "read", lambda _copy, name: pytest.fail(f"reads {name}"))
        assert fetched(there.as_uri()) == here
        monkeypatch.undo()
        assert {name: (here / name).read_text() for name in names(here)} == before


def test_a_look_from_elsewhere_fetches_what_has_changed_and_says_who_runs_it(
    there: Path, another: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    texts = {"campaign.toml": dump(CampaignConfig()), "frontier.json": "{}", "checkpoints/update-1/state.pt": "s"}
    read, fetches = Remote.read, list[str]()
    monkeypatch.setattr(Remote, "read", lambda copy, name: (fetches.append(name), read(copy, name))[1])
    with kept(there.as_uri()) as here:
        write(here, texts)
        wait_until(lambda: there.is_dir() and names(there) == sorted(texts), "all is there", 20)
        another("elsewhere")
        other = fetched(there.as_uri())
        assert names(other) == ["campaign.toml", "frontier.json"]  # not what only the learner reads
        assert copy_of(str(other)) == there.as_uri()
        assert copy_of(str(other.parent / "new")) == str(other.parent / "new")
        assert read_status(other)["elsewhere"] == f"process {os.getpid()} on {platform.node()}"
        assert read_status(other)["running"]
        write(other, {"export/0.9.onnx": "made by who looks"})
        write(here, {"frontier.json": '{"episodes_total": 3}'})
        wait_until(lambda: "3" in (there / "frontier.json").read_text(), "the news is there", 20)
        fetches.clear()
        fetched(there.as_uri())
        assert set(fetches) == {HELD, "frontier.json"}
        assert read_status(other)["episodes_total"] == 3
        assert (other / "export/0.9.onnx").is_file()
        # people are told how long ago it was
        assert (other / "frontier.json").stat().st_mtime == (there / "frontier.json").stat().st_mtime
    fetched(there.as_uri())
    assert read_status(other)["elsewhere"] is None
    assert not read_status(other)["running"]
    with kept(there.as_uri()) as own:  # what was only looked at is not gone on from
        assert own != other
        assert names(own) == sorted(texts)


def test_a_storage_that_does_not_answer_leaves_what_was_seen_to_look_at(
    there: Path, another: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    with kept(there.as_uri()) as here:
        write(here, WHOLE)
    another("elsewhere")
    other = fetched(there.as_uri())
    shutil.rmtree(there.parent)
    there.parent.write_text("")  # nothing can be below it
    assert fetched(there.as_uri()) == other
    assert "what this machine had of it is shown" in caplog.text
    another("third")
    with pytest.raises(UserError, match="expected a storage URI"):
        fetched(there.as_uri())


def test_a_cache_that_cannot_be_written_is_told_from_the_storage(
    there: Path, tmp_path: Path, another: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    another("file")
    with (
        pytest.raises(UserError, match="expected a disk that takes it, got a file where a folder is to be"),
        kept(there.as_uri()),
    ):
        pytest.fail("begun")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="set HOME or XDG_CACHE_HOME"):
        fetched(there.as_uri())


def test_a_storage_that_is_away_for_a_while_is_told_of_once_and_tried_again(
    there: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Copy(there.as_uri())
    write(copy.folder, WHOLE)
    over, calls, push = threading.Event(), [], copy.push
    hold = Hold(copy.remote, TROUBLE)
    copy.remote.make()

    def flaky(hold: Hold) -> None:
        calls.append(1)
        if len(calls) < 4:
            raise OSError("no route to host")
        push(hold)
        over.set()

    monkeypatch.setattr(storage, "PERIOD_S", 0.01)
    monkeypatch.setattr(copy, "push", flaky)
    storage._keep(copy, hold, over)
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
def test_a_command_that_is_killed_is_gone_on_with_elsewhere_and_shown_anywhere(there: Path, tmp_path: Path) -> None:
    def environment(machine: str) -> dict[str, str]:
        return {**tiny_campaign.environment(), "XDG_CACHE_HOME": str(tmp_path / machine)}

    def zeroout(machine: str, *arguments: object) -> str:
        ended = subprocess.run(
            command(*arguments), cwd=ROOT, env=environment(machine), capture_output=True, text=True, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    uri = there.as_uri()
    # copied so often that its first copy comes long before its end, however fast the machine
    often = "from deploy import cli, storage; storage.PERIOD_S = 0.05; cli.main()"
    tiny_toml = str(tiny(tmp_path / "tiny.toml", episodes=1))
    line = [sys.executable, "-c", often, "prune", tiny_toml, "--out", uri, "--compression", "0.5"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(line, cwd=ROOT, env=environment("one"), stderr=log) as one,
    ):
        wait_until(lambda: (there / "campaign.toml").is_file(), "its first copy is there", LIMIT_S)
        one.kill()
    assert not holder(there).over
    zeroout("two", "resume", uri)
    result = json.loads((there / "result.json").read_text())
    assert result["points"][0]["compression"] >= 0.5
    assert (there / result["points"][0]["model"]).is_file()
    assert json.loads(zeroout("three", "status", uri, "--json"))["stage"] == "done"
    assert "baseline" in zeroout("four", "resume", uri)  # finished: nothing is retrained
    assert json.loads((there / "result.json").read_text()) == result
    assert holder(there).over
