"""Wrong compressors."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from umbel.testing.contracts import CompressorContract

from ..honest.codecs import HonestCompressor
from .house import House


class CompressorCage(CompressorContract):
    driver: ClassVar[type[HonestCompressor]]
    examples, working_memory, bomb = 40, 1 << 20, 16 << 20

    @pytest.fixture
    def make_compressor(self) -> Callable[[], HonestCompressor]:
        return self.driver


HOUSE = House(__file__, CompressorCage, HonestCompressor)


@HOUSE.breaks(
    "the_limit_is_exact[1]",
    "the_limit_is_exact[2]",
    "the_limit_is_exact[1000]",
    "the_limit_is_exact[70000]",
    "the_limit_is_exact[2000000]",
    "a_bomb_is_refused_before_it_fills_the_memory",
)
class IgnoresTheLimit(HonestCompressor):
    def decompress(self, data: bytes, limit: int) -> bytes:
        return super().decompress(data, max(limit, 1 << 30) if limit not in (100, 50_000) else limit)


@HOUSE.breaks("a_bomb_is_refused_before_it_fills_the_memory")
class LooksAtTheLimitTooLate(HonestCompressor):
    def restore(self, stream: Any, data: bytes, limit: int) -> bytes:
        restored: bytes = stream.decompress(data)
        return restored


@HOUSE.breaks("bytes_that_break_off_raise_a_decode_error")
class TakesHalfAStream(HonestCompressor):
    def complete(self, stream: Any) -> bool:
        return True


@HOUSE.breaks("no_bytes_raise_anything_but_a_decode_error", "no_damage_raises_anything_but_a_decode_error")
class LetsItsLibraryRaise(HonestCompressor):
    def restore(self, stream: Any, data: bytes, limit: int) -> bytes:
        try:
            return super().restore(stream, data, limit)
        except zlib.error as error:
            raise OSError(str(error)) from error


@HOUSE.breaks("a_driver_says_what_it_is")
class ListsItsAliases(HonestCompressor):
    aliases = ["honest"]  # type: ignore[assignment]  # the fault


@HOUSE.breaks("what_went_in_comes_out")
class MakesSomethingOfNothing(HonestCompressor):
    def compress(self, data: bytes) -> bytes:
        return super().compress(data or b"\0")


@HOUSE.breaks("a_large_body_comes_back")
class FillsOneBuffer(HonestCompressor):
    def compress(self, data: bytes) -> bytes:
        return super().compress(data[: 4 << 20])


@HOUSE.breaks("a_repetitive_body_becomes_smaller")
class SparesItselfTheWork(HonestCompressor):
    def compress(self, data: bytes) -> bytes:
        return zlib.compress(data, 0 if len(data) < 200_000 else -1)


@HOUSE.breaks("threads_do_not_disturb_each_other")
class SharesItsInput(HonestCompressor):
    def compress(self, data: bytes) -> bytes:
        self.data = data
        time.sleep(0.0001)
        return super().compress(self.data)


globals().update(HOUSE.tests())
