"""The laws of the port: on one server, through its socket file, and in a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import NoReturn

import pytest
from servers.process import Missing
from servers.proxy import Proxy
from servers.redis import RedisCluster, RedisServer

from umbel.ports.transport import Transport
from umbel.testing.contracts import TransportContract
from umbel_redis.transport import RedisTransport, TransportOptions


class TestRedisTransport(TransportContract):
    @pytest.fixture
    def make_transport(
        self, redis_server: RedisServer, redis_url: str, make_proxy: Callable[[int], Proxy]
    ) -> Callable[[], RedisTransport]:
        self.proxy = make_proxy(redis_server.port)
        return lambda: RedisTransport(self.proxy.through(redis_url))

    @pytest.fixture
    def unreachable(self, redis_server: RedisServer, make_proxy: Callable[[int], Proxy]) -> Callable[[], Transport]:
        """A server that takes the connection and says nothing."""
        proxy = make_proxy(redis_server.port)
        proxy.stall()
        return lambda: RedisTransport(proxy.through(redis_server.url))

    @pytest.fixture
    def sever(self) -> Callable[[Transport], Awaitable[None]]:
        async def cut(transport: Transport) -> None:
            await asyncio.to_thread(self.proxy.reset)

        return cut


class TestUnixTransport(TransportContract):
    @pytest.fixture
    def make_transport(self, redis_server: RedisServer, redis_url: str) -> Callable[[], RedisTransport]:
        options = TransportOptions(db=int(redis_url.rpartition("/")[2]), prefix="p{1}:")
        return lambda: RedisTransport(f"unix://{redis_server.socket}", options=options)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, absent: Callable[[str], NoReturn]) -> Iterator[RedisCluster]:
    try:
        with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
            yield cluster
    except Missing as reason:
        absent(str(reason))


class TestClusterTransport(TransportContract):
    @pytest.fixture
    def make_transport(self, cluster: RedisCluster) -> Callable[[], RedisTransport]:
        return lambda: RedisTransport(cluster.url, options=TransportOptions(cluster=True))
