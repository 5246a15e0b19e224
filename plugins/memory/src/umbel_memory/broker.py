"""The broker that all transports of one name share: queues in memory, under one lock.

Every method is synchronous, short and thread-safe, and is told the time by its caller. An entry of a queue is either
ready, or away until a time: delayed, or leased. Leases and delays end alike, so one heap of timers serves both.
"""

from __future__ import annotations

import heapq
import itertools
import marshal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, evolve, field, fields, frozen

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
)
from umbel.ports.transport import QueueDepth
from umbel_memory.exchange import Exchange
from umbel_memory.shared import Bell, Registry


@define(eq=False)
class Entry:
    """One message in a queue."""

    message: Message
    """Without headers and properties: those are in ``plain``, so that no two parties ever share a dictionary."""
    plain: bytes
    order: int | None = None
    """Its place among equals, given when it first becomes ready and kept: what comes back comes back to the front."""
    since: float = 0.0
    """When it first became ready."""
    count: int = 0
    starts: int = 0
    fence: int = 0
    """Grows with each handing-out and each settlement: a token with another number is void."""
    until: float | None = None
    """Away until this time; None: ready."""
    leased: bool = False
    """Handed out and not returned; an ended lease stays one until the entry is handed out again."""

    def copy(self) -> Message:
        headers, properties = marshal.loads(self.plain)
        return evolve(self.message, headers=headers, properties=properties)


@frozen(eq=False)
class Token:
    """The handle of one handing-out."""

    entry: Entry
    fence: int


@define(eq=False)
class Queue:
    """Ready and away entries. Heaps keep items of entries that have moved on; those are skipped when they surface."""

    spec: QueueSpec | None = None
    entries: set[Entry] = field(factory=set)
    bells: set[Bell] = field(factory=set)
    _ready: list[tuple[int, int, Entry]] = field(factory=list)
    _timers: list[tuple[float, int, Entry]] = field(factory=list)

    def ring(self) -> None:
        for bell in self.bells:
            bell.ring()

    def make_ready(self, entry: Entry, *, now: float, ticks: Iterator[int]) -> None:
        entry.until = None
        if entry.order is None:
            entry.order = next(ticks)
            entry.since = now
        heapq.heappush(self._ready, (-entry.message.priority, entry.order, entry))

    def send_away(self, entry: Entry, *, until: float, ticks: Iterator[int]) -> None:
        """Keep ``entry`` back until a time. Consumers asleep until a later one are woken to look again."""
        entry.until = until
        heapq.heappush(self._timers, (until, next(ticks), entry))
        if self._timers[0][2] is entry:
            self.ring()

    def bring_back(self, *, now: float, ticks: Iterator[int]) -> None:
        """Make ready what was away until ``now`` or earlier."""
        while self._timers and self._timers[0][0] <= now:
            until, _, entry = heapq.heappop(self._timers)
            if entry in self.entries and entry.until == until:
                self.make_ready(entry, now=until, ticks=ticks)

    def head(self) -> tuple[int, int, Entry] | None:
        while self._ready:
            if (entry := self._ready[0][2]) in self.entries and entry.until is None:
                return self._ready[0]
            heapq.heappop(self._ready)
        return None

    def take(self) -> Entry:
        return heapq.heappop(self._ready)[2]

    def next_timer(self) -> float | None:
        while self._timers:
            until, _, entry = self._timers[0]
            if entry in self.entries and entry.until == until:
                return until
            heapq.heappop(self._timers)
        return None

    def remove(self, entry: Entry) -> None:
        self.entries.discard(entry)
        # Items of entries that have moved on would outlive them by a whole lease: drop them once they are the majority.
        if len(self._timers) > 2 * len(self.entries) + 64:
            self._timers = [(t, tick, e) for t, tick, e in self._timers if e in self.entries and e.until == t]
            heapq.heapify(self._timers)
        if len(self._ready) > 2 * len(self.entries) + 64:
            self._ready = [item for item in self._ready if item[2] in self.entries and item[2].until is None]
            heapq.heapify(self._ready)

    def waiting(self) -> list[Entry]:
        """Ready entries in the order of handing out, then delayed ones by due time."""
        ready = [entry for entry in self.entries if entry.until is None]
        delayed = [entry for entry in self.entries if entry.until is not None and not entry.leased]
        ready.sort(key=lambda entry: (-entry.message.priority, entry.order or 0))
        delayed.sort(key=lambda entry: entry.until or 0.0)
        return ready + delayed


@define(eq=False)
class Listener:
    """One subscription to a topic. What a listener does not fetch is lost oldest first, never kept without bound."""

    bell: Bell
    heard: deque[tuple[str, bytes]] = field(factory=lambda: deque(maxlen=10_000))


