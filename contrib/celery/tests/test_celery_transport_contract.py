"""The laws of the transport port, on a real server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
from servers.redis import RedisServer

from umbel.ports.transport import Transport
from umbel.testing.contracts import TransportContract
from umbel_celery import claims
from umbel_celery.transport import CeleryRedisTransport


class TestCeleryRedisTransport(TransportContract):
    silence: float = 0.5

    @pytest.fixture(autouse=True)
    def _less_patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Five seconds are for workers."""
        monkeypatch.setattr(claims, "_LONGEST_SILENCE", self.silence)

    @pytest.fixture
    def make_transport(self, redis_url: str) -> Callable[[], CeleryRedisTransport]:
        return lambda: CeleryRedisTransport(f"celery+{redis_url}")

    @pytest.fixture
    def unreachable(self) -> Iterator[Callable[[], Transport]]:
        """A server that accepts a connection and says nothing."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"celery+redis://127.0.0.1:{silent.getsockname()[1]}/0"
            yield lambda: CeleryRedisTransport(url)

    @pytest.fixture
    def sever(self, redis_server: RedisServer) -> Callable[[Transport], Awaitable[None]]:
        """Have the server close every connection of a transport."""

        async def cut(transport: Transport) -> None:
            assert isinstance(transport, CeleryRedisTransport)
            pool, watches = transport._session._pool, transport._claimer._watches
            of_consumers = [connection for watch in watches for connection in (watch._claims, watch._hints)]
            for connection in [*pool._available_connections, *pool._in_use_connections, *of_consumers]:
                if connection is not None and connection._writer is not None:
                    host, port = connection._writer.get_extra_info("sockname")
                    await asyncio.to_thread(
                        redis_server.command, "CLIENT", "KILL", "ADDR", f"{host}:{port}", "SKIPME", "no"
                    )

        return cut
