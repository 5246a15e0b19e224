"""The session that consumes: what it holds, how that outlives the broker's consumer timeout, and how it is given back."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from pamqp.commands import Basic

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Delivery, make_delivery
from umbel.ports.transport import Credit
from umbel_amqp.channel import ChannelClosed, Control, Raw
from umbel_amqp.connection import Connection
from umbel_amqp.consuming import Stream, Subscription, Taken
from umbel_amqp.frames import Consume, ExchangeDeclare, QueueBind, QueueDeclare
from umbel_amqp.holding import Hold, Tags
from umbel_amqp.messages import Marks, read_message
from umbel_amqp.sessions import Item, Outbound, uncounted
from umbel_amqp.topology import Topology

log = logging.getLogger("umbel.amqp")

_BACK: Final = "umbel.return"
"""The exchange by which parked messages go back to their queues."""
_PARKED_FOR: Final = 2000
"""Milliseconds after which a parked message that nobody holds any more goes back to its queue."""
_KEPT_FOR: Final = 3_600_000
"""Milliseconds after which a parking queue that nobody uses any more is deleted. It is long empty then."""
_RETIRED_FOR: Final = 10.0
"""Seconds after which what came by a subscription that is over is parked, so that its channel can close."""
_LAST_WORDS: Final = 2.0
"""Seconds for which a consumer that stops waits until what it gives back, uncounted, has been taken."""

Publish = Callable[[Sequence[Item]], Awaitable[None]]


class Inbound:
    """Consumes, and holds what it has handed out."""

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        outbound: Callable[[], Awaitable[Outbound]],
        publish: Publish,
        consumer_timeout: float | None,
    ) -> None:
        self.connection = connection
        self.control = Control(connection)
        self.streams: set[Stream] = set()
        self._topology = topology
        self._outbound = outbound
        self._publish = publish
        self._holds: dict[int, Hold] = {}
        self._numbers = 0
        self._parking: Parking | None = None
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        if consumer_timeout is not None:
            self._tasks.add(asyncio.create_task(self._keep(consumer_timeout), name="umbel-amqp-keeper"))
        connection.lost.add_done_callback(self._end)

    @property
    def alive(self) -> bool:
        return self.connection.fault is None

    # --- handing out ---------------------------------------------------------------------------------

    async def stream(self, queues: Sequence[str], credit: Credit) -> Stream:
        await self._topology.ensure(self.control, queues)
        stream = Stream(self.connection, queues, credit, self._give_back, self._retire)
        self.streams.add(stream)
        return stream

    def hand_out(self, taken: Sequence[Taken]) -> list[Delivery]:
        now, number, holds = time.monotonic(), self._numbers, self._holds
        inherits = self.connection.inherits_counts
        batch: list[Delivery] = []
        for subscription, queue, raw in taken:
            message, past = read_message(raw, queue, inherits)
            number += 1
            hold = holds[number] = Hold(message, past, subscription.tags, raw[0], now, number)
            batch.append(make_delivery(message, queue, hold, past.count, past.starts))
        self._numbers = number
        return batch

    async def _give_back(self, taken: Sequence[Taken]) -> None:
        """What was not handed out, uncounted: copies are published, then the originals acknowledged.

        Where the copies are refused, the originals go back to their places, and the broker counts it. While it is not known
        whether they were taken, nothing is said of the originals: both would run.
        """
        by_subscription: dict[Subscription, list[int]] = {}
        items = []
        for subscription, queue, raw in taken:
            by_subscription.setdefault(subscription, []).append(raw[0])
            message, past = read_message(raw, queue, self.connection.inherits_counts)
            items.append(uncounted(message, past.count, past.starts))
        moving = asyncio.create_task(self._move(items, by_subscription), name="umbel-amqp-give-back")
        self._tasks.add(moving)
        moving.add_done_callback(self._tasks.discard)
        await asyncio.wait([moving], timeout=_LAST_WORDS)
        if moving.done() and not moving.cancelled():
            moving.result()

    async def _move(self, items: Sequence[Item], by_subscription: Mapping[Subscription, Sequence[int]]) -> None:
        try:
            await self._publish(items)
            done = Tags.ack
        except (BrokerUnavailable, PublishRefused) as error:
            log.warning("%d messages go back as if they had been handed out: %s", len(items), error)
            done = Tags.requeue
        for subscription, tags in by_subscription.items():
            if subscription.channel.dead is None:
                done(subscription.tags, tags)
                subscription.tags.release()

    def _retire(self, subscription: Subscription) -> None:
        """It hands out nothing more. Its channel is closed when all is settled that came by it, or parked, before long."""
        subscription.release()
        if subscription.channel.dead is None:
            retiring = asyncio.create_task(self._empty(subscription.tags), name="umbel-amqp-retire")
            self._tasks.add(retiring)
            retiring.add_done_callback(self._tasks.discard)

    async def _empty(self, tags: Tags) -> None:
        while tags and tags.channel.dead is None:
            await asyncio.sleep(_RETIRED_FOR)
            await self._try_to_park([hold for hold in self._holds.values() if hold.tags is tags], _RETIRED_FOR)

    def held(self, queue: str) -> int:
        """Deliveries of ``queue`` that are handed out."""
        return sum(hold.message.queue == queue for hold in self._holds.values())

    # --- settling ------------------------------------------------------------------------------------

    def ended(self, holds: Sequence[Hold]) -> None:
        """These are settled: acknowledge what stands for them now."""
        by_channel: dict[Tags, list[int]] = {}
        for hold in holds:
            self._holds.pop(hold.number, None)
            by_channel.setdefault(hold.tags, []).append(hold.tag)
        for tags, numbers in by_channel.items():
            if tags.channel.dead is None:
                tags.ack(numbers)

    async def put_back(self, holds: Sequence[Hold]) -> None:
        """Back to their places, counted by the broker, which has them when this returns."""
        for hold in holds:
            self._holds.pop(hold.number, None)
            hold.tags.requeue([hold.tag])
        for tags in {hold.tags for hold in holds}:
            await tags.channel.call(Basic.Qos(0, 0, False))
            tags.release()

    async def sure(self) -> None:
        """Raises ``BrokerUnavailable`` if the broker has given us up, say while this process was stopped."""
        if self.connection.silent:
            await self.control.ask(Basic.Qos(0, 0, False))

    # --- long runs -----------------------------------------------------------------------------------

    async def _keep(self, consumer_timeout: float) -> None:
        """No tag stays out for longer than half the broker's patience."""
        while True:
            await asyncio.sleep(consumer_timeout / 16)
            oldest = time.monotonic() - consumer_timeout / 2
            await self._try_to_park([h for h in self._holds.values() if h.since < oldest], consumer_timeout / 8)

    async def _try_to_park(self, holds: Sequence[Hold], patience: float) -> None:
        if live := [hold for hold in holds if hold.live]:
            try:
                async with asyncio.timeout(patience):
                    await self.park(live)
            except (TimeoutError, BrokerUnavailable, PublishRefused, ChannelClosed) as error:
                log.warning("%d deliveries that last could not be parked, trying again: %s", len(live), error)

    async def park(self, holds: Sequence[Hold], *, starting: bool = False) -> None:
        """Let a copy, that only this broker session can have, stand for each delivery; with its counts, and its start.

        If the broker session dies, the copies go back to their queues by themselves. Raises ``BrokerUnavailable``.
        """
        async with self._opening:
            if self._parking is None:
                self._parking = await Parking.open(self)
        await self._parking.take(holds, starting=starting)

    def _end(self, _: object) -> None:
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Stop the streams, each giving back what it has not yielded."""
        for stream in list(self.streams):
            stream.stop(BrokerUnavailable(f"this connection to {self.connection.where} is closed"))
            await stream.close()


class Parking:
    """A queue of the broker session's own, all of which it holds. Its messages go back when they are held no more."""

    def __init__(self, session: Inbound, queue: str, tags: Tags) -> None:
        self._session = session
        self._queue = queue
        self._tags = tags
        self._bound: set[str] = set()
        self._awaited: dict[int, asyncio.Future[None]] = {}

    @classmethod
    async def open(cls, session: Inbound) -> Parking:
        channel = await session.connection.channel()
        parking = cls(session, f"umbel.parking.{secrets.token_hex(8)}", Tags(channel))
        arguments: dict[str, Any] = {
            "x-queue-type": "quorum",
            "x-message-ttl": _PARKED_FOR,
            "x-expires": _KEPT_FOR,
            "x-dead-letter-exchange": _BACK,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        await session.control.ask(
            ExchangeDeclare(exchange=_BACK, exchange_type="direct", durable=True),
            QueueDeclare(queue=parking._queue, durable=True, arguments=arguments),
        )
        channel.consumers["parking"] = parking._received
        channel.on_death.append(parking._died)
        await channel.call(Consume(queue=parking._queue, consumer_tag="parking", arguments={}))
        return parking

    async def take(self, holds: Sequence[Hold], *, starting: bool) -> None:
        outbound = await self._session._outbound()
        await self._bind({hold.message.queue for hold in holds})
        parked: list[tuple[Item, str]] = []
        arrivals: list[asyncio.Future[None]] = []
        for hold in holds:
            hold.marked |= starting
            marks = Marks(deliveries=hold.past.count, starts=hold.all_starts, parked=hold.number)
            parked.append((Item(message=hold.message, marks=marks), _key(hold.message.queue)))
            arrival = self._awaited.get(hold.number)
            if arrival is None:
                arrival = self._awaited[hold.number] = asyncio.get_running_loop().create_future()
            arrivals.append(arrival)
        await outbound.park(parked, self._queue, _BACK)
        await asyncio.gather(*map(asyncio.shield, arrivals))

    async def _bind(self, queues: set[str]) -> None:
        if new := queues - self._bound:
            bindings = [QueueBind(queue=q, exchange=_BACK, routing_key=_key(q), arguments={}) for q in new]
            await self._session.control.ask(*bindings)
            self._bound |= new

    def _received(self, raws: Sequence[Raw]) -> None:
        self._tags.add([raw[0] for raw in raws], "parking")
        for raw in raws:
            self._take_over(raw)

    def _take_over(self, raw: Raw) -> None:
        """A copy is ours: from now on its tag stands for the delivery, and the one before is acknowledged."""
        tag = raw[0]
        _, past = read_message(raw, self._queue)
        number = past.parked or 0
        if (arrival := self._awaited.pop(number, None)) is not None and not arrival.done():
            arrival.set_result(None)
        hold = self._session._holds.get(number)
        if hold is None or not hold.live:
            self._tags.ack([tag])
            return
        before, old_tag = hold.tags, hold.tag
        hold.tags, hold.tag, hold.since = self._tags, tag, time.monotonic()
        hold.parked = True
        before.ack([old_tag])

    def _died(self, reason: Exception) -> None:
        """What was held by it belongs to others now; nothing may be published to a queue that nobody reads."""
        connection = self._session.connection
        lost = BrokerUnavailable(f"{connection.where}: {reason}")
        for arrival in self._awaited.values():
            if not arrival.done():
                arrival.set_exception(lost)
                arrival.exception()
        connection.fail(lost)


def _key(queue: str) -> str:
    """By which a message goes back to ``queue``. No queue of a user's is named like it."""
    return f"umbel:return:{queue}"
