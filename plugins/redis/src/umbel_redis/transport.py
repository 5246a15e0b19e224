"""The broker in Redis: streams with a consumer group, and beside them what leases, delays and priorities need."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Final, TypeVar

from attrs import evolve, field, frozen, validators

from umbel.capabilities import UNLIMITED, TransportCapabilities
from umbel.errors import BrokerUnavailable, PublishError, PublishRefused
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement, dead_letter_queue
from umbel.ports.clock import Clock
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, QueueDepth, Transport
from umbel_redis import streams
from umbel_redis.advice import inspect
from umbel_redis.bells import Bells
from umbel_redis.blocking import BlockingLine
from umbel_redis.broadcasts import Ear, pack
from umbel_redis.lua import FENCE_LENGTH
from umbel_redis.options import RedisOptions
from umbel_redis.peeking import peek
from umbel_redis.scripts import ALL, PURGE, SURVEY
from umbel_redis.session import Command, Session
from umbel_redis.streams import Keys

T = TypeVar("T")

log = logging.getLogger("umbel.redis")

_LARGEST_BATCH: Final = 500
_CALLS_AT_ONCE: Final = 16
"""Scripts that one round trip publishes with: sixteen thousand messages, or 64 MiB."""
_LONGEST_WAIT: Final = 4.0
"""Seconds that a consumer with nothing to do waits for the server's word; one for the answer keeps its promise of five."""
_LAST_WORDS: Final = 1.0
"""Seconds that giving back may take at the end."""


@frozen(kw_only=True)
class TransportOptions(RedisOptions):
    """What the transport takes."""

    max_message_size: int = field(default=64 * 2**20, validator=validators.and_(validators.gt(0), validators.le(2**29)))
    """Largest body in bytes, of a message or of a broadcast."""


