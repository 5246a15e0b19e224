"""One session each way, because the broker stops reading from a connection that publishes when it is short of memory or disk:
what is consumed on another connection can still be acknowledged then."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

from attrs import evolve, field, frozen
from pamqp.commands import Confirm

from umbel.errors import BrokerUnavailable, NotSupported, PublishRefused
from umbel.model import Message
from umbel_amqp import delays, frames
from umbel_amqp.channel import Channel, Control
from umbel_amqp.connection import Connection
from umbel_amqp.messages import NO_MARKS, Marks, write_message
from umbel_amqp.publishing import NOT_TAKEN, Parcel, Publisher
from umbel_amqp.topology import Topology

log = logging.getLogger("umbel.amqp")


class Session(Protocol):
    """What lives and dies with one connection."""

    connection: Connection

    @property
    def alive(self) -> bool: ...


S = TypeVar("S", bound=Session)

_CLOSED = "this connection to RabbitMQ is closed"
_PATIENCE: Final = 2.0
"""Seconds for which a queue may refuse what has no deadline of its own."""
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""First and longest pause in seconds before a queue that has refused is asked again."""


class Slot(Generic[S]):
    """The place of a session: made when first asked for, thrown away whole on any fault, then made anew."""

    def __init__(self, make: Callable[[], Awaitable[S]], lost: Callable[[], None]) -> None:
        self._make = make
        self._lost = lost
        self._making: asyncio.Task[S] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False
        self.session: S | None = None

    @property
    def live(self) -> S | None:
        return self.session if self.session is not None and self.session.alive else None

    async def get(self) -> S:
        """The live session. Cancelling the call does not stop the making, for which others may wait."""
        while (session := self.live) is None:
            if self._closed:
                raise BrokerUnavailable(_CLOSED)
            if self.session is not None:
                self._end(self.session)
                self.session = None
                self._lost()
            if self._making is None:
                self._making = asyncio.create_task(self._fill(), name="umbel-amqp-connect")
                self._making.add_done_callback(_look_at)
            making = self._making
            await asyncio.wait([making])  # neither is cancelled with the other
            if making.cancelled():
                raise BrokerUnavailable(_CLOSED)
            making.result()
        return session

    async def _fill(self) -> S:
        try:
            self.session = await self._make()
            return self.session
        finally:
            self._making = None

    def _end(self, session: S) -> None:
        ending = asyncio.create_task(session.connection.close(), name="umbel-amqp-close")
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        self._closed = True
        if self._making is not None:
            self._making.cancel()
            await asyncio.wait([self._making])
        if self.session is not None:
            self._end(self.session)
        if self._ending:
            await asyncio.wait(self._ending)


@frozen(kw_only=True)
class Item:
    """A message to be sent."""

    message: Message
    marks: Marks = field(default=NO_MARKS)
    to_queue: bool = False
    """To its queue, whatever exchange its properties name."""

    @property
    def exchange(self) -> str:
        return "" if self.to_queue else self.message.properties.get("exchange") or ""


def uncounted(message: Message, count: int, starts: int) -> Item:
    """A copy to be handed out as if the last handing-out had never been."""
    return Item(message=message, marks=Marks(deliveries=count - 1, starts=starts), to_queue=True)


