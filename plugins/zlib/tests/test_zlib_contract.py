"""The laws of the compressor port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import CompressorContract
from umbel_zlib.compressor import ZlibCompressor


class TestZlibCompressor(CompressorContract):
    @pytest.fixture
    def make_compressor(self) -> Callable[[], ZlibCompressor]:
        return ZlibCompressor
