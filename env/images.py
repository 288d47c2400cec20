"""Any images in one folder per class: found, decoded once, cached. Called by `env/data.py`.

Nothing here trusts a file: whatever is wrong with one ends in one line that names it.
"""

import hashlib
import logging
import math
import os
import stat
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from env.errors import UserError
from env.files import replace_file
from env.splits import Split

__all__ = ["read_folder", "require_memory", "shown", "training_folder"]

_LOG = logging.getLogger(__name__)
_Progress = Callable[[int, int], None]
_PROGRESS_PERIOD = 500  # images between two calls of `progress`
# The whole zoo that Pillow and its plugins raise for bytes that are no image, or not all of one.
_NOT_AN_IMAGE = (
    ArithmeticError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


def read_folder(
    root: Path, *, image_size: int, cache: Path, progress: _Progress
) -> tuple[tuple[str, ...], Split, Split | None]:
    """The class names, the training images and the test images of `root`, in the order of their names.

    `root` holds train/<class>/* and test/<class>/*, or <class>/*; without test/ the last is None. Every image
    becomes a square of `image_size` pixels (0 = all have one size already). Decoded images are kept in the
    folder `cache`; `progress(done, total)` counts images while they are decoded.

    Raises:
        UserError: fewer than two classes, a class without images, other classes in test/ than in train/, a
            file that is no whole image, images of several sizes, or more images than the machine has memory.

    """
    inner = training_folder(root)
    train = _scan(inner)
    classes = tuple(train)
    test = _scan(root / "test") if inner != root and _is_folder(root / "test") else {}
    if test and tuple(test) != classes:
        odd = sorted(set(test) ^ set(classes))
        raise UserError(
            f"test classes in {shown(root / 'test')}",
            expected=f"the {len(classes)} classes of train/",
            got=f"a difference in {', '.join(odd[:3])}",
            remedy="give train/ and test/ the same class folders",
        )
    files = [file for folder in (*train.values(), *test.values()) for file in folder]
    images = _decode_once(root, files, image_size, cache, progress)
    count = sum(len(folder) for folder in train.values())
    return classes, Split(images[:count], _labels(train)), Split(images[count:], _labels(test)) if test else None


def training_folder(root: Path) -> Path:
    """Where the folders of the classes lie that are trained with."""
    return root / "train" if _is_folder(root / "train") else root


def require_memory(count: int, channels: int, height: int, width: int) -> None:
    """UserError when so many uint8 images cannot be held twice: as decoded, and once more while they are split."""
    needed, there = 2 * math.prod((count, channels, height, width)), _machine_bytes()
    if needed > there:
        raise UserError(
            f"{count:,} images of {width}x{height} pixels",
            expected=f"at most the {there / 2**30:.1f} GiB of this machine's memory",
            got=f"{needed / 2**30:.1f} GiB",
            remedy="set a smaller data.image_size, or give fewer images",
        )


def shown(path: Path | str) -> str:
    """The path as one line that every terminal and file takes, whatever bytes its name is made of."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _labels(scanned: Mapping[str, list[Path]]) -> Tensor:
    return torch.cat([torch.full((len(files),), index) for index, files in enumerate(scanned.values())])


def _is_folder(path: Path) -> bool:
    """Whether it is one, or a link to one; UserError where the system does not let us see."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():  # a class would be missing, and nobody would know
            raise _unreadable(path, OSError(error.errno, "a link to nothing")) from error
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"images in {shown(path)}",
        expected="a folder that can be read",
        got=(error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__,
        remedy="correct data.path or the permissions",
    )


def _scan(root: Path) -> dict[str, list[Path]]:
    """The files of each class, both sorted by name; names that start with a dot are not looked at."""
    if not _is_folder(root):
        got = "a file" if root.exists() else "no such path"
        raise UserError(f"images in {shown(root)}", expected="a folder", got=got, remedy="correct data.path")
    scanned = {folder.name: _visible(folder) for folder in _visible(root) if _is_folder(folder)}
    empty = [name for name, files in scanned.items() if not files]
    # Names go into the result, the report and the terminal.
    odd = [name for name in scanned if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)]
    if len(scanned) < 2:
        got = f"only {shown(next(iter(scanned)))}" if scanned else "none"
        problem = ("at least two class folders", got, "put each class's images into a folder of their own")
    elif odd:
        problem = ("class folders named in UTF-8, on one line", shown(odd[0]), "rename the class's folder")
    elif empty:
        problem = ("images for every class", f"none for {empty[0]}", "add images, or remove the class's folder")
    else:
        return scanned
    expected, got, remedy = problem
    raise UserError(f"images in {shown(root)}", expected=expected, got=got, remedy=remedy)


