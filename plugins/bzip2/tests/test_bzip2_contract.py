"""The laws of the compressor port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import CompressorContract
from umbel_bzip2.compressor import Bzip2Compressor


class TestBzip2Compressor(CompressorContract):
    @pytest.fixture
    def make_compressor(self) -> Callable[[], Bzip2Compressor]:
        return Bzip2Compressor
