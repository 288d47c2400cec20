"""How arrays and opaque bytes lie in Redis: a fixed header, then little-endian bytes. Never pickle.

    header   magic 4s | format version u16 | tag u64 | body length u64 | crc32 u32 of all before it and the body
    body     of b"ZOSQ" (tag = number of arrays), for each array:
             name length u8 | name UTF-8 | dtype code u8 | axes u8 | length u32 of each axis | raw elements

Called by the actors and the learner for sequences, and by `weights.py`, which seals its payload in the same
header. A value in a shared server may be anything: every size is checked before something is allocated for it.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from env.errors import ZerooutError

__all__ = ["FORMAT_VERSION", "MAX_BYTES", "PayloadError", "decode", "encode", "seal", "unseal"]

FORMAT_VERSION = 1
MAX_BYTES = 64 << 20

_MAGIC = b"ZOSQ"
_HEADER = struct.Struct("<4sHQQ")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_MAX_AXES = 8
_MAX_NAME_BYTES = 255
# The place in this tuple is the code on the wire: append only.
_DTYPES = tuple(np.dtype(name) for name in ("u1", "?", "<i2", "<i4", "<i8", "<f2", "<f4"))
_SHAPES = tuple(struct.Struct(f"<{axes}I") for axes in range(_MAX_AXES + 1))
_CODES = {dtype.name: code for code, dtype in enumerate(_DTYPES)}


class PayloadError(ZerooutError):
    """A value is not what the codec writes: says what was expected and what was got."""

    def __init__(self, what: str, *, expected: str, got: str) -> None:
        super().__init__(f"{what}: expected {expected}, got {got}")


def encode(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the payload of named arrays (any shape of up to 8 axes, any memory order or byte order).

    Raises PayloadError when a dtype is not in the allow-list (uint8, bool, int16, int32, int64, float16,
    float32) or a name is empty or above 255 bytes.
    """
    return seal(_MAGIC, len(arrays), b"".join(_encode_one(name, array) for name, array in arrays.items()))


def decode(payload: bytes, *, max_bytes: int = MAX_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays in the order they were encoded: read-only views into `payload`, aligned as they lie there.

    Raises PayloadError for anything but an intact payload of at most `max_bytes` in this format version.
    """
    count, _ = unseal(_MAGIC, payload, max_bytes=max_bytes)
    arrays: dict[str, npt.NDArray[Any]] = {}
    at = _HEADER_BYTES
    for _ in range(count):
        name, array, at = _decode_one(payload, at, max_bytes)
        if name in arrays:
            raise PayloadError("payload", expected="every name once", got=f"{name!r} twice")
        arrays[name] = array
    if at < len(payload):
        got = f"{len(payload) - at} bytes"
        raise PayloadError(f"payload of {count} arrays", expected="nothing after them", got=got)
    return arrays


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


def _encode_one(name: str, array: npt.NDArray[Any]) -> bytes:
    array = np.asarray(array)
    code = _CODES.get(array.dtype.name)
    if code is None:
        raise PayloadError(f"array {name!r}", expected=f"a dtype of {', '.join(_CODES)}", got=str(array.dtype))
    encoded = name.encode()
    if not 0 < len(encoded) <= _MAX_NAME_BYTES:
        raise PayloadError(
            "array's name", expected=f"1 to {_MAX_NAME_BYTES} bytes", got=f"{len(encoded)}: {name[:40]!r}"
        )
    if array.ndim > _MAX_AXES or any(length >= 1 << 32 for length in array.shape):
        raise PayloadError(
            f"array {name!r}", expected=f"up to {_MAX_AXES} axes below 2**32", got=f"shape {array.shape}"
        )
    head = struct.pack(f"<B{len(encoded)}sBB{array.ndim}I", len(encoded), encoded, code, array.ndim, *array.shape)
    return head + array.astype(_DTYPES[code], copy=False).tobytes()


def _decode_one(payload: bytes, at: int, max_bytes: int) -> tuple[str, npt.NDArray[Any], int]:
    """Return the name and the elements of the array that begins at byte `at`, and where the next one begins."""
    try:
        end = at + 1 + payload[at]  # of the name
        code, axes = payload[end], payload[end + 1]
        name = payload[at + 1 : end].decode()
        if code >= len(_DTYPES) or axes > _MAX_AXES:
            raise PayloadError(
                f"array {name!r}",
                expected=f"a dtype code below {len(_DTYPES)} and at most {_MAX_AXES} axes",
                got=f"code {code} and {axes} axes",
            )
        shape = _SHAPES[axes].unpack_from(payload, end + 2)
    except UnicodeDecodeError as error:
        raise PayloadError("array's name", expected="UTF-8", got=repr(error.object[:40])) from None
    except (IndexError, struct.error):
        raise PayloadError("payload", expected="another array", got=f"{len(payload) - at} bytes") from None
    dtype, start = _DTYPES[code], end + 2 + 4 * axes
    stop = start + math.prod(shape) * dtype.itemsize
    _check_elements(payload, name, dtype, shape, start, stop, max_bytes)
    return name, np.ndarray(shape, dtype, payload, start), stop


def _check_elements(
    payload: bytes, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], start: int, stop: int, max_bytes: int
) -> None:
    # With an axis of length 0 the others need no bytes and could hold any number: they are bounded as well.
    bound = stop - start or math.prod(max(length, 1) for length in shape) * dtype.itemsize
    if bound > max_bytes:
        raise PayloadError(f"array {name!r}", expected=f"at most {max_bytes} bytes", got=f"shape {shape}")
    if stop > len(payload):
        expected, got = f"{stop - start} more bytes", f"{len(payload) - start}"
        raise PayloadError(f"array {name!r}", expected=expected, got=got)
    if dtype.kind == "b" and payload[start:stop].translate(None, b"\0\1"):
        raise PayloadError(f"array {name!r}", expected="bool elements of 0 or 1", got="another byte")
