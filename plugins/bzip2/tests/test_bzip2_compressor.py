"""What the bzip2 compressor promises: the wire's stream, a bound on the output, and one error for all damage."""

from __future__ import annotations

import bz2
import json
import tracemalloc
from base64 import b64decode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import ContentRefused, DecodeError
from umbel_bzip2.compressor import Bzip2Compressor

BZIP2 = Bzip2Compressor()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
LIMIT = 1 << 20
modest = settings(max_examples=100, deadline=None)
bodies = st.binary() | st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 2000))


def test_identity_on_the_wire() -> None:
    assert (BZIP2.name, BZIP2.encoding, BZIP2.aliases) == ("bzip2", "application/x-bz2", ("bzip2", "bzip"))


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["name"])
def test_a_recorded_body_decompresses_to_what_was_recorded(entry: dict[str, str]) -> None:
    assert entry["compression"] == BZIP2.encoding
    body = BZIP2.decompress(b64decode(entry["body_base64"]), LIMIT)
    assert json.loads(body) == entry["decoded"]
    assert BZIP2.compress(body) == b64decode(entry["body_base64"])


@modest
@given(bodies)
def test_what_went_in_comes_out(data: bytes) -> None:
    assert BZIP2.decompress(BZIP2.compress(data), len(data)) == data
    assert BZIP2.decompress(bz2.compress(data, 1), len(data)) == data


@pytest.mark.parametrize("size", [1, 2, 1000, 100_000, 2_000_000])
def test_the_limit_is_exact(size: int) -> None:
    packed = BZIP2.compress(bytes(size))
    assert len(BZIP2.decompress(packed, size)) == size
    with pytest.raises(ContentRefused, match="max_body_size"):
        BZIP2.decompress(packed, size - 1)


def test_a_bomb_is_refused_within_the_limit() -> None:
    squeeze = bz2.BZ2Compressor()
    packed = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    assert len(packed) < 1000
    tracemalloc.start()
    try:
        with pytest.raises(ContentRefused, match="1,048,576 bytes"):
            BZIP2.decompress(packed, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Output in pieces and joined; 64 MiB would have come.
    assert peak < 3 * LIMIT


def test_a_truncated_stream_is_refused_wherever_it_breaks_off() -> None:
    whole = BZIP2.compress(b"body of a task" * 20)
    for length in range(len(whole)):
        with pytest.raises(DecodeError, match="truncated"):
            BZIP2.decompress(whole[:length], LIMIT)


def test_a_wrong_checksum_is_refused() -> None:
    whole = bytearray(BZIP2.compress(b"body of a task"))
    whole[10] ^= 1  # the checksum of the first block follows ten bytes of magic
    with pytest.raises(DecodeError, match="damaged"):
        BZIP2.decompress(bytes(whole), LIMIT)


@pytest.mark.parametrize("rest", [b"\x00", b"rest", bz2.compress(b"second")])
def test_what_follows_the_stream_is_refused(rest: bytes) -> None:
    with pytest.raises(DecodeError, match=f"{len(rest)} bytes follow"):
        BZIP2.decompress(BZIP2.compress(b"first") + rest, LIMIT)


def survives(data: bytes, limit: int) -> None:
    try:
        assert len(BZIP2.decompress(data, limit)) <= limit
    except DecodeError:
        pass


@modest
@given(st.binary() | st.binary().map(lambda b: b"BZh9" + b) | st.binary().map(lambda b: b"BZh91AY&SY" + b))
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data, 100)


@modest
@given(bodies, st.data())
def test_no_damaged_stream_raises_anything_but_a_decode_error(body: bytes, data: st.DataObject) -> None:
    whole = BZIP2.compress(body)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 4, len(whole))))
    survives(whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:], len(body))
