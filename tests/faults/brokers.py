"""The brokers that the faults are done to, asked by means that share nothing with the drivers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import redis
from attrs import define, field
from cluster import FULL
from servers.process import Server
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer

QUEUE = "default"


class Broker(ABC):
    """A server, and the part of it that belongs to one test."""

    name: ClassVar[str]
    patient: ClassVar[Mapping[str, Any]]
    """Settings with which a dead connection is noticed within seconds, and no slowness is taken for death."""
    hasty: ClassVar[Mapping[str, Any]]
    """Settings with which it is noticed as soon as may be: for many faults in little time."""
    resumes: ClassVar[float]
    """Seconds in which work goes on after the broker, or the way to it, is whole again; twice as many amid other tests."""
    restarts: float
    """Seconds that it may take to come back after a kill, and a worker with it."""
    url: str

    @property
    @abstractmethod
    def server(self) -> Server:
        """What can be killed, stopped and started."""

    @abstractmethod
    def left(self) -> int:
        """Messages of all queues but those of the dead letters: ready, held, or delayed."""

    @abstractmethod
    def consumers(self) -> int:
        """Consumers of the default queue, while it is empty."""

    @abstractmethod
    def subscribers(self) -> int:
        """Workers that hear what is broadcast to the workers."""

    @abstractmethod
    def connections(self) -> int:
        """Connections of clients, this one's own left out."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL to the server, which keeps what it has accepted."""


@define
class RedisBroker(Broker):
    name: ClassVar[str] = "redis"
    patient: ClassVar[Mapping[str, Any]] = {"broker__lease": 3.0}
    hasty: ClassVar[Mapping[str, Any]] = {
        "broker__lease": 2.0,
        "broker__options__timeout": 1.0,
        "broker__options__connect_timeout": 1.0,
    }
    resumes: ClassVar[float] = 30.0 if FULL else 60.0
    restarts: ClassVar[float] = 5.0  # type: ignore[misc]  # the same for each

    server: RedisServer
    url: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.url = self.server.url

    def left(self) -> int:
        with self._client() as client:
            streams = [key for key in client.keys("umbel:{*}:[0-9]") if b"}.dead:" not in key]
            return sum(map(client.xlen, streams)) + sum(map(client.zcard, client.keys("umbel:{*}:delayed")))

    def consumers(self) -> int:
        """Those that wait for a message now: workers with nothing to do. The streams' group is one for all of them."""
        with self._client() as client:
            return sum(1 for one in client.client_list() if one["cmd"] == "blpop")

    def subscribers(self) -> int:
        with self._client() as client:
            ((_, number),) = client.pubsub_numsub("umbel.broadcast.umbel.pidbox")
            return int(number)

    def connections(self) -> int:
        with self._client() as client:
            return len(client.client_list()) - 1

    def kill(self) -> None:
        self.server.kill()

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=10)


@define
class RabbitBroker(Broker):
    name: ClassVar[str] = "rabbitmq"
    patient: ClassVar[Mapping[str, Any]] = {"broker__options__heartbeat": 2.0}
    hasty: ClassVar[Mapping[str, Any]] = {
        "broker__options__heartbeat": 1.0,
        "broker__options__timeout": 2.0,
        "broker__options__connect_timeout": 1.0,
    }
    resumes: ClassVar[float] = 45.0 if FULL else 90.0

    server: RabbitServer
    restarts: float = 30.0
    url: str = field(init=False)
    _vhost: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.url = self.server.vhost()
        self._vhost = unquote(urlsplit(self.url).path.removeprefix("/"))

    def left(self) -> int:
        return self.server.messages(self.url)

    def consumers(self) -> int:
        return self._consumers(f'{{queue_name, {{resource, <<"{self._vhost}">>, queue, <<"{QUEUE}">>}}}}')

    def subscribers(self) -> int:
        return self._consumers('{consumer_tag, <<"topic">>}')

    def _consumers(self, having: str) -> int:
        """-1 while a queue goes away."""
        listed = f'catch rabbit_amqqueue:consumers_all(<<"{self._vhost}">>)'
        return int(
            self.server.eval(
                f"case ({listed}) of Cs when is_list(Cs) -> length([C || C <- Cs, lists:member({having}, C)]); _ -> -1 end"
            )
        )

    def connections(self) -> int:
        infos = "rabbit_networking:connection_info_all([vhost])"
        return int(self.server.eval(f'length([C || C <- {infos}, C =:= [{{vhost, <<"{self._vhost}">>}}]])'))

    def kill(self) -> None:
        self.server.sync()
        self.server.kill()
