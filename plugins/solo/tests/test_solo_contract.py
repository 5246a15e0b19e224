"""The laws of the pool port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import PoolContract
from umbel_solo.pool import SoloPool


class TestSoloPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Callable[[], SoloPool]:
        return SoloPool
