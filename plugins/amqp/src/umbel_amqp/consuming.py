"""One consumer: messages pushed by the broker as far as credit goes, and what is left over given back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from pamqp.commands import Basic

from umbel.errors import BrokerUnavailable
from umbel.ports.transport import Credit
from umbel_amqp.channel import Channel, ChannelClosed, Raw, Receive
from umbel_amqp.connection import Connection
from umbel_amqp.frames import Consume
from umbel_amqp.holding import Tags

SILENCE: Final = 4.5
"""Seconds after which a consumer yields an empty batch: less than what the port allows."""
_LARGEST_BATCH: Final = 500
_LARGEST_PREFETCH: Final = 65_535
_PATIENCE: Final = 0.5
"""Seconds for which messages wait here for credit before others may have them."""
_CAUTION: Final = 5.0
"""Seconds for which, after that, no more is asked for than credit allows at once."""
_PAUSE: Final = 0.02
"""Least seconds between two subscriptions."""
_MANY: Final = 64
_AHEAD: Final = 256
"""Credit from which as many again are asked for, up to ``_AHEAD``, to be at hand when credit comes: who asks for so many ends
them soon, and a quorum queue sends more only once its log has each acknowledgement. Draining one goes from 3,000 to 5,400
tasks/s so."""
_WORTHWHILE: Final = 8
"""A subscription that is used up is replaced once that brings an eighth more."""


class Subscription:
    """A channel with one consumer a queue, whose prefetch is fixed for its life."""

    def __init__(self, channel: Channel, queues: Sequence[str], share: int) -> None:
        self.channel = channel
        self.tags = Tags(channel, self.release)
        self.queues = {str(number): queue for number, queue in enumerate(queues)}
        self.share = share
        self.ended = False
        self._ending: asyncio.Task[None] | None = None
        self._answers: list[asyncio.Future[object]] = []

    def begin(self, receive: Callable[[Sequence[Taken]], None]) -> None:
        call, consumers = self.channel.call, self.channel.consumers

        def receiver(consumer: str, queue: str) -> Receive:
            def received(raws: Sequence[Raw]) -> None:
                self.tags.add([raw[0] for raw in raws], consumer)
                receive([(self, queue, raw) for raw in raws])

            return received

        self._answers.append(call(Basic.Qos(0, self.share, False)))
        for consumer, queue in self.queues.items():
            consumers[consumer] = receiver(consumer, queue)
            self._answers.append(call(Consume(queue=queue, consumer_tag=consumer, arguments={})))

    async def begun(self) -> None:
        for answer in self._answers:
            await asyncio.shield(answer)

    @property
    def used_up(self) -> bool:
        return any(self.tags.out[consumer] >= self.share for consumer in self.queues)

    async def end(self) -> None:
        """Stop; whatever the broker had sent until then has arrived when this returns. Cancelling the call does not stop it.

        A quorum queue forgets to tell what it hands to a consumer in the moment of its end, and keeps it until the channel
        closes. So nothing is under way then: all that was, has come, and no acknowledgement makes room for more.
        """
        if self._ending is None:
            self.ended = True
            self.tags.pause()  # at once: an acknowledgement that came before the task begins would make room, and may be the last
            self._ending = asyncio.create_task(self._stop(), name="umbel-amqp-unsubscribe")
        await asyncio.wait([self._ending])
        self._ending.result()

    async def _stop(self) -> None:
        try:
            await self.begun()
            await self._pass()
            for answer in [self.channel.call(Basic.Cancel(consumer)) for consumer in self.queues]:
                await answer
            await self._pass()
        finally:
            self.tags.resume()

    async def _pass(self) -> None:
        """A question whose answer comes after all that was told before."""
        await self.channel.call(Basic.Qos(0, 0, False))

    def release(self) -> None:
        """Free the channel, once its consumers have ended and nothing that came by it is unsettled."""
        if self._ending is not None and self._ending.done() and not self.tags:
            self.channel.close_soon()


Taken = tuple[Subscription, str, Raw]


class Stream:
    """One subscription after another.

    What a consumer may have unsettled is fixed when it subscribes, and counts only what came by it. So it is the credit's
    limit, twice that where it is high, and a new subscription follows when credit is left that the present one cannot use.
    That may bring more than there is credit for: what waits here for longer than ``_PATIENCE`` is given back, and for a while
    no more is asked for than credit allows at once.
    """

    def __init__(
        self,
        connection: Connection,
        queues: Sequence[str],
        credit: Credit,
        give_back: Callable[[Sequence[Taken]], Awaitable[None]],
        retire: Callable[[Subscription], None],
    ) -> None:
        self._connection = connection
        self._queues = list(dict.fromkeys(queues))
        self._credit = credit
        self._give_back = give_back
        self._retire = retire
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Taken] = deque()
        """Received and not yielded."""
        self._news = asyncio.Event()
        self._subscription: Subscription | None = None
        self._leaving: list[Subscription] = []
        """Former ones that may not have ended yet."""
        self._subscribed_at = -1.0
        self._stuck_at: float | None = None
        self._cautious_until = 0.0
        self._closed = False
        self._fault: Exception | None = None

    # --- what the broker tells -----------------------------------------------------------------------

    def _received(self, taken: Sequence[Taken]) -> None:
        self._waiting.extend(taken)
        self._news.set()

    def stop(self, reason: Exception) -> None:
        """Let whoever waits for the next batch have ``reason`` instead."""
        self._fault = reason if isinstance(reason, BrokerUnavailable) else BrokerUnavailable(f"consuming: {reason}")
        self._news.set()

    def _cancelled(self, _: str) -> None:
        self.stop(
            BrokerUnavailable(f"{self._connection.where} ended a consumer of {self._queues}: was a queue deleted?")
        )

    # --- batches -------------------------------------------------------------------------------------

    async def next(self) -> list[Taken]:
        """Messages for which credit is taken; empty after ``SILENCE``. Raises ``BrokerUnavailable``."""
        until = self._loop.time() + SILENCE
        while True:
            if self._fault is not None:
                raise self._fault
            now = self._loop.time()
            room = self._credit.available
            if self._waiting and room:
                self._stuck_at = None
                batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting), _LARGEST_BATCH))]
                self._credit.take(len(batch))
                return batch
            if now >= until:
                return []
            if not room:
                await self._wait_for_credit(until, now)
            elif not self._starving(room):
                await self._hear(until - now)
            elif now < self._subscribed_at + _PAUSE:
                await self._hear(self._subscribed_at + _PAUSE - now)
            else:
                await self._subscribe(room)

    def _starving(self, room: int) -> bool:
        """Whether there is credit that no consumer may use."""
        present = self._subscription
        return present is None or (present.used_up and room * _WORTHWHILE >= present.share)

    async def _hear(self, seconds: float) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return

    async def _wait_for_credit(self, until: float, now: float) -> None:
        patience = until
        if self._waiting:
            self._stuck_at = now if self._stuck_at is None else self._stuck_at
            patience = min(until, self._stuck_at + _PATIENCE)
            if now >= patience:
                self._stuck_at = None
                self._cautious_until = now + _CAUTION
                await self._unsubscribe()
                return
        paid = asyncio.ensure_future(self._credit.wait())
        self._news.clear()
        heard = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait([paid, heard], timeout=patience - now, return_when=asyncio.FIRST_COMPLETED)
        finally:
            paid.cancel()
            heard.cancel()

    # --- subscriptions -------------------------------------------------------------------------------

    async def _subscribe(self, room: int) -> None:
        self._subscribed_at = self._loop.time()
        channel = await self._connection.channel()
        cautious = self._subscribed_at < self._cautious_until
        share = max(1, room // len(self._queues)) if cautious else self._credit.limit
        if share >= _MANY:
            share += min(share, _AHEAD)
        self._replace()
        subscription = self._subscription = Subscription(channel, self._queues, min(share, _LARGEST_PREFETCH))
        channel.on_cancel = self._cancelled
        channel.on_death.append(lambda reason: None if subscription.ended else self.stop(reason))
        subscription.begin(self._received)
        await self._leave()
        await subscription.begun()

    def _replace(self) -> None:
        if self._subscription is not None:
            self._leaving.append(self._subscription)
            self._subscription = None

    async def _leave(self) -> None:
        """End what was replaced; a call that was cancelled here leaves that to the next."""
        while self._leaving:
            subscription = self._leaving[0]
            try:
                await subscription.end()
            except (BrokerUnavailable, ChannelClosed):
                self._left(subscription)
                raise
            self._left(subscription)

    def _left(self, subscription: Subscription) -> None:
        if subscription in self._leaving:  # two may have waited for its end
            self._leaving.remove(subscription)
            self._retire(subscription)

    async def _unsubscribe(self) -> None:
        """Ask for nothing more, and give back what waits."""
        self._replace()
        await self._leave()
        waiting, self._waiting = list(self._waiting), deque()
        if waiting:
            await self._give_back(waiting)

    async def close(self) -> None:
        """Stop, and give back what was not yielded."""
        if not self._closed:
            self._closed = True
            try:
                await self._unsubscribe()
            except (BrokerUnavailable, ChannelClosed):
                self._waiting.clear()  # the channel is dead: what it held is back in its queues