class Outbound:
    """Publishes."""

    def __init__(self, connection: Connection, publisher: Channel, topology: Topology) -> None:
        self.connection = connection
        self.control = Control(connection)
        self._take(publisher)
        self._topology = topology
        self._casting: Channel | None = None
        self._topics: set[str] = set()

    @classmethod
    async def open(cls, connection: Connection, topology: Topology) -> Outbound:
        try:
            channel = await _confirming(connection)
        except BaseException:
            connection.fail(BrokerUnavailable(f"{connection.where} was given up"))
            raise
        return cls(connection, channel, topology)

    def _take(self, channel: Channel) -> None:
        self._channel = channel
        self._publisher = Publisher(channel)

    @property
    def alive(self) -> bool:
        return self.connection.fault is None and self._channel.dead is None

    async def publish(self, items: Sequence[Item], now: float, patience: float = _PATIENCE) -> None:
        """Return when the broker has taken every one; the caller sets the bound. Raises as ``Transport.publish`` does.

        What a queue does not take now is offered again for ``patience`` seconds, on a new channel each time: one that has met
        a quorum queue whose leader is down asks there for ever, although another node leads it by then.
        """
        begun, pause = time.monotonic(), _PAUSE
        await self.connection.unblocked()
        while True:
            publisher = self._publisher
            if not (items := await self._offer(items, now + time.monotonic() - begun)):
                break
            if time.monotonic() + pause > begun + patience:
                raise BrokerUnavailable(_refusal(items[0], NOT_TAKEN))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            await self._replace(publisher)
        await self.connection.drained()

    async def _replace(self, publisher: Publisher) -> None:
        """Publish on another channel from now on; of several callers, one sees to it."""
        if self._publisher is publisher:
            channel = await _confirming(self.connection)
            if self._publisher is publisher:
                self._take(channel)
                publisher.retire()
            else:
                channel.close()

    async def _offer(self, items: Sequence[Item], now: float) -> Sequence[Item]:
        """Send; those that their queues do not take now. Raises ``PublishRefused`` for what nobody will take."""
        refused = await self._send(items, now)
        unrouted = [items[place] for place, text in refused.items() if not text and not items[place].exchange]
        later = [items[place] for place, text in refused.items() if text == NOT_TAKEN]
        for place, text in refused.items():
            if text not in ("", NOT_TAKEN) or (not text and items[place].exchange):
                raise PublishRefused(_refusal(items[place], text))
        if unrouted:  # someone has deleted their queues
            for item in unrouted:
                self._topology.forget_queue(item.message.queue)
            for place, text in (await self._send(unrouted, now)).items():
                if text != NOT_TAKEN:
                    raise PublishRefused(_refusal(unrouted[place], text))
                later.append(unrouted[place])
        return later

    async def _send(self, items: Sequence[Item], now: float) -> dict[int, str]:
        topology, control = self._topology, self.control
        await topology.ensure(control, {item.message.queue: None for item in items if not item.exchange})
        for exchange in {item.exchange for item in items if item.exchange}:
            await topology.ensure_exchange(control, exchange)
        parcels: list[Parcel] = []
        for item in items:
            message, due = item.message, item.message.due
            exchange = item.exchange
            if due is None or due <= now:
                key = (message.properties.get("routing_key") or "") if exchange else message.queue
                parcels.append(Parcel(exchange, key, write_message(message, exchange, item.marks), message.body))
                continue
            if due - now > delays.LONGEST:
                raise NotSupported(f"message {message.id!r}: RabbitMQ keeps messages for ten years at most")
            target = delays.Target(exchange or message.queue, exchange=bool(exchange))
            path = delays.plan(math.ceil((due - now) * 1000))
            await topology.ensure_path(control, target, path)
            keys = target.keys(path)
            more = keys[1:]
            if exchange:
                more = [*more, message.properties.get("routing_key") or ""]
            properties = write_message(message, delays.ENTRY, evolve(item.marks, due=due), more)
            parcels.append(Parcel(delays.ENTRY, keys[0], properties, message.body))
        return await self._publisher.publish(parcels)

    async def park(self, items: Sequence[tuple[Item, str]], queue: str, back: str) -> None:
        """Publish to ``queue``, from where each goes through the exchange ``back``, by its own key, when its holder dies."""
        await self.connection.unblocked()
        parcels = [
            Parcel("", queue, write_message(item.message, back, item.marks, [key]), item.message.body)
            for item, key in items
        ]
        if await self._publisher.publish(parcels):
            raise BrokerUnavailable(f"{self.connection.where} takes nothing into {queue!r}")

    async def broadcast(self, topic: str, key: str, payload: bytes) -> None:
        if self.connection.blocked:
            raise BrokerUnavailable(_alarm(self.connection))
        if topic not in self._topics:
            await self.control.ask(topic_exchange(topic))
            self._topics.add(topic)
        if self._casting is None or self._casting.dead is not None:
            self._casting = await self.connection.channel()
        channel = self._casting
        properties = b"\x80\x00\x18application/octet-stream"
        parts = frames.content_frames(channel.number, properties, payload, self.connection.frame_max)
        channel.send(b"".join((frames.publish_frame(channel.number, broadcast_exchange(topic), key, False), *parts)))
        await self.connection.drained()


async def _confirming(connection: Connection) -> Channel:
    channel = await connection.channel()
    await channel.call(Confirm.Select())
    return channel


def broadcast_exchange(topic: str) -> str:
    return f"umbel.topic.{topic}"


def topic_exchange(topic: str) -> frames.ExchangeDeclare:  # type: ignore[valid-type]  # a class made by a function
    """Not durable: it is declared again by whoever speaks or listens."""
    return frames.ExchangeDeclare(exchange=broadcast_exchange(topic), exchange_type="topic")


def overdue(session: Outbound | None, timeout: float, address: object) -> str:
    """What a deadline that has passed was waiting for."""
    if session is None:
        return f"no connection to RabbitMQ at {address} within {timeout:g} s"
    if session.connection.blocked:
        return _alarm(session.connection)
    return f"{session.connection.where} has not confirmed within {timeout:g} s"


def _alarm(connection: Connection) -> str:
    return (
        f"{connection.where} takes no messages now: {connection.blocked} (an alarm of its memory or disk: see "
        "`rabbitmqctl status`)"
    )


def _refusal(item: Item, text: str) -> str:
    message = item.message
    if exchange := item.exchange:
        key = message.properties.get("routing_key") or ""
        reason = text or f"no queue is bound to it under the routing key {key!r}"
        return f"message {message.id!r} for exchange {exchange!r}, routing key {key!r}: {reason}"
    return f"message {message.id!r} for queue {message.queue!r}: {text or 'the queue is not there, and cannot be made'}"


def _look_at(task: asyncio.Task[S]) -> None:
    if not task.cancelled():
        task.exception()
