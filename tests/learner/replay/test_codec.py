import contextlib
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from env.errors import ZerooutError
from learner.replay.codec import PayloadError, decode, encode, seal, unseal

_DTYPES = ("uint8", "bool", "int16", "int32", "int64", "float16", "float32")
_arrays = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.sampled_from(_DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    max_size=4,
)


def test_the_bytes_of_a_small_payload_are_the_documented_ones() -> None:
    payload = encode({"ab": np.array([[1, -2, 3]], ">i2")})
    table = b"\x02ab" + b"\x02\x02" + struct.pack("<II", 1, 3)
    body = table + struct.pack("<hhh", 1, -2, 3)
    head = b"ZOSQ" + struct.pack("<HQQ", 2, len(table), len(body))
    assert payload == head + struct.pack("<I", zlib.crc32(head + body)) + body


@given(_arrays)
def test_what_is_encoded_comes_back(arrays: dict[str, np.ndarray]) -> None:
    decoded = decode(encode(arrays))
    assert list(decoded) == list(arrays)
    for name, array in arrays.items():
        assert decoded[name].dtype == array.dtype
        assert decoded[name].shape == array.shape
        assert decoded[name].tobytes() == array.tobytes()
        assert not decoded[name].flags.writeable


def test_strided_and_big_endian_arrays_come_back_by_value() -> None:
    array = np.arange(24, dtype=">f4").reshape(4, 6)[::2, ::-3].T
    np.testing.assert_array_equal(decode(encode({"x": array}))["x"], array)


@given(st.data())
@settings(max_examples=200)
def test_every_flipped_bit_is_noticed(data: st.DataObject) -> None:
    payload = bytearray(encode({"x": np.arange(7, dtype=np.float32), "y": np.array([True, False])}))
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError):
        decode(bytes(payload))


@given(_arrays, st.integers(0, 60))
def test_a_cut_or_lengthened_payload_is_noticed(arrays: dict[str, np.ndarray], count: int) -> None:
    payload = encode(arrays)
    for wrong in (payload[: max(0, len(payload) - 1 - count)], payload + b"\0" * (count + 1)):
        with pytest.raises(PayloadError):
            decode(wrong)


@given(st.binary(max_size=80), st.integers(0, 90))
@settings(max_examples=300)
def test_an_evil_body_with_a_right_checksum_never_does_worse_than_payload_error(body: bytes, table_bytes: int) -> None:
    with contextlib.suppress(PayloadError):
        decode(seal(b"ZOSQ", table_bytes, body), max_bytes=1000)


def _entry(name: bytes, code: int, shape: tuple[int, ...]) -> bytes:
    return bytes([len(name)]) + name + bytes([code, len(shape)]) + struct.pack(f"<{len(shape)}I", *shape)


@pytest.mark.parametrize(
    ("table", "elements", "message"),
    [
        (_entry(b"x", 4, (2**31, 2**31)), b"", "at most 1000 bytes"),
        (_entry(b"x", 4, (0, 2**32 - 1, 2**32 - 1, 2**32 - 1)), b"", "at most 1000 bytes"),
        (_entry(b"x", 6, (3,)), b"12345678", "12 more bytes, got 8"),
        (_entry(b"x", 7, (1,)), b"1", "a dtype code below 7"),
        (_entry(b"x", 0, (1,) * 9), b"1", "at most 8 axes"),
        (_entry(b"x", 1, (1,)), b"\x02", "bool elements of 0 or 1"),
        (_entry(b"\xff", 0, (1,)), b"1", "UTF-8"),
        (_entry(b"x", 0, (1,)), b"12", "nothing after them, got 1 bytes"),
    ],
)
def test_a_lying_body_is_refused_before_anything_is_allocated(table: bytes, elements: bytes, message: str) -> None:
    for _ in range(2):  # what is refused is not remembered as good
        with pytest.raises(PayloadError, match=message):
            decode(seal(b"ZOSQ", len(table), table + elements), max_bytes=1000)


@pytest.mark.parametrize(("table_bytes", "body"), [(9, b"12345678"), (2**40, b"12345678"), (20_000, b"\0" * 30_000)])
def test_a_table_longer_than_the_body_or_than_any_of_ours_is_refused(table_bytes: int, body: bytes) -> None:
    with pytest.raises(PayloadError, match=f"table: expected at most (8|16384) bytes, got {table_bytes}"):
        decode(seal(b"ZOSQ", table_bytes, body))


def test_one_table_serves_payloads_of_other_elements_but_of_no_other_length() -> None:
    one, other = (encode({"x": np.arange(start, start + 3, dtype=np.int16)}) for start in (0, 5))
    assert decode(one)["x"].tolist() == [0, 1, 2]
    assert decode(other)["x"].tolist() == [5, 6, 7]
    table = _entry(b"x", 2, (3,))
    for elements in (b"12345", b"1234567"):
        with pytest.raises(PayloadError):
            decode(seal(b"ZOSQ", len(table), table + elements))


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(PayloadError, match="'x' twice"):
        decode(seal(b"ZOSQ", 16, 2 * _entry(b"x", 0, (1,)) + b"11"))


@pytest.mark.parametrize(("version", "word"), [(1, "older"), (3, "newer")])
def test_another_format_version_says_which_side_is_old(version: int, word: str) -> None:
    payload = bytearray(encode({}))
    payload[4:6] = struct.pack("<H", version)
    with pytest.raises(PayloadError, match=f"expected 2, got {version}; an? {word} Zeroout"):
        decode(bytes(payload))


def test_a_foreign_value_and_a_large_one_are_refused() -> None:
    with pytest.raises(PayloadError, match=r"first bytes: expected b'ZOSQ', got b'\\x80\\x05"):
        decode(b"\x80\x05" + b"\0" * 40)
    with pytest.raises(PayloadError, match="at most 99 bytes, got 126"):
        decode(b"\0" * 126, max_bytes=99)
    assert issubclass(PayloadError, ZerooutError)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([None])}, "array 'x': expected a dtype of uint8, bool, .* got object"),
        ({"x": np.zeros(1)}, "got float64"),
        ({"": np.zeros(1, np.uint8)}, "1 to 255 bytes, got 0"),
        ({"x": np.zeros((1,) * 9, np.uint8)}, "up to 8 axes"),
        ({f"{i:0>200}": np.zeros(1, np.uint8) for i in range(90)}, "at most 16384 bytes, got .* for 90 arrays"),
    ],
)
def test_what_cannot_be_encoded_is_named(arrays: dict[str, np.ndarray[Any, Any]], message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        encode(arrays)


def test_a_sealed_body_comes_back_with_its_tag() -> None:
    tag, body = unseal(b"ZOWT", seal(b"ZOWT", 2**40, b"abc"))
    assert (tag, bytes(body)) == (2**40, b"abc")
