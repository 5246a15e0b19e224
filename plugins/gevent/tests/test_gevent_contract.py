"""The laws of the pool port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import PoolContract
from umbel_gevent.pool import GeventPool


class TestGeventPool(PoolContract):
    @pytest.fixture
    def make_pool(self, request: pytest.FixtureRequest) -> Callable[[], GeventPool]:
        """One child with all slots, but for the law that needs another to survive the first."""
        processes = 2 if "crash" in request.node.name else 1
        return lambda: GeventPool(options=GeventPool.Options(processes=processes))
