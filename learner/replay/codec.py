"""How arrays and opaque bytes lie in Redis: a fixed header, then little-endian bytes. Never pickle.

    header   magic 4s | format version u16 | tag u64 | body length u64 | crc32 u32 of all before it and the body
    body     of b"ZOSQ" (tag = bytes of the table): the table, then the raw elements of the arrays in its order
    table    for each array: name length u8 | name UTF-8 | dtype code u8 | axes u8 | length u32 of each axis

Called by the actors and the learner for sequences, and by `weights.py`, which seals its payload in the same
header. A value in a shared server may be anything: every size is checked before something is allocated for it. A
campaign's sequences have few tables between them, so a table is made, and read and checked, once and then remembered.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from env.errors import ZerooutError

__all__ = ["FORMAT_VERSION", "MAX_BYTES", "PayloadError", "decode", "encode", "seal", "unseal"]

FORMAT_VERSION = 2
MAX_BYTES = 64 << 20

_MAGIC = b"ZOSQ"
_HEADER = struct.Struct("<4sHQQ")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_MAX_AXES = 8
_MAX_NAME_BYTES = 255
_MAX_TABLE_BYTES = 16 << 10  # a remembered table must not be a way to fill the memory
_TABLES = 1024  # remembered
# The place in this tuple is the code on the wire: append only.
_DTYPES = tuple(np.dtype(name) for name in ("u1", "?", "<i2", "<i4", "<i8", "<f2", "<f4"))
_SHAPES = tuple(struct.Struct(f"<{axes}I") for axes in range(_MAX_AXES + 1))
_CODES = {dtype.name: code for code, dtype in enumerate(_DTYPES)}


class PayloadError(ZerooutError):
    """A value is not what the codec writes: says what was expected and what was got."""

    def __init__(self, what: str, *, expected: str, got: str) -> None:
        super().__init__(f"{what}: expected {expected}, got {got}")


class _Place(NamedTuple):
    """Where an array of a table lies."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # bytes from the first element of all
    stop: int


def encode(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the payload of named arrays (any shape of up to 8 axes, any memory order or byte order).

    Raises PayloadError when a dtype is not in the allow-list (uint8, bool, int16, int32, int64, float16,
    float32), a name is empty or above 255 bytes, or all names and shapes together take above 16 KiB.
    """
    given = [(name, np.asarray(array)) for name, array in arrays.items()]
    table, as_stored = _table(tuple([(name, array.dtype, array.shape) for name, array in given]))
    elements = [
        (array if dtype is None else array.astype(dtype)).tobytes()
        for (_, array), dtype in zip(given, as_stored, strict=True)
    ]
    return seal(_MAGIC, len(table), b"".join((table, *elements)))


def decode(payload: bytes, *, max_bytes: int = MAX_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays in the order they were encoded: read-only views into `payload`, aligned as they lie there.

    Raises PayloadError for anything but an intact payload of at most `max_bytes` in this format version.
    """
    table_bytes, body = unseal(_MAGIC, payload, max_bytes=max_bytes)
    most = min(len(body), _MAX_TABLE_BYTES)
    if table_bytes > most:
        raise PayloadError("payload's table", expected=f"at most {most} bytes", got=f"{table_bytes}")
    places = _places(bytes(body[:table_bytes]), len(body) - table_bytes, max_bytes)
    first = _HEADER_BYTES + table_bytes
    for place in places:
        if place.dtype.kind == "b" and payload[first + place.start : first + place.stop].translate(None, b"\0\1"):
            raise PayloadError(f"array {place.name!r}", expected="bool elements of 0 or 1", got="another byte")
    return {name: np.ndarray(shape, dtype, payload, first + start) for name, dtype, shape, start, _ in places}


def seal(magic: bytes, tag: int, body: bytes) -> bytes:
    """Return `body` behind the header: `magic` (4 bytes), `tag` (0 <= tag < 2**64), length and checksum."""
    head = _HEADER.pack(magic, FORMAT_VERSION, tag, len(body))
    return b"".join((head, _CRC.pack(_checksum(head, body)), body))


def unseal(magic: bytes, payload: bytes, *, max_bytes: int = MAX_BYTES) -> tuple[int, memoryview]:
    """Return (tag, body) of what `seal` made, without a copy; PayloadError when it is anything else."""
    if len(payload) > max_bytes:
        raise PayloadError("payload", expected=f"at most {max_bytes} bytes", got=f"{len(payload)}")
    if len(payload) < _HEADER_BYTES:
        raise PayloadError("payload", expected=f"a header of {_HEADER_BYTES} bytes", got=f"{len(payload)} bytes")
    found, version, tag, length = _HEADER.unpack_from(payload)
    if found != magic:
        raise PayloadError("payload's first bytes", expected=repr(magic), got=repr(found))
    _check_version(version)
    body = memoryview(payload)[_HEADER_BYTES:]
    if length != len(body):
        raise PayloadError("payload's body", expected=f"{length} bytes as its header says", got=f"{len(body)}")
    (expected,) = _CRC.unpack_from(payload, _HEADER.size)
    actual = _checksum(payload[: _HEADER.size], body)
    if actual != expected:
        raise PayloadError("payload's crc32", expected=f"{expected:#010x}", got=f"{actual:#010x} (damaged)")
    return tag, body


def _check_version(version: int) -> None:
    if version == FORMAT_VERSION:
        return
    side = (
        "a newer Zeroout wrote it: use that version here too"
        if version > FORMAT_VERSION
        else "an older Zeroout wrote it: finish that campaign with the version that began it"
    )
    raise PayloadError("payload's format version", expected=str(FORMAT_VERSION), got=f"{version}; {side}")


def _checksum(head: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(head))


@lru_cache(_TABLES)
def _table(
    arrays: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...],
) -> tuple[bytes, tuple[np.dtype[Any] | None, ...]]:
    """Return the table of arrays of these names, dtypes and shapes, and what dtype each must be brought to first."""
    table = b"".join(_entry(name, dtype, shape) for name, dtype, shape in arrays)
    if len(table) > _MAX_TABLE_BYTES:
        expected, got = f"at most {_MAX_TABLE_BYTES} bytes", f"{len(table)} for {len(arrays)} arrays"
        raise PayloadError("names and shapes", expected=expected, got=got)
    stored = [_DTYPES[_CODES[dtype.name]] for _, dtype, _ in arrays]
    return table, tuple(None if dtype == as_is else dtype for dtype, (_, as_is, _) in zip(stored, arrays, strict=True))


