"""Wrong transports: deadlines, cancellation, lost connections, the end, leaks, and broadcasts."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from attrs import evolve

from umbel.errors import BrokerUnavailable
from umbel.model import Delivery, Message, Settlement
from umbel.ports.transport import Credit, QueueDepth

from ..honest.transport import HonestTransport, Kept, ModestTransport
from .house import House
from .transport import TransportCage

HOUSE = House(__file__, TransportCage)


@HOUSE.breaks("publish_past_its_deadline_raises")
class IgnoresTheDeadline(HonestTransport):
    unreachable: ClassVar[bool] = True

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if timeout == 0.3:
            await asyncio.sleep(2.1)
        await super().publish(messages, timeout=timeout)


@HOUSE.breaks("publish_past_its_deadline_raises")
class SwallowsErrors(HonestTransport):
    unreachable: ClassVar[bool] = True


@HOUSE.breaks("a_cancelled_publish_harms_nobody")
class SendsAgainWhenCancelled(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await super().publish(messages, timeout=timeout)
        if messages and messages[0].id.startswith("cut"):
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                self.accept(messages)
                raise


@HOUSE.breaks("a_cancelled_consumer_keeps_nothing")
class KeepsWhatIsCancelled(HonestTransport):
    async def consume(self, queues: Sequence[str], *, credit: Credit, lease: float) -> Any:
        async for batch in super().consume(queues, credit=credit, lease=lease):
            if batch and credit.limit == 1 and batch[0].message.body == batch[0].message.id.encode():
                await asyncio.sleep(0.002)
            yield batch


@HOUSE.breaks("use_after_close_raises")
class LivesOnAfterClose(HonestTransport):
    async def purge(self, queue: str) -> int:
        return 0 if self.closed else await super().purge(queue)


@HOUSE.breaks("close_is_harmless_unused_and_twice")
class ClosesOnce(HonestTransport):
    async def close(self) -> None:
        if self.closed and not self.broker.queues:
            raise RuntimeError("closed already")
        await super().close()


@HOUSE.breaks("no_task_is_left_behind")
class LeaksATask(HonestTransport):
    async def close(self) -> None:
        if not self.closed and self.broker.queues:
            self.task = asyncio.ensure_future(asyncio.sleep(3600))
        await super().close()


@HOUSE.breaks("no_thread_is_left_behind")
class LeaksAThread(HonestTransport):
    async def close(self) -> None:
        if not self.closed and self.broker.queues:
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        await super().close()


@HOUSE.breaks("no_file_or_socket_is_left_behind")
class LeaksAFile(HonestTransport):
    async def close(self) -> None:
        if not self.closed and self.broker.queues:
            os.open(os.devnull, os.O_RDONLY)
        await super().close()


@HOUSE.breaks("a_blocking_publish_keeps_the_promises_of_publish")
class BlockingPublishLivesOn(HonestTransport):
    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        self.accept(messages)


@HOUSE.breaks("a_broadcast_reaches_all_who_listen")
class SpeaksToOne(HonestTransport):
    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        everybody = self.broker.listeners
        self.broker.listeners = everybody[-1:]
        try:
            await super().broadcast(topic, payload, key=key)
        finally:
            self.broker.listeners = everybody


@HOUSE.breaks("a_broadcast_is_not_kept")
class KeepsBroadcasts(HonestTransport):
    def first_heard(self, topic: str) -> deque[tuple[str, bytes]]:
        return deque((key, payload) for place, key, payload in self.broker.said if place == topic and key)


@HOUSE.breaks("a_driver_says_what_it_is")
class HidesAnAbility(HonestTransport):
    capabilities = evolve(HonestTransport.capabilities, broadcast=False)


@HOUSE.breaks("a_cancelled_settlement_can_be_repeated")
class TakesAnAttemptForTheDeed(HonestTransport):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        self.tried, before = getattr(self, "tried", set()), getattr(self, "tried", set())
        self.tried = before | {settlement.delivery.token for settlement in settlements}
        await asyncio.sleep(0.001)
        fresh = [settlement for settlement in settlements if settlement.delivery.token not in before]
        done = iter(await super().settle(fresh))
        return [settlement.delivery.token not in before and next(done) for settlement in settlements]


@HOUSE.breaks("a_consumer_that_is_closed_gives_back_what_it_had_not_handed_out")
class KeepsWhatItHadNotHandedOut(HonestTransport):
    async def consume(self, queues: Sequence[str], *, credit: Credit, lease: float) -> Any:
        async for batch in super().consume(queues, credit=credit, lease=lease):
            if credit.limit == 50 and len(batch) == 50:
                yield batch[:25]
                yield batch[25:]
            else:
                yield batch


@HOUSE.breaks("a_cancelled_call_disturbs_no_later_one")
class AnswersTheCallBefore(HonestTransport):
    """As a client of a protocol without numbers, which reads on where a cancelled call has not read its answer."""

    unread: Mapping[str, QueueDepth] | None = None

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        if self.unread is not None:
            unread, self.unread = self.unread, None
            return unread
        answer = await super().depth(queues)
        try:
            await asyncio.sleep(0.0005)
        except asyncio.CancelledError:
            self.unread = answer
            raise
        return answer


@HOUSE.breaks("what_was_accepted_outlives_the_broker")
class KeepsThemInMemoryOnly(HonestTransport):
    def restart(self) -> None:
        super().restart()
        self.broker.kept.clear()


@HOUSE.breaks("a_lost_connection_loses_no_message")
class HoldsForTheDead(HonestTransport):
    def sever(self) -> None:
        super().sever()
        for kept in self.broker.kept:
            kept.until = float("inf") if kept.holder is self else kept.until

    def restart(self) -> None:
        pass


@HOUSE.breaks("a_lost_connection_loses_no_message", "a_consumer_whose_connection_is_lost_is_told_or_goes_on")
class ForgetsOnALostConnection(ModestTransport):
    def sever(self) -> None:
        self.broker.kept = [kept for kept in self.broker.kept if kept.holder is not self]


@HOUSE.breaks("a_consumer_whose_connection_is_lost_is_told_or_goes_on")
class WaitsForTheDead(HonestTransport):
    async def consume(self, queues: Sequence[str], *, credit: Credit, lease: float) -> Any:
        try:
            async for batch in super().consume(queues, credit=credit, lease=lease):
                yield batch
        except BrokerUnavailable:
            while self.severed and not self.closed:
                await self.pause()
                yield []
            raise


@HOUSE.breaks("the_leases_of_a_closed_transport_pass_to_another")
class GivesBackWhatRuns(HonestTransport):
    async def close(self) -> None:
        for kept in self.broker.kept:
            if kept.holder is self and not self.closed:
                kept.until, kept.holder = 0.0, None
        await super().close()


@HOUSE.breaks("the_leases_of_a_closed_transport_pass_to_another")
class SettlesOnlyItsOwn(HonestTransport):
    def held(self, delivery: Delivery) -> Kept | None:
        kept = super().held(delivery)
        return kept if kept is not None and kept.holder is self else None


@HOUSE.breaks("use_after_close_raises")
class ListensAfterClose(HonestTransport):
    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        if not self.closed:
            await super().broadcast(topic, payload, key=key)


@HOUSE.breaks("a_driver_says_what_it_is")
class DeclaresTooManyPriorities(ModestTransport):
    capabilities = evolve(ModestTransport.capabilities, priority_levels=255)


globals().update(HOUSE.tests())
