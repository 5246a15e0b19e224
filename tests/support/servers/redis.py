"""Redis, or Valkey where ``TEST_REDIS_SERVER`` names its program: alone, in a cluster, or under Sentinel."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import redis

from servers.certificates import Certificates, make_certificates
from servers.process import HOST, Failed, Server, free_port, program, spawn

DATABASES = 1024
_SLOTS = 16_384

# Every answer is in the hands of the kernel before the client sees it: SIGKILL of the server loses nothing.
_CONFIG = f"""\
bind 127.0.0.1
daemonize no
dir .
save ""
appendonly yes
appendfsync no
databases {DATABASES}
"""


class RedisServer(Server):
    """One server. ``config`` are lines for ``redis.conf``, which override what stands before them::

        RedisServer(folder, "maxmemory 10mb", "maxmemory-policy allkeys-lru")
        RedisServer(folder, "appendonly no")  # forgets everything when it is restarted

    With ``tls`` there is, beside ``url``, ``tls_url`` on a port of its own; ``certificates`` says what a client needs.
    """

    def __init__(self, folder: Path, *config: str, password: str | None = None, tls: bool = False) -> None:
        super().__init__(folder)
        self.password = password
        self.socket = self.folder / "redis.sock"
        self.certificates: Certificates | None = None
        self.tls_port = self.bus_port = 0
        lines = [_CONFIG, f"port {self.port}", f"unixsocket {self.socket}"]
        if "cluster-enabled yes" in config:
            self.bus_port = free_port()  # Redis's own choice, its port + 10,000, may be somebody's
            lines.append(f"cluster-port {self.bus_port}")
        if password is not None:
            lines += [f'requirepass "{password}"', f'masterauth "{password}"']
        if tls:
            self.tls_port, self.certificates = free_port(), make_certificates(self.folder)
            lines += [
                f"tls-port {self.tls_port}",
                f"tls-ca-cert-file {self.certificates.ca}",
                f"tls-cert-file {self.certificates.cert}",
                f"tls-key-file {self.certificates.key}",
                "tls-auth-clients optional",
            ]
        self._config = self.folder / "redis.conf"
        self._config.write_text("\n".join([*lines, *config, ""]))

    @property
    def url(self) -> str:
        return self.url_of(0)

    @property
    def tls_url(self) -> str:
        return f"rediss://{self._user}{HOST}:{self.tls_port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._user}{self.socket}?db=0"

    def url_of(self, database: int) -> str:
        return f"redis://{self._user}{HOST}:{self.port}/{database}"

    def command(self, *arguments: Any, database: int = 0) -> Any:
        """Send one command on a connection of its own; the answer is what ``redis-py`` makes of it."""
        with redis.Redis.from_url(self.url_of(database), socket_timeout=10) as client:
            return client.execute_command(*arguments)

    @property
    def _user(self) -> str:
        return "" if self.password is None else f":{self.password}@"

    def _spawn(self) -> subprocess.Popen[bytes]:
        return spawn(self._command(), log=self.log, folder=self.folder)

    def _command(self) -> list[str]:
        return [program(os.environ.get("TEST_REDIS_SERVER", "redis-server")), str(self._config)]

    def _ready(self) -> bool:
        try:
            return self.command("PING") is True
        except (redis.ConnectionError, redis.TimeoutError):  # no kinds of OSError; loading its data is one of the first
            return False


class _Sentinel(RedisServer):
    def _command(self) -> list[str]:
        return [*super()._command(), "--sentinel"]


class _Several:
    """Servers that are started and killed together."""

    servers: list[RedisServer]

    def start(self) -> Self:
        for server in self.servers:
            server.start()
        return self

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.kill()


class RedisCluster(_Several):
    """A cluster of ``nodes`` masters, each with ``replicas`` replicas; ``start`` blocks until all say it is ok."""

    def __init__(self, folder: Path, nodes: int = 3, *config: str, replicas: int = 0) -> None:
        self.servers = [
            RedisServer(
                folder / f"node{number}",
                "cluster-enabled yes",
                "cluster-node-timeout 2000",
                "cluster-replica-validity-factor 0",
                "repl-diskless-sync-delay 0",
                *config,
            )
            for number in range(nodes * (1 + replicas))
        ]
        self.masters, self.replicas = self.servers[:nodes], self.servers[nodes:]
        self._formed = False

    @property
    def hosts(self) -> list[str]:
        return [f"{HOST}:{server.port}" for server in self.servers]

    @property
    def url(self) -> str:
        """The address of the first node, from which a client finds the others."""
        return self.servers[0].url

    def start(self) -> Self:
        super().start()
        if not self._formed:
            self._form()
            self._formed = True
        self.wait_until_ok()
        return self

    def wait_until_ok(self, timeout: float = 30.0) -> None:
        """Block until every node that runs sees every slot served, as after a restart or a failover."""
        alive = [server for server in self.servers if server.running]
        _until(lambda: all(_info(server)["cluster_state"] == "ok" for server in alive), f"{self} is ok", timeout)

    def _form(self) -> None:
        first = self.servers[0]
        for server in self.servers[1:]:
            first.command("CLUSTER", "MEET", HOST, server.port, server.bus_port)
        for number, master in enumerate(self.masters):
            low, high = (_SLOTS * (number + extra) // len(self.masters) for extra in (0, 1))
            master.command("CLUSTER", "ADDSLOTSRANGE", low, high - 1)
        known = str(len(self.servers))
        _until(lambda: all(_info(server)["cluster_known_nodes"] == known for server in self.servers), "all nodes meet")
        for number, replica in enumerate(self.replicas):
            replica.command("CLUSTER", "REPLICATE", _id(self.masters[number % len(self.masters)]))
        _until(lambda: all(_linked(replica) for replica in self.replicas), "all replicas follow")

    def __repr__(self) -> str:
        return f"<RedisCluster {', '.join(self.hosts)}>"


class RedisSentinel(_Several):
    """A master, a replica, and Sentinels that watch them under the name ``name``."""

    def __init__(self, folder: Path, *config: str, sentinels: int = 1, name: str = "umbel") -> None:
        self.name = name
        eager = ("repl-diskless-sync-delay 0", *config)
        first = RedisServer(folder / "a", *eager)
        second = RedisServer(folder / "b", *eager, f"replicaof {HOST} {first.port}")
        self.data = [first, second]
        self.sentinels = [
            _Sentinel(
                folder / f"sentinel{number}",
                f"sentinel monitor {name} {HOST} {first.port} {sentinels // 2 + 1}",
                f"sentinel down-after-milliseconds {name} 1000",
                f"sentinel failover-timeout {name} 3000",
            )
            for number in range(sentinels)
        ]
        self.servers = [*self.data, *self.sentinels]

    @property
    def hosts(self) -> list[str]:
        return [f"{HOST}:{sentinel.port}" for sentinel in self.sentinels]

    @property
    def url(self) -> str:
        """As Celery writes it: ``sentinel://HOST:PORT;sentinel://HOST:PORT``."""
        return ";".join(f"sentinel://{host}" for host in self.hosts)

    @property
    def master(self) -> RedisServer:
        """The server that the first living Sentinel names as the master; it may be dead and not replaced yet."""
        watching = next(sentinel for sentinel in self.sentinels if sentinel.running)
        _, port = watching.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        return next(server for server in self.data if server.port == int(port))

    def start(self) -> Self:
        super().start()
        self.wait_until_ready()
        return self

    def failover(self) -> RedisServer:
        """Make the replica the master, and block until it is. Returns the new master. Writes that the replica did not have by
        then are lost, as they always are under Sentinel.

        For a failover after a death: ``sentinel.master.kill()``, then `wait_until_master_is_not`.
        """
        before = self.master
        self.sentinels[0].command("SENTINEL", "FAILOVER", self.name)
        return self.wait_until_master_is_not(before)

    def wait_until_master_is_not(self, before: RedisServer, timeout: float = 30.0) -> RedisServer:
        """Block until the Sentinels have made another server the master, and it takes writes. Returns it."""
        _until(lambda: self.master is not before and _role(self.master) == "master", "another master", timeout)
        return self.master

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Block until the replica follows and every Sentinel knows it and its peers: only then a failover can succeed."""
        others = str(len(self.sentinels) - 1).encode()

        def knows(sentinel: RedisServer) -> bool:
            master = sentinel.command("SENTINEL", "MASTER", self.name)
            replicas = sentinel.command("SENTINEL", "REPLICAS", self.name)
            linked = [replica[b"master-link-status"] == b"ok" for replica in replicas]
            return linked == [True] and master[b"num-other-sentinels"] == others

        _until(lambda: any(_linked(server) for server in self.data), "the replica follows", timeout)
        _until(lambda: all(knows(sentinel) for sentinel in self.sentinels), "the Sentinels know all", timeout)

    def __repr__(self) -> str:
        return f"<RedisSentinel {', '.join(self.hosts)}>"


def _info(server: RedisServer) -> dict[str, str]:
    answer: dict[str, str] = server.command("CLUSTER INFO")
    return answer


def _id(server: RedisServer) -> str:
    return _text(server.command("CLUSTER", "MYID"))


def _role(server: RedisServer) -> str:
    return str(server.command("INFO", "replication")["role"])


def _linked(server: RedisServer) -> bool:
    state = server.command("INFO", "replication")
    return bool(state["role"] == "slave" and state["master_link_status"] == "up")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _until(condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"not within {timeout:g} s: {what}")
        time.sleep(0.05)
