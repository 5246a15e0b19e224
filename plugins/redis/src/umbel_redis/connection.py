"""Clients of redis-py for one address, and what their errors mean.

redis-py's own retries are off everywhere: whoever calls has a deadline, and decides about another try.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final, TypeAlias

import hiredis
from attrs import field, frozen
from redis import Redis, RedisCluster, exceptions
from redis.asyncio import Redis as AsyncSingle
from redis.asyncio import RedisCluster as AsyncCluster
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from umbel_redis.options import Address, RedisOptions

AsyncRedis: TypeAlias = AsyncSingle | AsyncCluster
BlockingRedis: TypeAlias = Redis | RedisCluster

CLIENT_NAME: Final = "umbel"


@frozen(eq=False)
class Client:
    """An asyncio client and all that belongs to it: for one event loop, thrown away whole on any fault.

    Makes connections when they are needed. Await ``redis.initialize()`` before a single command (it returns at once where
    there is nothing to do): a cluster's client sends those that come before it knows its nodes to any of them.
    ``redis.execute_command`` raises what ``explain`` reads.
    """

    address: Address
    redis: AsyncRedis
    _sentinels: tuple[AsyncSingle, ...] = field(default=(), repr=False)
    _idle: list[AbstractConnection] = field(factory=list, init=False, repr=False)
    """Connections of ``exchange`` that nobody uses now."""

    async def exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to ``commands`` in one round trip, errors of single commands among them. Not for a cluster.

        Over a connection that nobody else uses meanwhile; one on which anything else fails is closed. redis-py's own way,
        with its retries and observers, takes twice the time of the round trip itself. Raises ``ERRORS``.
        """
        connection = self._idle.pop() if self._idle else None
        if connection is not None and await connection.can_read():  # it was closed, or is out of step
            await connection.disconnect(nowait=True)
            connection = None
        if connection is None:
            connection = await self.dedicated()
        packed = connection.pack_command(*commands[0])
        for command in commands[1:]:
            packed += connection.pack_command(*command)
        try:
            await connection.send_packed_command(packed, check_health=False)
            answers = [await self._answer(connection, command[0]) for command in commands]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._idle.append(connection)
        return answers

    async def _answer(self, connection: AbstractConnection, verb: Any) -> Any:
        try:
            answer = await connection.read_response()
        except exceptions.ResponseError as error:
            return error
        reading = self.redis.response_callbacks.get(verb)
        return answer if reading is None else reading(answer)

    async def dedicated(self) -> AbstractConnection:
        """A connection of its own, made already, for subscriptions: the caller disconnects it. May raise as commands do.

        In a cluster it leads to any node: what is published at one is heard at all.
        """
        connection: AbstractConnection
        if isinstance(self.redis, AsyncCluster):
            await self.redis.initialize()
            node = self.redis.get_random_node()
            connection = node.connection_class(**node.connection_kwargs)
        else:
            connection = self.redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py's gap
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's gap
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def aclose(self) -> None:
        """Close every connection of the client's own. Harmless when called twice."""
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)
        await self.redis.aclose()
        if isinstance(
            self.redis, AsyncCluster
        ):  # which closes nothing itself while it thinks of looking for its nodes anew
            for nodes in ("nodes_cache", "startup_nodes"):
                await self.redis.nodes_manager.aclose(nodes)
        for sentinel in self._sentinels:
            await sentinel.aclose()


def connect(address: Address, options: RedisOptions, **overrides: Any) -> Client:
    """An asyncio client for ``address``. No I/O. ``overrides``: keyword arguments of redis-py's own connections.

    The pool of connections has no bound of its own: the caller keeps ``options.connections``.
    """
    settings = {**_settings(address, options), "retry": AsyncRetry(NoBackoff(), 0), **overrides}
    if address.kind == "cluster":
        nodes = [AsyncClusterNode(host, port) for host, port in address.hosts]
        # After so many MOVED it would cut its connections, whatever is under way on them; it follows each without that.
        settings |= {"max_connections": 2**31, "reinitialize_steps": 0}
        cluster = AsyncCluster(startup_nodes=nodes, **settings)
        ours = _ours(cluster.connection_kwargs["connection_class"])
        for node in cluster.startup_nodes:
            node.connection_class = ours
        cluster.connection_kwargs["connection_class"] = ours
        return Client(address, cluster)
    if address.kind == "sentinel":
        own = _of_sentinels(settings, options)
        manager = AsyncSentinel(address.hosts, sentinel_kwargs=own, db=address.db, **settings)  # type: ignore[no-untyped-call]  # redis-py's gap
        client, sentinels = manager.master_for(address.master), tuple(manager.sentinels)
    else:
        client, sentinels = AsyncSingle(**_place(address), **settings), ()
    client.connection_pool.connection_class = _ours(client.connection_pool.connection_class)
    return Client(address, client, sentinels)


def connect_blocking(address: Address, options: RedisOptions, **overrides: Any) -> BlockingRedis:
    """A synchronous client for ``address``: thread-safe, fork-safe (a child makes connections of its own).

    The one for a cluster connects at once, and may raise what ``explain`` reads; the others make no connection yet.
    """
    settings = {**_settings(address, options), "retry": Retry(NoBackoff(), 0), **overrides}
    if address.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.hosts]  # type: ignore[no-untyped-call]  # redis-py's gap
        return RedisCluster(startup_nodes=nodes, **settings)
    if address.kind == "sentinel":
        own = _of_sentinels(settings, options)
        manager = Sentinel(list(address.hosts), sentinel_kwargs=own, db=address.db, **settings)  # type: ignore[no-untyped-call]  # redis-py's gap
        master: Redis = manager.master_for(address.master)  # type: ignore[no-untyped-call]  # redis-py's gap
        return master
    return Redis(**_place(address), **settings)


