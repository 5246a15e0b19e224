"""Honest transports over a small broker in memory: each passes its whole contract, with every ability or with none.

The animals of the zoo are these with one fault each, so their parts are cut where faults go. So it is with the other ports.
"""

from __future__ import annotations

import asyncio
import itertools
import marshal
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence

from attrs import define, evolve, field

from umbel.capabilities import UNLIMITED, TransportCapabilities
from umbel.errors import BrokerUnavailable, NotSupported, PublishRefused
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
)
from umbel.ports.clock import Clock
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, QueueDepth, Transport

POLL = 0.001
QUIET = 0.15


def carried(message: Message) -> Message:
    """The message on the other side of a wire: nothing is shared with the sender."""
    headers, properties = marshal.loads(marshal.dumps((message.headers, message.properties)))
    return evolve(message, headers=headers, properties=properties)


@define(eq=False)
class Kept:
    """A message that a broker keeps."""

    message: Message
    order: int
    until: float
    """Not before this time: delayed, or leased. ``inf``: as long as the session lives."""
    holder: object = None
    count: int = 0
    starts: int = 0
    fence: int = 0


@define
class Exchange:
    """What an exchange knows: its type, and which queue is bound to it by which key."""

    type: str
    bindings: list[tuple[str, str]] = field(factory=list)

    def reaches(self, key: str) -> list[str]:
        return list(dict.fromkeys(queue for queue, binding in self.bindings if self.fits(binding, key)))

    def fits(self, binding: str, key: str) -> bool:
        if self.type == "topic":
            pattern = re.escape(binding).replace(r"\#\.", r"([^.]+\.)*").replace(r"\.\#", r"(\.[^.]+)*")
            return bool(re.fullmatch(pattern.replace(r"\*", r"[^.]+").replace(r"\#", ".*"), key))
        return self.type == "fanout" or binding == key


@define
class Broker:
    """What instances share."""

    kept: list[Kept] = field(factory=list)
    queues: dict[str, QueueSpec] = field(factory=dict)
    exchanges: dict[str, Exchange] = field(factory=dict)
    listeners: list[tuple[str, deque[tuple[str, bytes]]]] = field(factory=list)
    said: list[tuple[str, str, bytes]] = field(factory=list)
    sessions: list[ModestTransport] = field(factory=list)
    order: itertools.count[int] = field(factory=itertools.count)
    lock: threading.Lock = field(factory=threading.Lock)