def _visible(folder: Path) -> list[Path]:
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(visible, key=lambda path: path.name)


def _decode_once(root: Path, files: list[Path], image_size: int, cache: Path, progress: _Progress) -> Tensor:
    """All images, uint8 [N, C, H, W], from the cache or else decoded and put there."""
    cached = cache / f"images-{_cache_key(root, files, image_size)}.safetensors"
    try:
        return _read_cache(cached, len(files))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, LookupError, RuntimeError, ValueError, SafetensorError) as error:
        _LOG.warning("cache %s is broken (%s): decoding the images again", cached, error)
    images = _decode(files, image_size, progress)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replace_file(cached) as temporary:
            save_file({"images": images, "crc32": torch.tensor(_crc32(images))}, temporary)
    except (OSError, SafetensorError) as error:
        _LOG.warning("cache %s cannot be written (%s): images are decoded at each start", cached, error)
    return images


def _cache_key(root: Path, files: list[Path], image_size: int) -> str:
    """Names, sizes and times decide: a changed, added or removed file makes another key."""
    digest = hashlib.sha256(f"1 {image_size}\n".encode())  # 1 = the version of this decoder
    for file in files:
        status = _file_status(file)
        name = str(file).removeprefix(str(root))
        digest.update(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _file_status(file: Path) -> os.stat_result:
    """Size and time of a regular file: to open a pipe would wait for ever."""
    try:
        status = file.stat()
    except OSError as error:
        got = f"{type(error).__name__}: {error.strerror}"
    else:
        if stat.S_ISREG(status.st_mode):
            return status
        got = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
    raise UserError(f"image {shown(file)}", expected="a file", got=got, remedy="remove it from the class's folder")


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
    """uint8 [N, C, H, W]: one channel if all images are gray, else three."""
    images: NDArray[np.uint8] | None = None
    for index, file in enumerate(files):
        pixels = _decode_file(file, image_size)  # [C, H, W]
        if images is None:
            require_memory(len(files), *pixels.shape)
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape[1:] != images.shape[2:]:
            raise UserError(
                f"image {shown(file)}",
                expected=f"{_size(images.shape)} pixels as in {shown(files[0])}",
                got=_size(pixels.shape),
                remedy="set data.image_size, so that all are resized to one square",
            )
        if len(pixels) > images.shape[1]:  # the first colour image after gray ones
            require_memory(len(files), *pixels.shape)
            images = np.repeat(images, 3, axis=1)
        images[index] = pixels  # a gray image among colour ones fills all three channels
        if (index + 1) % _PROGRESS_PERIOD == 0 or index + 1 == len(files):
            progress(index + 1, len(files))
    assert images is not None  # _scan lets no empty folder through
    return torch.from_numpy(images)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]}x{shape[-2]}"


def _decode_file(file: Path, image_size: int) -> NDArray[np.uint8]:
    """Upright, gray [1, H, W] or colour [3, H, W]."""
    try:
        # What Pillow merely warns of (large images, odd metadata) does not keep it from reading the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
            mode = opened.mode
            image = _eight_bits(ImageOps.exif_transpose(opened))
    except _NOT_AN_IMAGE as error:
        raise UserError(
            f"image {shown(file)}",
            expected="a whole image that Pillow can read",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            remedy="replace or remove the file",
        ) from error
    if image is None:
        raise UserError(
            f"image {shown(file)}", expected="8 bits per channel", got=f"mode {mode}", remedy="convert the image"
        )
    if image_size and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


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
