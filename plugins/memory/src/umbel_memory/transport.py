"""``memory://name``: a broker inside the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

from umbel.capabilities import UNLIMITED, TransportCapabilities
from umbel.errors import BrokerUnavailable
from umbel.model import Delivery, Message, QueueSpec, Settlement
from umbel.ports.clock import Clock
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, QueueDepth, Transport
from umbel_memory.broker import Listener, brokers
from umbel_memory.shared import Bell, Session, rung_by

QUIET = 4.0
"""Seconds of real time after which an empty batch is yielded; the port asks for at least one every 5 s."""


class MemoryTransport(Transport, BlockingPublisher, Broadcaster):
    """Keeps every law of the port, and forgets everything when the process ends.

    All instances for one name share one broker; each has its own event loop, on whatever thread. Nothing blocks: the
    lock is held for the length of a dictionary operation. Leases and due times follow ``clock``; with a
    ``VirtualClock`` waiting consumers look again at each of its steps.
    """

    capabilities: TransportCapabilities = TransportCapabilities(
        durable=False,
        confirm=True,
        max_delay=UNLIMITED,
        priority_levels=10,
        renewable_lease=True,
        delivery_count=True,
        start_marks=True,
        exchanges=True,
        broadcast=True,
        blocking_publish=True,
    )
    api_version: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self._broker = brokers.get(url)
        self._session = Session(url, BrokerUnavailable)
        self._bells: set[Bell] = set()

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        """Accept all of ``messages`` or none; ``PublishRefused`` for a header that no wire could carry, or an exchange
        from which it would reach no queue."""
        await self._session.checkpoint()
        self._broker.publish(messages, now=self.clock.time())

    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        """See the port: the broker is a lock away from every thread."""
        if self._session.closed:
            raise BrokerUnavailable(f"this connection to {self.url} is closed")
        self._broker.publish(messages, now=self.clock.time())

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        """See the port. Claiming and yielding are one step here: nothing is ever claimed and not yielded."""
        self._session.enter()
        names = tuple(dict.fromkeys(queues))
        loop = asyncio.get_running_loop()
        bell = Bell()
        with ExitStack() as stack:
            stack.callback(self._bells.discard, bell)
            self._bells.add(bell)
            stack.callback(self._broker.unlisten, names, bell)
            self._broker.listen(names, bell)
            stack.enter_context(rung_by(self.clock, bell))
            quiet_until = loop.time() + QUIET
            while True:
                bell.clear()
                self._session.enter()
                batch = self._broker.claim(names, credit.available, lease=lease, now=self.clock.time())
                if batch or loop.time() >= quiet_until:
                    credit.take(len(batch))
                    yield batch
                    quiet_until = loop.time() + QUIET
                    await asyncio.sleep(0)
                else:
                    await self._wait(names, bell, credit, quiet_until - loop.time())

    async def _wait(self, names: Sequence[str], bell: Bell, credit: Credit, seconds: float) -> None:
        """Wait until there may be something to claim, at most ``seconds``."""
        if credit.available:
            if (due := self._broker.next_timer(names)) is not None:
                seconds = min(seconds, max(0.0, due - self.clock.time()))
            await bell.wait(seconds)
            return
        paid = asyncio.ensure_future(credit.wait())
        paid.add_done_callback(lambda _: bell.ring())
        try:
            await bell.wait(seconds)
        finally:
            paid.cancel()

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        """See the port. A delivery whose lease has ended can still be settled until it is handed out again."""
        await self._session.checkpoint()
        return self._broker.settle(settlements, now=self.clock.time())

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        """See the port. A lease that has ended can still be renewed until the message is handed out again."""
        await self._session.checkpoint()
        return self._broker.renew(deliveries, lease=lease, starting=starting, now=self.clock.time())

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        """Remember ``queues`` as described; ``PublishRefused`` where one was declared differently before."""
        await self._session.checkpoint()
        self._broker.declare(queues)

    async def purge(self, queue: str) -> int:
        await self._session.checkpoint()
        return self._broker.purge(queue, now=self.clock.time())

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        await self._session.checkpoint()
        return self._broker.depth(queues, now=self.clock.time())

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        """Ready messages in the order of handing out, then delayed ones by due time."""
        await self._session.checkpoint()
        return self._broker.peek(queue, limit=limit, offset=offset, now=self.clock.time())

    async def close(self) -> None:
        """See the port; iterators that are still waiting raise ``BrokerUnavailable``."""
        if self._session.closed:
            return
        self._session.closed = True
        for bell in self._bells:
            bell.ring()

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        await self._session.checkpoint()
        self._broker.say(topic, key, payload)

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        """See the port. A listener that falls 10,000 behind loses the oldest."""
        self._session.enter()
        listener = Listener(Bell())
        with ExitStack() as stack:
            stack.callback(self._bells.discard, listener.bell)
            self._bells.add(listener.bell)
            stack.callback(self._broker.depart, topic, listener)
            self._broker.attend(topic, listener)
            while True:
                listener.bell.clear()
                self._session.enter()
                while listener.heard:
                    yield listener.heard.popleft()
                await listener.bell.wait()
