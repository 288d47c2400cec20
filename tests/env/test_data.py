import contextlib
import dataclasses
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from env.data import (
    DataConfig,
    Dataset,
    Split,
    augment,
    check_fields,
    default_cache,
    load_dataset,
    normalise,
    require_batch,
)
from env.errors import UserError
from env.files import replace_file

ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"
DIGITS = load_dataset(DataConfig())


def picture(path: Path, value: int, *, size: tuple[int, int] = (7, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 20 images, 7 wide and 5 high, each image of its own brightness."""
    for index in range(40):
        picture(tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index:02d}.png", index)
    return tmp_path / "images"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Dataset]:
    def load(path: Path, **settings: Any) -> Dataset:
        given = {"source": "folder", "path": str(path), "cache": str(tmp_path / "cache")}
        return load_dataset(DataConfig(**{**given, **settings}))

    return load


def images_of(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_gray_8x8_and_split_as_configured() -> None:
    assert DIGITS.image_shape == (1, 8, 8)
    assert DIGITS.classes == tuple("0123456789")
    assert len(DIGITS.train) + len(DIGITS.validation) + len(DIGITS.test) == 1797
    assert len(DIGITS.test) / 1797 == pytest.approx(0.15, abs=0.003)
    assert len(DIGITS.validation) / (1797 - len(DIGITS.test)) == pytest.approx(0.05, abs=0.004)
    assert DIGITS.train.images.max() == 255


def test_splits_are_disjoint_and_complete(folder: Path, load: Callable[..., Dataset]) -> None:
    data = load(folder, validation_share=0.2)
    values = [set(split.images[:, 0, 0, 0].tolist()) for split in (data.train, data.validation, data.test)]
    assert sum(map(len, values)) == 40
    assert set.union(*values) == set(range(40))
    labels = torch.cat([data.train.labels, data.validation.labels, data.test.labels])
    brightness = torch.cat([s.images[:, 0, 0, 0] for s in (data.train, data.validation, data.test)])
    assert torch.equal(labels, brightness.long() % 2)  # cat even, dog odd


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_every_split_holds_each_class_in_its_share(name: str) -> None:
    every = torch.cat([split.labels for split in (DIGITS.train, DIGITS.validation, DIGITS.test)])
    split = getattr(DIGITS, name)
    expected = every.bincount() * len(split) / len(every)
    assert (split.labels.bincount(minlength=10) - expected).abs().max() <= 1.0


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    again, other = load_dataset(DataConfig()), load_dataset(DataConfig(split_seed=1))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(again, name).images, getattr(DIGITS, name).images)
        assert torch.equal(getattr(again, name).labels, getattr(DIGITS, name).labels)
    assert images_of(other.test) != images_of(DIGITS.test)


def test_the_train_limit_is_balanced_and_leaves_validation_and_test_alone() -> None:
    limited = load_dataset(DataConfig(train_limit=53))
    assert sorted(limited.train.labels.bincount().tolist()) == [5] * 7 + [6] * 3
    assert images_of(limited.train) <= images_of(DIGITS.train)
    assert images_of(limited.validation) == images_of(DIGITS.validation)
    assert images_of(limited.test) == images_of(DIGITS.test)


def test_mean_and_deviation_are_those_of_the_training_split() -> None:
    pixels = DIGITS.train.images.double() / 255
    assert DIGITS.mean == pytest.approx((pixels.mean().item(),))
    assert DIGITS.std == pytest.approx((pixels.std(correction=0).item(),))


def test_a_test_folder_is_used_as_it_is(folder: Path, load: Callable[..., Dataset]) -> None:
    shutil.move(folder, folder.parent / "both" / "train")
    for index, name in enumerate(("cat", "dog")):
        picture(folder.parent / "both" / "test" / name / "only.png", 200 + index)
    data = load(folder.parent / "both")
    assert sorted(data.test.images[:, 0, 0, 0].tolist()) == [200, 201]
    assert len(data.train) + len(data.validation) == 40
    assert data.image_shape == (3, 5, 7)


def test_gray_folders_have_one_channel_and_mixed_ones_three(folder: Path, load: Callable[..., Dataset]) -> None:
    for path in folder.rglob("*.png"):
        picture(path, 9, mode="L")
    assert load(folder).image_shape == (1, 5, 7)
    picture(folder / "dog" / "39.png", 100)
    data = load(folder)
    assert data.image_shape == (3, 5, 7)
    assert set(data.train.images.flatten().tolist()) <= {9, 100}


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
def test_other_kinds_of_images_are_converted(folder: Path, load: Callable[..., Dataset], mode: str) -> None:
    picture(folder / "cat" / "odd.tiff" if mode == "CMYK" else folder / "cat" / "odd.png", 255, mode=mode)
    data = load(folder)
    every = torch.cat([split.images for split in (data.train, data.validation, data.test)])
    assert (every == 255).flatten(1).all(1).sum() == 1


def test_images_are_resized_to_a_square(folder: Path, load: Callable[..., Dataset]) -> None:
    assert load(folder, image_size=4).image_shape == (3, 4, 4)


def test_images_stand_upright_as_their_camera_says(folder: Path, load: Callable[..., Dataset]) -> None:
    pixels = np.zeros((7, 5, 3), np.uint8)  # stored 5 wide and 7 high, to be turned by a quarter
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "cat" / "turned.png", exif=exif)
    assert load(folder).image_shape == (3, 5, 7)


def test_progress_counts_every_image_and_the_cache_needs_none(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = DataConfig(source="folder", path=str(folder), cache=str(tmp_path / "cache"))
    first = load_dataset(config, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (40, 40)
    calls.clear()
    second = load_dataset(config, progress=lambda done, total: calls.append((done, total)))
    assert calls == []
    assert torch.equal(first.train.images, second.train.images)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_a_changed_file_or_size_is_decoded_again(folder: Path, load: Callable[..., Dataset]) -> None:
    load(folder)
    picture(folder / "cat" / "00.png", 77)
    os.utime(folder / "cat" / "00.png", ns=(1, 1))
    data = load(folder)
    assert 77 in torch.cat([data.train.images, data.validation.images, data.test.images])
    assert load(folder, image_size=3).image_shape == (3, 3, 3)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "other content"])
def test_a_broken_cache_is_made_again_and_said_so(
    folder: Path,
    load: Callable[..., Dataset],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    good = load(folder)
    (cached,) = (tmp_path / "cache").iterdir()
    content = bytearray(cached.read_bytes())
    if damage == "flipped bit":
        content[-9] ^= 1
    broken = {"truncated": content[:99], "flipped bit": content, "other content": bytearray(b"nonsense")}
    cached.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        again = load(folder)
    assert "is broken" in caplog.text
    assert torch.equal(good.train.images, again.train.images)
    caplog.clear()
    load(folder)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop(
    folder: Path, load: Callable[..., Dataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert load(folder, cache=str(tmp_path / "file")).image_shape == (3, 5, 7)
    assert "cannot be written" in caplog.text


def test_the_default_cache_follows_the_users_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "zeroout"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "zeroout"


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
    (folder / "cat" / "03.png").write_text("hello")


def _truncated(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cat" / "04.jpg")
    content = (folder / "cat" / "04.jpg").read_bytes()
    (folder / "cat" / "04.jpg").write_bytes(content[:-40])


def _other_size(folder: Path) -> None:
    picture(folder / "dog" / "05.png", 5, size=(6, 5))


def _deep(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(folder / "dog" / "07.png")


def _nested(folder: Path) -> None:
    (folder / "dog" / "more").mkdir()


def _other_test_classes(folder: Path) -> None:
    shutil.copytree(folder, folder / "train")
    picture(folder / "test" / "cat" / "1.png", 1)
    picture(folder / "test" / "cow" / "1.png", 1)


def _too_few(folder: Path) -> None:
    picture(folder / "emu" / "1.png", 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, ("images", "no such path", "data.path")),
        (_a_file, ("images", "a file", "data.path")),
        (_empty, ("two class folders", "none")),
        (_one_class, ("two class folders", "only cat")),
        (_class_without_images, ("every class", "none for emu")),
        (_not_an_image, ("03.png", "UnidentifiedImageError")),
        (_truncated, ("04.jpg", "OSError")),
        (_other_size, ("05.png", "7x5", "6x5", "set data.image_size")),
        (_deep, ("07.png", "8 bits", "I;16")),
        (_nested, ("more", "IsADirectoryError")),
        (_other_test_classes, ("classes of train/", "cow")),
        (_too_few, ("class emu", "at least 3")),
    ],
)
def test_a_wrong_folder_is_told_in_one_line(
    folder: Path, load: Callable[..., Dataset], spoil: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "imagenet"),
        ("image_size", -1),
        ("image_size", True),
        ("validation_share", 0.0),
        ("validation_share", 1),
        ("validation_share", float("nan")),
        ("test_share", "0.1"),
        ("split_seed", -1),
        ("flip", 1),
        ("shift_pixels", 1.0),
        ("train_limit", -5),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        DataConfig(**{field: value})
    assert caught.value.what == f"data.{field}"
    assert caught.value.got == repr(value)


def test_a_folder_needs_a_path() -> None:
    with pytest.raises(UserError, match=r"data\.path"):
        DataConfig(source="folder")


def test_whole_numbers_pass_where_a_number_is_expected() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float = 0.5

    check_fields("section", Config(1), {"rate": (lambda rate: rate > 0, "above 0")})
    with pytest.raises(UserError, match=r"section\.rate: expected above 0, got -1"):
        check_fields("section", Config(-1), {"rate": (lambda rate: rate > 0, "above 0")})


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    require_batch(DIGITS, len(DIGITS.train))
    with pytest.raises(UserError, match=f"at least one batch of {len(DIGITS.train) + 1}"):
        require_batch(DIGITS, len(DIGITS.train) + 1)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2)),
    ],
)
def test_a_split_refuses_other_shapes_and_types(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        Split(images, labels)


def test_data_moves_to_a_device() -> None:
    moved = DIGITS.to("meta")
    assert {s.images.device.type for s in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert moved.mean == DIGITS.mean


def test_normalising_is_as_worked_by_hand() -> None:
    images = torch.tensor([[[[0, 51]], [[255, 102]]]], dtype=torch.uint8)  # 0, 0.2 | 1, 0.4
    expected = torch.tensor([[[[-2.0, 0.0]], [[1.0, -0.2]]]])
    torch.testing.assert_close(normalise(images, (0.2, 0.5), (0.1, 0.5)), expected)


def moved(images: torch.Tensor, *, seed: int = 0, **how: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = images.shape[1]
    given: dict[str, Any] = {"flip": False, "shift_pixels": 0, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return augment(images, **{**given, **how}, generator=generator).mul(255).round()


def test_augmenting_without_flip_and_shift_only_normalises() -> None:
    images = DIGITS.test.images[:5]
    assert torch.equal(moved(images), images.float())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), shift=st.integers(0, 3), flip=st.booleans())
def test_every_augmented_image_is_a_shifted_perhaps_mirrored_original(seed: int, shift: int, flip: bool) -> None:
    images = torch.randint(1, 256, (5, 3, 4, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    results = moved(images, seed=seed, flip=flip, shift_pixels=shift)
    for image, result in zip(images, results, strict=True):
        padded = torch.nn.functional.pad(image, [shift] * 4).float()
        windows = [padded[:, y : y + 4, x : x + 7] for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
        candidates = windows + [window.flip(2) for window in windows if flip]
        assert any(torch.equal(result, candidate) for candidate in candidates)


def test_half_of_the_images_are_mirrored_and_shifts_are_uniform() -> None:
    images = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 255
    shifted = moved(images, shift_pixels=1).flatten(1).argmax(1).bincount(minlength=25).view(5, 5)[1:4, 1:4]
    assert shifted.sum() == 9000
    assert (shifted - 1000).abs().max() < 5 * 30  # 5 standard deviations of about 30
    images = images.roll(1, dims=3)
    mirrored = (moved(images, flip=True).flatten(1).argmax(1) == 11).sum().item()
    assert abs(mirrored - 4500) < 5 * 48


def test_the_seed_alone_decides_the_augmentation() -> None:
    images = DIGITS.train.images[:50]
    first = moved(images, seed=1, flip=True, shift_pixels=2)
    assert torch.equal(first, moved(images, seed=1, flip=True, shift_pixels=2))
    assert not torch.equal(first, moved(images, seed=2, flip=True, shift_pixels=2))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replace_file(path) as temporary:
        temporary.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replace_file(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"no CIFAR-10 copy at {ARCHIVE}")
def test_real_images_load(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if member.name.startswith("train/bird"):
                break  # two classes are enough: 50 images each
            if member.name.endswith("00.jpg"):
                archive.extract(member, tmp_path / "cifar", filter="data")
    config = DataConfig(source="folder", path=str(tmp_path / "cifar"), cache=str(tmp_path / "cache"))
    data = load_dataset(config)
    assert data.image_shape == (3, 32, 32)
    assert data.classes == ("airplane", "automobile")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [80, 4, 16]
    assert data.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.1)