def _settings(address: Address, options: RedisOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "username": address.username,
        "password": address.password,
        "client_name": CLIENT_NAME,
        "driver_info": None,  # spares two commands a connection
        "protocol": 2,
        "socket_timeout": options.timeout,
        "socket_connect_timeout": options.connect_timeout,
    }
    if address.tls:
        settings |= {
            "ssl": True,
            "ssl_ca_certs": options.ssl_ca_certs,
            "ssl_certfile": options.ssl_certfile,
            "ssl_keyfile": options.ssl_keyfile,
            "ssl_cert_reqs": options.ssl_cert_reqs,
            "ssl_check_hostname": options.ssl_check_hostname and options.ssl_cert_reqs == "required",
        }
    return settings


def _place(address: Address) -> dict[str, Any]:
    if address.path is not None:
        return {"unix_socket_path": address.path, "db": address.db}
    host, port = address.hosts[0]
    return {"host": host, "port": port, "db": address.db}


class _Connection:
    """What we change about redis-py's asyncio connections, whichever their class.

    Commands are written in C, as its synchronous ones do: in Python each argument takes 4 µs. And one that was lost says so: from
    CPython 3.12 on, asyncio's transport fails with an ``AttributeError``, or a ``TypeError``, when it is written to then.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        verb = args[0]
        if isinstance(verb, str) and " " in verb:  # redis-py's own form of a command with a sub-command
            args = (*verb.split(), *args[1:])
        try:
            return [hiredis.pack_command(args)]
        except TypeError as error:
            raise exceptions.DataError(str(error)) from None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]  # mixed into a connection class
        except (AttributeError, TypeError) as error:
            raise exceptions.ConnectionError(f"the connection was lost before this was written: {error}") from error


@cache
def _ours(connection_class: type[Any]) -> type[Any]:
    return type(connection_class.__name__, (_Connection, connection_class), {})


def _of_sentinels(settings: dict[str, Any], options: RedisOptions) -> dict[str, Any]:
    return {**settings, "username": options.sentinel_username, "password": options.sentinel_password}


# --- errors --------------------------------------------------------------------------------------

ERRORS: Final = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
"""What a command may raise; a timeout of asyncio's is an ``OSError`` too. ``explain`` tells them apart."""


@frozen
class Fault:
    """A failed call, explained."""

    sentence: str
    permanent: bool
    """The same call would fail again until somebody mends something."""


def explain(error: BaseException, address: Address) -> Fault:
    """The fault behind one of ``ERRORS``: one sentence with the address and the remedy, and never a password."""
    for cause in _causes(error):
        if isinstance(cause, exceptions.AuthenticationError | exceptions.AuthenticationWrongNumberOfArgsError):
            said = str(cause).rstrip(".")
            return Fault(f"{address} refused {_who(address)}: {said}; mend the user or the password in the URL", True)
        if isinstance(cause, exceptions.NoPermissionError):
            return Fault(f"{address} does not allow it to {_who(address)}: {cause}; see ACL SETUSER", True)
        if isinstance(cause, ssl.SSLCertVerificationError):
            remedy = "name its authority with the option ssl_ca_certs"
            return Fault(f"the certificate of {address} is not trusted ({cause.verify_message}): {remedy}", True)
        if isinstance(cause, MasterNotFoundError | AsyncMasterNotFoundError):  # its text shows objects
            return Fault(f"no sentinel of {address} knows a master {address.master!r} that is up", False)
        if isinstance(cause, exceptions.MovedError) and address.kind != "cluster":
            return Fault(f"{address} is a node of a Redis Cluster: add ?cluster=true to the URL", True)
        if isinstance(cause, exceptions.OutOfMemoryError):
            return Fault(f"{address} has no memory left: raise its maxmemory, or let it evict results", False)
        if isinstance(cause, exceptions.ReadOnlyError):
            return Fault(f"{address} is a replica: name the master in the URL, or use sentinel://", False)
        if isinstance(cause, exceptions.BusyLoadingError):
            return Fault(f"{address} is starting, and still loads its data", False)
        if isinstance(cause, exceptions.ClusterDownError | exceptions.SlotNotCoveredError | exceptions.TryAgainError):
            return Fault(f"the cluster of {address} is not ready: {cause}", False)
    text = str(error)
    if "Cluster mode is not enabled" in text:
        return Fault(f"{address} is not a Redis Cluster: remove cluster=true from the URL", True)
    if isinstance(error, exceptions.ResponseError):
        if "out of range" in text and "DB" in text:
            return Fault(f"{address} has no database {address.db}: see `databases` in its configuration", True)
        return Fault(f"{address} refused: {text}", not text.startswith(("UNKILLABLE", "BUSY", "NOREPLICAS")))
    if isinstance(error, exceptions.DataError):
        return Fault(f"{address} cannot hold such a value: {text}", True)
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return Fault(f"{address} does not answer in time{text and f': {text}'}", False)
    return Fault(f"{address} cannot be reached: {text or type(error).__name__}", False)


def _who(address: Address) -> str:
    return f"user {address.username!r}" if address.username else "its default user"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
