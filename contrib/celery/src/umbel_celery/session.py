"""Connections to the server: one pool for calls, one pair for each consumer, one for each subscriber."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from umbel.errors import BrokerUnavailable, PublishError, PublishRefused, SettingsError
from umbel_celery import scripts
from umbel_celery.losses import honest
from umbel_celery.options import TransportOptions

log = logging.getLogger("umbel.celery")

_SCHEMES: Final[Mapping[str, str]] = {"celery+redis": "redis", "celery+rediss": "rediss"}
_PASSING: Final = (exceptions.ReadOnlyError, exceptions.BusyLoadingError, exceptions.TryAgainError)
_FORBIDDEN: Final = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
FAULTS: Final = (exceptions.RedisError, OSError, TimeoutError, asyncio.IncompleteReadError)
"""All that a call may raise because of the server or the way to it."""
_LEAST_VERSION: Final = (6, 2)


class Session:
    """Everything that is connected. Made without I/O; thrown away whole."""

    def __init__(self, url: str, options: TransportOptions) -> None:
        """Raises ``SettingsError`` for a URL that is none of ours."""
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES:
            raise SettingsError(['[broker] url must be "celery+redis://host:6379/0", with celery+rediss for TLS'])
        self.where = f"Redis at {parts.hostname or parts.path}:{parts.port or 6379}"
        self._options = options
        tls = {"ssl_ca_certs": options.ssl_ca_certs} if parts.scheme == "celery+rediss" and options.ssl_ca_certs else {}
        try:
            self._pool = BlockingConnectionPool.from_url(
                urlunsplit(parts._replace(scheme=_SCHEMES[parts.scheme])),
                max_connections=int(options.max_connections),
                timeout=None,
                socket_timeout=None,  # every call has a deadline of its own
                socket_connect_timeout=options.socket_timeout,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                client_name="umbel",
                **tls,
            )
        except ValueError as exc:
            raise SettingsError([f"[broker] url is not the address of a Redis server: {exc}"]) from exc
        honest(self._pool)
        self.db = int(self._pool.connection_kwargs.get("db", 0))
        self.client: Redis = Redis(connection_pool=self._pool)
        self._scripts = {text: self.client.register_script(text) for text in (scripts.RENEW, scripts.SETTLE)}
        self._checked = False

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script; it is loaded where the server has forgotten it."""
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return await self._scripts[script](keys=keys, args=args)

    async def check(self) -> None:
        """Refuse, once, a server on which the layout cannot be kept. Raises ``PublishRefused``."""
        if self._checked:
            return
        info = await self.client.info("server")
        version = str(info.get("redis_version", "0"))
        if info.get("redis_mode") == "cluster":
            raise PublishRefused(
                f"{self.where} is a Redis Cluster, on which the list layout of Celery cannot be kept: use a single server, "
                'or [broker] url = "redis://…?cluster=true" of umbel-redis'
            )
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _LEAST_VERSION:
            raise PublishRefused(
                f"{self.where} has version {version}; celery+redis needs Redis 6.2 or newer, or Valkey"
            )
        self._checked = True

    async def connect(self) -> AbstractConnection:
        """A connection of one's own, outside the pool."""
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py does not say
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # likewise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def close(self) -> None:
        """Close the pool's connections."""
        with contextlib.suppress(*FAULTS):  # they are thrown away
            await self._pool.disconnect()

    def failure(self, error: BaseException) -> PublishError:
        """What to raise for a fault of the server or of the way to it."""
        if isinstance(error, PublishError):
            return error
        if isinstance(error, _FORBIDDEN):
            return PublishRefused(f"{self.where} refuses us: {error}; check user and password in [broker] url")
        if isinstance(error, exceptions.ResponseError) and not isinstance(error, _PASSING):
            _, _, answer = str(error).rpartition(
                "caused error: "
            )  # before it redis-py quotes the command, body and all
            return PublishRefused(f"{self.where} answered: {answer}")
        if isinstance(error, TimeoutError | exceptions.TimeoutError):
            return BrokerUnavailable(f"{self.where} does not answer in time")
        return BrokerUnavailable(f"{self.where} cannot be reached: {error or type(error).__name__}")


class Watch:
    """A consumer's own pair of connections: one for its claims, one on which the server says that a list has changed.

    The server remembers which keys the first has looked at and reports, once, the next change of any (client tracking). A
    hint only: where the server does not allow it, or a hint is lost, the next poll finds what there is.
    """

    def __init__(self, session: Session, keys: Sequence[str]) -> None:
        self._session = session
        self._keys = tuple(keys)
        self._claims: AbstractConnection | None = None
        self._hints: AbstractConnection | None = None
        self._listening: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._digest = ""

    async def open(self) -> None:
        """Connect. Raises what the client library raises."""
        self._claims = await self._session.connect()
        self._digest = (await _ask(self._claims, "SCRIPT", "LOAD", scripts.CLAIM)).decode()
        self._hints = await self._session.connect()
        number = await _ask(self._hints, "CLIENT", "ID")
        await _ask(self._hints, "SUBSCRIBE", "__redis__:invalidate")
        try:
            await _ask(self._claims, "CLIENT", "TRACKING", "ON", "REDIRECT", number, "NOLOOP")
        except exceptions.ResponseError as exc:
            log.warning("%s does not tell of new messages and is asked now and then: %s", self._session.where, exc)
        self._listening = asyncio.create_task(self._listen(self._hints), name="umbel-celery-hints")

    async def _listen(self, hints: AbstractConnection) -> None:
        try:
            while True:
                await hints.read_response(timeout=None)
                self._changed.set()
        except FAULTS:
            self._changed.set()  # the next claim finds out whether the server is still there

    async def claim(self, keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
        """Look at the keys from now on, and claim."""
        assert self._claims is not None
        connection = self._claims
        self._changed.clear()
        commands = (("EXISTS", *self._keys), ("EVALSHA", self._digest, len(keys), *keys, *args))
        await connection.send_packed_command(connection.pack_commands(commands))
        await connection.read_response(timeout=None)
        out: list[Any] = await connection.read_response(timeout=None)
        return out

    async def wait(self, seconds: float) -> None:
        """Wait until a key has changed since the last claim, at most ``seconds``."""
        assert self._listening is not None
        if self._listening.done():
            raise exceptions.ConnectionError("the connection for hints is lost")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._changed.wait()

    async def close(self) -> None:
        """Disconnect both."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        for connection in (self._claims, self._hints):
            if connection is not None:
                await connection.disconnect(nowait=True)


async def _ask(connection: AbstractConnection, *command: Any) -> Any:
    await connection.send_command(*command)
    return await connection.read_response(timeout=None)


class Calls:
    """The calls under way, each with a deadline, so that closing ends them all."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._running: set[asyncio.Task[Any]] = set()
        self.closed = False

    async def run(self, work: Callable[[], Awaitable[Any]], timeout: float) -> Any:
        """What ``work`` gives. Raises ``BrokerUnavailable`` past ``timeout`` seconds or when closed, ``PublishRefused``."""
        if self.closed:
            raise self.ended()
        task = asyncio.ensure_future(self._within(work, timeout))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if _cancelled() or not task.cancelled():
                raise
            raise self.ended() from None

    async def _within(self, work: Callable[[], Awaitable[Any]], timeout: float) -> Any:
        try:
            async with asyncio.timeout(timeout):
                await self._session.check()
                return await work()
        except FAULTS as exc:
            raise self._session.failure(exc) from exc

    def ended(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"this connection to {self._session.where} is closed")

    async def close(self) -> None:
        """End what is under way, and refuse what comes."""
        self.closed = True
        running = set(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
