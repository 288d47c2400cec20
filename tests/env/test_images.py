import contextlib
import io
import logging
import math
import os
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from env.errors import UserError
from env.images import read_folder, require_memory, shown
from env.splits import Split

Read = Callable[..., tuple[tuple[str, ...], Split, Split | None]]


def picture(path: Path, value: int, *, size: tuple[int, int] = (7, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def silent(done: int, total: int) -> None:
    """For tests that do not look at the progress."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 3 images, 7 wide and 5 high, each image of its own brightness: cat 0, 2, 4 and dog 1, 3, 5."""
    for index in range(6):
        picture(tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png", index)
    return tmp_path / "images"


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(
        root: Path, *, image_size: int = 0, cache: Path = tmp_path / "cache"
    ) -> tuple[tuple[str, ...], Split, Split | None]:
        return read_folder(root, image_size=image_size, cache=cache, progress=silent)

    return read


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user whom file permissions bind, which they do not the system's own."""
    us, nobody = os.geteuid(), 65534
    if us == 0:
        os.seteuid(nobody)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        os.seteuid(us)


def shape(read: tuple[tuple[str, ...], Split, Split | None]) -> list[int]:
    return list(read[1].images.shape[1:])


def told(read: Callable[[], object]) -> str:
    """The one line that a reading ends in."""
    with pytest.raises(UserError) as caught:
        read()
    line = str(caught.value)
    assert line.isprintable()
    return line


def test_classes_and_files_come_in_the_order_of_their_names(folder: Path, read: Read) -> None:
    classes, train, test = read(folder)
    assert classes == ("cat", "dog")
    assert train.images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test is None


def test_a_test_folder_is_kept_apart(folder: Path, read: Read) -> None:
    shutil.move(folder, folder.parent / "both" / "train")
    for index, name in enumerate(("cat", "dog")):
        picture(folder.parent / "both" / "test" / name / "only.png", 200 + index)
    _, train, test = read(folder.parent / "both")
    assert test is not None
    assert test.images[:, 0, 0, 0].tolist() == [200, 201]
    assert test.labels.tolist() == [0, 1]
    assert len(train) == 6
    assert train.images.shape[1:] == (3, 5, 7)


def test_gray_folders_have_one_channel_and_mixed_ones_three(folder: Path, read: Read) -> None:
    for path in folder.rglob("*.png"):
        picture(path, 9, mode="L")
    assert shape(read(folder)) == [1, 5, 7]
    picture(folder / "dog" / "3.png", 100)
    _, train, _ = read(folder)
    assert shape(read(folder)) == [3, 5, 7]
    for channel in range(3):  # gray before and after the one in colour
        assert train.images[:, channel, 0, 0].tolist() == [9, 9, 9, 9, 100, 9]


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
def test_other_kinds_of_images_are_converted(folder: Path, read: Read, mode: str) -> None:
    picture(folder / "cat" / "odd.tiff" if mode == "CMYK" else folder / "cat" / "odd.png", 255, mode=mode)
    assert (read(folder)[1].images == 255).flatten(1).all(1).sum() == 1


def test_images_are_resized_to_a_square(folder: Path, read: Read) -> None:
    picture(folder / "dog" / "other.png", 5, size=(11, 3))
    assert shape(read(folder, image_size=4)) == [3, 4, 4]


def test_images_stand_upright_as_their_camera_says(folder: Path, read: Read) -> None:
    pixels = np.zeros((7, 5, 3), np.uint8)  # stored 5 wide and 7 high, to be turned by a quarter
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "cat" / "turned.png", exif=exif)
    assert shape(read(folder)) == [3, 5, 7]


def test_what_pillow_only_warns_of_is_read(folder: Path, read: Read) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    path = folder / "cat" / "odd.png"
    Image.fromarray(np.full((5, 7, 3), 77, np.uint8)).save(path, exif=exif.tobytes()[:-9])
    with pytest.warns(UserWarning, match="Truncated File Read"), Image.open(path) as opened:
        opened.getexif()
    assert 77 in read(folder)[1].images


def test_links_are_followed(folder: Path, read: Read) -> None:
    (folder / "emu").symlink_to(folder / "cat")
    (folder / "dog" / "link.png").symlink_to(folder / "cat" / "4.png")
    classes, train, _ = read(folder)
    assert classes == ("cat", "dog", "emu")
    assert train.images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5, 4, 0, 2, 4]


def test_file_names_of_any_bytes_are_read(folder: Path, read: Read) -> None:
    for name in (b"\xff\xfe.png", b"two\nlines.png", "猫.png".encode()):
        shutil.copy(folder / "cat" / "0.png", os.fsencode(folder / "cat") + b"/" + name)
    assert len(read(folder)[1]) == 9
    (folder / "cat" / "two\nlines.png").write_text("no image")
    assert r"two\nlines.png" in told(lambda: read(folder))
    (folder / "cat" / "two\nlines.png").unlink()
    Path(os.fsdecode(os.fsencode(folder / "cat") + b"/\xff\xfe.png")).write_text("no image")
    assert r"\udcff\udcfe.png" in told(lambda: read(folder))


@pytest.mark.parametrize(("name", "words"), [(b"\xff\xfe", r"\udcff\udcfe"), (b"two\nlines", r"two\nlines")])
def test_class_names_must_be_fit_for_a_report(folder: Path, read: Read, name: bytes, words: str) -> None:
    os.rename(os.fsencode(folder / "cat"), os.fsencode(folder) + b"/" + name)
    line = told(lambda: read(folder))
    assert words in line
    assert "rename" in line


def test_a_path_is_shown_as_it_is_unless_it_cannot_be() -> None:
    assert shown(Path("/a b/猫.png")) == "/a b/猫.png"
    assert shown("a\nb") == r"'a\nb'"


def test_progress_counts_every_image_and_the_cache_needs_none(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def again() -> Split:
        return read_folder(
            folder, image_size=0, cache=tmp_path / "cache", progress=lambda done, total: calls.append((done, total))
        )[1]

    first = again()
    assert calls[-1] == (6, 6)
    calls.clear()
    assert torch.equal(first.images, again().images)
    assert calls == []
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_a_changed_added_or_removed_file_and_another_size_are_decoded_again(folder: Path, read: Read) -> None:
    read(folder)
    picture(folder / "cat" / "0.png", 77)
    os.utime(folder / "cat" / "0.png", ns=(1, 1))
    assert 77 in read(folder)[1].images
    picture(folder / "cat" / "1.png", 88)
    assert 88 in read(folder)[1].images
    (folder / "cat" / "1.png").unlink()
    assert 88 not in read(folder)[1].images
    assert shape(read(folder, image_size=3)) == [3, 3, 3]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "other content", "a folder"])