class ModestTransport(Transport):
    """Can only what every transport must: holds for the session, keeps no delay, knows no priority."""

    capabilities = TransportCapabilities(confirm=True)

    def __init__(self, broker: Broker, clock: Clock | None = None) -> None:
        super().__init__("honest://", clock=clock)
        self.broker = broker
        self.closed = self.severed = False
        broker.sessions.append(self)

    async def enter(self) -> None:
        self.check()
        await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        if self.closed or self.severed:
            raise BrokerUnavailable("honest:// is closed, or lost its connection")

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await self.enter()
        self.accept(messages)

    def accept(self, messages: Sequence[Message]) -> None:
        now, able = self.clock.time(), self.capabilities
        for message in messages:
            if message.due is not None and message.due > now + able.max_delay:
                raise NotSupported("honest:// keeps no such delay")
            if able.max_message_size is not None and len(message.body) > able.max_message_size:
                raise PublishRefused("honest:// takes no body of that size")
        with self.broker.lock:
            routed = [(message, self.route(message)) for message in messages]
            for message, queues in routed:
                for queue in queues:
                    self.keep(carried(evolve(message, queue=queue)))

    def route(self, message: Message) -> list[str]:
        """The queues that a message is for."""
        if not (name := message.properties.get("exchange")):
            return [message.queue]
        reached = self.reached(name, message.properties["routing_key"])
        if not reached:
            raise PublishRefused(f"no queue is bound to exchange {name!r} for such a message")
        return reached

    def reached(self, exchange: str, key: str) -> list[str]:
        return self.broker.exchanges[exchange].reaches(key) if exchange in self.broker.exchanges else []

    def keep(self, message: Message) -> None:
        self.broker.queues.setdefault(message.queue, QueueSpec(name=message.queue))
        until = 0.0 if message.due is None else message.due
        self.broker.kept.append(Kept(message, next(self.broker.order), until))

    def ready(self, queues: Sequence[str]) -> list[Kept]:
        """What may be handed out now, in order."""
        now = self.clock.time()
        found = [kept for kept in self.broker.kept if kept.message.queue in queues and kept.until <= now]
        return sorted(found, key=self.place)

    def place(self, kept: Kept) -> tuple[float, int]:
        return (-kept.message.priority if self.capabilities.priority_levels > 1 else 0, kept.order)

    def room(self, credit: Credit) -> int:
        return credit.available

    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        able = self.capabilities
        kept.until = self.clock.time() + lease if able.renewable_lease else float("inf")
        kept.holder = self
        kept.count += 1
        kept.fence += 1
        return Delivery(
            message=carried(kept.message),
            queue=kept.message.queue,
            token=(kept, kept.fence),
            count=kept.count if able.delivery_count else min(kept.count, 2),
            starts=kept.starts,
            leased_until=kept.until if able.renewable_lease else None,
        )

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        silent = time.monotonic()
        while True:
            self.check()
            with self.broker.lock:
                batch = [self.hand_out(kept, lease) for kept in self.ready(queues)[: self.room(credit)]]
            if batch or self.speaks(silent):
                credit.take(len(batch))
                yield batch
                silent = time.monotonic()
            await self.pause()

    async def pause(self) -> None:
        await asyncio.sleep(POLL)

    def speaks(self, silent: float) -> bool:
        return time.monotonic() > silent + QUIET

    def held(self, delivery: Delivery) -> Kept | None:
        kept, fence = delivery.token
        return kept if kept in self.broker.kept and kept.fence == fence else None

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        await self.enter()
        if any(settlement.delay > self.capabilities.max_delay for settlement in settlements):
            raise NotSupported("honest:// keeps no delay")
        return [self.carry_out(settlement) for settlement in settlements]

    def carry_out(self, settlement: Settlement) -> bool:
        if (kept := self.held(settlement.delivery)) is None:
            return False
        kept.fence += 1
        if settlement.action is Action.REQUEUE:
            self.give_back(kept, settlement)
            return True
        self.broker.kept.remove(kept)
        if settlement.action is Action.DEAD:
            self.bury(settlement, kept)
        return True

    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        kept.until = self.clock.time() + settlement.delay
        kept.holder = None
        kept.count -= not settlement.counted

    def bury(self, settlement: Settlement, kept: Kept) -> None:
        queue = kept.message.queue
        headers = {
            **kept.message.headers,
            HEADER_DEAD_CAUSE: settlement.cause,
            HEADER_DEAD_QUEUE: queue,
            HEADER_DEAD_AT: self.clock.time(),
            HEADER_DEAD_COUNT: settlement.delivery.count,
        }
        self.keep(evolve(kept.message, queue=dead_letter_queue(queue), headers=headers, due=None))

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        await self.enter()
        if not self.capabilities.renewable_lease:
            return [True] * len(deliveries)
        found = [self.held(delivery) for delivery in deliveries]
        for kept in found:
            if kept is not None:
                kept.until = self.clock.time() + lease
                kept.starts += starting and self.capabilities.start_marks
        return [kept is not None for kept in found]

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self.enter()
        for spec in queues:
            if self.broker.queues.setdefault(spec.name, spec) != spec:
                raise PublishRefused(f"queue {spec.name!r} has other arguments")
            if spec.exchange is not None:
                self.bind(spec, spec.exchange)

    def bind(self, spec: QueueSpec, name: str) -> None:
        if not self.capabilities.exchanges:
            raise PublishRefused(f"queue {spec.name!r}: honest:// has no exchange")
        exchange = self.broker.exchanges.setdefault(name, Exchange(spec.exchange_type))
        if exchange.type != spec.exchange_type:
            raise PublishRefused(f"queue {spec.name!r}: exchange {name!r} has another type")
        exchange.bindings.append((spec.name, spec.name if spec.routing_key is None else spec.routing_key))

    def waiting(self, queue: str) -> list[Kept]:
        ready = self.ready([queue])
        delayed = [k for k in self.broker.kept if k.message.queue == queue and k.holder is None and k not in ready]
        return ready + sorted(delayed, key=lambda kept: kept.until)

    async def purge(self, queue: str) -> int:
        await self.enter()
        gone = self.waiting(queue)
        for kept in gone:
            self.broker.kept.remove(kept)
        return len(gone)

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        await self.enter()
        return {queue: self.count(queue) for queue in queues or self.broker.queues}

    def count(self, queue: str) -> QueueDepth:
        kept = [kept for kept in self.broker.kept if kept.message.queue == queue]
        ready, waiting = len(self.ready([queue])), len(self.waiting(queue))
        return QueueDepth(ready=ready, delayed=waiting - ready, leased=len(kept) - waiting)

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        await self.enter()
        return [carried(kept.message) for kept in self.waiting(queue)[offset : offset + limit]]

    async def close(self) -> None:
        self.closed = True
        self.part()

    def sever(self) -> None:
        """What a lost connection does, on both of its ends."""
        self.severed = True
        self.part()

    def restart(self) -> None:
        """What the broker's death does."""
        for session in self.broker.sessions:
            session.sever()

    def part(self) -> None:
        """What was handed out stays leased; what has no lease was held by the session."""
        for kept in self.broker.kept:
            if kept.holder is self and not self.capabilities.renewable_lease:
                kept.holder, kept.until = None, 0.0
                kept.fence += 1


class HonestTransport(ModestTransport, BlockingPublisher, Broadcaster):
    """Can everything."""

    capabilities = TransportCapabilities(
        durable=True,
        confirm=True,
        max_delay=UNLIMITED,
        priority_levels=10,
        renewable_lease=True,
        delivery_count=True,
        start_marks=True,
        broadcast=True,
        blocking_publish=True,
        exchanges=True,
        max_message_size=20_000_000,
    )

    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        self.check()
        self.accept(messages)

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        await self.enter()
        self.broker.said.append((topic, key, payload))
        for place, heard in self.broker.listeners:
            if place == topic:
                heard.append((key, payload))

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        listener = (topic, self.first_heard(topic))
        self.broker.listeners.append(listener)
        try:
            while True:
                self.check()
                while listener[1]:
                    yield listener[1].popleft()
                await asyncio.sleep(POLL)
        finally:
            self.broker.listeners = [other for other in self.broker.listeners if other is not listener]

    def first_heard(self, topic: str) -> deque[tuple[str, bytes]]:
        return deque()
