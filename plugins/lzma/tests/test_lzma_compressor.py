"""What the xz compressor promises: the wire's container, a bound on the output, and one error for all damage."""

from __future__ import annotations

import json
import lzma
import tracemalloc
import zlib
from base64 import b64decode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import ContentRefused, DecodeError
from umbel_lzma.compressor import LzmaCompressor

LZMA = LzmaCompressor()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
LIMIT = 1 << 20
modest = settings(max_examples=100, deadline=None)
bodies = st.binary() | st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 2000))


def test_identity_on_the_wire() -> None:
    assert (LZMA.name, LZMA.encoding, LZMA.aliases) == ("lzma", "application/x-lzma", ("lzma", "xz"))
    assert LzmaCompressor.__dict__["api_version"] == (1, 0)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["name"])
def test_a_recorded_body_decompresses_to_what_was_recorded(entry: dict[str, str]) -> None:
    assert entry["compression"] == LZMA.encoding
    assert json.loads(LZMA.decompress(b64decode(entry["body_base64"]), LIMIT)) == entry["decoded"]


def test_an_xz_container_is_written() -> None:
    assert LZMA.compress(b"x").startswith(b"\xfd7zXZ\x00")


def test_the_dictionary_is_no_larger_than_the_body_needs() -> None:
    packed = LZMA.compress(bytes(range(256)) * 8)
    small = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=1 << 17)
    assert small.decompress(packed) == bytes(range(256)) * 8


@modest
@given(bodies)
def test_what_went_in_comes_out(data: bytes) -> None:
    assert LZMA.decompress(LZMA.compress(data), len(data)) == data
    assert LZMA.decompress(lzma.compress(data, preset=0), len(data)) == data


@pytest.mark.parametrize("preset", [*range(10), 9 | lzma.PRESET_EXTREME])
def test_every_preset_is_read(preset: int) -> None:
    assert LZMA.decompress(lzma.compress(b"body of a task", preset=preset), LIMIT) == b"body of a task"


@pytest.mark.parametrize("size", [1, 2, 1000, 100_000, 2_000_000])
def test_the_limit_is_exact(size: int) -> None:
    packed = LZMA.compress(bytes(size))
    assert len(LZMA.decompress(packed, size)) == size
    with pytest.raises(ContentRefused, match="max_body_size"):
        LZMA.decompress(packed, size - 1)


def test_nothing_is_a_body_too() -> None:
    assert LZMA.decompress(LZMA.compress(b""), 0) == b""


def test_a_bomb_is_refused_within_the_limit() -> None:
    squeeze = lzma.LZMACompressor(preset=0)
    packed = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    assert len(packed) < 12_000
    tracemalloc.start()
    try:
        with pytest.raises(ContentRefused, match="1,048,576 bytes"):
            LZMA.decompress(packed, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Output in pieces and joined; 64 MiB would have come.
    assert peak < 3 * LIMIT


def test_the_bomb_is_a_stream_that_a_larger_limit_would_read_on() -> None:
    packed = LZMA.compress(bytes(4 << 20))
    with pytest.raises(DecodeError, match="truncated") as caught:
        LZMA.decompress(packed[:-1], 4 << 20)
    assert not isinstance(caught.value, ContentRefused)


def test_a_truncated_stream_is_refused_wherever_it_breaks_off() -> None:
    whole = LZMA.compress(b"body of a task" * 20)
    for length in range(len(whole)):
        with pytest.raises(DecodeError, match="truncated"):
            LZMA.decompress(whole[:length], LIMIT)


def test_a_wrong_checksum_is_refused() -> None:
    body = b"body of a task" * 20
    whole = lzma.compress(body, check=lzma.CHECK_CRC32)
    other = lzma.compress(body[::-1], check=lzma.CHECK_CRC32)
    assert len(whole) == len(other)
    # After the checksum come the index and the footer, 12 bytes each here, which tell lengths only.
    end = len(whole) - 24
    with pytest.raises(DecodeError, match="damaged"):
        LZMA.decompress(whole[: end - 4] + other[end - 4 : end] + whole[end:], LIMIT)


@pytest.mark.parametrize("rest", [b"\x00" * 4, b"rest", lzma.compress(b"second")])
def test_what_follows_the_stream_is_refused(rest: bytes) -> None:
    with pytest.raises(DecodeError, match=f"{len(rest)} bytes follow"):
        LZMA.decompress(LZMA.compress(b"first") + rest, LIMIT)


def test_a_bare_lzma_stream_is_refused() -> None:
    with pytest.raises(DecodeError, match="damaged"):
        LZMA.decompress(lzma.compress(b"body", format=lzma.FORMAT_ALONE), LIMIT)


def test_a_dictionary_that_no_preset_has_is_refused() -> None:
    # 256 MiB declared; liblzma reserves all of it before the first byte comes out
    whole = bytearray(lzma.compress(b"body", preset=9))
    header = whole[12:24]
    assert header[4] == 28  # 64 MiB, as a power of two and a half step
    header[4] = 32
    header[8:12] = zlib.crc32(header[:8]).to_bytes(4, "little")
    whole[12:24] = header
    with pytest.raises(DecodeError, match="Memory usage limit"):
        LZMA.decompress(bytes(whole), LIMIT)


def survives(data: bytes, limit: int) -> None:
    try:
        assert len(LZMA.decompress(data, limit)) <= limit
    except DecodeError:
        pass


@modest
@given(
    st.binary()
    | st.binary().map(lambda b: b"\xfd7zXZ\x00" + b)
    | st.binary().map(lambda b: lzma.compress(b"")[:12] + b)
)
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data, 100)


@modest
@given(bodies, st.data())
def test_no_damaged_stream_raises_anything_but_a_decode_error(body: bytes, data: st.DataObject) -> None:
    whole = LZMA.compress(body)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 4, len(whole))))
    survives(whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:], len(body))
