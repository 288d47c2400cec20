import contextlib
from pathlib import Path

from env.files import replace_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replace_file(path) as temporary:
        temporary.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replace_file(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
