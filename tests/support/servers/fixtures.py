"""Servers as fixtures, for every test of the repository. Nothing starts before a test asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from servers.process import Missing
from servers.proxy import Proxy
from servers.rabbitmq import RabbitServer
from servers.redis import DATABASES, RedisCluster, RedisSentinel, RedisServer

Absent = Callable[[str], NoReturn]

NODE = Path(__file__).parents[3] / ".services/node"


@contextmanager
def _or_absent(absent: Absent) -> Iterator[None]:
    try:
        yield
    except Missing as reason:
        absent(str(reason))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory, absent: Absent) -> Iterator[RedisServer]:
    """One Redis for all tests that do it no harm; what they store belongs into ``redis_url``."""
    with ExitStack() as stack:
        with _or_absent(absent):
            server = stack.enter_context(RedisServer(tmp_path_factory.mktemp("redis")))
        yield server


_databases = itertools.cycle(range(1, DATABASES))


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """A database of the shared Redis that is empty and nobody else's. Channels of PUBLISH know no databases."""
    database = next(_databases)
    yield redis_server.url_of(database)
    redis_server.command("FLUSHDB", database=database)


@pytest.fixture
def make_redis(tmp_path_factory: pytest.TempPathFactory, absent: Absent) -> Iterator[Callable[..., RedisServer]]:
    """``make_redis(*config, password=None, tls=False)``: a started Redis for this test alone."""
    with ExitStack() as stack:

        def make(*config: str, **options: Any) -> RedisServer:
            with _or_absent(absent):
                return stack.enter_context(RedisServer(tmp_path_factory.mktemp("redis"), *config, **options))

        yield make


@pytest.fixture
def redis_cluster(tmp_path_factory: pytest.TempPathFactory, absent: Absent) -> Iterator[RedisCluster]:
    """A cluster of three masters, for this test alone."""
    with ExitStack() as stack:
        with _or_absent(absent):
            cluster = stack.enter_context(RedisCluster(tmp_path_factory.mktemp("cluster")))
        yield cluster


@pytest.fixture
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory, absent: Absent) -> Iterator[RedisSentinel]:
    """A master, a replica and one Sentinel, for this test alone."""
    with ExitStack() as stack:
        with _or_absent(absent):
            sentinel = stack.enter_context(RedisSentinel(tmp_path_factory.mktemp("sentinel")))
        yield sentinel


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory, absent: Absent) -> Iterator[RabbitServer]:
    """One RabbitMQ for all tests that do it no harm; what they declare belongs into ``rabbitmq_url``."""
    with ExitStack() as stack:
        with _or_absent(absent):
            server = stack.enter_context(RabbitServer(tmp_path_factory.mktemp("rabbitmq")))
        yield server


@pytest.fixture
def rabbitmq_url(rabbitmq: RabbitServer) -> Iterator[str]:
    """A vhost of the shared RabbitMQ that is empty and nobody else's."""
    url = rabbitmq.vhost()
    yield url
    rabbitmq.delete_vhost(url)


@pytest.fixture
def make_rabbitmq(tmp_path_factory: pytest.TempPathFactory, absent: Absent) -> Iterator[Callable[..., RabbitServer]]:
    """``make_rabbitmq(tls=False, management=False, **config)``: a started RabbitMQ for this test alone. Takes seconds."""
    with ExitStack() as stack:

        def make(**options: Any) -> RabbitServer:
            with _or_absent(absent):
                return stack.enter_context(RabbitServer(tmp_path_factory.mktemp("rabbitmq"), **options))

        yield make


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], Proxy]]:
    """``make_proxy(server.port)``: a started proxy before a server of this machine."""
    with ExitStack() as stack:
        yield lambda upstream_port: stack.enter_context(Proxy(upstream_port))


@pytest.fixture(scope="session")
def node_modules(absent: Absent) -> Path:
    """The folder in which ``require('celery-node')`` works; run ``node`` there."""
    if not (NODE / "node_modules/celery-node").is_dir():
        absent("no celery-node in .services/node (make services installs what the tests need)")
    return NODE
