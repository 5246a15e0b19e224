"""The laws of the compressor port."""

from __future__ import annotations

import pytest

from umbel.testing.contracts import CompressorContract
from umbel_zstd.compressor import ZstdCompressor


class TestZstdCompressor(CompressorContract):
    @pytest.fixture
    def make_compressor(self) -> type[ZstdCompressor]:
        return ZstdCompressor
