"""Fixtures for the test suites of applications. In the topmost ``conftest.py``::

    pytest_plugins = ["umbel.testing.fixtures"]

To test an app of your own, override one fixture there::

    @pytest.fixture
    def umbel_app():
        return shop.tasks.app
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from umbel import Umbel
from umbel.ports.clock import VirtualClock
from umbel.testing.harness import Harness, in_memory, standing_clock


@pytest.fixture
def umbel_app() -> Umbel:
    """The app under test; a new and empty one unless you override this."""
    return Umbel("testing")


@pytest.fixture
def umbel_clock() -> VirtualClock:
    """The app's clock during the test. It stands at the present until it is moved."""
    return standing_clock()


@pytest.fixture
def umbel_settings() -> Mapping[str, Any]:
    """Settings, by dotted key, that win over the app's own during the test; none unless you override this."""
    return {}


@pytest.fixture
def umbel_harness(umbel_app: Umbel, umbel_clock: VirtualClock, umbel_settings: Mapping[str, Any]) -> Iterator[Harness]:
    """``umbel_app`` in memory for this test. What is sent is recorded, and nothing runs it."""
    with in_memory(umbel_app, clock=umbel_clock, settings=umbel_settings) as harness:
        yield harness


@pytest.fixture
def umbel_worker(umbel_harness: Harness) -> Iterator[Harness]:
    """``umbel_harness`` with a worker running in threads of this process, from before the test until after it."""
    with umbel_harness.worker():
        yield umbel_harness
