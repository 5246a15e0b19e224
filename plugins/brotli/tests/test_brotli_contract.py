"""The laws of the compressor port."""

from __future__ import annotations

import pytest

from umbel.testing.contracts import CompressorContract
from umbel_brotli.compressor import BrotliCompressor


class TestBrotliCompressor(CompressorContract):
    @pytest.fixture
    def make_compressor(self) -> type[BrotliCompressor]:
        return BrotliCompressor