class Broker:
    """The queues and topics of one name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticks = itertools.count(1)
        self._queues: dict[str, Queue] = {}
        self._exchanges: dict[str, Exchange] = {}
        self._topics: dict[str, set[Listener]] = {}

    # --- messages -------------------------------------------------------------------------------

    def publish(self, messages: Sequence[Message], *, now: float) -> None:
        """Accept all of ``messages``, or none of them."""
        routed = any(message.properties.get("exchange") for message in messages)
        with self._lock:
            if routed:
                messages = [copy for message in messages for copy in self._routed(message)]
            for entry in [_entry(message) for message in messages]:
                self._accept(entry, now=now)

    def claim(self, names: Sequence[str], limit: int, *, lease: float, now: float) -> Sequence[Delivery]:
        """Hand out at most ``limit`` messages, over all queues by priority and age."""
        with self._lock:
            queues = [(name, self._queue(name)) for name in names]
            for _, queue in queues:
                queue.bring_back(now=now, ticks=self._ticks)
            batch: list[Delivery] = []
            while len(batch) < limit:
                heads = [(head[:2], name, queue) for name, queue in queues if (head := queue.head())]
                if not heads:
                    break
                _, name, queue = min(heads, key=lambda head: head[0])
                batch.append(self._hand_out(queue.take(), name, queue, until=now + lease))
            return batch

    def next_timer(self, names: Sequence[str]) -> float | None:
        """When the next delay or lease in these queues ends."""
        with self._lock:
            times = [time for name in names if (time := self._queue(name).next_timer()) is not None]
        return min(times, default=None)

    def settle(self, settlements: Sequence[Settlement], *, now: float) -> list[bool]:
        with self._lock:
            return [self._settle(settlement, now=now) for settlement in settlements]

    def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool, now: float) -> list[bool]:
        with self._lock:
            held = []
            for delivery in deliveries:
                queue = self._held(delivery)
                if queue is not None:
                    entry: Entry = delivery.token.entry
                    entry.starts += starting
                    queue.send_away(entry, until=now + lease, ticks=self._ticks)
                held.append(queue is not None)
            return held

    # --- queues ---------------------------------------------------------------------------------

    def declare(self, specs: Sequence[QueueSpec]) -> None:
        with self._lock:
            for spec in specs:
                known = self._queues[spec.name].spec if spec.name in self._queues else None
                if known is not None and known != spec:
                    raise PublishRefused(_difference(known, spec))
                exchange = self._exchanges.get(spec.exchange or "")
                if exchange is not None and exchange.type != spec.exchange_type:
                    raise PublishRefused(
                        f"queue {spec.name!r}: exchange {spec.exchange!r} exists with exchange_type {exchange.type!r}, not "
                        f"{spec.exchange_type!r}"
                    )
            for spec in specs:
                self._queue(spec.name).spec = spec
                if spec.exchange is not None:
                    exchange = self._exchanges.setdefault(spec.exchange, Exchange(spec.exchange_type))
                    exchange.bind(spec.name, spec.name if spec.routing_key is None else spec.routing_key)

    def purge(self, name: str, *, now: float) -> int:
        with self._lock:
            if (queue := self._queues.get(name)) is None:
                return 0
            queue.bring_back(now=now, ticks=self._ticks)
            waiting = queue.waiting()
            for entry in waiting:
                queue.remove(entry)
            return len(waiting)

    def depth(self, names: Sequence[str], *, now: float) -> Mapping[str, QueueDepth]:
        with self._lock:
            return {name: self._depth(name, now=now) for name in names or self._queues}

    def peek(self, name: str, *, limit: int, offset: int, now: float) -> list[Message]:
        with self._lock:
            if (queue := self._queues.get(name)) is None:
                return []
            queue.bring_back(now=now, ticks=self._ticks)
            return [entry.copy() for entry in queue.waiting()[offset : offset + limit]]

    def listen(self, names: Sequence[str], bell: Bell) -> None:
        """Ring ``bell`` whenever one of these queues may have something new, or an earlier timer."""
        with self._lock:
            for name in names:
                self._queue(name).bells.add(bell)

    def unlisten(self, names: Sequence[str], bell: Bell) -> None:
        with self._lock:
            for name in names:
                self._queue(name).bells.discard(bell)

    # --- topics ---------------------------------------------------------------------------------

    def say(self, topic: str, key: str, payload: bytes) -> None:
        with self._lock:
            for listener in self._topics.get(topic, ()):
                listener.heard.append((key, payload))
                listener.bell.ring()

    def attend(self, topic: str, listener: Listener) -> None:
        with self._lock:
            self._topics.setdefault(topic, set()).add(listener)

    def depart(self, topic: str, listener: Listener) -> None:
        with self._lock:
            self._topics[topic].discard(listener)
            if not self._topics[topic]:
                del self._topics[topic]

    # --- under the lock -------------------------------------------------------------------------

    def _queue(self, name: str) -> Queue:
        if (queue := self._queues.get(name)) is None:
            queue = self._queues[name] = Queue()
        return queue

    def _routed(self, message: Message) -> Sequence[Message]:
        """The copies of ``message`` that its exchange makes: one for each queue."""
        if not (name := message.properties.get("exchange")):
            return [message]
        key = str(message.properties.get("routing_key") or "")
        exchange = self._exchanges.get(name)
        if exchange is None or not (queues := exchange.route(key)):
            what = "there is no such exchange" if exchange is None else f"no queue is bound there under {key!r}"
            raise PublishRefused(
                f"message {message.id or '(no id)'} of task {message.task or '(no name)'} for exchange {name!r}: {what}; bind a "
                "queue to it ([queues.NAME] exchange, routing_key)"
            )
        return [evolve(message, queue=queue) for queue in queues]

    def _accept(self, entry: Entry, *, now: float) -> None:
        queue = self._queue(entry.message.queue)
        queue.bring_back(now=now, ticks=self._ticks)
        queue.entries.add(entry)
        due = entry.message.due
        if due is not None and due > now:
            queue.send_away(entry, until=due, ticks=self._ticks)
        else:
            queue.make_ready(entry, now=now, ticks=self._ticks)
            queue.ring()

    def _hand_out(self, entry: Entry, name: str, queue: Queue, *, until: float) -> Delivery:
        entry.count += 1
        entry.fence += 1
        entry.leased = True
        queue.send_away(entry, until=until, ticks=self._ticks)
        return Delivery(
            message=entry.copy(),
            queue=name,
            token=Token(entry, entry.fence),
            count=entry.count,
            starts=entry.starts,
            leased_until=until,
        )

    def _held(self, delivery: Delivery) -> Queue | None:
        """The queue of a delivery that is not settled and has not passed to another, even if its lease has ended."""
        token: Token = delivery.token
        queue = self._queues.get(delivery.queue)
        if queue is None or token.entry not in queue.entries or token.entry.fence != token.fence:
            return None
        return queue

    def _settle(self, settlement: Settlement, *, now: float) -> bool:
        delivery = settlement.delivery
        if (queue := self._held(delivery)) is None:
            return False
        entry: Entry = delivery.token.entry
        if settlement.action is Action.REQUEUE:
            if not settlement.counted:
                entry.count -= 1
                entry.starts = settlement.delivery.starts
            self._return(entry, queue, until=now + settlement.delay if settlement.delay > 0 else None, now=now)
            return True
        queue.remove(entry)
        if settlement.action is Action.DEAD:
            self._accept(_dead_letter(entry, delivery.queue, settlement.cause, now=now), now=now)
        return True

    def _return(self, entry: Entry, queue: Queue, *, until: float | None, now: float) -> None:
        entry.fence += 1
        entry.leased = False
        if until is not None:
            queue.send_away(entry, until=until, ticks=self._ticks)
        else:
            queue.make_ready(entry, now=now, ticks=self._ticks)
            queue.ring()

    def _depth(self, name: str, *, now: float) -> QueueDepth:
        if (queue := self._queues.get(name)) is None:
            return QueueDepth()
        queue.bring_back(now=now, ticks=self._ticks)
        ready = [entry for entry in queue.entries if entry.until is None]
        leased = sum(entry.until is not None and entry.leased for entry in queue.entries)
        return QueueDepth(
            ready=len(ready),
            delayed=len(queue.entries) - len(ready) - leased,
            leased=leased,
            oldest=min((entry.since for entry in ready), default=None),
        )


def _entry(message: Message) -> Entry:
    """Cut ``message`` loose from its sender, as the wire would."""
    try:
        plain = marshal.dumps((dict(message.headers), dict(message.properties)))
    except ValueError:
        raise PublishRefused(
            f"message {message.id or '(no id)'} of task {message.task or '(no name)'} for queue {message.queue!r}: "
            f"headers and properties must be plain data (None, bool, int, float, str, bytes, list, dict)"
        ) from None
    return Entry(message=evolve(message, headers={}, properties={}), plain=plain)


def _dead_letter(entry: Entry, queue: str, cause: str, *, now: float) -> Entry:
    message = entry.copy()
    headers: dict[str, Any] = {
        **message.headers,
        HEADER_DEAD_CAUSE: cause,
        HEADER_DEAD_QUEUE: queue,
        HEADER_DEAD_AT: now,
        HEADER_DEAD_COUNT: entry.count,
    }
    return _entry(evolve(message, queue=dead_letter_queue(queue), headers=headers, due=None))


def _difference(known: QueueSpec, wanted: QueueSpec) -> str:
    pairs = {field.name: (getattr(known, field.name), getattr(wanted, field.name)) for field in fields(QueueSpec)}
    told = ", ".join(f"{name} is {was!r}, not {now!r}" for name, (was, now) in pairs.items() if was != now)
    return f"queue {known.name!r} exists with other properties: {told}; purge and rename it, or declare it as it is"


brokers: Registry[Broker] = Registry(Broker)