class RedisTransport(Transport, BlockingPublisher, Broadcaster):
    """Keeps messages on the server, or in the cluster, that the URL names. Needs Redis 7.0 or Valkey.

    Delivers at least once. Order: higher priority first, then oldest first; a message given back keeps its place. Of
    several queues none is preferred at equal priority; in a cluster each is asked in turn. Times are the server's; ``due``
    is compared with them.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = TransportOptions

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self.capabilities = TransportCapabilities(
            durable=True,
            confirm=True,
            max_delay=UNLIMITED,
            priority_levels=streams.LEVELS,
            renewable_lease=True,
            delivery_count=True,
            start_marks=True,
            broadcast=True,
            blocking_publish=True,
            max_message_size=self.options.max_message_size,
        )
        self._session = Session(url, self.options, BrokerUnavailable, ALL)
        patient = evolve(self.options, timeout=self.options.timeout + _LONGEST_WAIT, connections=2**31)
        self._waiting = Session(url, patient, BrokerUnavailable, ALL)
        self._line = BlockingLine(self._session.address, self.options)
        self._ear = Ear(self._session, self.options.timeout)
        self._keys: dict[str, Keys] = {}
        self._registry = f"{self.options.prefix}umbel:queues"
        self._inspected = False
        self._closed = False
        self._over = asyncio.Event()
        self._claiming: set[asyncio.Future[Any]] = set()
        self._cleaning: set[asyncio.Task[None]] = set()

    def _keys_of(self, queue: str) -> Keys:
        if (keys := self._keys.get(queue)) is None:
            keys = self._keys[queue] = Keys(self.options.prefix, queue)
        return keys

    # --- sending ---------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if messages:
            await self._refusing(self._within(timeout, self._publish(messages)))

    async def _publish(self, messages: Sequence[Message]) -> None:
        for queues, calls in self._publishing(messages):
            if new := _new(queues, await self._session.run(calls)):
                await self._session.call(("SADD", self._registry, *new))

    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        """See the port. On the calling thread, over a connection that is its own for so long."""
        if messages:
            with self._line.within(timeout):
                for queues, calls in self._publishing(messages):
                    if new := _new(queues, self._line.run(calls)):
                        self._line.run([("SADD", self._registry, *new)])

    def _publishing(self, messages: Sequence[Message]) -> Iterator[tuple[list[Keys], list[Command]]]:
        """What to send at once: the queues and the calls that publish to them. Thousands of messages are one portion."""
        by_queue: dict[str, list[Message]] = {}
        for message in messages:
            self._check_size(len(message.body), f"message {message.id!r}")
            by_queue.setdefault(message.queue, []).append(message)
        now = self.clock.time()
        every = (
            (keys, call)
            for queue, some in by_queue.items()
            for keys in [self._keys_of(queue)]
            for call in streams.publishing(keys, some, now)
        )
        while portion := list(islice(every, _CALLS_AT_ONCE)):
            yield [keys for keys, _ in portion], [call for _, call in portion]

    def _check_size(self, size: int, what: str) -> None:
        limit = self.options.max_message_size
        if size > limit:
            raise PublishRefused(f"{what} has {size} bytes, the broker's option max_message_size allows {limit}")

    async def _within(self, timeout: float, call: Awaitable[T]) -> T:
        """What ``call`` gives within its deadline."""
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                return await call
        except TimeoutError:
            if not deadline.expired():
                raise
            raise BrokerUnavailable(f"{self._session.address} has not answered within {timeout:g} s") from None

    async def _refusing(self, call: Awaitable[T]) -> T:
        """What ``call`` gives. What would fail again is ``PublishRefused``."""
        try:
            return await call
        except BrokerUnavailable as error:
            if self._session.permanent(error):
                raise PublishRefused(str(error)) from error
            raise

    # --- receiving -------------------------------------------------------------------------------

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        keys = [self._keys_of(queue) for queue in dict.fromkeys(queues)]
        shares = [[one] for one in keys] if self._session.clustered else [keys]
        await self._inspect()
        while not keys:  # the worker has been told to leave every queue
            await self._paid(Credit(0))
            await self._session.call(("PING",))
            yield []
        bells = Bells(self._session, self._waiting, shares)
        wait = 0.0  # seconds for which there is nothing to look for unless a bell rings
        looked = time.monotonic()
        try:
            while True:
                if not credit.available:
                    await bells.stop()
                    if not await self._paid(credit):
                        await self._session.call(("PING",))
                        yield []
                        continue
                if (pause := looked + wait - time.monotonic()) > 0:
                    await bells.wait(pause)
                    if not credit.available:  # another consumer has taken it meanwhile
                        await bells.ring()
                        continue
                room = min(credit.available, _LARGEST_BATCH)
                looked = time.monotonic()
                batch, wait = await self._claim(shares, room, lease, credit)
                yield batch
                shares = [[*share[1:], *share[:1]] for share in [*shares[1:], *shares[:1]]]
        finally:
            await asyncio.shield(self._clean(bells.stop()))

    async def _paid(self, credit: Credit) -> bool:
        """Whether credit has come, before a word from the server is due. Raises ``BrokerUnavailable`` after ``close``."""
        paid = asyncio.ensure_future(credit.wait())
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait([paid, over], timeout=_LONGEST_WAIT, return_when=asyncio.FIRST_COMPLETED)
            self._check_open()
            return paid.done()
        finally:
            paid.cancel()
            over.cancel()

    async def _claim(
        self, shares: Sequence[Sequence[Keys]], room: int, lease: float, credit: Credit
    ) -> tuple[list[Delivery], float]:
        """Claim, with the credit taken beforehand: several consumers may share it.

        What is claimed for a caller who is gone by then is given back, uncounted.
        """
        self._check_open()
        claimed = asyncio.ensure_future(self._claim_from(shares, room, lease))
        self._claiming.add(claimed)
        claimed.add_done_callback(self._claiming.discard)
        credit.take(room)
        unused = room
        try:
            batch, wait = await asyncio.shield(claimed)
            unused -= len(batch)
            return batch, wait
        except asyncio.CancelledError:
            await asyncio.shield(self._clean(self._abandon(claimed)))
            raise
        finally:
            if unused:
                credit.give(unused)

    async def _claim_from(
        self, shares: Sequence[Sequence[Keys]], room: int, lease: float
    ) -> tuple[list[Delivery], float]:
        """Deliveries, and the seconds until there may be more without a bell."""
        batch: list[Delivery] = []
        waits = [_LONGEST_WAIT]
        for share in shares:
            if len(batch) == room:
                return batch, 0.0
            fence = secrets.token_hex(FENCE_LENGTH // 2)
            until = self.clock.time() + lease
            try:
                answer = await self._session.call(streams.claiming(share, room - len(batch), lease, fence))
            except BrokerUnavailable:
                if not batch:
                    raise
                break  # what there is is held; the next call says what is wrong
            next_due, batches = answer
            if next_due is not None:
                waits.append((next_due + 1) / 1000)  # the server's ms are cut off
            batch += streams.claimed(share, batches, until, fence)
        if self._closed:
            await self._give_back(batch)
            self._check_open()
        return batch, min(waits) if len(batch) < room else 0.0

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable(f"this connection to {self._session.address} is closed")

    def _clean(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="umbel-redis-clean")
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)
        return task

    async def _abandon(self, claimed: asyncio.Future[tuple[list[Delivery], float]]) -> None:
        await asyncio.wait([claimed])
        if claimed.exception() is None:
            await self._give_back(claimed.result()[0])

    async def _give_back(self, batch: Sequence[Delivery]) -> None:
        if not batch:
            return
        back = [Settlement(delivery=delivery, action=Action.REQUEUE, counted=False) for delivery in batch]
        try:
            await self._within(_LAST_WORDS, self._settle(back))
        except PublishError as error:
            log.warning("%d messages were not given back and wait for their leases to end: %s", len(batch), error)

    async def _inspect(self) -> None:
        if not self._inspected:
            await inspect(self._session)
            self._inspected = True

    # --- ending ----------------------------------------------------------------------------------

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return await self._settle(settlements) if settlements else []

    async def _settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        parts = list(streams.settling(self._keys_of, settlements, self.clock.time()))
        answers = await self._session.run([call for call, _ in parts])
        done = streams.carried_out(len(settlements), [places for _, places in parts], [lost for _, lost in answers])
        if any(created for created, _ in answers):
            new = {dead_letter_queue(one.delivery.queue) for one in settlements if one.action is Action.DEAD}
            await self._session.call(("SADD", self._registry, *new))
        return done

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        if not deliveries:
            return []
        parts = list(streams.renewing(self._keys_of, deliveries, lease, starting))
        answers = await self._session.run([call for call, _ in parts])
        return streams.carried_out(len(deliveries), [places for _, places in parts], answers)

    # --- queues ----------------------------------------------------------------------------------

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        for spec in queues:
            for argument, value in [("type", spec.type), ("exchange", spec.exchange), *spec.arguments.items()]:
                if value is not None:
                    raise PublishRefused(
                        f"queue {spec.name!r}: a Redis queue has no {argument!r}; remove it from the queue's settings"
                    )
        if queues:
            await self._refusing(self._inspect())
            await self._refusing(self._session.call(("SADD", self._registry, *(spec.name for spec in queues))))

    async def purge(self, queue: str) -> int:
        keys, total = self._keys_of(queue), 0
        most = (await self.depth([queue]))[queue].ready  # what is published meanwhile may stay
        while True:
            deleted: int = await self._session.call(PURGE.on(keys.all))
            total += deleted
            if not deleted or total >= most:
                return total

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        names = list(dict.fromkeys(queues))
        if not names:
            names = sorted(name.decode() for name in await self._session.call(("SMEMBERS", self._registry)))
        answers = await self._session.run([SURVEY.on(self._keys_of(name).all, 0) for name in names]) if names else []
        return {
            name: QueueDepth(
                ready=ready, delayed=delayed, leased=leased, oldest=None if oldest is None else oldest / 1000
            )
            for name, (ready, delayed, leased, oldest, _) in zip(names, answers, strict=True)
        }

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        return await peek(self._session, self._keys_of(queue), limit, offset)

    # --- broadcasts ------------------------------------------------------------------------------

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        """Raises ``PublishRefused`` beyond ``max_message_size``, ``BrokerUnavailable``."""
        self._check_size(len(payload), f"the broadcast to {topic!r}")
        await self._refusing(self._session.call(("PUBLISH", self._channel(topic), pack(key, payload))))

    def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        """A subscriber may fall behind by 10,000 items; then the oldest are forgotten. Raises ``BrokerUnavailable``."""
        return self._ear.hear(self._channel(topic))

    def _channel(self, topic: str) -> str:
        return f"{self.options.prefix}umbel.broadcast.{topic}"

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give back, uncounted, what was claimed and not yielded; then free everything.

        What was yielded stays leased: another transport may renew and settle it.
        """
        if self._closed:
            return
        self._closed = True
        self._over.set()
        await self._waiting.close()
        while pending := self._claiming | self._cleaning:
            await asyncio.wait(pending)
        await self._ear.close()
        self._line.close()
        await self._session.close()


def _new(queues: Sequence[Keys], answers: Sequence[int]) -> set[str]:
    """The names of those queues that may be new to the server."""
    return {keys.queue for keys, created in zip(queues, answers, strict=True) if created}
