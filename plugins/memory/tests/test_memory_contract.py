"""The laws of the three ports, by the machine's clock and by one that a test moves."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from umbel.ports.clock import VirtualClock
from umbel.testing.contracts import ResultStoreContract, SchedulerContract, TransportContract
from umbel_memory import transport as transport_module
from umbel_memory.result_store import MemoryResultStore
from umbel_memory.scheduler import MemoryScheduler
from umbel_memory.transport import MemoryTransport


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    def make_transport(self, url: str) -> Callable[[], MemoryTransport]:
        return lambda: MemoryTransport(url)


class TestMemoryTransportByAVirtualClock(TransportContract):
    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_transport(
        self, url: str, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[], MemoryTransport]:
        monkeypatch.setattr(transport_module, "QUIET", 1.0)  # real time, of which the other class spends enough
        return lambda: MemoryTransport(url, clock=clock)


class TestMemoryResultStore(ResultStoreContract):
    @pytest.fixture
    def make_store(self, url: str) -> Callable[[], MemoryResultStore]:
        return lambda: MemoryResultStore(url)


class TestMemoryResultStoreByAVirtualClock(ResultStoreContract):
    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_store(self, url: str, clock: VirtualClock) -> Callable[[], MemoryResultStore]:
        return lambda: MemoryResultStore(url, clock=clock)


class TestMemoryScheduler(SchedulerContract):
    @pytest.fixture
    def make_scheduler(self, url: str) -> Callable[[], MemoryScheduler]:
        return lambda: MemoryScheduler(url)


class TestMemorySchedulerByAVirtualClock(SchedulerContract):
    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_scheduler(self, url: str, clock: VirtualClock) -> Callable[[], MemoryScheduler]:
        return lambda: MemoryScheduler(url, clock=clock)
