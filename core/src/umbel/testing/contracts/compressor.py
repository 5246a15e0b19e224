"""The laws of the compressor port."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.errors import ContentRefused, DecodeError
from umbel.ports.compressor import Compressor
from umbel.testing.contracts.codecs import at_once, damaged, thorough

LIMIT: Final = 1 << 20
BODIES: Final = st.binary() | st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 2000))


class CompressorContract:
    """Subclass it and give the fixture ``make_compressor``: a callable that makes a compressor."""

    working_memory: int = 16 << 20
    """Bytes that restoring may take beside the output. A window or dictionary of fixed size belongs here."""
    bomb: int = 64 << 20
    """Bytes that a bomb wants to become; more than the laws let a driver allocate."""
    examples: int = 150
    """How many bodies and pieces of nonsense each law tries."""

    @pytest.fixture
    def compressor(self, make_compressor: Callable[[], Compressor]) -> Compressor:
        return make_compressor()

    def test_a_driver_says_what_it_is(self, compressor: Compressor) -> None:
        assert isinstance(compressor, Compressor)
        assert type(compressor).api_version[0] == Compressor.api_version[0]
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", compressor.name)
        assert re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", compressor.encoding)
        assert isinstance(compressor.aliases, tuple)
        assert all(re.fullmatch(r"[a-z0-9/.+-]+", alias) for alias in compressor.aliases)

    def test_what_went_in_comes_out(self, compressor: Compressor) -> None:
        @thorough(self.examples)
        @given(BODIES)
        def check(data: bytes) -> None:
            packed = compressor.compress(data)
            assert type(packed) is bytes
            restored = compressor.decompress(packed, len(data))
            assert type(restored) is bytes
            assert restored == data

        check()

    def test_a_large_body_comes_back(self, compressor: Compressor) -> None:
        body = random.Random(7).randbytes(1 << 20) + b"all the same " * 300_000
        assert compressor.decompress(compressor.compress(body), len(body)) == body

    def test_a_repetitive_body_becomes_smaller(self, compressor: Compressor) -> None:
        assert len(compressor.compress(b"all the same " * 10_000)) < 13_000

    @pytest.mark.parametrize("size", [1, 2, 1000, 70_000, 2_000_000])
    def test_the_limit_is_exact(self, compressor: Compressor, size: int) -> None:
        packed = compressor.compress(bytes(size))
        assert len(compressor.decompress(packed, size)) == size
        with pytest.raises(ContentRefused):
            compressor.decompress(packed, size - 1)

    def test_a_bomb_is_refused_before_it_fills_the_memory(self, compressor: Compressor) -> None:
        packed = compressor.compress(bytes(self.bomb))
        tracemalloc.start()
        try:
            with pytest.raises(ContentRefused):
                compressor.decompress(packed, LIMIT)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 * LIMIT + self.working_memory, f"{peak:,} bytes for a limit of {LIMIT:,}"

    def test_bytes_that_break_off_raise_a_decode_error(self, compressor: Compressor) -> None:
        packed = compressor.compress(b"body of a task" * 20)
        for length in range(len(packed)):
            with pytest.raises(DecodeError):
                compressor.decompress(packed[:length], LIMIT)

    def test_no_bytes_raise_anything_but_a_decode_error(self, compressor: Compressor) -> None:
        magic = compressor.compress(b"")[:4]

        @thorough(self.examples)
        @given(st.binary() | st.binary().map(magic.__add__))
        def check(data: bytes) -> None:
            _restores_or_refuses(compressor, data, 100)

        check()

    def test_no_damage_raises_anything_but_a_decode_error(self, compressor: Compressor) -> None:
        @thorough(self.examples)
        @given(damaged(BODIES.map(compressor.compress)))
        def check(data: bytes) -> None:
            _restores_or_refuses(compressor, data, 50_000)

        check()

    def test_threads_do_not_disturb_each_other(self, compressor: Compressor) -> None:
        def work(number: int) -> None:
            for turn in range(50):
                body = b"%d-%d " % (number, turn) * 200
                assert compressor.decompress(compressor.compress(body), len(body)) == body

        at_once(work)


def _restores_or_refuses(compressor: Compressor, data: bytes, limit: int) -> None:
    try:
        restored = compressor.decompress(data, limit)
    except DecodeError:
        return
    assert len(restored) <= limit
