"""All who wait for results in this process, on one subscription."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

from redis.asyncio.connection import AbstractConnection

from umbel.errors import DecodeError, ResultStoreUnavailable
from umbel.model import Result
from umbel_redis.connection import ERRORS
from umbel_redis.documents import whole
from umbel_redis.session import Session

log = logging.getLogger("umbel.redis")

_IDLE: Final = 30.0
"""Seconds without anybody waiting after which the connection is closed."""
_AT_ONCE: Final = 1000
"""Channels in one command."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0

Fetch = Callable[[Iterable[str]], Awaitable[Mapping[str, Result | DecodeError]]]


class Waiters:
    """Subscribes to the records that are waited for, then looks each up once: nothing falls between.

    Everybody is looked up again every ``poll`` seconds, for what was stored and not published (some workers do not), and a
    ping on the subscription shows whether it lives. After a fault all begins anew on another connection.
    """

    def __init__(self, session: Session, prefix: str, fetch: Fetch, *, poll: float, patience: float) -> None:
        """``prefix``: before a task's id it makes the channel's name. ``patience``: seconds to wait for the server's answer."""
        self._session = session
        self._prefix = prefix.encode()
        self._fetch = fetch
        self._poll = poll
        self._patience = patience
        self._waiting: dict[str, set[asyncio.Future[Result]]] = {}
        self._unseen: set[str] = set()
        """Waited for, and to be subscribed to if they are not yet, and looked up."""
        self._subscribed: set[str] = set()
        self._left: set[str] = set()
        """Subscribed to, and waited for by nobody any more."""
        self._bell: asyncio.Future[None] | None = None
        """What the keeper sleeps on."""
        self._awaited: tuple[bytes, asyncio.Future[None]] | None = None
        """The answer of the server for which the keeper waits."""
        self._pings = itertools.count()
        self._keeper: asyncio.Task[None] | None = None

    async def wait(self, task_id: str) -> Result:
        waiter: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(task_id, set())
        waiters.add(waiter)
        self._left.discard(task_id)
        self._unseen.add(task_id)
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name="umbel-redis-waiters")
            self._keeper.add_done_callback(self._unkept)
        self._ring()
        try:
            return await waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiting.get(task_id) is waiters:
                self._drop(task_id)

    async def close(self) -> None:
        """Cancel all who wait."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    # --- who waits -------------------------------------------------------------------------------

    def _drop(self, task_id: str) -> set[asyncio.Future[Result]]:
        self._unseen.discard(task_id)
        if task_id in self._subscribed:
            self._left.add(task_id)
        return self._waiting.pop(task_id, set())

    def _conclude(self, task_id: str, end: Result | Exception) -> None:
        for waiter in self._drop(task_id):
            if waiter.done():
                continue
            if isinstance(end, Result):
                waiter.set_result(end)
            else:
                waiter.set_exception(end)

    def _unkept(self, keeper: asyncio.Task[None]) -> None:
        error = None if keeper.cancelled() else keeper.exception()
        if not keeper.cancelled() and error is None:
            return  # nobody waited when it returned
        for waiter in [waiter for waiters in self._waiting.values() for waiter in waiters if not waiter.done()]:
            if error is None:
                waiter.cancel()
            else:
                waiter.set_exception(error)

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    # --- the keeper ------------------------------------------------------------------------------

    async def _keep(self) -> None:
        pause = _FIRST_PAUSE
        while self._waiting:
            client, begun = self._session.client, time.monotonic()
            try:
                async with asyncio.timeout(self._patience):
                    connection = await client.dedicated()
                await self._follow(connection)
            except (*ERRORS, ResultStoreUnavailable) as error:
                own = isinstance(error, ResultStoreUnavailable)
                shown = error if own else self._session.failed(client, error)
                if self._session.permanent(error):
                    for task_id in list(self._waiting):
                        self._conclude(task_id, ResultStoreUnavailable(str(shown)))
                    return
                if time.monotonic() - begun > _LONGEST_PAUSE:  # it had worked
                    pause = _FIRST_PAUSE
                log.warning("waiting for results continues: %s", shown)
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
                pause = min(pause * 2, _LONGEST_PAUSE)

    async def _follow(self, connection: AbstractConnection) -> None:
        """Serve all who wait over one connection, until it fails or nobody has waited for a while."""
        reader = asyncio.create_task(self._read(connection), name="umbel-redis-reader")
        self._unseen |= self._waiting.keys()
        self._subscribed.clear()
        self._left.clear()
        loop = asyncio.get_running_loop()
        next_poll = loop.time() + self._next_poll()
        try:
            while True:
                async with asyncio.timeout(self._patience):
                    await self._subscribe(connection, reader)
                asked, self._unseen = self._unseen & self._subscribed, self._unseen - self._subscribed
                if asked:
                    await self._look(asked)
                if self._unseen:
                    continue
                if loop.time() >= next_poll:
                    next_poll = loop.time() + self._next_poll()
                    async with asyncio.timeout(self._patience):
                        await self._ping(connection, reader)
                    self._unseen |= self._waiting.keys()
                    continue
                self._bell = loop.create_future()
                rest = max(0.0, next_poll - loop.time()) if self._waiting else _IDLE
                if not await self._first(reader, self._bell, rest) and not self._waiting:
                    return
        finally:
            self._bell = self._awaited = None
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            with contextlib.suppress(*ERRORS):  # it is thrown away, whole or broken
                await connection.disconnect(nowait=True)

    async def _subscribe(self, connection: AbstractConnection, reader: asyncio.Task[None]) -> None:
        """Bring the subscriptions to what is waited for; return when the server has them."""
        new = list(self._unseen - self._subscribed)
        if self._left and (new or len(self._left) >= _AT_ONCE):
            left, self._left = list(self._left), set()
            self._subscribed.difference_update(left)
            await self._say(connection, "UNSUBSCRIBE", left)
        if new:
            self._subscribed.update(new)
            answer = self._await(self._channel(new[-1]))
            await self._say(connection, "SUBSCRIBE", new)
            await self._first(reader, answer)

    async def _ping(self, connection: AbstractConnection, reader: asyncio.Task[None]) -> None:
        if self._subscribed:  # without subscriptions the answer would have another form
            mark = b"%d" % next(self._pings)
            answer = self._await(mark)
            await connection.send_command("PING", mark)
            await self._first(reader, answer)

    async def _say(self, connection: AbstractConnection, verb: str, task_ids: Sequence[str]) -> None:
        for at in range(0, len(task_ids), _AT_ONCE):
            channels = [self._channel(task_id) for task_id in task_ids[at : at + _AT_ONCE]]
            await connection.send_command(verb, *channels)

    async def _look(self, task_ids: Iterable[str]) -> None:
        for task_id, found in (await self._fetch(task_ids)).items():
            if isinstance(found, DecodeError) or found.final:
                self._conclude(task_id, found)

    async def _read(self, connection: AbstractConnection) -> None:
        """Hear what the server says; returns never."""
        while True:
            kind, name, *more = await connection.read_response(timeout=math.inf)
            if kind == b"message":
                self._hear(name, more[0])
            elif self._awaited is not None and kind in (b"subscribe", b"pong") and name == self._awaited[0]:
                self._awaited[1].set_result(None)
                self._awaited = None

    def _hear(self, channel: bytes, document: bytes) -> None:
        task_id = channel[len(self._prefix) :].decode()
        if task_id not in self._waiting:
            return
        result = whole(task_id, document)
        if result is None:  # another program's, or one that needs what stands beside it
            self._unseen.add(task_id)
            self._ring()
        elif result.final:
            self._conclude(task_id, result)

    def _await(self, name: bytes) -> asyncio.Future[None]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited = (name, answer)
        return answer

    async def _first(
        self, reader: asyncio.Task[None], event: asyncio.Future[None], timeout: float | None = None
    ) -> bool:
        """Wait for ``event``: False if it did not come in time. Raises what ``reader`` ended with."""
        await asyncio.wait([reader, event], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            reader.result()
        return event.done()

    def _channel(self, task_id: str) -> bytes:
        return self._prefix + task_id.encode()

    def _next_poll(self) -> float:
        return self._poll * random.uniform(0.75, 1.25)  # not in step with others
