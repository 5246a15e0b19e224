"""The laws of the scheduler port, on one server and on a cluster."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterator

import pytest
from servers.redis import RedisCluster, RedisServer

from umbel.testing.contracts import SchedulerContract
from umbel_redis.options import RedisOptions
from umbel_redis.scheduler import RedisScheduler


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class TestRedisScheduler(SchedulerContract):
    @pytest.fixture
    def make_scheduler(self, server: RedisServer) -> Callable[[], RedisScheduler]:
        options = RedisOptions(prefix=uuid.uuid4().hex)
        return lambda: RedisScheduler(server.url, options=options)

    @pytest.fixture
    def restart(self, server: RedisServer) -> Callable[[], Awaitable[None]]:
        async def restart() -> None:
            server.kill()
            server.start()

        return restart


class TestRedisSchedulerOnCluster(SchedulerContract):
    @pytest.fixture
    def make_scheduler(self, cluster: RedisCluster) -> Callable[[], RedisScheduler]:
        options = RedisOptions(cluster=True, prefix=uuid.uuid4().hex)
        return lambda: RedisScheduler(cluster.url, options=options)
