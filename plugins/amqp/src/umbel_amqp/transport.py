"""RabbitMQ as a broker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

from umbel.capabilities import TransportCapabilities
from umbel.errors import BrokerUnavailable, PublishRefused
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
    without_route,
)
from umbel.ports.clock import Clock
from umbel.ports.transport import Broadcaster, Credit, QueueDepth, Transport
from umbel_amqp import delays
from umbel_amqp.channel import ChannelClosed, Control, Raw
from umbel_amqp.connection import connect
from umbel_amqp.frames import Consume, QueueBind, QueueDeclare
from umbel_amqp.holding import Hold
from umbel_amqp.inbound import Inbound
from umbel_amqp.looking import peek
from umbel_amqp.messages import Marks
from umbel_amqp.options import TransportOptions, address_of
from umbel_amqp.sessions import (
    Item,
    Outbound,
    Slot,
    broadcast_exchange,
    overdue,
    topic_exchange,
    uncounted,
)
from umbel_amqp.topology import Topology

_MOST_UNHEARD: Final = 10_000
"""Broadcasts that a subscriber may lag behind before it misses the oldest."""

T = TypeVar("T")


class AmqpTransport(Transport, Broadcaster):
    """Quorum queues by default, classic ones on request; delayed messages wait in the broker.

    Delivers at least once. Consumes and publishes on connections of their own; each is thrown away whole on any fault, and
    made anew by the next call. ``clock`` is only asked how far due times lie ahead.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = TransportOptions

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self._address = address_of(url, self.options)
        priorities = self.options.max_priority if self.options.queue_type == "classic" else None
        self.capabilities = TransportCapabilities(
            durable=True,
            confirm=True,
            max_delay=delays.LONGEST,
            priority_levels=min((priorities or 0) + 1, 10),
            delivery_count=True,
            start_marks=True,
            exchanges=True,
            broadcast=True,
            max_message_size=self.options.max_message_size,
        )
        self._topology = Topology(self.options)
        self._out: Slot[Outbound] = Slot(self._open_outbound, self._topology.forget)
        self._in: Slot[Inbound] = Slot(self._open_inbound, self._topology.forget)
        self._closed = False
        self._ending: set[asyncio.Task[Any]] = set()

    async def _open_outbound(self) -> Outbound:
        return await Outbound.open(await connect(self._address, self.options), self._topology)

    async def _open_inbound(self) -> Inbound:
        connection = await connect(self._address, self.options)
        return Inbound(connection, self._topology, self._out.get, self._forward, self.options.consumer_timeout)

    # --- sending -------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        self._check_open()
        for message in messages:
            self._check_size(len(message.body), f"message {message.id!r}")
        if not messages:
            return
        if timeout <= 0:
            raise BrokerUnavailable(f"no time to publish ({timeout:g} s)")
        try:
            async with asyncio.timeout(timeout):
                await (await self._out.get()).publish(
                    [Item(message=message) for message in messages], self.clock.time(), timeout
                )
        except TimeoutError:
            raise BrokerUnavailable(overdue(self._out.live, timeout, self._address)) from None

    async def _forward(self, items: Sequence[Item]) -> None:
        outbound = await self._out.get()
        await outbound.publish(items, self.clock.time())

    def _check_size(self, size: int, what: str) -> None:
        limit = self.options.max_message_size
        if size > limit:
            raise PublishRefused(f"{what} has {size} bytes, the broker's option max_message_size allows {limit}")

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable(f"this transport to RabbitMQ at {self._address} is closed")

    # --- receiving -----------------------------------------------------------------------------------

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        """A delivery is held for as long as its connection lives, however long that is; ``lease`` says nothing here."""
        self._check_open()
        session = await self._in.get()
        stream = await self._answered(session.stream(queues, credit))
        try:
            while True:
                taken = await stream.next()
                yield session.hand_out(taken)
        finally:
            await self._to_its_end(self._end(session, stream))

    async def _end(self, session: Inbound, stream: Any) -> None:
        try:
            await stream.close()
        finally:
            session.streams.discard(stream)

    async def _to_its_end(self, work: Awaitable[T]) -> T:
        """Do ``work`` even if the caller does not wait for it."""
        task = asyncio.ensure_future(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return await asyncio.shield(task)

    # --- ending --------------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """Acknowledgements are written at once. What goes elsewhere is published first, then acknowledged: a crash between
        the two doubles it, and never loses it."""
        self._check_open()
        session = self._in.live
        if session is None:
            return [False] * len(settlements)
        if session.connection.silent:
            try:
                await self._bounded(session.sure())
            except BrokerUnavailable:
                return [False] * len(settlements)
        done: list[bool] = []
        acked: list[Hold] = []
        put_back: list[Hold] = []
        moved: list[Hold] = []
        items: list[Item] = []
        for settlement in settlements:
            hold: Hold = settlement.delivery.token
            if hold.ended or hold.tags.channel.dead is not None:
                done.append(False)
                continue
            hold.ended = True
            done.append(True)
            if settlement.action is Action.ACK:
                acked.append(hold)
            elif _in_place(settlement, hold):
                put_back.append(hold)
            else:
                moved.append(hold)
                items.append(self._copy(settlement, hold))
        if items:
            await self._to_its_end(self._move(session, items, moved, acked))
        else:
            session.ended(acked)
        if put_back:
            await self._bounded(session.put_back(put_back))
        return done

    async def _move(self, session: Inbound, items: list[Item], moved: list[Hold], acked: list[Hold]) -> None:
        try:
            await self._bounded(self._forward(items))
        except BaseException:
            for hold in (*moved, *acked):
                hold.ended = False
            raise
        session.ended([*moved, *acked])

    def _copy(self, settlement: Settlement, hold: Hold) -> Item:
        message = hold.message
        if settlement.action is Action.DEAD:
            told = {
                HEADER_DEAD_CAUSE: settlement.cause,
                HEADER_DEAD_QUEUE: message.queue,
                HEADER_DEAD_AT: self.clock.time(),
                HEADER_DEAD_COUNT: hold.past.count,
            }
            return Item(
                message=evolve(
                    message,
                    queue=dead_letter_queue(message.queue),
                    headers={**message.headers, **told},
                    properties=without_route(message.properties),
                ),
                to_queue=True,
            )
        due = self.clock.time() + settlement.delay if settlement.delay > 0 else None
        message = evolve(message, due=due)
        if not settlement.counted:
            return uncounted(message, hold.past.count, hold.past.starts)
        return Item(message=message, marks=Marks(deliveries=hold.past.count, starts=hold.all_starts), to_queue=True)

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        """There is nothing to renew while the session lives; a start is recorded in a copy that stands for the message."""
        self._check_open()
        session = self._in.live
        if session is None:
            return [False] * len(deliveries)
        await self._bounded(session.sure())
        holds: list[Hold] = [delivery.token for delivery in deliveries]
        if starting and (live := [hold for hold in holds if hold.live]):
            await self._bounded(session.park(live, starting=True))
        return [hold.live for hold in holds]

    # --- queues --------------------------------------------------------------------------------------

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        control = await self._control()
        for spec in queues:
            await self._answered(self._topology.declare(control, spec))

    async def purge(self, queue: str) -> int:
        return await self._answered(self._topology.purge(await self._control(), queue))

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        """Without names: of the queues that this transport has declared, consumed or sent to. ``leased`` counts what this
        transport holds; AMQP does not tell what others do."""
        control = await self._control()
        found: dict[str, QueueDepth] = {}
        for name in queues or list(self._topology.names):
            ready, delayed = await self._answered(self._topology.counts(control, name))
            held = self._in.live.held(name) if self._in.live is not None else 0
            found[name] = QueueDepth(ready=ready, delayed=delayed, leased=held)
        return found

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        """RabbitMQ has no look into a queue: the messages are taken, and put back. For that moment consumers miss them.

        In a queue of up to 200 messages and 4 MiB, copies take the places of all, so that no count tells of it; in a longer
        one, those seen go back to their places and count one more delivery.
        """
        found = await self._answered(peek(await self._control(), self._topology, self._forward, queue, offset + limit))
        return found[offset:]

    async def _control(self) -> Control:
        """A place to ask: not on a connection from which the broker does not read now."""
        self._check_open()
        if (inbound := self._in.live) is not None:
            return inbound.control
        if (outbound := self._out.live) is not None and not outbound.connection.blocked:
            return outbound.control
        return (await self._in.get()).control

    async def _answered(self, work: Awaitable[T]) -> T:
        """``_bounded``, with what the broker refuses told as an error of ours."""
        try:
            return await self._bounded(work)
        except ChannelClosed as refusal:
            raise PublishRefused(f"RabbitMQ at {self._address} refuses: {refusal.text}") from refusal

    async def _bounded(self, work: Awaitable[T]) -> T:
        timeout = self.options.timeout
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError:
            raise BrokerUnavailable(overdue(self._out.live, timeout, self._address)) from None

    # --- broadcasts ----------------------------------------------------------------------------------

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        """Raises ``PublishRefused`` beyond ``max_message_size``, ``BrokerUnavailable``, also while the broker has an alarm."""
        self._check_open()
        self._check_size(len(payload), f"the broadcast to {topic!r}")
        outbound = await self._out.get()
        await self._answered(outbound.broadcast(topic, key, payload))

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        """A subscriber that lags by more than 10,000 broadcasts misses the oldest."""
        self._check_open()
        session = await self._in.get()
        channel = await session.connection.channel()
        heard: deque[Raw] = deque(maxlen=_MOST_UNHEARD)
        news = asyncio.Event()

        def receive(raws: Sequence[Raw]) -> None:
            heard.extend(raws)
            news.set()

        channel.consumers["topic"] = receive
        channel.on_death.append(lambda _: news.set())
        try:
            await channel.call(topic_exchange(topic))
            made = await channel.call(QueueDeclare(queue="", exclusive=True, auto_delete=True, arguments={}))
            exchange = broadcast_exchange(topic)
            await channel.call(QueueBind(queue=made.queue, exchange=exchange, routing_key="#", arguments={}))
            await channel.call(Consume(queue=made.queue, consumer_tag="topic", no_ack=True, arguments={}))
            while True:
                while heard:
                    _, _, _, key, _, payload = heard.popleft()
                    yield key, payload
                if channel.dead is not None:
                    raise BrokerUnavailable(f"{session.connection.where}: {channel.dead}")
                news.clear()
                await news.wait()
        finally:
            channel.close()

    # --- the end -------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give back, uncounted, what was claimed and not yielded; what was yielded goes back counted."""
        if self._closed:
            return
        self._closed = True
        if (inbound := self._in.live) is not None:
            await inbound.close()
        if self._ending:
            await asyncio.wait(self._ending)
        await self._in.close()
        await self._out.close()


def _in_place(settlement: Settlement, hold: Hold) -> bool:
    """Whether the broker itself can put the message back, and count it right."""
    requeued = settlement.action is Action.REQUEUE and settlement.counted and settlement.delay <= 0
    return requeued and not hold.past.inexact and not hold.parked
