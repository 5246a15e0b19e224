from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))

from brokers import Broker, RabbitBroker, RedisBroker
from cluster import Cluster, cluster  # noqa: F401  # found by the line above; a fixture
from fleet import Fleet
from servers.process import Missing
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer


@pytest.fixture(scope="session")
def rough_rabbitmq(
    tmp_path_factory: pytest.TempPathFactory, absent: Callable[[str], object]
) -> Iterator[tuple[RabbitServer, float]]:
    """One RabbitMQ that the tests of this folder may kill, and leave dead: a start costs seconds, which it comes with."""
    server = RabbitServer(tmp_path_factory.mktemp("rough"))
    began = time.monotonic()
    try:
        server.start()
    except Missing as reason:
        absent(str(reason))
    yield server, time.monotonic() - began
    server.kill()


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A broker to which anything may be done."""
    if request.param == "redis":
        make_redis: Callable[[], RedisServer] = request.getfixturevalue("make_redis")
        yield RedisBroker(make_redis())
        return
    server: RabbitServer
    server, starting = request.getfixturevalue("rough_rabbitmq")
    if not server.running:
        server.start()
    made = RabbitBroker(server, restarts=5.0 + 2.5 * starting)
    yield made
    if server.running:
        server.delete_vhost(made.url)


@pytest.fixture
def fleet(cluster: Cluster, broker: Broker, redis_url: str) -> Fleet:  # noqa: F811  # the fixture that was imported
    """Workers on ``broker``, whose results are in a Redis that nothing happens to."""
    return Fleet(cluster, broker, redis_url)
