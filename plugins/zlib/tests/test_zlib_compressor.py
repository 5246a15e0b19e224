"""What the zlib compressor promises: the wire's stream, a bound on the output, and one error for all damage."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from base64 import b64decode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import ContentRefused, DecodeError
from umbel_zlib.compressor import ZlibCompressor

ZLIB = ZlibCompressor()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
LIMIT = 1 << 20
modest = settings(max_examples=100, deadline=None)
bodies = st.binary() | st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 2000))


def bomb(megabytes: int) -> bytes:
    """A stream of zeros, one megabyte for each repetition of one deflate block, made without compressing them all."""
    squeeze = zlib.compressobj(9)
    head = squeeze.flush(zlib.Z_FULL_FLUSH)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    again = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return head + block + again * (megabytes - 1)


def test_identity_on_the_wire() -> None:
    assert (ZLIB.name, ZLIB.encoding, ZLIB.aliases) == ("zlib", "application/x-gzip", ("zlib", "gzip"))


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["name"])
def test_a_recorded_body_decompresses_to_what_was_recorded(entry: dict[str, str]) -> None:
    assert entry["compression"] == ZLIB.encoding
    assert json.loads(ZLIB.decompress(b64decode(entry["body_base64"]), LIMIT)) == entry["decoded"]


def test_a_zlib_stream_is_written() -> None:
    assert ZLIB.compress(b"x").startswith(b"\x78\x9c")


@modest
@given(bodies)
def test_what_went_in_comes_out(data: bytes) -> None:
    assert ZLIB.decompress(ZLIB.compress(data), len(data)) == data
    assert ZLIB.decompress(zlib.compress(data, 9), len(data)) == data


@modest
@given(bodies)
def test_a_gzip_stream_is_read_too(data: bytes) -> None:
    assert ZLIB.decompress(gzip.compress(data), len(data)) == data


@pytest.mark.parametrize("size", [1, 2, 1000, 100_000])
def test_the_limit_is_exact(size: int) -> None:
    packed = ZLIB.compress(bytes(size))
    assert len(ZLIB.decompress(packed, size)) == size
    with pytest.raises(ContentRefused, match="max_body_size"):
        ZLIB.decompress(packed, size - 1)


def test_a_bomb_of_a_gigabyte_is_refused_within_the_limit() -> None:
    packed = bomb(1024)
    assert len(packed) < 2 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ContentRefused, match="1,048,576 bytes"):
            ZLIB.decompress(packed, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Output in pieces and joined, and zlib's copy of the input that it did not come to.
    assert peak < 3 * LIMIT + len(packed)


def test_the_bomb_is_a_stream_that_a_larger_limit_would_read_on() -> None:
    with pytest.raises(DecodeError, match="truncated") as caught:
        ZLIB.decompress(bomb(4), 4 << 20)
    assert not isinstance(caught.value, ContentRefused)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_a_truncated_stream_is_refused_wherever_it_breaks_off(pack: object) -> None:
    whole = pack(b"body of a task" * 20)  # type: ignore[operator]  # a table of functions
    for length in range(len(whole)):
        with pytest.raises(DecodeError, match="truncated"):
            ZLIB.decompress(whole[:length], LIMIT)


def test_a_wrong_checksum_is_refused() -> None:
    whole = ZLIB.compress(b"body of a task")
    with pytest.raises(DecodeError, match="damaged"):
        ZLIB.decompress(whole[:-1] + bytes([whole[-1] ^ 1]), LIMIT)


@pytest.mark.parametrize("rest", [b"\x00", b"rest", zlib.compress(b"second")])
def test_what_follows_the_stream_is_refused(rest: bytes) -> None:
    with pytest.raises(DecodeError, match=f"{len(rest)} bytes follow"):
        ZLIB.decompress(ZLIB.compress(b"first") + rest, LIMIT)


def test_a_stream_that_wants_a_dictionary_is_refused() -> None:
    squeeze = zlib.compressobj(zdict=b"task")
    with pytest.raises(DecodeError, match="damaged"):
        ZLIB.decompress(squeeze.compress(b"task task") + squeeze.flush(), LIMIT)


def survives(data: bytes, limit: int) -> None:
    try:
        assert len(ZLIB.decompress(data, limit)) <= limit
    except DecodeError:
        pass


@modest
@given(st.binary() | st.binary().map(lambda b: b"\x78\x9c" + b) | st.binary().map(lambda b: b"\x1f\x8b\x08" + b))
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data, 100)


@modest
@given(bodies, st.data())
def test_no_damaged_stream_raises_anything_but_a_decode_error(body: bytes, data: st.DataObject) -> None:
    whole = ZLIB.compress(body)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 4, len(whole))))
    survives(whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:], len(body))
