"""The laws of the pool port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import PoolContract
from umbel_eventlet.pool import EventletPool


class TestEventletPool(PoolContract):
    @pytest.fixture
    def make_pool(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], EventletPool]:
        """One child with all slots, but for the law that needs another to survive the first."""
        # Half of what a fork server of eventlet costs is its DNS library, and no law looks up a name.
        monkeypatch.setenv("EVENTLET_NO_GREENDNS", "yes")
        processes = 2 if "crash" in request.node.name else 1
        return lambda: EventletPool(options=EventletPool.Options(processes=processes))
