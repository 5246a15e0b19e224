"""The broker in a file."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from umbel.capabilities import UNLIMITED, TransportCapabilities
from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement
from umbel.ports.clock import Clock
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, QueueDepth, Transport
from umbel_sqlite.bells import BROADCASTS, MESSAGES, Bell
from umbel_sqlite.database import Database
from umbel_sqlite.messages import SCHEMA, ClaimRequest, Messages, Token
from umbel_sqlite.options import TransportOptions, file_of

log = logging.getLogger("umbel.sqlite")

_LARGEST_BATCH: Final = 200
_LONGEST_SILENCE: Final = 5.0
"""Seconds within which ``consume`` yields, be it an empty batch."""


class SqliteTransport(Transport, BlockingPublisher, Broadcaster):
    """Keeps messages in the file that the URL names; the file is created, its directory is not.

    Delivers at least once. Order: higher priority first, then oldest first; a message given back keeps its place. Times
    are those of ``clock``. The file does not shrink by itself: ``VACUUM`` it to give disk space back.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = TransportOptions

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self.capabilities = TransportCapabilities(
            durable=True,
            confirm=True,
            max_delay=UNLIMITED,
            priority_levels=10,
            renewable_lease=True,
            delivery_count=True,
            start_marks=True,
            broadcast=True,
            blocking_publish=True,
            max_message_size=self.options.max_message_size,
        )
        file = file_of(url)
        self._messages = Messages(self.clock)
        self._db = Database(file, self.options, SCHEMA, BrokerUnavailable)
        self._new_messages = Bell(file, MESSAGES)
        self._new_broadcasts = Bell(file, BROADCASTS)
        self._closed = False
        self._claiming: set[asyncio.Future[Any]] = set()
        self._cleaning: set[asyncio.Task[None]] = set()
        self._unpaid: set[asyncio.Future[int]] = set()
        self._unyielded: set[Token] = set()
        """Claimed, and not yet on its way to the caller."""

    # --- sending ---------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if self._sendable(messages):
            publish = self._messages.publish
            await self._db.submit(publish, messages, write=True, ring=MESSAGES, timeout=timeout, refused=PublishRefused)

    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        """See the port. One transaction on the calling thread, which waits for those of other threads."""
        if self._sendable(messages):
            self._db.run(self._messages.publish, messages, ring=MESSAGES, timeout=timeout, refused=PublishRefused)

    def _sendable(self, messages: Sequence[Message]) -> bool:
        for message in messages:
            self._check_size(len(message.body), f"message {message.id!r}")
        return bool(messages)

    def _check_size(self, size: int, what: str) -> None:
        limit = self.options.max_message_size
        if size > limit:
            raise PublishRefused(f"{what} has {size} bytes, the broker's option max_message_size allows {limit}")

    # --- receiving -------------------------------------------------------------------------------

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        names = json.dumps(list(dict.fromkeys(queues)))
        self._new_messages.open()
        yielded = time.monotonic()
        while True:
            room = await self._room(credit, yielded + _LONGEST_SILENCE - time.monotonic())
            seen = self._new_messages.count
            batch, next_due = await self._claim(ClaimRequest(queues=names, limit=room, lease=lease), credit)
            if batch or time.monotonic() - yielded >= _LONGEST_SILENCE:
                yield batch
                yielded = time.monotonic()
            if room and len(batch) < room:
                pause = min(self._poll(), yielded + _LONGEST_SILENCE - time.monotonic())
                if next_due is not None:
                    pause = min(pause, next_due - self.clock.time())
                await self._new_messages.wait(seen, pause)

    async def _room(self, credit: Credit, patience: float) -> int:
        """How many deliveries may be claimed; 0 if no credit comes for as long as the caller may be kept waiting."""
        if not credit.available:
            paid = asyncio.ensure_future(credit.wait())
            self._unpaid.add(paid)
            try:
                await asyncio.wait([paid], timeout=max(0.0, patience))
            finally:
                self._unpaid.discard(paid)
                paid.cancel()
        return min(credit.available, _LARGEST_BATCH)

    async def _claim(self, request: ClaimRequest, credit: Credit) -> tuple[list[Delivery], float | None]:
        """Claim, with the credit taken beforehand: several consumers may share it.

        What is claimed for a caller who is gone by then is given back, uncounted.
        """
        self._check_open()
        claimed = self._db.submit(self._messages.claim, request, write=True)
        self._claiming.add(claimed)
        claimed.add_done_callback(self._claimed)
        credit.take(request.limit)
        unused = request.limit
        try:
            batch, next_due = await asyncio.shield(claimed)
            self._check_open()
            unused -= len(batch)
            self._unyielded.difference_update(delivery.token for delivery in batch)
            return batch, next_due
        except asyncio.CancelledError:
            await asyncio.shield(self._clean(claimed))
            raise
        finally:
            if unused:
                credit.give(unused)

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable(f"this connection to {self._db.file} is closed")

    def _claimed(self, claimed: asyncio.Future[tuple[list[Delivery], float | None]]) -> None:
        self._claiming.discard(claimed)
        if not claimed.cancelled() and claimed.exception() is None:
            self._unyielded.update(delivery.token for delivery in claimed.result()[0])

    def _clean(self, claimed: asyncio.Future[tuple[list[Delivery], float | None]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._abandon(claimed))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)
        return task

    async def _abandon(self, claimed: asyncio.Future[tuple[list[Delivery], float | None]]) -> None:
        await asyncio.wait([claimed])
        if claimed.exception() is None:
            await self._give_back([delivery.token for delivery in claimed.result()[0]])

    async def _give_back(self, tokens: Sequence[Token]) -> None:
        self._unyielded.difference_update(tokens)
        if not tokens:
            return
        try:
            await self._db.submit(self._messages.give_back, tokens, write=True, ring=MESSAGES, timeout=1.0)
        except BrokerUnavailable as error:
            log.warning("%d messages were not given back and wait for their leases to end: %s", len(tokens), error)

    def _poll(self) -> float:
        interval: float = self.options.poll_interval
        return interval * random.uniform(0.75, 1.25)

    # --- ending ----------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        if not settlements:
            return []
        ring = "" if all(settlement.action is Action.ACK for settlement in settlements) else MESSAGES
        done: Sequence[bool] = await self._db.submit(self._messages.settle, settlements, write=True, ring=ring)
        return done

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        if not deliveries:
            return []
        tokens = [delivery.token for delivery in deliveries]
        held: Sequence[bool] = await self._db.submit(self._messages.renew, (tokens, lease, starting), write=True)
        return held

    # --- queues ----------------------------------------------------------------------------------

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        for spec in queues:
            for argument, value in [("type", spec.type), ("exchange", spec.exchange), *spec.arguments.items()]:
                if value is not None:
                    raise PublishRefused(
                        f"queue {spec.name!r}: a SQLite queue has no {argument!r}; remove it from the queue's settings"
                    )
        names = [spec.name for spec in queues]
        await self._db.submit(self._messages.declare, names, write=True, refused=PublishRefused)

    async def purge(self, queue: str) -> int:
        total = 0
        deleted, last = await self._db.submit(self._messages.purge, (queue, None), write=True)
        while deleted:
            total += deleted
            deleted, last = await self._db.submit(self._messages.purge, (queue, last), write=True)
        return total

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        depths: Mapping[str, QueueDepth] = await self._db.submit(self._messages.depth, queues)
        return depths

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        """Ready messages in order, then delayed ones by their time."""
        messages: Sequence[Message] = await self._db.submit(self._messages.peek, (queue, limit, offset), write=True)
        return messages

    # --- broadcasts ------------------------------------------------------------------------------

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        """Raises ``PublishRefused`` beyond ``max_message_size``, ``BrokerUnavailable``."""
        self._check_size(len(payload), f"the broadcast to {topic!r}")
        say = self._messages.broadcast
        await self._db.submit(say, (topic, key, payload), write=True, ring=BROADCASTS, refused=PublishRefused)

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        """A subscriber that takes longer than a minute between two items may miss what was said meanwhile."""
        self._new_broadcasts.open()
        last = await self._db.submit(self._messages.last_broadcast)
        while True:
            seen = self._new_broadcasts.count
            heard = await self._db.submit(self._messages.heard, (topic, last))
            for number, key, payload in heard:
                last = number
                yield key, payload
            if not heard:
                await self._new_broadcasts.wait(seen, self._poll())

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give back, uncounted, what was claimed and not yielded; then free everything.

        What was yielded stays leased: another transport on the same file may renew and settle it.
        """
        if self._closed:
            return
        self._closed = True
        self._new_messages.close()
        self._new_broadcasts.close()
        for paid in self._unpaid:
            paid.cancel()
        if pending := self._claiming | self._cleaning:
            await asyncio.wait(pending)
        await self._give_back(list(self._unyielded))
        await self._db.close()
