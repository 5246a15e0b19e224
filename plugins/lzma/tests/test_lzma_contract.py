"""The laws of the compressor port."""

from __future__ import annotations

import pytest

from umbel.testing.contracts import CompressorContract
from umbel_lzma.compressor import LzmaCompressor


class TestLzmaCompressor(CompressorContract):
    @pytest.fixture
    def make_compressor(self) -> type[LzmaCompressor]:
        return LzmaCompressor
