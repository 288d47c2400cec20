import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from env.data import DataConfig, check_fields, default_cache, load_dataset, require_batch
from env.errors import UserError
from env.splits import Split

DIGITS = load_dataset(DataConfig())


def images_of(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_gray_8x8_and_split_as_configured() -> None:
    assert DIGITS.image_shape == (1, 8, 8)
    assert DIGITS.classes == tuple("0123456789")
    assert len(DIGITS.train) + len(DIGITS.validation) + len(DIGITS.test) == 1797
    assert len(DIGITS.test) / 1797 == pytest.approx(0.15, abs=0.003)
    assert len(DIGITS.validation) / (1797 - len(DIGITS.test)) == pytest.approx(0.05, abs=0.004)
    assert DIGITS.train.images.max() == 255


def test_the_splits_of_a_folder_are_disjoint_and_complete(tmp_path: Path) -> None:
    for index in range(40):  # each image of its own brightness
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 7), index, np.uint8)).save(path)
    config = DataConfig(
        source="folder", path=str(tmp_path / "images"), cache=str(tmp_path / "cache"), validation_share=0.2
    )
    data = load_dataset(config)
    assert data.classes == ("cat", "dog")
    assert data.image_shape == (1, 5, 7)
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


def test_a_train_limit_without_an_image_for_each_class_is_refused() -> None:
    assert load_dataset(DataConfig(train_limit=10)).train.labels.sort().values.tolist() == list(range(10))
    with pytest.raises(UserError, match=r"train_limit: expected .* each of the 10 classes, got 9"):
        load_dataset(DataConfig(train_limit=9))


def test_a_train_limit_above_what_there_is_takes_all() -> None:
    assert len(load_dataset(DataConfig(train_limit=10**30)).train) == len(DIGITS.train)


def test_the_chosen_classes_alone_are_there_numbered_as_given() -> None:
    chosen = load_dataset(DataConfig(classes="7, 2,9"))
    assert chosen.classes == ("7", "2", "9")
    whole = {name: getattr(DIGITS, name) for name in ("train", "validation", "test")}
    of_class = {
        image.numpy().tobytes(): int(label)
        for split in whole.values()
        for image, label in zip(split.images, split.labels, strict=True)
    }
    count = 0
    for name in whole:
        split = getattr(chosen, name)
        assert sorted(split.labels.unique().tolist()) == [0, 1, 2]
        for image, label in zip(split.images, split.labels, strict=True):
            assert of_class[image.numpy().tobytes()] == (7, 2, 9)[int(label)]
        count += len(split)
    assert count == sum(list(of_class.values()).count(digit) for digit in (7, 2, 9))


def test_all_classes_by_name_are_all_classes() -> None:
    named = load_dataset(DataConfig(classes="0,1,2,3,4,5,6,7,8,9"))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(named, name).images, getattr(DIGITS, name).images)
        assert torch.equal(getattr(named, name).labels, getattr(DIGITS, name).labels)
    assert (named.mean, named.std) == (DIGITS.mean, DIGITS.std)


def test_few_images_a_class_are_exactly_so_many_by_seed_and_leave_validation_and_test_alone() -> None:
    config = DataConfig(classes="3,8", split_seed=4)
    every = load_dataset(config)
    few, fewer, again, other = (
        load_dataset(dataclasses.replace(config, train_per_class=count, split_seed=seed))
        for count, seed in ((10, 4), (4, 4), (10, 4), (10, 5))
    )
    assert few.train.labels.bincount().tolist() == [10, 10]
    assert fewer.train.labels.bincount().tolist() == [4, 4]
    assert images_of(fewer.train) <= images_of(few.train) <= images_of(every.train)
    assert torch.equal(few.train.images, again.train.images)
    assert images_of(few.train) != images_of(other.train)
    for name in ("validation", "test"):
        assert images_of(getattr(few, name)) == images_of(getattr(every, name))
    pixels = few.train.images.double() / 255
    assert few.mean == pytest.approx((pixels.mean().item(),))
    assert few.std == pytest.approx((pixels.std(correction=0).item(),))


def test_a_class_with_fewer_images_than_asked_is_named_with_what_it_has() -> None:
    there = load_dataset(DataConfig(classes="3,8")).train.labels.bincount().tolist()
    fewest = min(range(2), key=lambda index: there[index])
    assert len(load_dataset(DataConfig(classes="3,8", train_per_class=there[fewest])).train) == 2 * there[fewest]
    line = f"expected at most {there[fewest]}, the training images of class {'38'[fewest]}, got {there[fewest] + 1}; "
    with pytest.raises(UserError, match=rf"^data\.train_per_class: {line}lower it"):
        load_dataset(DataConfig(classes="3,8", train_per_class=there[fewest] + 1))


@pytest.mark.parametrize(
    ("classes", "got"),
    [("3", "only '3'"), ("3,3", "'3' twice"), ("3,5, 3", "'3' twice"), ("3,,5", "a name that is empty"),
     (",,", "a name that is empty"), (" ", "only ''")],
)  # fmt: skip
def test_classes_are_two_or_more_different_names(classes: str, got: str) -> None:
    with pytest.raises(UserError, match=f"^data.classes: expected two or more different names, .*, got {got}; "):
        DataConfig(classes=classes)


