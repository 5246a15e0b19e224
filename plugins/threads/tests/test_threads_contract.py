"""The laws of the pool port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import PoolContract
from umbel_threads.pool import ThreadsPool


class TestThreadsPool(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Callable[[], ThreadsPool]:
        return ThreadsPool
