from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NoReturn

import pytest
from servers.process import Missing
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer

sys.path.insert(0, str(Path(__file__).parent))

from interop_fleet import Broker, Fleet  # found by the line above


@pytest.fixture(scope="module")
def fleet_on(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    node_modules: Path,
    absent: Callable[[str], NoReturn],
) -> Iterator[Callable[[str], Fleet]]:
    """``fleet_on("redis")``: the one fleet on that broker. Results are in Redis on both: celery-node reads no others."""
    fleets: dict[str, Fleet] = {}
    with ExitStack() as stack:
        try:
            redis = stack.enter_context(RedisServer(tmp_path_factory.mktemp("redis")))
        except Missing as reason:
            absent(str(reason))

        def url_of(broker: str) -> str:
            if broker == "redis":
                return redis.url_of(1)
            rabbit: RabbitServer = request.getfixturevalue("rabbitmq")
            url = rabbit.vhost()
            stack.callback(rabbit.delete_vhost, url)
            return url

        def fleet_on(broker: str) -> Fleet:
            if broker not in fleets:
                where = Broker(name=broker, url=url_of(broker), results=redis.url_of(2 if broker == "redis" else 3))
                fleet = Fleet(tmp_path_factory.mktemp(broker), where, node_modules)
                fleets[broker] = stack.enter_context(closing(fleet))
            return fleets[broker]

        yield fleet_on
