"""The laws of the result store port, on one server and on a cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
from servers.redis import RedisCluster, RedisServer

from umbel.ports.result_store import ResultStore
from umbel.testing.contracts import ResultStoreContract
from umbel_redis.result_store import RedisResultStore, ResultStoreOptions

Sever = Callable[[ResultStore], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def severs(servers: Sequence[RedisServer]) -> Sever:
    async def sever(store: ResultStore) -> None:
        for server in servers:
            for kind in ("normal", "pubsub"):
                server.command("CLIENT", "KILL", "TYPE", kind)

    return sever


class TestRedisResultStore(ResultStoreContract):
    @pytest.fixture
    def make_store(self, server: RedisServer) -> Callable[[], RedisResultStore]:
        return lambda: RedisResultStore(server.url)

    @pytest.fixture
    def sever(self, server: RedisServer) -> Sever:
        return severs([server])

    @pytest.fixture
    def restart(self, server: RedisServer) -> Callable[[], Awaitable[None]]:
        async def restart() -> None:
            server.kill()
            server.start()

        return restart


class TestRedisResultStoreOnCluster(ResultStoreContract):
    @pytest.fixture
    def make_store(self, cluster: RedisCluster) -> Callable[[], RedisResultStore]:
        return lambda: RedisResultStore(cluster.url, options=ResultStoreOptions(cluster=True, prefix="kit"))

    @pytest.fixture
    def sever(self, cluster: RedisCluster) -> Sever:
        return severs(cluster.servers)
