"""Images: what the Recognizer is trained, judged and tested on.

Read once into uint8 tensors, kept on the device, augmented there: no worker processes stand in the inner
loop. Called by `deploy/campaign.py`, by every actor when it starts, and by `env/training.py`. The split
follows the source's protocol: 5 % of the training images are kept out for validation, which decides
everything; the test images are looked at once.
"""

import hashlib
import logging
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from env.errors import UserError
from env.files import replace_file

__all__ = [
    "DataConfig",
    "Dataset",
    "Split",
    "augment",
    "check_fields",
    "default_cache",
    "load_dataset",
    "normalise",
    "require_batch",
]

_LOG = logging.getLogger(__name__)
_Progress = Callable[[int, int], None]
_PROGRESS_PERIOD = 500  # images between two calls of `progress`
# The whole zoo that Pillow raises for bytes that are no image, or not all of one.
_NOT_AN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def check_fields(section: str, config: Any, rules: Mapping[str, tuple[Callable[..., bool], str]]) -> None:
    """Check a frozen config dataclass, whose fields all have defaults, against their types and `rules`.

    A rule is (predicate of the value, words for what is expected). UserError names `section.field`.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    for field in fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        fits, expected = rules.get(field.name, (lambda _: True, ""))
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
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

    source: str = "digits"  # "digits" (1,797 embedded 8x8 images) or "folder" (one folder per class)
    path: str = ""  # for "folder": holds train/<class>/* and test/<class>/*, or <class>/*
    image_size: int = 0  # pixels; 0 = as they are, else every image is resized to this square
    validation_share: float = 0.05  # of the training images, kept out for every decision (the source's 5 %)
    test_share: float = 0.15  # of all images, only where there is no test/ folder
    split_seed: int = 0  # draws the test and validation images and the training subset
    cache: str = ""  # folder for decoded images; "" = the user's own cache folder
    flip: bool = False  # augmentation: half of the images mirrored left to right
    shift_pixels: int = 0  # augmentation: moved by up to so many pixels each way, zeros moving in
    train_limit: int = 0  # training images; 0 = all, else so many, drawn class-balanced

    def __post_init__(self) -> None:
        check_fields("data", self, _RULES)
        if self.source == "folder" and not self.path:
            raise UserError(
                "data.path",
                expected="the folder of images, because data.source is folder",
                got="nothing",
                remedy="set data.path",
            )


_NOT_NEGATIVE = (lambda n: n >= 0, "a whole number of at least 0")
_SHARE = (lambda share: 0 < share < 1, "a share above 0 and below 1")
_RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "source": (lambda source: source in ("digits", "folder"), "digits or folder"),
    "image_size": _NOT_NEGATIVE,
    "validation_share": _SHARE,
    "test_share": _SHARE,
    "split_seed": (lambda seed: 0 <= seed < 2**63, "a whole number of at least 0, below 2**63"),
    "shift_pixels": _NOT_NEGATIVE,
    "train_limit": _NOT_NEGATIVE,
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes, in random order, so that any prefix is a fair sample."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], 0 to classes - 1

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The images at `indices` (int64 [M]), in that order."""
        return Split(self.images[indices], self.labels[indices])


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
    """The user's cache folder for Zeroout: $XDG_CACHE_HOME/zeroout, or ~/.cache/zeroout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeroout"


def load_dataset(config: DataConfig, *, progress: _Progress | None = None) -> Dataset:
    """Read, split and describe the images that `config` names, on the CPU.

    The same configuration and files give the same splits. `progress(done, total)` is called while images
    are decoded, which happens once; later calls read the cache. UserError for anything wrong with the files.
    """
    report = progress or (lambda done, total: None)
    if config.source == "digits":
        classes, pool, test = *_digits(), None
    else:
        classes, pool, test = _folder(config, report)
    # Indices are drawn first and images copied once: they may be hundreds of megabytes.
    generator = torch.Generator().manual_seed(config.split_seed)
    rest = torch.arange(len(pool))
    if test is None:
        rest, drawn = _part(rest, pool.labels, config.test_share, generator, classes)
        test = pool.take(drawn)
    rest, validation = _part(rest, pool.labels, config.validation_share, generator, classes)
    if config.train_limit:
        rest = rest[_in_turn(pool.labels[rest], generator)[: config.train_limit]]
    train = pool.take(_shuffled(rest, generator))
    mean, std = _moments(train.images)
    return Dataset(
        train=train,
        validation=pool.take(_shuffled(validation, generator)),
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


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images uint8 [B, C, H, W] as float32 [B, C, H, W] with the training split's mean 0 and deviation 1."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(-1, 1, 1)
    return images.to(torch.float32).mul_(scale).add_(shift)


def augment(
    images: Tensor,
    *,
    flip: bool,
    shift_pixels: int,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """Images uint8 [B, C, H, W], each flipped and shifted by itself, normalised: float32 [B, C, H, W].

    Each image is mirrored with probability 1/2 where `flip`, and moved by whole pixels, uniform in
    -shift_pixels..shift_pixels along each axis; zeros (black) move in. Numbers are drawn on the generator's
    device, so a CPU generator gives the same pictures on every device.
    """
    if flip or shift_pixels:
        images = _moved(images, flip=flip, shift_pixels=shift_pixels, generator=generator)
    return normalise(images, mean, std)


def _moved(images: Tensor, *, flip: bool, shift_pixels: int, generator: torch.Generator) -> Tensor:
    """Each image cut as a window out of its padded self (one copy), then mirrored where drawn."""
    batch, _, height, width = images.shape
    source = generator.device
    shifts = torch.randint(2 * shift_pixels + 1, (2, batch), generator=generator, device=source)
    mirrored = torch.randint(2, (batch, 1, 1, 1), generator=generator, device=source, dtype=torch.bool)
    if shift_pixels:
        down, right = shifts.to(images.device)
        padded = torch.nn.functional.pad(images, [shift_pixels] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, rows, columns, H, W]
        images = windows[torch.arange(batch, device=images.device), :, down, right]
    if flip:
        images = torch.where(mirrored.to(images.device), images.flip(3), images)
    return images


def _digits() -> tuple[tuple[str, ...], Split]:
    # Imported here: it takes a second, which only those who use the digits should wait.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))  # stored as 0 to 16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return tuple(str(digit) for digit in range(10)), Split(images.unsqueeze(1), labels)


def _folder(config: DataConfig, progress: _Progress) -> tuple[tuple[str, ...], Split, Split | None]:
    root = Path(config.path).expanduser()
    train = _scan(root / "train" if (root / "train").is_dir() else root)
    classes = tuple(train)
    test: dict[str, list[Path]] = {}
    if (root / "train").is_dir() and (root / "test").is_dir():
        test = _scan(root / "test")
        if tuple(test) != classes:
            odd = sorted(set(test) ^ set(classes))
            raise UserError(
                f"test classes in {root / 'test'}",
                expected=f"the {len(classes)} classes of train/",
                got=f"a difference in {', '.join(odd[:3])}",
                remedy="give train/ and test/ the same class folders",
            )
    files = [file for folder in (*train.values(), *test.values()) for file in folder]
    images = _decode_once(root, files, config, progress)
    count = sum(len(folder) for folder in train.values())
    pool = Split(images[:count], _labels(train))
    return classes, pool, Split(images[count:], _labels(test)) if test else None


def _labels(scanned: Mapping[str, list[Path]]) -> Tensor:
    return torch.cat([torch.full((len(files),), index) for index, files in enumerate(scanned.values())])


def _scan(root: Path) -> dict[str, list[Path]]:
    """The files of each class, both sorted by name; names that start with a dot are not looked at."""
    if not root.exists() or not root.is_dir():
        got = "a file" if root.exists() else "no such path"
        raise UserError(f"images in {root}", expected="a folder", got=got, remedy="correct data.path")
    scanned = {folder.name: _visible(folder) for folder in _visible(root) if folder.is_dir()}
    empty = [name for name, files in scanned.items() if not files]
    if len(scanned) < 2:
        got = f"only {next(iter(scanned))}" if scanned else "none"
        problem = ("at least two class folders", got, "put each class's images into a folder of their own")
    elif empty:
        problem = ("images for every class", f"none for {empty[0]}", "add images, or remove the class's folder")
    else:
        return scanned
    expected, got, remedy = problem
    raise UserError(f"images in {root}", expected=expected, got=got, remedy=remedy)


def _visible(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(visible, key=lambda path: path.name)


def _decode_once(root: Path, files: list[Path], config: DataConfig, progress: _Progress) -> Tensor:
    """All images, uint8 [N, C, H, W], from the cache or else decoded and put there."""
    folder = Path(config.cache).expanduser() if config.cache else default_cache()
    cached = folder / f"images-{_cache_key(root, files, config.image_size)}.safetensors"
    if cached.exists():
        try:
            return _read_cache(cached, len(files))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            _LOG.warning("cache %s is broken (%s): decoding the images again", cached, error)
    images = _decode(files, config.image_size, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(cached) as temporary:
            save_file({"images": images, "crc32": torch.tensor(_crc32(images))}, temporary)
    except (OSError, SafetensorError) as error:
        _LOG.warning("cache %s cannot be written (%s): images are decoded at each start", cached, error)
    return images


def _cache_key(root: Path, files: list[Path], image_size: int) -> str:
    """Names, sizes and times decide: a changed, added or removed file makes another key."""
    digest = hashlib.sha256(f"1 {image_size}\n".encode())  # 1 = the version of this decoder
    for file in files:
        status = file.stat()
        name = str(file).removeprefix(str(root))
        digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(path: Path, count: int) -> Tensor:
    stored = load_file(path)
    images = stored["images"]
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != count:
        raise ValueError(f"holds {images.dtype} {list(images.shape)} for {count} images")
    if int(stored["crc32"]) != _crc32(images):
        raise ValueError("checksum does not agree")
    return images


def _crc32(images: Tensor) -> int:
    return zlib.crc32(images.numpy().data)


def _decode(files: list[Path], image_size: int, progress: _Progress) -> Tensor:
    images: NDArray[np.uint8] | None = None
    for index, file in enumerate(files):
        pixels = _decode_file(file, image_size)  # [H, W, C]
        if images is None:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape[:2] != images.shape[1:3]:
            raise UserError(
                f"image {file}",
                expected=f"{_size(images.shape[1:])} pixels as in {files[0]}",
                got=_size(pixels.shape),
                remedy="set data.image_size, so that all are resized to one square",
            )
        if pixels.shape[2] > images.shape[3]:  # the first colour image after gray ones
            images = np.repeat(images, 3, axis=3)
        images[index] = pixels  # a gray image among colour ones fills all three channels
        if (index + 1) % _PROGRESS_PERIOD == 0 or index + 1 == len(files):
            progress(index + 1, len(files))
    assert images is not None  # _scan lets no empty folder through
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _decode_file(file: Path, image_size: int) -> NDArray[np.uint8]:
    """Upright, gray [H, W, 1] or colour [H, W, 3]."""
    try:
        with Image.open(file) as opened:
            mode = opened.mode
            image = _eight_bits(ImageOps.exif_transpose(opened))
    except _NOT_AN_IMAGE as error:
        raise UserError(
            f"image {file}",
            expected="a whole image that Pillow can read",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            remedy="replace or remove the file",
        ) from error
    if image is None:
        raise UserError(f"image {file}", expected="8 bits per channel", got=f"mode {mode}", remedy="convert the image")
    if image_size and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _eight_bits(image: Image.Image) -> Image.Image | None:
    """The image in mode L or RGB, or None where its channels have more than 8 bits."""
    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode[0] in "IF":
        return None
    # A palette's transparent colours must pass through RGBA, or Pillow warns.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _part(
    indices: Tensor, labels: Tensor, share: float, generator: torch.Generator, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Draw `share` of each class out of `indices`: (the rest, the drawn), at least one of a class in both."""
    drawn = torch.zeros(len(indices), dtype=torch.bool)
    for index, name in enumerate(classes):
        members = (labels[indices] == index).nonzero().flatten()
        if len(members) < 2:
            raise UserError(
                f"images of class {name}",
                expected="at least 3 (2 in train/ beside a test/ folder), so that every split has one",
                got="fewer",
                remedy="add images of this class",
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        drawn[_shuffled(members, generator)[:count]] = True
    return indices[~drawn], indices[drawn]


def _shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)]


def _in_turn(labels: Tensor, generator: torch.Generator) -> Tensor:
    """All indices, drawn class by class in turn, so that every prefix is as balanced as it can be."""
    shuffled = torch.randperm(len(labels), generator=generator)
    turn = torch.empty_like(labels)  # how many of the same class come before
    for index in range(int(labels.max()) + 1):
        members = shuffled[labels[shuffled] == index]
        turn[members] = torch.arange(len(members))
    return shuffled[torch.argsort(turn[shuffled], stable=True)]


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
