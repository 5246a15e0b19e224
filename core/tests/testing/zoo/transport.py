"""The cage of wrong transports, which live in three modules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar, cast

import pytest

from umbel.ports.clock import VirtualClock
from umbel.ports.transport import Transport
from umbel.testing.contracts import TransportContract

from ..honest.transport import Broker, ModestTransport
from .house import MANY


class TransportCage(TransportContract):
    driver: ClassVar[type[ModestTransport]]
    lease, patience, quiet, silence, time_limit, many = 5.0, 1.0, 0.02, 0.2, 4.0, MANY

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_transport(self, clock: VirtualClock) -> Callable[[], ModestTransport]:
        broker = Broker()
        return lambda: self.driver(broker, clock)

    @pytest.fixture
    def unreachable(self, make_transport: Callable[[], ModestTransport]) -> Callable[[], ModestTransport] | None:
        return make_transport if getattr(self.driver, "unreachable", False) else None

    @pytest.fixture
    def sever(self) -> Callable[[Transport], Awaitable[None]]:
        async def cut(transport: Transport) -> None:
            cast("ModestTransport", transport).sever()

        return cut

    @pytest.fixture
    def restart(self, make_transport: Callable[[], ModestTransport]) -> Callable[[], Awaitable[None]]:
        async def again() -> None:
            make_transport().restart()

        return again
