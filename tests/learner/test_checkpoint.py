import errno
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from env.errors import UserError
from learner import checkpoint


def state(updates: int) -> dict[str, Any]:
    return {"controller": {"weight": torch.arange(5.0) + updates}, "updates": updates}


def saved(folder: Path, *updates: int) -> None:
    for count in updates:
        checkpoint.save(folder, state(count), count)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(folder: Path) -> int | None:
    found = checkpoint.load_newest(folder)
    if found is None:
        return None
    updates = found["updates"]
    assert isinstance(updates, int)
    assert torch.equal(found["controller"]["weight"], torch.arange(5.0) + updates)
    return updates


def claim_right_sizes(path: Path, data: bytes) -> None:
    """A file of another kind with a manifest that fits it."""
    (path / "state.pt").write_bytes(data)
    manifest = {"updates": 7, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil-was-here",)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path / "state.pt", 100),
    "one bit flipped": lambda path: flip_a_bit(path / "state.pt"),
    "half-written, no manifest": lambda path: (path / "manifest.json").unlink(),
    "no state": lambda path: (path / "state.pt").unlink(),
    "manifest truncated": lambda path: os.truncate(path / "manifest.json", 10),
    "manifest without a hash": lambda path: (path / "manifest.json").write_text('{"bytes": 1}'),
    "manifest of another kind": lambda path: (path / "manifest.json").write_text("[1, 2]"),
    "manifest not text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\xfd"),
    "wrong hash": lambda path: rewrite(path / "manifest.json", sha256="0" * 64),
    "wrong size": lambda path: rewrite(path / "manifest.json", bytes=1),
    "empty, with its manifest": lambda path: claim_right_sizes(path, b""),
    "text, with its manifest": lambda path: claim_right_sizes(path, b"not a checkpoint"),
    "a pickle that would act, with its manifest": lambda path: claim_right_sizes(
        path, pickle.dumps(Evil(), protocol=2)
    ),
}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "missing") is None


def test_the_newest_one_loads(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10, 100)
    assert loaded(tmp_path) == 100


def test_the_same_number_saved_again_comes_after_the_first(tmp_path: Path) -> None:
    for value in range(12):
        checkpoint.save(tmp_path, state(value), 7)
        assert loaded(tmp_path) == value
    assert names(tmp_path) == ["update-00000007.10", "update-00000007.11", "update-00000007.9"]
    checkpoint.save(tmp_path, state(20), 8)
    assert loaded(tmp_path) == 20


def test_a_disk_that_is_full_when_the_same_number_is_saved_again_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, state(3), 7)

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(tmp_path, state(5), 7)
    monkeypatch.undo()
    assert loaded(tmp_path) == 3


def test_its_manifest_tells_size_and_hash(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), 7)
    data = (path / "state.pt").read_bytes()
    assert json.loads((path / "manifest.json").read_text()) == {
        "updates": 7,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_in_the_log_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    saved(folder, 5, 7)
    DAMAGE[damage](folder / "update-00000007")
    with caplog.at_level(logging.WARNING):
        assert loaded(folder) == 5
    (message,) = [record.getMessage() for record in caplog.records]
    assert "update-00000007 is not valid (" in message
    assert not (tmp_path / "evil-was-here").exists()


def test_when_all_are_damaged_each_is_named_and_nothing_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 3, 5, 7)
    for path in tmp_path.iterdir():
        (path / "state.pt").write_bytes(b"")
    assert loaded(tmp_path) is None
    assert [record.getMessage().split()[1][-8:] for record in caplog.records] == ["00000007", "00000005", "00000003"]


def test_only_the_newest_three_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 3, 5, 7, 9, 11)
    assert names(tmp_path) == ["update-00000007", "update-00000009", "update-00000011"]


def test_damaged_ones_with_more_updates_never_push_out_what_was_just_saved(tmp_path: Path) -> None:
    saved(tmp_path, 150, 200, 250)
    for path in tmp_path.iterdir():
        (path / "manifest.json").unlink()
    saved(tmp_path, 5, 7)  # the learner had to begin again
    assert names(tmp_path) == ["update-00000005", "update-00000007"]
    assert loaded(tmp_path) == 7


def test_what_a_killed_process_left_half_written_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".update-00000009.4711"
    left.mkdir()
    (left / "state.pt").write_bytes(b"half")
    assert loaded(tmp_path) is None
    saved(tmp_path, 10)
    assert names(tmp_path) == ["update-00000010"]


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_a_full_disk_is_the_users_error_and_leaves_the_old_ones_untouched(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 3, 5, 7)
    write = checkpoint._write

    def full(path: Path, data: bytes) -> None:
        if path.name == file:
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(UserError, match=r"update-00000009: expected \d+ bytes of disk.*No space left.*make room"):
        checkpoint.save(tmp_path, state(9), 9)
    assert names(tmp_path) == ["update-00000003", "update-00000005", "update-00000007"]
    monkeypatch.undo()
    assert loaded(tmp_path) == 7
    saved(tmp_path, 9)
    assert loaded(tmp_path) == 9


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="update-00000001"):
        checkpoint.save(tmp_path / "file", state(1), 1)
