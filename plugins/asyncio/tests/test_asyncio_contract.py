"""The laws of the pool port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import PoolContract
from umbel_asyncio.pool import AsyncioPool
from umbel_children.crowd_pool import CrowdOptions


class TestAsyncioPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Callable[[], AsyncioPool]:
        return AsyncioPool

    @pytest.fixture
    def make_crowd(self) -> Callable[[], AsyncioPool]:
        return lambda: AsyncioPool(options=CrowdOptions(processes=1))
