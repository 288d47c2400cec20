"""Images: what the Recognizer is trained, judged and tested on.

Read once into uint8 tensors, kept on the device, augmented there (`env/augment.py`): no worker processes stand in
the inner loop. Called by `deploy/prepare.py` and by everything that trains or judges. The split follows the
source's protocol: 5 % of the training images are kept out for validation, which decides everything; the test
images are looked at once.
"""

import difflib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from env.cifar import CIFAR10, find_archive, read_cifar10
from env.errors import UserError
from env.images import read_folder, require_memory, shown, training_folder
from env.splits import Split, draw_share, shuffled, take_turns

__all__ = [
    "DataConfig",
    "Dataset",
    "check_fields",
    "default_cache",
    "load_dataset",
    "require_batch",
]

_Progress = Callable[[int, int], None]
_LARGEST = 4096  # pixels: far above what a network here is made for, and its images still fit in memory
_LISTED = 12  # class names in a message: of a thousand the first ones say what kind they are


def check_fields(section: str, config: Any, rules: Mapping[str, tuple[Callable[..., bool], str]]) -> None:
    """Check a frozen config dataclass, whose fields all have defaults, against their types and `rules`.

    A rule is (predicate of the value, words for what is expected). UserError names `section.field`.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    for field in fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        fits, expected = rules.get(field.name, (lambda _: True, ""))
        # Compared, not converted: false for NaN, and no whole number is too large for it.
        number = isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max
        if not (number if kind is float else type(value) is kind):
            expected = kinds[kind]
        elif fits(value):
            continue
        raise UserError(
            f"{section}.{field.name}",
            expected=expected,
            got=repr(value),
            remedy=f"set {section}.{field.name}, for instance to its default {field.default!r}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split, how they are augmented. UserError for a value out of range."""

    source: str = "digits"  # "digits" (1,797 embedded 8x8 images), "cifar10" or "folder" (one folder per class)
    # For "folder": holds train/<class>/* and test/<class>/*, or <class>/*. For "cifar10": cifar-10-python.tar.gz
    # or the folder it lies in; "" = in the cache, downloaded if need be.
    path: str = ""
    image_size: int = 0  # pixels, at most 4096; 0 = as they are, else every image is resized to this square
    validation_share: float = 0.05  # of the training images, kept out for every decision (the source's 5 %)
    test_share: float = 0.15  # of all images, only where no test images are given
    split_seed: int = 0  # draws the test and validation images and the training subset
    cache: str = ""  # folder for decoded and downloaded images; "" = the user's own cache folder
    flip: bool = False  # augmentation: half of the images mirrored left to right
    shift_pixels: int = 0  # augmentation: moved by up to so many pixels each way, zeros moving in
    train_limit: int = 0  # training images; 0 = all, else at most so many, drawn class-balanced
    # Names of the only classes that there are, separated by commas, in the order in which they are numbered; "" = all.
    # Every split then holds these alone.
    classes: str = ""
    # Training images of each class; 0 = all, else exactly so many. Validation and test keep all of theirs, because what
    # is measured on a handful of images says little.
    train_per_class: int = 0

    def __post_init__(self) -> None:
        check_fields("data", self, _RULES)
        if self.classes:
            _check_names(self.chosen)
        if self.train_limit and self.train_per_class:
            raise UserError(
                "data.train_per_class",
                expected="0 beside data.train_limit, because both say how many training images there are",
                got=repr(self.train_per_class),
                remedy="leave out one of them",
            )
        if self.source == "folder" and not self.path:
            raise UserError(
                "data.path",
                expected="the folder of images, because data.source is folder",
                got="nothing",
                remedy="set data.path",
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names in `classes`; none where all classes are meant."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()


def _check_names(names: Sequence[str]) -> None:
    """UserError unless these are at least two names of classes, none of them twice."""
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        got = f"{doubled!r} twice" if doubled else "a name that is empty"
    elif len(names) < 2 or "" in names:
        got = f"only {names[0]!r}" if len(names) < 2 else "a name that is empty"
    else:
        return
    raise UserError(
        "data.classes",
        expected="two or more different names, separated by commas",
        got=got,
        remedy="give e.g. cat,dog or leave it empty for all classes",
    )


def _is_path(text: str) -> bool:
    """Whether the system can open it and the resolved configuration can be written with it."""
    return "\0" not in text and text.encode("utf-8", "ignore").decode() == text


_NOT_NEGATIVE = (lambda n: n >= 0, "a whole number of at least 0")
_PIXELS = (lambda n: 0 <= n <= _LARGEST, f"a whole number from 0 to {_LARGEST}")
_PATH = (_is_path, "a path in UTF-8, without a NUL")
_SHARE = (lambda share: 0 < share < 1, "a share above 0 and below 1")
_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "source": (lambda source: source in ("digits", "cifar10", "folder"), "digits, cifar10 or folder"),
    "path": _PATH,
    "image_size": _PIXELS,
    "cache": _PATH,
    "validation_share": _SHARE,
    "test_share": _SHARE,
    "split_seed": (lambda seed: 0 <= seed < 2**63, "a whole number of at least 0, below 2**63"),
    "shift_pixels": _PIXELS,
    "train_limit": _NOT_NEGATIVE,
    "classes": (str.isprintable, "names on one line"),
    "train_per_class": _NOT_NEGATIVE,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Three splits without a common image, and what normalises them."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel over the training split, 1.0 = white
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width in pixels."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on `device`."""
        return Dataset(
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            classes=self.classes,
            mean=self.mean,
            std=self.std,
        )


def default_cache() -> Path:
    """The user's cache folder for Zeroout: $XDG_CACHE_HOME/zeroout, or ~/.cache/zeroout.

    UserError where neither the variable nor a home folder is known, as for a container's nameless user.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeroout"
    except RuntimeError as error:
        raise UserError(
            "the cache folder", expected="a home folder", got="none for this user", remedy="set data.cache"
        ) from error


def load_dataset(config: DataConfig, *, progress: _Progress | None = None) -> Dataset:
    """Read, split and describe the images that `config` names, on the CPU.

    The same configuration and files give the same splits. `progress(done, total)` is called while an archive is
    downloaded (it counts bytes) and while files are decoded (it counts images), so show it as a share; both happen
    once, and later calls read what was kept. UserError for anything wrong with the files.
    """
    classes, pool, test = _read(config, progress or (lambda done, total: None))
    if config.chosen:
        pool = _of_classes(config.chosen, classes, pool)
        test = None if test is None else _of_classes(config.chosen, classes, test)
        classes = config.chosen
    _check_pixels(config, pool)
    named = _named(config, classes)
    # Indices are drawn first and images copied once: they may be hundreds of megabytes.
    generator = torch.Generator().manual_seed(config.split_seed)
    rest = torch.arange(len(pool))
    if test is None:
        rest, drawn = draw_share(rest, pool.labels, config.test_share, generator, named)
        test = pool.take(drawn)
    rest, validation = draw_share(rest, pool.labels, config.validation_share, generator, named)
    if config.train_limit:
        _check_limit(config.train_limit, len(classes))
        rest = rest[take_turns(pool.labels[rest], generator)[: config.train_limit]]
    if config.train_per_class:
        _check_per_class(config.train_per_class, pool.labels[rest], named)
        # each class has its turn as long as none of them is used up
        rest = rest[take_turns(pool.labels[rest], generator)[: config.train_per_class * len(classes)]]
    train = pool.take(shuffled(rest, generator))
    mean, std = _moments(train.images)
    return Dataset(
        train=train,
        validation=pool.take(shuffled(validation, generator)),
        test=test.take(torch.randperm(len(test), generator=generator)),
        classes=classes,
        mean=mean,
        std=std,
    )


def require_batch(dataset: Dataset, batch_size: int) -> None:
    """UserError when the training split has fewer images than one batch."""
    if len(dataset.train) < batch_size:
        raise UserError(
            "training images",
            expected=f"at least one batch of {batch_size}",
            got=str(len(dataset.train)),
            remedy="give more images, or set a smaller batch_size",
        )


def _read(config: DataConfig, progress: _Progress) -> tuple[tuple[str, ...], Split, Split | None]:
    """The class names, the images to train and validate with, and the test images if they are given."""
    if config.source == "digits":
        classes, pool = _digits()
        return classes, _resized(pool, config.image_size), None
    # Unlike Path.expanduser, os.path's never raises.
    cache = Path(os.path.expanduser(config.cache)) if config.cache else default_cache()
    if config.source == "cifar10":
        file = find_archive(config.path, CIFAR10, cache=cache, progress=progress)
        classes, pool, test = read_cifar10(file)
        return classes, _resized(pool, config.image_size), _resized(test, config.image_size)
    root = Path(os.path.expanduser(config.path))
    return read_folder(root, image_size=config.image_size, cache=cache, progress=progress)


def _of_classes(chosen: Sequence[str], classes: Sequence[str], split: Split) -> Split:
    """The images of the `chosen` classes, labelled in their order; UserError for one that is not in `classes`.

    Taken after everything was read, so that what is kept of a folder's images is the same for any choice.
    """
    unknown = next((name for name in chosen if name not in classes), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, classes, n=1)
        more = ", ..." if len(classes) > _LISTED else ""
        raise UserError(
            "data.classes",
            expected=f"names of these images' classes ({', '.join(classes[:_LISTED])}{more})",
            got=repr(unknown),
            remedy=f"did you mean {near[0]}?" if near else "correct it",
        )
    number = torch.full((len(classes),), -1)
    number[[classes.index(name) for name in chosen]] = torch.arange(len(chosen))
    labels = number[split.labels]
    kept = (labels >= 0).nonzero().flatten()
    return Split(split.images[kept], labels[kept])


def _named(config: DataConfig, classes: Sequence[str]) -> Sequence[str]:
    """The classes as messages name them: each with its folder, where it has one."""
    if config.source != "folder":
        return classes
    inner = training_folder(Path(os.path.expanduser(config.path)))
    return [f"{name} in {shown(inner / name)}" for name in classes]


def _digits() -> tuple[tuple[str, ...], Split]:
    # Imported here: it takes a second, which only those who use the digits should wait.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))  # stored as 0 to 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return tuple(str(digit) for digit in range(10)), Split(images.unsqueeze(1), labels)


def _resized(split: Split, size: int) -> Split:
    """Each image as a square of `size` pixels (0 = as it is), by the same filter as a folder's images."""
    if size in (0, split.images.shape[-1]):
        return split
    require_memory(len(split), split.images.shape[1], size, size)
    images = torch.nn.functional.interpolate(split.images, size=(size, size), mode="bilinear", antialias=True)
    return Split(images, split.labels)


def _check_pixels(config: DataConfig, pool: Split) -> None:
    smallest = min(pool.images.shape[-2:])
    if config.shift_pixels >= smallest:
        raise UserError(
            "data.shift_pixels",
            expected=f"less than the images' {smallest} pixels",
            got=str(config.shift_pixels),
            remedy="set it lower, or images may be shifted out of sight",
        )


def _check_limit(limit: int, classes: int) -> None:
    if limit < classes:
        raise UserError(
            "data.train_limit",
            expected=f"at least one image for each of the {classes} classes",
            got=str(limit),
            remedy="raise it, or set it to 0 for all",
        )


def _check_per_class(count: int, labels: Tensor, classes: Sequence[str]) -> None:
    """UserError, naming the class with the fewest, where a class has fewer than `count` in `labels` (int64 [N])."""
    there = labels.bincount(minlength=len(classes))
    fewest = int(there.argmin())
    if int(there[fewest]) < count:
        raise UserError(
            "data.train_per_class",
            expected=f"at most {int(there[fewest])}, the training images of class {classes[fewest]}",
            got=str(count),
            remedy="lower it, or add images of this class",
        )


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (1.0 = white), exact: counted, not summed in floats."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).to(torch.float64)
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(mean)
        deviations.append(max(math.sqrt(variance), 1 / 255))  # a constant channel is not divided by 0
    return tuple(means), tuple(deviations)