def test_an_unknown_class_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.classes: .* \(0, 1, .*, 9\), got 'ten'; correct it"):
        load_dataset(DataConfig(classes="3,ten"))
    for name in ("cat", "dog", "hen"):
        save_pictures(tmp_path / "images" / name, 4)
    with pytest.raises(UserError, match=r"\(cat, dog, hen\), got 'bog'; did you mean dog\?"):
        load_dataset(folder_config(tmp_path, classes="cat,bog"))


def test_training_images_are_limited_in_one_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_per_class: expected 0 beside data\.train_limit"):
        DataConfig(train_limit=50, train_per_class=5)


def save_pictures(folder: Path, count: int, shade: int = 0) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (6, 6), (index, shade, 0)).save(folder / f"{index}.png")


def folder_config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        source="folder", path=str(root / "images"), cache=str(root / "cache"), validation_share=0.2, **changes
    )


def test_what_is_kept_of_a_folder_is_never_taken_for_other_classes(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("test", 4)):
        for shade, name in enumerate(("cat", "dog", "hen")):
            save_pictures(tmp_path / "images" / split / name, count, shade)
    for classes in ("", "hen,cat", "cat,dog", "hen,cat"):
        data = load_dataset(folder_config(tmp_path, classes=classes, train_per_class=5))
        assert data.classes == (tuple(classes.split(",")) if classes else ("cat", "dog", "hen"))
        assert len(data.train) == 5 * len(data.classes)
        assert len(data.test) == 4 * len(data.classes)
        shades = [("cat", "dog", "hen").index(name) for name in data.classes]
        for split in (data.train, data.validation, data.test):
            assert [shades[label] for label in split.labels.tolist()] == split.images[:, 1, 0, 0].tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # decoded once for all of them


def test_digits_are_resized_like_any_image() -> None:
    small = load_dataset(DataConfig(image_size=5))
    assert small.image_shape == (1, 5, 5)
    pillow = Image.fromarray(DIGITS.train.images[0, 0].numpy()).resize((5, 5), Image.Resampling.BILINEAR)
    assert small.train.images[0, 0].tolist() == np.asarray(pillow).tolist()


def test_images_that_do_not_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("env.images._machine_bytes", lambda: 2 * 1797 * 64 * 64)
    assert load_dataset(DataConfig(image_size=64)).image_shape == (1, 64, 64)
    with pytest.raises(UserError, match=r"1,797 images of 65x65 pixels: .* set a smaller data\.image_size"):
        load_dataset(DataConfig(image_size=65))


def test_a_shift_leaves_a_part_of_the_image_in_sight() -> None:
    assert load_dataset(DataConfig(shift_pixels=7)).image_shape == (1, 8, 8)
    with pytest.raises(UserError, match=r"data\.shift_pixels: expected less than the images' 8 pixels, got 8"):
        load_dataset(DataConfig(shift_pixels=8))


def test_mean_and_deviation_are_those_of_the_training_split() -> None:
    pixels = DIGITS.train.images.double() / 255
    assert DIGITS.mean == pytest.approx((pixels.mean().item(),))
    assert DIGITS.std == pytest.approx((pixels.std(correction=0).item(),))


def test_the_default_cache_follows_the_users_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "zeroout"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "zeroout"


def test_a_user_without_a_home_is_told_to_set_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # in no list of users
    with pytest.raises(UserError, match=r"set data\.cache"):
        default_cache()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "imagenet"),
        ("image_size", -1),
        ("image_size", True),
        ("image_size", 4097),
        ("image_size", 10**9),
        ("path", "a\0b"),
        ("path", "\udcff"),
        ("cache", "\udcff"),
        ("validation_share", 0.0),
        ("validation_share", 1),
        ("validation_share", math.nan),
        ("validation_share", math.inf),
        ("validation_share", -math.inf),
        ("validation_share", 10**400),
        ("test_share", "0.1"),
        ("split_seed", -1),
        ("flip", 1),
        ("split_seed", 2**63),
        ("shift_pixels", 1.0),
        ("shift_pixels", -1),
        ("shift_pixels", 10**9),
        ("train_limit", -5),
        ("classes", "cat\ndog"),
        ("classes", ("cat", "dog")),
        ("train_per_class", -1),
        ("train_per_class", 2.0),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        DataConfig(**{field: value})
    assert caught.value.what == f"data.{field}"
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_class_with_too_few_images_is_named_with_its_folder(tmp_path: Path, inner: str) -> None:
    for name, count in (("a", 2), ("b", 5)):
        for index in range(count):
            path = tmp_path / "images" / inner / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 6), (index, 0, 0)).save(path)
    config = DataConfig(source="folder", path=str(tmp_path / "images"), cache=str(tmp_path / "cache"))
    folder = tmp_path / "images" / inner / "a"
    with pytest.raises(UserError, match=f"^images of class a in {folder}: expected at least 3 "):
        load_dataset(config)


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


def test_data_moves_to_a_device() -> None:
    moved = DIGITS.to("meta")
    assert {s.images.device.type for s in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert moved.mean == DIGITS.mean