def test_a_broken_cache_is_made_again_and_said_so(
    folder: Path, read: Read, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    good = read(folder)[1].images
    (cached,) = (tmp_path / "cache").iterdir()
    content = bytearray(cached.read_bytes())
    if damage == "flipped bit":
        content[-9] ^= 1
    broken = {"truncated": content[:99], "flipped bit": content, "other content": bytearray(b"nonsense")}
    if damage == "a folder":
        cached.unlink()
        cached.mkdir()
    else:
        cached.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(good, read(folder)[1].images)
    assert "is broken" in caplog.text
    if damage == "a folder":
        cached.rmdir()
    caplog.clear()
    read(folder)
    read(folder)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop(
    folder: Path, read: Read, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert shape(read(folder, cache=tmp_path / "file")) == [3, 5, 7]
    assert "cannot be written" in caplog.text


def test_a_cache_that_may_not_be_entered_does_not_stop(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    with unprivileged() as folder:
        for index, name in enumerate(("cat", "dog")):
            picture(folder / "images" / name / "1.png", index)
        (folder / "cache").mkdir(mode=0)
        assert shape(read(folder / "images", cache=folder / "cache")) == [3, 5, 7]
    assert "cannot be written" in caplog.text


def _missing(folder: Path) -> None:
    shutil.rmtree(folder)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _one_class(folder: Path) -> None:
    shutil.rmtree(folder / "dog")


def _class_without_images(folder: Path) -> None:
    (folder / "emu").mkdir()
    (folder / "emu" / ".hidden").touch()


def _not_an_image(folder: Path) -> None:
    (folder / "cat" / "3.jpg").write_text("hello")


def _without_bytes(folder: Path) -> None:
    (folder / "cat" / "3.png").touch()


def _truncated(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cat" / "4.jpg")
    content = (folder / "cat" / "4.jpg").read_bytes()
    (folder / "cat" / "4.jpg").write_bytes(content[:-40])


def _truncated_png(folder: Path) -> None:
    content = (folder / "cat" / "4.png").read_bytes()
    (folder / "cat" / "4.png").write_bytes(content[: len(content) // 2])


def _other_size(folder: Path) -> None:
    picture(folder / "dog" / "5.png", 5, size=(6, 5))


def _deep(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(folder / "dog" / "7.png")


def _nested(folder: Path) -> None:
    (folder / "dog" / "more").mkdir()


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "dog" / "pipe.png")


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str((folder / "dog" / "s.png").relative_to(Path.cwd())))


def _dead_link(folder: Path) -> None:
    (folder / "dog" / "link.png").symlink_to(folder / "nothing.png")


def _link_to_itself(folder: Path) -> None:
    (folder / "dog" / "link.png").symlink_to(folder / "dog" / "link.png")


def _dead_class(folder: Path) -> None:
    (folder / "emu").symlink_to(folder / "nothing")


def _class_in_a_circle(folder: Path) -> None:
    (folder / "emu").symlink_to(folder / "emu")


def _other_test_classes(folder: Path) -> None:
    shutil.copytree(folder, folder / "train")
    picture(folder / "test" / "cat" / "1.png", 1)
    picture(folder / "test" / "cow" / "1.png", 1)


def _empty_test_class(folder: Path) -> None:
    shutil.copytree(folder, folder / "train")
    picture(folder / "test" / "cat" / "1.png", 1)
    (folder / "test" / "dog").mkdir()


def _one_test_class(folder: Path) -> None:
    shutil.copytree(folder, folder / "train")
    picture(folder / "test" / "cat" / "1.png", 1)


def _flat_train(folder: Path) -> None:
    picture(folder / "train" / "1.png", 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, ("images", "no such path", "data.path")),
        (_a_file, ("images", "a file", "data.path")),
        (_empty, ("two class folders", "none")),
        (_one_class, ("two class folders", "only cat")),
        (_class_without_images, ("every class", "none for emu")),
        (_not_an_image, ("cat/3.jpg", "UnidentifiedImageError")),
        (_without_bytes, ("cat/3.png", "UnidentifiedImageError")),
        (_truncated, ("cat/4.jpg", "OSError")),
        (_truncated_png, ("cat/4.png", "a whole image")),
        (_other_size, ("dog/5.png", "7x5", "6x5", "set data.image_size")),
        (_deep, ("dog/7.png", "8 bits", "I;16")),
        (_nested, ("dog/more", "a folder", "remove it")),
        (_pipe, ("dog/pipe.png", "a pipe", "remove it")),
        (_socket, ("dog/s.png", "a pipe", "remove it")),
        (_dead_link, ("dog/link.png", "No such file")),
        (_link_to_itself, ("dog/link.png", "symbolic links")),
        (_dead_class, ("images/emu", "a link to nothing")),
        (_class_in_a_circle, ("images/emu", "symbolic links")),
        (_other_test_classes, ("classes of train/", "cow")),
        (_empty_test_class, ("images/test", "none for dog")),
        (_one_test_class, ("images/test", "only cat")),
        (_flat_train, ("images/train", "two class folders")),
    ],
)
def test_a_wrong_folder_is_told_in_one_line(
    folder: Path,
    read: Read,
    spoil: Callable[[Path], None],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)  # the path of a socket must be short
    spoil(folder)
    line = told(lambda: read(folder))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("path", "words"),
    [("x" * 300, "name too long"), ("~nobody-of-this-name", "no such path"), ("a\0b", "null")],
)
def test_a_path_that_cannot_be_is_told(read: Read, path: str, words: str) -> None:
    assert words in told(lambda: read(Path(path)))


@pytest.mark.parametrize("hidden", ["images/cat/1.png", "images/cat", "images", "images/train/cat"])
def test_what_may_not_be_read_is_named(read: Read, hidden: str) -> None:
    with unprivileged() as folder:
        for part in ("train", "test") if "train" in hidden else ("",):
            for index, name in enumerate(("cat", "dog")):
                picture(folder / "images" / part / name / "1.png", index)
        (folder / hidden).chmod(0)
        line = told(lambda: read(folder / "images", cache=folder / "cache"))
        (folder / hidden).chmod(0o700)
    assert hidden in line
    assert "ermission" in line


@pytest.mark.parametrize(("format_", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "RGB")])
@settings(deadline=None, max_examples=40)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damage_anywhere_in_an_image_gives_pixels_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, format_: str, mode: str, position: float, value: int, cut: bool
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    content = io.BytesIO()
    Image.fromarray(np.arange(105, dtype=np.uint8).reshape(5, 7, 3)).convert(mode).save(content, format_)
    damaged = bytearray(content.getvalue())
    where = int(position * len(damaged))
    damaged[where] = value
    (root / "cat").mkdir()
    (root / "cat" / "damaged").write_bytes(damaged[:where] if cut else damaged)
    picture(root / "dog" / "1.png", 1)
    try:
        images = read_folder(root, image_size=4, cache=root / "cache", progress=silent)[1].images
    except UserError as error:
        line = str(error)
    else:
        assert images.shape[2:] == (4, 4)
        return
    assert str(root / "cat" / "damaged") in line
    assert "\n" not in line


def test_more_images_than_memory_are_refused_before_they_are_decoded(
    folder: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 6 * 3 * 64 * 64
    monkeypatch.setattr("env.images._machine_bytes", lambda: needed)
    assert shape(read(folder, image_size=64)) == [3, 64, 64]
    monkeypatch.setattr("env.images._machine_bytes", lambda: needed - 1)
    line = told(lambda: read(folder, image_size=64, cache=folder.parent / "other"))
    for word in ("6 images of 64x64 pixels", "GiB", "data.image_size"):
        assert word in line


def test_gray_images_that_turn_out_to_be_coloured_need_three_times_the_memory(
    folder: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.glob("cat/*.png"):
        picture(path, 9, mode="L")
    monkeypatch.setattr("env.images._machine_bytes", lambda: 2 * 6 * math.prod((5, 7)))
    assert "6 images of 7x5 pixels" in told(lambda: read(folder))


def test_the_memory_of_this_machine_is_known() -> None:
    require_memory(1000, 3, 32, 32)
    with pytest.raises(UserError, match="GiB of this machine's memory"):
        require_memory(10**9, 3, 4096, 4096)


def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "root" / name).mkdir(parents=True)
        Image.new("L", (1, 1)).save(tmp_path / "root" / name / "1.png")
    bomb = tmp_path / "root" / "b" / "1.png"
    content = bytearray(bomb.read_bytes())
    content[16:24] = struct.pack(">II", 50_000, 50_000)  # width and height of a PNG, and then the checksum of its head
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    bomb.write_bytes(content)
    with pytest.raises(UserError, match=r"b/1\.png: .*DecompressionBombError"):
        read_folder(tmp_path / "root", image_size=8, cache=tmp_path / "cache", progress=lambda done, total: None)
