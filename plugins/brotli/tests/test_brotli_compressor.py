"""What the brotli compressor promises: the wire's stream, a bound on the output, and one error for all damage."""

from __future__ import annotations

import json
import tracemalloc
from base64 import b64decode
from pathlib import Path

import brotli  # type: ignore[import-untyped]  # it ships no types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import ContentRefused, DecodeError
from umbel_brotli.compressor import BrotliCompressor

BROTLI = BrotliCompressor()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
LIMIT = 1 << 20
modest = settings(max_examples=100, deadline=None)
bodies = st.binary() | st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 2000))


def test_identity_on_the_wire() -> None:
    assert (BROTLI.name, BROTLI.encoding, BROTLI.aliases) == ("brotli", "application/x-brotli", ("brotli",))
    assert BrotliCompressor.__dict__["api_version"] == (1, 0)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["name"])
def test_a_recorded_body_decompresses_to_what_was_recorded(entry: dict[str, str]) -> None:
    assert entry["compression"] == BROTLI.encoding
    assert json.loads(BROTLI.decompress(b64decode(entry["body_base64"]), LIMIT)) == entry["decoded"]


@modest
@given(bodies, st.integers(0, 11))
def test_what_went_in_comes_out(data: bytes, quality: int) -> None:
    assert BROTLI.decompress(BROTLI.compress(data), len(data)) == data
    assert BROTLI.decompress(brotli.compress(data, quality=quality), len(data)) == data


@pytest.mark.parametrize("size", [1, 2, 1000, 100_000, 2_000_000])
def test_the_limit_is_exact(size: int) -> None:
    packed = BROTLI.compress(bytes(size))
    assert len(BROTLI.decompress(packed, size)) == size
    with pytest.raises(ContentRefused, match="max_body_size"):
        BROTLI.decompress(packed, size - 1)


def test_nothing_is_a_body_too() -> None:
    assert BROTLI.decompress(BROTLI.compress(b""), 0) == b""


def test_a_bomb_is_refused_within_the_limit() -> None:
    squeeze = brotli.Compressor(quality=5)
    block = bytes(16 << 20)
    packed = b"".join(squeeze.process(block) for _ in range(64)) + squeeze.finish()
    assert len(packed) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(ContentRefused, match="1,048,576 bytes"):
            BROTLI.decompress(packed, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Output in blocks, the last one past the limit, and joined; 1 GiB would have come.
    assert peak < 5 * LIMIT


def test_the_bomb_is_a_stream_that_a_larger_limit_would_read_on() -> None:
    packed = BROTLI.compress(bytes(4 << 20))
    with pytest.raises(DecodeError, match="truncated") as caught:
        BROTLI.decompress(packed[:-1], 4 << 20)
    assert not isinstance(caught.value, ContentRefused)


def test_a_truncated_stream_is_refused_wherever_it_breaks_off() -> None:
    whole = BROTLI.compress(b"body of a task" * 20)
    for length in range(len(whole)):
        with pytest.raises(DecodeError, match="truncated"):
            BROTLI.decompress(whole[:length], LIMIT)


@pytest.mark.parametrize("rest", [b"\x00", b"rest", brotli.compress(b"second")])
def test_what_follows_the_stream_is_refused(rest: bytes) -> None:
    with pytest.raises(DecodeError, match="follow its end"):
        BROTLI.decompress(BROTLI.compress(b"first") + rest, LIMIT)


def test_a_stream_that_is_none_is_refused() -> None:
    with pytest.raises(DecodeError, match="damaged"):
        BROTLI.decompress(b"\xff" * 20, LIMIT)


def survives(data: bytes, limit: int) -> None:
    try:
        assert len(BROTLI.decompress(data, limit)) <= limit
    except DecodeError:
        pass


@modest
@given(st.binary() | st.binary().map(lambda b: BROTLI.compress(b"body of a task")[:4] + b))
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data, 100)


@modest
@given(bodies, st.data())
def test_no_damaged_stream_raises_anything_but_a_decode_error(body: bytes, data: st.DataObject) -> None:
    whole = BROTLI.compress(body)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 4, len(whole))))
    survives(whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:], len(body))
