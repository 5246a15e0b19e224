"""What is said to all: one connection for every subscription of a transport, kept while anybody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from umbel.errors import BrokerUnavailable
from umbel_redis.connection import ERRORS, Client
from umbel_redis.session import Session

Heard: TypeAlias = tuple[str, bytes]

_MOST_KEPT: Final = 10_000
"""Broadcasts kept for a listener that is slow; beyond them the oldest are forgotten."""


def pack(key: str, payload: bytes) -> bytes:
    """One message of a channel: the key's length, a colon, key, payload."""
    name = key.encode()
    return b"%d:%b%b" % (len(name), name, payload)


def unpack(data: bytes) -> Heard:
    size, _, rest = data.partition(b":")
    return rest[: int(size)].decode(), rest[int(size) :]


class Ear:
    """All who listen on one transport. Silence of the server is noticed within twice ``patience`` seconds."""

    def __init__(self, session: Session, patience: float) -> None:
        self._session = session
        self._patience = patience
        self._line: _Line | None = None
        self._making = asyncio.Lock()

    async def hear(self, channel: str) -> AsyncIterator[Heard]:
        """Raises ``BrokerUnavailable`` when the connection is lost."""
        mine: asyncio.Queue[Heard | BrokerUnavailable] = asyncio.Queue(_MOST_KEPT)
        async with self._making:
            if self._line is None or self._line.reading.done():
                client = self._session.client
                try:
                    async with asyncio.timeout(self._patience):
                        connection = await client.dedicated()
                    self._line = _Line(self._session, client, connection, self._patience)
                except ERRORS as error:
                    raise self._session.failed(client, error) from error
            line = self._line
        try:
            await line.join(channel.encode(), mine)
            while True:
                item = await mine.get()
                if isinstance(item, BrokerUnavailable):
                    raise item
                yield item
        finally:
            line.leave(channel.encode(), mine)
            if not line.listeners:
                if self._line is line:
                    self._line = None
                await line.close()

    async def close(self) -> None:
        """Whoever listens gets ``BrokerUnavailable``."""
        async with self._making:
            if self._line is not None:
                await self._line.close()


class _Line:
    """One connection that listens."""

    def __init__(self, session: Session, client: Client, connection: AbstractConnection, patience: float) -> None:
        self._session = session
        self._client = client
        self._connection = connection
        self._patience = patience
        self.listeners: dict[bytes, set[asyncio.Queue[Any]]] = {}
        self._joined: dict[bytes, asyncio.Event] = {}
        self.reading = asyncio.create_task(self._read(), name="umbel-redis-ear")

    async def join(self, channel: bytes, listener: asyncio.Queue[Any]) -> None:
        """Returns when the server has confirmed it, or the connection is lost."""
        self.listeners.setdefault(channel, set()).add(listener)
        if (joined := self._joined.get(channel)) is None:
            joined = self._joined[channel] = asyncio.Event()
            try:
                await self._connection.send_command("SUBSCRIBE", channel)
            except ERRORS as error:
                raise self._session.failed(self._client, error) from error
        await joined.wait()

    def leave(self, channel: bytes, listener: asyncio.Queue[Any]) -> None:
        """The channel itself is left with the connection: there are as many as the process has topics, a handful."""
        listeners = self.listeners.get(channel, set())
        listeners.discard(listener)
        if not listeners:
            self.listeners.pop(channel, None)

    async def _read(self) -> None:
        error: object = BrokerUnavailable(f"this connection to {self._session.address} is closed")
        asked = False
        try:
            while True:
                answer = await self._connection.read_response(timeout=self._patience, disconnect_on_error=False)
                if answer is None and asked:
                    raise exceptions.TimeoutError(f"no word for {2 * self._patience:g} s")
                if answer is None:  # silence
                    await self._connection.send_command("PING")
                elif answer[0] == b"message":
                    self._tell(answer[1], unpack(answer[2]))
                elif answer[0] == b"subscribe":
                    self._joined[answer[1]].set()
                asked = answer is None
        except ERRORS as fault:
            error = self._session.failed(self._client, fault)
        finally:
            self._end(error)

    def _tell(self, channel: bytes, item: Heard) -> None:
        for listener in self.listeners.get(channel, ()):
            if listener.full():
                listener.get_nowait()
            listener.put_nowait(item)

    def _end(self, error: object) -> None:
        for listeners in self.listeners.values():
            for listener in listeners:
                if listener.full():
                    listener.get_nowait()
                listener.put_nowait(error)
        for joined in self._joined.values():
            joined.set()

    async def close(self) -> None:
        self.reading.cancel()
        await asyncio.wait([self.reading])
        await self._connection.disconnect(nowait=True)