def _entry(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    code = _CODES.get(dtype.name)
    if code is None:
        raise PayloadError(f"array {name!r}", expected=f"a dtype of {', '.join(_CODES)}", got=str(dtype))
    encoded, axes = name.encode(), len(shape)
    if not 0 < len(encoded) <= _MAX_NAME_BYTES:
        raise PayloadError(
            "array's name", expected=f"1 to {_MAX_NAME_BYTES} bytes", got=f"{len(encoded)}: {name[:40]!r}"
        )
    if axes > _MAX_AXES or any(length >= 1 << 32 for length in shape):
        raise PayloadError(f"array {name!r}", expected=f"up to {_MAX_AXES} axes below 2**32", got=f"shape {shape}")
    return struct.pack(f"<B{len(encoded)}sBB", len(encoded), encoded, code, axes) + _SHAPES[axes].pack(*shape)


@lru_cache(_TABLES)
def _places(table: bytes, elements_bytes: int, max_bytes: int) -> tuple[_Place, ...]:
    """Return where the arrays of `table` lie in `elements_bytes`, which they fill."""
    places: dict[str, _Place] = {}
    at = start = 0
    while at < len(table):
        name, dtype, shape, at = _read_entry(table, at)
        if name in places:
            raise PayloadError("payload", expected="every name once", got=f"{name!r} twice")
        stop = start + math.prod(shape) * dtype.itemsize
        # With an axis of length 0 the others need no bytes and could hold any number: they are bounded as well.
        bound = stop - start or math.prod(max(length, 1) for length in shape) * dtype.itemsize
        if bound > max_bytes:
            raise PayloadError(f"array {name!r}", expected=f"at most {max_bytes} bytes", got=f"shape {shape}")
        if stop > elements_bytes:
            expected, got = f"{stop - start} more bytes", f"{elements_bytes - start}"
            raise PayloadError(f"array {name!r}", expected=expected, got=got)
        places[name] = _Place(name, dtype, shape, start, stop)
        start = stop
    if start < elements_bytes:
        got = f"{elements_bytes - start} bytes"
        raise PayloadError(f"payload of {len(places)} arrays", expected="nothing after them", got=got)
    return tuple(places.values())


def _read_entry(table: bytes, at: int) -> tuple[str, np.dtype[Any], tuple[int, ...], int]:
    """Return name, dtype and shape of the array whose entry begins at byte `at`, and where the next one begins."""
    try:
        end = at + 1 + table[at]  # of the name
        code, axes = table[end], table[end + 1]
        name = table[at + 1 : end].decode()
        if code >= len(_DTYPES) or axes > _MAX_AXES:
            raise PayloadError(
                f"array {name!r}",
                expected=f"a dtype code below {len(_DTYPES)} and at most {_MAX_AXES} axes",
                got=f"code {code} and {axes} axes",
            )
        shape = _SHAPES[axes].unpack_from(table, end + 2)
    except UnicodeDecodeError as error:
        raise PayloadError("array's name", expected="UTF-8", got=repr(error.object[:40])) from None
    except (IndexError, struct.error):
        raise PayloadError("payload's table", expected="another array", got=f"{len(table) - at} bytes") from None
    return name, _DTYPES[code], shape, end + 2 + 4 * axes
