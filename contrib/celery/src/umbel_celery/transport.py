"""The lists that Celery keeps on Redis, as a transport: the same keys, claimed, held and settled in one step each."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final
from uuid import uuid4

from redis.asyncio.connection import AbstractConnection

from umbel.capabilities import UNLIMITED, TransportCapabilities
from umbel.errors import PublishRefused
from umbel.model import (
    HEADER_DEAD_AT,
    HEADER_DEAD_CAUSE,
    HEADER_DEAD_COUNT,
    HEADER_DEAD_QUEUE,
    Action,
    Delivery,
    Message,
    QueueSpec,
    Settlement,
    dead_letter_queue,
    evolve,
)
from umbel.ports.clock import Clock
from umbel.ports.transport import Broadcaster, Credit, QueueDepth, Transport
from umbel_celery import envelope, scripts
from umbel_celery.claims import Claimer
from umbel_celery.envelope import SEPARATOR
from umbel_celery.layout import Layout
from umbel_celery.options import TransportOptions
from umbel_celery.session import Calls, Session

log = logging.getLogger("umbel.celery")

_HEARTBEAT: Final = 5.0
"""Seconds after which a subscriber that hears nothing asks whether the server is there."""


class CeleryRedisTransport(Transport, Broadcaster):
    """Keeps messages where Celery's workers and clients look for them. Delivers at least once.

    Order: by step of the priority, then oldest first; what is given back comes first among its equals. Times are the
    server's. A message is claimed in one step with its entries in ``unacked`` and ``unacked_index``, so that Celery
    workers restore ours and we restore theirs.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = TransportOptions

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        """Raises ``SettingsError`` for a URL that names no Redis server."""
        super().__init__(url, options=options, clock=clock)
        self.capabilities = TransportCapabilities(
            durable=True,
            confirm=True,
            max_delay=UNLIMITED,
            priority_levels=len(self.options.priority_steps),
            renewable_lease=True,
            delivery_count=True,
            start_marks=True,
            broadcast=True,
            max_message_size=self.options.max_message_size,
        )
        self._session = Session(url, self.options)
        self._calls = Calls(self._session)
        self._layout = Layout(self.options, self._session.db)
        self._claimer = Claimer(self._session, self._calls, self._layout, self.options, self.clock, self._bury)
        self._closed = False

    async def _call(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return await self._calls.run(lambda: self._session.run(script, keys, args), self.options.socket_timeout)

    # --- sending ---------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if messages:
            for message in messages:
                self._check_size(len(message.body), f"message {message.id!r}")
            await self._calls.run(lambda: self._publish(messages), timeout)

    async def _publish(self, messages: Sequence[Message]) -> None:
        """One transaction: all or none, and none twice."""
        now = self.clock.time()
        async with self._session.client.pipeline(transaction=True) as pipe:
            ready: dict[str, list[str]] = {}
            for message in messages:
                number = self._layout.on_wire(message.priority)
                raw = envelope.write(message, str(uuid4()), number)
                if message.due is not None and message.due > now and message.queue not in self.options.eta_queues:
                    member = f"{self._layout.step(number)}:{raw}"
                    pipe.zadd(self._layout.delayed(message.queue), {member: message.due})
                else:
                    ready.setdefault(self._layout.list_of(message.queue, number), []).append(raw)
            for key, raws in ready.items():
                pipe.lpush(key, *raws)
            pipe.sadd(self._layout.queues, *{message.queue for message in messages})
            await pipe.execute()

    def _check_size(self, size: int, what: str) -> None:
        if size > self.options.max_message_size:
            raise PublishRefused(
                f"{what} has {size} bytes, the broker's option max_message_size allows {self.options.max_message_size}"
            )

    # --- receiving -------------------------------------------------------------------------------

    def consume(self, queues: Sequence[str], *, credit: Credit, lease: float) -> AsyncIterator[Sequence[Delivery]]:
        return self._claimer.consume(queues, credit=credit, lease=lease)

    async def _bury(self, delivery: Delivery, cause: str) -> None:
        log.error("a message in queue %r cannot be read and goes to the dead letters: %s", delivery.queue, cause)
        await self.settle([Settlement(delivery=delivery, action=Action.DEAD, cause=cause)])

    # --- ending ----------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        if not settlements:
            return []
        args = [part for settlement in settlements for part in self._settlement(settlement)]
        return [bool(done) for done in await self._call(scripts.SETTLE, self._claimer.settle_keys, args)]

    def _settlement(self, settlement: Settlement) -> Iterable[Any]:
        delivery = settlement.delivery
        token, number = delivery.token, self._layout.on_wire(delivery.message.priority)
        match settlement.action:
            case Action.ACK:
                return token.tag, token.claim, "ack", "", "", ""
            case Action.REQUEUE:
                step = self._layout.step(number)
                return token.tag, token.claim, "requeue", settlement.delay, int(settlement.counted), step
            case Action.DEAD:
                queue = dead_letter_queue(delivery.queue)
                letter = {
                    **delivery.message.headers,
                    HEADER_DEAD_CAUSE: settlement.cause,
                    HEADER_DEAD_QUEUE: delivery.queue,
                    HEADER_DEAD_AT: self.clock.time(),
                    HEADER_DEAD_COUNT: delivery.count,
                }
                raw = envelope.write(delivery.message, str(uuid4()), number, queue=queue, headers=letter)
                return token.tag, token.claim, "dead", self._layout.list_of(queue, number), queue, raw

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        if not deliveries:
            return []
        tokens = [part for delivery in deliveries for part in (delivery.token.tag, delivery.token.claim)]
        args = (lease, self.options.visibility_timeout, int(starting), *tokens)
        return [bool(held) for held in await self._call(scripts.RENEW, self._layout.common, args)]

    # --- queues ----------------------------------------------------------------------------------

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        """Bind each queue to the exchange of its name, as Celery does, for clients that publish by exchange."""
        for spec in queues:
            for argument, value in [("type", spec.type), ("exchange", spec.exchange), *spec.arguments.items()]:
                if value is not None:
                    raise PublishRefused(
                        f"queue {spec.name!r}: a list on Redis has no {argument!r}; remove it from the queue's settings"
                    )
        if queues:
            names = [spec.name for spec in queues]
            await self._calls.run(lambda: self._declare(names), self.options.socket_timeout)

    async def _declare(self, names: Sequence[str]) -> None:
        async with self._session.client.pipeline(transaction=True) as pipe:
            pipe.sadd(self._layout.queues, *names)
            for name in names:
                for table in self._layout.bindings(name):
                    pipe.sadd(table, SEPARATOR.join((name, "", name)))
            await pipe.execute()

    async def purge(self, queue: str) -> int:
        keys = [self._layout.delayed(queue), *self._layout.lists([queue])]
        return int(await self._call(scripts.PURGE, keys, ()))

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        """With no names given: of the queues that were declared or published to through this driver.

        What is handed out includes what Celery workers hold.
        """
        depths: Mapping[str, QueueDepth] = await self._calls.run(
            lambda: self._depth(queues), self.options.socket_timeout
        )
        return depths

    async def _depth(self, queues: Sequence[str]) -> Mapping[str, QueueDepth]:
        client = self._session.client
        names = list(queues) or sorted(map(_text, await client.smembers(self._layout.queues)))
        async with client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zcard(self._layout.delayed(name))
                for key in self._layout.lists([name]):
                    pipe.llen(key)
            counts = await pipe.execute()
        leased = await self._session.run(scripts.DEPTH, self._layout.common, names)
        width = 1 + len(self.options.priority_steps)
        return {
            name: QueueDepth(
                ready=sum(counts[at * width + 1 : (at + 1) * width]), delayed=counts[at * width], leased=leased[at]
            )
            for at, name in enumerate(names)
        }

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        """What cannot be read is shown with its raw text as the body."""
        keys = [self._layout.delayed(queue), *self._layout.lists([queue])]
        found = await self._call(scripts.PEEK, keys, (offset, limit))
        ready = int(found[0])
        messages = [self._shown(raw, queue) for raw in found[1 : 1 + ready]]
        for at in range(1 + ready, len(found), 2):
            _, _, raw = found[at].partition(b":")
            messages.append(evolve(self._shown(raw, queue), due=float(found[at + 1])))
        return messages

    def _shown(self, raw: bytes, queue: str) -> Message:
        try:
            message, number = envelope.read(raw, queue)
        except envelope.Unreadable:
            return Message(queue=queue, body=raw, content_type="text/plain")
        return evolve(message, priority=self._layout.on_wire(number))

    # --- broadcasts ------------------------------------------------------------------------------

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        """Publish to the fanout exchange ``topic``.

        Raises ``PublishRefused`` beyond ``max_message_size``, ``BrokerUnavailable``.
        """
        self._check_size(len(payload), f"the broadcast to {topic!r}")
        raw = envelope.write(Message(queue=topic, body=payload), str(uuid4()), 0)
        channel = self._layout.channel(topic, key)
        await self._calls.run(lambda: self._session.client.publish(channel, raw), self.options.socket_timeout)

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        """Hear the fanout exchange ``topic``, Celery's own messages included."""
        base = self._layout.channel(topic)
        timeout = self.options.socket_timeout
        made: list[AbstractConnection] = []  # also what a cancelled call has made
        try:
            await self._calls.run(lambda: self._listen(base, made), timeout)
            (connection,) = made
            while True:
                heard = await self._calls.run(lambda: _hear(connection, timeout), _HEARTBEAT + 2 * timeout)
                if heard[0] != b"pmessage":
                    continue
                channel = heard[2].decode("utf-8", "replace")
                try:
                    message, _ = envelope.read(heard[3], topic)
                except envelope.Unreadable as exc:
                    log.warning("a broadcast on %r cannot be read and is ignored: %s", channel, exc)
                    continue
                yield channel[len(base) + 1 :], message.body
        finally:
            for connection in made:
                await connection.disconnect(nowait=True)

    async def _listen(self, base: str, made: list[AbstractConnection]) -> None:
        connection = await self._session.connect()
        made.append(connection)
        escaped = "".join(f"\\{letter}" if letter in "*?[]\\" else letter for letter in base)
        await connection.send_command("PSUBSCRIBE", escaped, f"{escaped}/*")

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give back, uncounted, what was claimed and not yielded; then free everything.

        What was yielded stays leased: another transport on the same server may renew and settle it.
        """
        if self._closed:
            return
        self._closed = self._calls.closed = True
        await self._claimer.close()
        await self._calls.close()
        await self._session.close()


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


async def _hear(connection: AbstractConnection, patience: float) -> Sequence[Any]:
    """The next thing said. A silent server is asked whether it is there."""
    for seconds in (_HEARTBEAT, patience):
        said: Sequence[Any] | None = await connection.read_response(timeout=seconds)
        if said is not None:
            return said
        await connection.send_command("PING")
    raise TimeoutError
