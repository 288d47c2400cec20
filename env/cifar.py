"""CIFAR-10 as its authors publish it: an archive of pickles, checked before anything of it is read.

Called by `env/data.py`. The archive is read anew at each start: on one core 0.5 s for its checksum and 2 s to
unpack, which a cache of the decoded images would not much improve.
The format: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, 2009).
"""

import hashlib
import io
import os
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.error import HTTPError

import numpy as np
import torch
from numpy.typing import NDArray

from env.errors import UserError
from env.files import replace_file
from env.images import shown
from env.splits import Split

__all__ = ["CIFAR10", "Archive", "find_archive", "read_cifar10"]

_Progress = Callable[[int, int], None]
_CHUNK_BYTES = 2**20
_TIMEOUT_S = 30.0  # of silence, not of the whole download
_CLASSES = 10
_SHAPE = (3, 32, 32)
_WIDTH = 3072  # an image's row: 1024 red, 1024 green, 1024 blue
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST, _META = "test_batch", "batches.meta"
_OFFICIAL = "use the official archive"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published file, and how to know it."""

    url: str
    md5: str  # 32 hexadecimal digits, lower case
    size_bytes: int

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rpartition("/")[2]


CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    size_bytes=170_498_071,
)


def find_archive(path: str, archive: Archive, *, cache: Path, progress: _Progress) -> Path:
    """The archive's file: `path` is the file or its folder; "" = `cache`, into which it is downloaded if need be.

    What it returns has the right md5. `progress(done, total)` counts bytes while they arrive.

    Raises:
        UserError: no such file, another content, a folder that cannot be written, or no way to download it.

    """
    given = Path(os.path.expanduser(path)) if path else cache  # unlike Path.expanduser it never raises
    try:
        file = given / archive.name if given.is_dir() or not path else given
        if file.is_file():
            _check(file, archive, remedy="remove it, and give the official one or leave data.path empty")
            return file
    except OSError as error:
        raise UserError(
            f"archive {shown(given)}",
            expected="a file that can be read",
            got=error.strerror or type(error).__name__,
            remedy="correct data.path or the permissions",
        ) from error
    if path:
        raise UserError(
            f"data.path {shown(path)}",
            expected=f"{archive.name} or the folder that holds it",
            got=f"no file {shown(file)}",
            remedy=f"correct it, or leave it empty to download {archive.url}",
        )
    _download(archive, file, progress)
    return file


def read_cifar10(file: Path) -> tuple[tuple[str, ...], Split, Split]:
    """The class names, the 50,000 training and the 10,000 test images of an archive in CIFAR-10's layout.

    Images are uint8 [N, 3, 32, 32]. UserError names the member of the archive that is missing or wrong.
    """
    members = _members(file)
    train = [_batch(members[name], f"{name} in {shown(file)}") for name in _TRAIN]
    classes = _class_names(members[_META], f"{_META} in {shown(file)}")
    pool = Split(torch.cat([batch.images for batch in train]), torch.cat([batch.labels for batch in train]))
    return classes, pool, _batch(members[_TEST], f"{_TEST} in {shown(file)}")


def _check(file: Path, archive: Archive, *, remedy: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if got != archive.md5:
        raise UserError(f"archive {shown(file)}", expected=f"md5 {archive.md5}", got=f"md5 {got}", remedy=remedy)


def _download(archive: Archive, file: Path, progress: _Progress) -> None:
    """Fetch to a temporary name, check, and only then give it the name `file`."""
    elsewhere = f"fetch it by other means (md5 {archive.md5}) and put it at {shown(file)}, or set data.path to it"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as temporary:
            _fetch(archive, temporary, progress)
            _check(temporary, archive, remedy=f"what {archive.url} gave is not kept: try again, or {elsewhere}")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise UserError(
            f"download of {archive.url} to {shown(file.parent)}",
            expected="the whole archive",
            got=" ".join(str(error).split()) or type(error).__name__,
            remedy=elsewhere,
        ) from error


def _fetch(archive: Archive, file: Path, progress: _Progress) -> None:
    """Write what the URL gives to `file`; ValueError when it is not as long as it should be."""
    done = 0
    with urllib.request.urlopen(archive.url, timeout=_TIMEOUT_S) as response, file.open("wb") as stream:
        while done <= archive.size_bytes and (chunk := response.read(_CHUNK_BYTES)):
            stream.write(chunk)
            done += len(chunk)
            progress(min(done, archive.size_bytes), archive.size_bytes)
    if done != archive.size_bytes:
        got = (
            f"more than {archive.size_bytes:,}" if done > archive.size_bytes else f"{done:,} of {archive.size_bytes:,}"
        )
        raise ValueError(f"{got} bytes")


def _members(file: Path) -> dict[str, Any]:
    """What each wanted member of the archive holds, by its name without folders."""
    members: dict[str, Any] = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member) if name in (*_TRAIN, _TEST, _META) else None
                if content is not None:
                    members[name] = _unpickle(content.read(), f"{name} in {shown(file)}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"archive {shown(file)}", expected="a whole .tar.gz", got=got, remedy=_OFFICIAL) from error
    for name in (*_TRAIN, _TEST, _META):
        if name not in members:
            raise UserError(f"archive {shown(file)}", expected=f"the member {name}", got="none", remedy=_OFFICIAL)
    return members


class _Inert:
    """Stands in for everything that a batch's pickle constructs: keeps what it is given and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Reads Python 2's strings as bytes, and runs no code of the pickle's choice.

    The one in C makes room for as many remembered objects as a pickle says it has: a single damaged byte can ask it for
    all memory there is. So could a bytearray's length; no batch has one.
    """

    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> type[_Inert]:
        """An inert stand-in for the three names of a pickled array; UnpicklingError for any other."""
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        ):
            return _Inert
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _unpickle(content: bytes, what: str) -> dict[bytes, Any]:
    try:
        unpickled = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything, as Python's documentation says
        got = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(what, expected="a pickled batch", got=got, remedy=_OFFICIAL) from error
    if not isinstance(unpickled, dict):
        raise UserError(what, expected="a dictionary", got=type(unpickled).__name__, remedy=_OFFICIAL)
    return unpickled


def _batch(content: dict[bytes, Any], what: str) -> Split:
    pixels, labels = _array(content.get(b"data"), what), content.get(b"labels")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        got = f"{len(labels)} labels" if isinstance(labels, list) else "no list of labels"
        raise UserError(what, expected=f"{len(pixels)} labels, one an image", got=got, remedy=_OFFICIAL)
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < _CLASSES]
    if wrong:
        raise UserError(what, expected=f"labels from 0 to {_CLASSES - 1}", got=ascii(wrong[0])[:40], remedy=_OFFICIAL)
    return Split(torch.from_numpy(pixels.reshape(-1, *_SHAPE)), torch.tensor(labels))


def _array(pickled: object, what: str) -> NDArray[np.uint8]:
    """The uint8 [N, 3072] that numpy would make of a pickled array's state, N at least 1."""
    match getattr(pickled, "state", None):
        case (_, (int(rows), width), _Inert(arguments=(b"u1", *_)), by_columns, bytes(content)) if (
            width == _WIDTH and len(content) == rows * width > 0
        ):
            # A copy: what stands on a bytes object cannot be written to, which torch refuses.
            return np.frombuffer(content, np.uint8).reshape(rows, width, order="F" if by_columns else "C").copy()
        case (_, shape, _Inert(arguments=(kind, *_)), _, _):
            got = ascii((kind, shape))[:80]
        case _:
            got = "no array"
    raise UserError(what, expected=f"data, an array of uint8 [N, {_WIDTH}]", got=got, remedy=_OFFICIAL)


def _class_names(content: dict[bytes, Any], what: str) -> tuple[str, ...]:
    names = content.get(b"label_names")
    if isinstance(names, list) and len(names) == _CLASSES and all(isinstance(name, bytes) for name in names):
        return tuple(name.decode("ascii", "backslashreplace") for name in names)
    raise UserError(what, expected=f"label_names, {_CLASSES} of them", got=ascii(names)[:80], remedy=_OFFICIAL)
