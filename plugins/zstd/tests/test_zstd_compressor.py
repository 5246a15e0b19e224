"""What the Zstandard compressor promises: the wire's frame, a bound on the output, and one error for all damage."""

from __future__ import annotations

import json
import sys
import tracemalloc
from base64 import b64decode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import ContentRefused, DecodeError
from umbel_zstd.compressor import ZstdCompressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD = ZstdCompressor()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
LIMIT = 1 << 20
modest = settings(max_examples=100, deadline=None)
bodies = st.binary() | st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 2000))


def test_identity_on_the_wire() -> None:
    assert (ZSTD.name, ZSTD.encoding, ZSTD.aliases) == ("zstd", "application/zstd", ("zstd", "zstandard"))
    assert ZstdCompressor.__dict__["api_version"] == (1, 0)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["name"])
def test_a_recorded_body_decompresses_to_what_was_recorded(entry: dict[str, str]) -> None:
    assert entry["compression"] == ZSTD.encoding
    assert json.loads(ZSTD.decompress(b64decode(entry["body_base64"]), LIMIT)) == entry["decoded"]


def test_a_zstandard_frame_is_written() -> None:
    assert ZSTD.compress(b"x").startswith(b"\x28\xb5\x2f\xfd")


def long_frame(data: bytes, window: int) -> bytes:
    """A frame that does not say how long its content is, and wants a window of ``1 << window`` bytes."""
    squeeze = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window})
    return squeeze.compress(data, mode=squeeze.FLUSH_BLOCK) + squeeze.flush()


@modest
@given(bodies, st.integers(1, 19))
def test_what_went_in_comes_out(data: bytes, level: int) -> None:
    assert ZSTD.decompress(ZSTD.compress(data), len(data)) == data
    assert ZSTD.decompress(zstd.compress(data, level), len(data)) == data


@pytest.mark.parametrize(("window", "limit"), [(10, 100), (23, 100), (24, 1 << 23), (27, 1 << 26), (27, 1 << 40)])
def test_a_window_that_the_limit_allows_is_read(window: int, limit: int) -> None:
    assert ZSTD.decompress(long_frame(b"body of a task", window), limit) == b"body of a task"


@pytest.mark.parametrize(("window", "limit"), [(24, 100), (27, 1 << 25), (28, 1 << 40)])
def test_a_window_beyond_the_limit_is_refused(window: int, limit: int) -> None:
    with pytest.raises(DecodeError, match="too much memory"):
        ZSTD.decompress(long_frame(b"body of a task", window), limit)


@pytest.mark.parametrize("size", [1, 2, 1000, 100_000, 2_000_000])
def test_the_limit_is_exact(size: int) -> None:
    packed = ZSTD.compress(bytes(size))
    assert len(ZSTD.decompress(packed, size)) == size
    with pytest.raises(ContentRefused, match="max_body_size"):
        ZSTD.decompress(packed, size - 1)


def test_nothing_is_a_body_too() -> None:
    assert ZSTD.decompress(ZSTD.compress(b""), 0) == b""


def test_a_bomb_is_refused_within_the_limit() -> None:
    squeeze = zstd.ZstdCompressor()
    block = bytes(16 << 20)
    packed = b"".join(squeeze.compress(block) for _ in range(64)) + squeeze.flush()
    assert len(packed) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(ContentRefused, match="1,048,576 bytes"):
            ZSTD.decompress(packed, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Output in pieces and joined; 1 GiB would have come.
    assert peak < 3 * LIMIT + len(packed)


def test_the_bomb_is_a_stream_that_a_larger_limit_would_read_on() -> None:
    packed = ZSTD.compress(bytes(4 << 20))
    with pytest.raises(DecodeError, match="truncated") as caught:
        ZSTD.decompress(packed[:-1], 4 << 20)
    assert not isinstance(caught.value, ContentRefused)


def test_a_truncated_stream_is_refused_wherever_it_breaks_off() -> None:
    whole = ZSTD.compress(b"body of a task" * 20)
    for length in range(len(whole)):
        with pytest.raises(DecodeError, match="truncated"):
            ZSTD.decompress(whole[:length], LIMIT)


def test_a_wrong_checksum_is_refused() -> None:
    whole = zstd.compress(b"body of a task", options={zstd.CompressionParameter.checksum_flag: 1})
    assert ZSTD.decompress(whole, LIMIT) == b"body of a task"
    with pytest.raises(DecodeError, match=r"damaged.*checksum"):
        ZSTD.decompress(whole[:-1] + bytes([whole[-1] ^ 1]), LIMIT)


@pytest.mark.parametrize("rest", [b"\x00", b"rest", zstd.compress(b"second")])
def test_what_follows_the_frame_is_refused(rest: bytes) -> None:
    with pytest.raises(DecodeError, match=f"{len(rest)} bytes follow"):
        ZSTD.decompress(ZSTD.compress(b"first") + rest, LIMIT)


def test_a_skippable_frame_is_not_skipped() -> None:
    with pytest.raises(DecodeError, match="bytes follow"):
        ZSTD.decompress(b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + ZSTD.compress(b"body"), LIMIT)


def test_a_frame_that_wants_a_dictionary_is_refused() -> None:
    words = zstd.ZstdDict(b"body of a task, and more of it", is_raw=True)
    named = bytearray(zstd.compress(b"body of a task" * 9, zstd_dict=words))
    named[4:5] = bytes([named[4] | 1, 7])  # the frame's header with the id 7 of a dictionary
    with pytest.raises(DecodeError, match="damaged"):
        ZSTD.decompress(bytes(named), LIMIT)


def survives(data: bytes, limit: int) -> None:
    try:
        assert len(ZSTD.decompress(data, limit)) <= limit
    except DecodeError:
        pass


@modest
@given(
    st.binary()
    | st.binary().map(lambda b: b"\x28\xb5\x2f\xfd" + b)
    | st.binary().map(lambda b: ZSTD.compress(b"body")[:6] + b)
)
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data, 100)


@modest
@given(bodies, st.data())
def test_no_damaged_stream_raises_anything_but_a_decode_error(body: bytes, data: st.DataObject) -> None:
    whole = ZSTD.compress(body)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 4, len(whole))))
    survives(whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:], len(body))
