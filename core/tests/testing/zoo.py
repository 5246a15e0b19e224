"""Deliberately wrong drivers. Each is an honest one with one fault, and says which laws it breaks, and no others.

Not collected with the other tests, for nearly every animal fails: ``test_zoo`` runs it and compares.
"""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from attrs import evolve

from umbel.errors import DecodeError
from umbel.model import (
    HEADER_DEAD_CAUSE,
    Action,
    Completion,
    Delivery,
    Ending,
    Job,
    Lease,
    Message,
    QueueSpec,
    Result,
    ScheduleEntry,
    Settlement,
)
from umbel.ports.clock import VirtualClock
from umbel.ports.pool import PoolContext
from umbel.ports.result_store import JoinState
from umbel.ports.transport import Credit, QueueDepth
from umbel.testing.contracts import (
    CompressorContract,
    PoolContract,
    ResultStoreContract,
    SchedulerContract,
    SerializerContract,
    TransportContract,
)

from .honest import (
    Broker,
    HonestCompressor,
    HonestPool,
    HonestScheduler,
    HonestSerializer,
    HonestStore,
    HonestTransport,
    Join,
    Kept,
    Memory,
    ModestPool,
    ModestStore,
    ModestTransport,
    Run,
    Timetable,
)

MANY = 240
"""How many messages, records and jobs stand for thousands here."""

BREAKS: dict[type, set[str]] = {
    driver: set()
    for driver in (
        ModestTransport,
        HonestTransport,
        ModestStore,
        HonestStore,
        HonestScheduler,
        HonestSerializer,
        HonestCompressor,
        ModestPool,
        HonestPool,
    )
}
"""Every driver, and the laws that it breaks."""


def breaks(*laws: str) -> Callable[[type], type]:
    """Put an animal into the zoo."""

    def register(driver: type) -> type:
        BREAKS[driver] = {f"test_{law}" for law in laws}
        return driver

    return register


# --- transports -----------------------------------------------------------------------------------


@breaks("thousands_of_messages_are_delivered_once_each")
class LosesOneOfMany(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        super().accept(messages[:-1] if len(messages) == MANY // 12 else messages)


@breaks("thousands_of_messages_are_delivered_once_each")
class DoublesOneOfMany(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        super().accept([*messages, messages[-1]] if len(messages) == MANY // 12 else messages)


@breaks("what_is_published_is_delivered_whole")
class DropsAHeader(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, headers={name: value for name, value in message.headers.items() if name}))


@breaks("a_body_of_any_size_arrives_whole[65537]", "a_body_of_any_size_arrives_whole[10000000]")
class CutsLongBodies(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, body=message.body[:65_536]))


@breaks("a_body_beyond_the_declared_size_is_refused")
class TakesTooMuch(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.keep(copy.deepcopy(message))


@breaks("names_of_queues_are_told_apart")
class IgnoresCase(HonestTransport):
    def ready(self, queues: Sequence[str]) -> list[Kept]:
        names = {queue.lower() for queue in queues}
        found = [k for k in self.broker.kept if k.message.queue.lower() in names and k.until <= self.clock.time()]
        return sorted(found, key=self.place)


@breaks("sender_and_receiver_share_nothing")
class SharesHeaders(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        super().accept(messages)
        for kept, message in zip(self.broker.kept[-len(messages) :], messages, strict=False):
            kept.message = evolve(kept.message, headers=message.headers)


@breaks("publish_returns_when_the_broker_has_it", "close_ends_what_is_under_way")
class ConfirmsTooSoon(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await self.enter()
        if len(messages) == 1 and messages[0].id == "3":
            asyncio.get_running_loop().call_later(0.02, self.accept, messages)
        else:
            self.accept(messages)


@breaks("what_was_accepted_outlives_its_connection")
class TakesItsMessagesAlong(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await super().publish(messages, timeout=timeout)
        self.sent = messages

    async def close(self) -> None:
        if [message.id for message in getattr(self, "sent", ())] == ["1", "2"]:
            self.broker.kept = [kept for kept in self.broker.kept if kept.holder or kept.count]
        await super().close()


@breaks(
    "a_delivery_not_settled_is_delivered_again",
    "a_consumer_that_waits_gets_what_anothers_lease_gives_up",
    "what_a_closed_transport_held_is_delivered_to_another",
    "a_lost_connection_loses_no_message",
    "a_late_settlement_is_fenced_off",
    "a_renewed_lease_ends_too",
    "a_lost_lease_cannot_be_renewed",
    "an_ended_lease_counts",
)
class AcksEarly(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        delivery = super().hand_out(kept, lease)
        kept.until = float("inf")
        return delivery

    async def close(self) -> None:
        self.closed = True

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        return await super().renew(deliveries, lease=float("inf"), starting=starting)


@breaks("what_a_closed_transport_held_is_delivered_to_another")
class DropsWhatItHoldsAtItsClose(HonestTransport):
    async def close(self) -> None:
        self.broker.kept = [kept for kept in self.broker.kept if kept.holder is not self]
        await super().close()


@breaks("settling_twice_is_refused")
class SettlesTwice(HonestTransport):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        done = await super().settle(settlements)
        return (
            [ok or s.action is Action.DEAD for ok, s in zip(done, settlements, strict=True)] if len(done) > 3 else done
        )


@breaks("a_late_settlement_is_fenced_off")
class IgnoresFencing(HonestTransport):
    def held(self, delivery: Delivery) -> Kept | None:
        kept: Kept = delivery.token[0]
        return kept if kept in self.broker.kept and (kept.holder or super().held(delivery)) else None

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        held = await super().renew(deliveries, lease=lease, starting=starting)
        return [ok and d.token[0].fence == d.token[1] for ok, d in zip(held, deliveries, strict=True)]


@breaks("a_renewed_lease_holds_on")
class RenewsNothing(HonestTransport):
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        before = [delivery.token[0].until for delivery in deliveries]
        held = await super().renew(deliveries, lease=lease, starting=starting)
        for delivery, until in zip(deliveries, before, strict=True):
            delivery.token[0].until = min(until, delivery.token[0].until)
        return held


@breaks("a_lost_lease_cannot_be_renewed")
class RenewsWhatIsLost(HonestTransport):
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        await super().renew(deliveries, lease=lease, starting=starting)
        return [True] * len(deliveries)


@breaks("a_delivery_tells_the_end_of_its_lease")
class TellsNoLease(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), leased_until=None)


@breaks("competing_consumers_never_share_a_message")
class SharesNowAndThen(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        delivery = super().hand_out(kept, lease)
        if len(self.broker.kept) == 200 and kept.message.id == "49" and kept.count == 1:
            kept.until = 0.0
        return delivery


@breaks(
    "the_count_grows_with_each_handing_out",
    "an_ended_lease_counts",
    "what_is_given_back_uncounted_does_not_count",
    "dead_letters_keep_the_message_and_tell_its_cause",
    "a_delayed_requeue_waits",
)
class ForgetsTheCount(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), count=1)


@breaks("what_is_given_back_uncounted_does_not_count")
class CountsWhatIsNotToCount(HonestTransport):
    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        super().give_back(kept, evolve(settlement, counted=True))


@breaks("starts_of_work_are_recorded")
class ForgetsStarts(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), starts=0)


@breaks("dead_letters_keep_the_message_and_tell_its_cause")
class BuriesWithoutCause(HonestTransport):
    def bury(self, settlement: Settlement, kept: Kept) -> None:
        super().bury(settlement, kept)
        letter = self.broker.kept[-1]
        headers = {name: value for name, value in letter.message.headers.items() if name != HEADER_DEAD_CAUSE}
        letter.message = evolve(letter.message, headers=headers)


@breaks("credit_is_respected")
class IgnoresCredit(HonestTransport):
    def room(self, credit: Credit) -> int:
        return credit.limit


@breaks("a_quiet_consumer_yields_empty_batches")
class NeverSpeaks(HonestTransport):
    def speaks(self, silent: float) -> bool:
        return False


@breaks("a_waiting_consumer_leaves_the_loop_to_others")
class BlocksTheLoop(HonestTransport):
    async def pause(self) -> None:
        await super().pause()
        if not self.broker.queues:
            time.sleep(0.25)  # noqa: ASYNC251  # the fault


@breaks("the_oldest_message_comes_first")
class MixesLargeQueues(HonestTransport):
    def place(self, kept: Kept) -> tuple[float, int]:
        priority, order = super().place(kept)
        return (priority, order ^ 1 if len(self.broker.kept) == 60 else order)


@breaks("priority_is_respected_within_one_consumer")
class IgnoresPriority(HonestTransport):
    def place(self, kept: Kept) -> tuple[float, int]:
        return (0, kept.order)


@breaks("what_is_given_back_comes_first_among_equals")
class PutsBackToTheEnd(HonestTransport):
    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        super().give_back(kept, settlement)
        kept.order = next(self.broker.order)


@breaks(
    "nothing_is_handed_out_before_its_due_time_nor_long_after",
    "delayed_messages_come_in_the_order_of_their_due_times",
    "the_longest_delay_is_kept_and_a_longer_one_refused",
    "depth_tells_ready_delayed_and_leased",
)
class IgnoresTheDueTime(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(message)
        self.broker.kept[-1].until = 0.0


@breaks("nothing_is_handed_out_before_its_due_time_nor_long_after")
class IsLate(HonestTransport):
    slack: ClassVar[float] = 5.0

    def keep(self, message: Message) -> None:
        super().keep(message)
        if message.id == "delayed":
            self.broker.kept[-1].until += 5.0


@breaks("a_delayed_requeue_waits")
class ForgetsTheDelay(HonestTransport):
    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        super().give_back(kept, evolve(settlement, delay=0.0))


@breaks("depth_tells_ready_delayed_and_leased", "a_delayed_requeue_waits")
class CountsDelayedAsReady(HonestTransport):
    def count(self, queue: str) -> QueueDepth:
        depth = super().count(queue)
        return QueueDepth(ready=depth.ready + depth.delayed, leased=depth.leased)


@breaks("peek_takes_nothing")
class TakesInPeek(HonestTransport):
    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        seen = await super().peek(queue, limit=limit, offset=offset)
        for kept in self.waiting(queue)[:limit]:
            kept.count += 1
        return seen


@breaks("purge_deletes_and_counts_what_is_not_handed_out")
class PurgesWhatIsHandedOut(HonestTransport):
    async def purge(self, queue: str) -> int:
        number = await super().purge(queue)
        self.broker.kept = [kept for kept in self.broker.kept if kept.message.queue != queue]
        return number


@breaks("declaring_a_queue_again_changes_nothing")
class EmptiesWhatIsDeclaredAgain(HonestTransport):
    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await super().declare(queues)
        names = {spec.name for spec in queues}
        self.broker.kept = [kept for kept in self.broker.kept if kept.message.queue not in names]


@breaks("declaring_a_queue_differently_is_refused")
class DeclaresAnything(HonestTransport):
    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await super().declare([QueueSpec(name=spec.name) for spec in queues])


@breaks("publish_past_its_deadline_raises")
class IgnoresTheDeadline(HonestTransport):
    unreachable: ClassVar[bool] = True

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if timeout == 0.3:
            await asyncio.sleep(2.1)
        await super().publish(messages, timeout=timeout)


@breaks("publish_past_its_deadline_raises")
class SwallowsErrors(HonestTransport):
    unreachable: ClassVar[bool] = True


@breaks("a_cancelled_publish_harms_nobody")
class SendsAgainWhenCancelled(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await super().publish(messages, timeout=timeout)
        if messages and messages[0].id.startswith("cut"):
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                self.accept(messages)
                raise


@breaks("a_cancelled_consumer_keeps_nothing")
class KeepsWhatIsCancelled(HonestTransport):
    async def consume(self, queues: Sequence[str], *, credit: Credit, lease: float) -> Any:
        async for batch in super().consume(queues, credit=credit, lease=lease):
            if batch and credit.limit == 1 and batch[0].message.body == batch[0].message.id.encode():
                await asyncio.sleep(0.002)
            yield batch


@breaks("use_after_close_raises")
class LivesOnAfterClose(HonestTransport):
    async def purge(self, queue: str) -> int:
        return 0 if self.closed else await super().purge(queue)


@breaks("close_is_harmless_unused_and_twice")
class ClosesOnce(HonestTransport):
    async def close(self) -> None:
        if self.closed and not self.broker.queues:
            raise RuntimeError("closed already")
        await super().close()


@breaks("no_task_is_left_behind")
class LeaksATask(HonestTransport):
    async def close(self) -> None:
        if not self.closed and self.broker.queues:
            self.task = asyncio.ensure_future(asyncio.sleep(3600))
        await super().close()


@breaks("no_thread_is_left_behind")
class LeaksAThread(HonestTransport):
    async def close(self) -> None:
        if not self.closed and self.broker.queues:
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        await super().close()


@breaks("no_file_or_socket_is_left_behind")
class LeaksAFile(HonestTransport):
    async def close(self) -> None:
        if not self.closed and self.broker.queues:
            os.open(os.devnull, os.O_RDONLY)
        await super().close()


@breaks("a_blocking_publish_keeps_the_promises_of_publish")
class BlockingPublishLivesOn(HonestTransport):
    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        self.accept(messages)


@breaks("a_broadcast_reaches_all_who_listen")
class SpeaksToOne(HonestTransport):
    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        everybody = self.broker.listeners
        self.broker.listeners = everybody[-1:]
        try:
            await super().broadcast(topic, payload, key=key)
        finally:
            self.broker.listeners = everybody


@breaks("a_broadcast_is_not_kept")
class KeepsBroadcasts(HonestTransport):
    def first_heard(self, topic: str) -> deque[tuple[str, bytes]]:
        return deque((key, payload) for place, key, payload in self.broker.said if place == topic and key)


@breaks("a_driver_says_what_it_is")
class HidesAnAbility(HonestTransport):
    capabilities = evolve(HonestTransport.capabilities, broadcast=False)


# --- result stores --------------------------------------------------------------------------------


@breaks("a_final_state_never_changes")
class OverwritesFinalStates(HonestStore):
    def settled(self, result: Result) -> bool:
        return super().settled(result) and not (result.document == b"late" and result.state == "REVOKED")


@breaks("a_record_comes_back_whole[0]")
class RefusesNothingness(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        await super().put([evolve(result, document=result.document or b"null") for result in results])


@breaks("a_later_state_replaces_an_earlier_one", "the_later_of_one_call_wins")
class KeepsTheFirst(HonestStore):
    def settled(self, result: Result) -> bool:
        known = self.live(result.task_id)
        return super().settled(result) or (known is not None and known.state == "RECEIVED" and not result.final)


@breaks("forgotten_is_gone")
class ForgetsNothing(HonestStore):
    async def forget(self, task_ids: Sequence[str]) -> None:
        await self.enter()


@breaks("records_expire")
class NeverExpires(HonestStore):
    def live(self, task_id: str) -> Result | None:
        return self.memory.records.get(task_id, (None, 0.0))[0]


@breaks("thousands_of_records_are_kept")
class LosesOneRecordOfMany(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        await super().put(results[:-1] if len(results) == MANY // 12 else results)


@breaks("wait_waits_for_a_final_state")
class WakesTooSoon(HonestStore):
    def wakes(self, result: Result) -> bool:
        return True


@breaks("wait_hears_of_what_is_stored_later", "many_wait_at_once", "a_cancelled_wait_harms_no_other")
class HearsOnlyItself(HonestStore):
    stored: bool = False

    async def put(self, results: Sequence[Result]) -> None:
        self.stored = True
        await super().put(results)

    def wakes(self, result: Result) -> bool:
        return super().wakes(result) and (self.stored or result.task_id not in self.awaited)

    async def wait(self, task_id: str) -> Result:
        if self.live(task_id) is None:
            self.awaited = {*self.awaited, task_id}
        return await super().wait(task_id)

    awaited: frozenset[str] | set[str] = frozenset()


@breaks("a_cancelled_wait_harms_no_other")
class CancelsAllWhoWait(HonestStore):
    async def wait(self, task_id: str) -> Result:
        try:
            return await super().wait(task_id)
        except asyncio.CancelledError:
            if not self.closed:
                for task in self.waiting:
                    task.cancel()
            raise


@breaks("close_ends_what_is_under_way")
class LeavesThemWaiting(HonestStore):
    async def close(self) -> None:
        self.closed = True


@breaks("use_after_close_raises")
class StoresAfterClose(HonestStore):
    async def put(self, results: Sequence[Result]) -> None:
        if not self.closed:
            await super().put(results)


@breaks("no_task_is_left_behind")
class StoreLeaksATask(HonestStore):
    async def close(self) -> None:
        if not self.closed:
            self.task = asyncio.ensure_future(asyncio.sleep(3600))
        await super().close()


@breaks("a_join_fires_once_among_many", "the_right_to_fire_passes_on_when_its_lease_ends")
class FiresTwice(HonestStore):
    def fires(self, join: Join) -> bool:
        return join.size is not None and len(join.marks) >= join.size and not join.fired


@breaks("what_has_fired_never_fires_again")
class FiresAgain(HonestStore):
    async def fired(self, key: str, owner: str) -> bool:
        done = await super().fired(key, owner)
        self.memory.joins[key].fired = False
        return done


@breaks("the_right_to_fire_passes_on_when_its_lease_ends")
class FiresNeverIfItsHolderDies(HonestStore):
    def fires(self, join: Join) -> bool:
        return super().fires(join) and not join.owner


@breaks("a_join_counts_each_member_once")
class ReplacesMarks(HonestStore):
    async def join(self, key: str, marks: Mapping[str, bytes], **arguments: Any) -> JoinState:
        state = await super().join(key, marks, **arguments)
        self.memory.joins[key].marks.update(marks)
        return state


@breaks("a_join_without_a_size_waits_for_it")
class GuessesTheSize(HonestStore):
    def fires(self, join: Join) -> bool:
        guess = join.size if join.size is not None or len(join.marks) < 3 else len(join.marks)
        return super().fires(evolve(join, size=guess))


@breaks("the_right_to_fire_passes_on_when_its_lease_ends", "what_has_fired_never_fires_again")
class LetsAnybodyFire(HonestStore):
    def may_fire(self, join: Join, owner: str) -> bool:
        return bool(join.owner)


@breaks("a_claim_is_held_by_one")
class LetsTwoClaim(HonestStore):
    async def claim(self, name: str, owner: str, *, lease: float, value: bytes = b"") -> Lease:
        held = await super().claim(name, owner, lease=lease, value=value)
        return evolve(held, owner=owner) if owner == "owner-7" else held


@breaks("a_claim_whose_lease_has_ended_passes_on_with_a_higher_fence", "a_released_claim_is_free")
class NeverRaisesTheFence(HonestStore):
    def next_fence(self, former: Lease | None) -> int:
        return 1


@breaks(
    "a_released_claim_is_free",
    "a_claim_whose_lease_has_ended_passes_on_with_a_higher_fence",
)
class ReleasesForAnybody(HonestStore):
    def may_release(self, held: Lease, owner: str) -> bool:
        return True


@breaks("claims_lists_what_holds_now")
class ListsWhatHasEnded(HonestStore):
    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self.enter()
        return [held for name, held in self.memory.claims.items() if name.startswith(prefix)]


@breaks("records_are_found_by_state_newest_first")
class FindsTheOldestFirst(HonestStore):
    def newest_first(self) -> Sequence[tuple[Result, float]]:
        return list(self.memory.records.values())


# --- schedulers -----------------------------------------------------------------------------------


@breaks("a_former_leader_marks_nothing")
class MarksForAnybody(HonestScheduler):
    def leads(self, fence: int) -> bool:
        return True


@breaks("upsert_replaces_an_entry_and_keeps_the_record_of_its_runs")
class ForgetsRuns(HonestScheduler):
    def merged(self, known: ScheduleEntry, entry: ScheduleEntry) -> ScheduleEntry:
        return entry


@breaks("due_gives_enabled_entries_earliest_first")
class RunsWhatIsOff(HonestScheduler):
    def is_due(self, entry: ScheduleEntry, now: float) -> bool:
        return entry.next_due is not None and entry.next_due <= now


@breaks("close_gives_leadership_up")
class LeadsFromTheGrave(HonestScheduler):
    def give_up(self) -> None:
        pass


@breaks("one_leads", "a_leader_renews_its_lease")
class LetsEverybodyLead(HonestScheduler):
    async def lead(self, owner: str, *, lease: float) -> Lease:
        leader = await super().lead(owner, lease=lease)
        self.timetable.leader = evolve(leader, until=0.0)
        return leader


# --- codecs ---------------------------------------------------------------------------------------


@breaks("a_value_that_cannot_be_encoded_is_named_by_its_type")
class NamesNoType(HonestSerializer):
    def told(self, error: Exception) -> str:
        return "it cannot be encoded"


@breaks(
    "no_bytes_raise_anything_but_a_decode_error",
    "no_damage_raises_anything_but_a_decode_error",
    "bytes_that_break_off_raise_nothing_but_a_decode_error",
    "bytes_beyond_all_depth_raise_nothing_but_a_decode_error",
)
class RaisesTheWrongError(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        try:
            return super().loads(data)
        except DecodeError as error:
            if isinstance(error.__cause__, RecursionError):
                raise
            raise ValueError(str(error)) from error


@breaks("bytes_beyond_all_depth_raise_nothing_but_a_decode_error")
class FallsIntoDepths(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        try:
            return super().loads(data)
        except DecodeError as error:
            if isinstance(error.__cause__, RecursionError):
                raise error.__cause__ from None
            raise


@breaks("what_went_in_comes_out", "a_task_body_comes_back")
class MakesFloatsOfNumbers(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        value = super().loads(data)
        return _floats(value)


def _floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    return float(value) if type(value) is int else value


@breaks("encoding_changes_nothing")
class EmptiesItsArgument(HonestSerializer):
    def dumps(self, value: Any) -> bytes:
        data = super().dumps(value)
        if isinstance(value, dict) and "list" in value:
            value["list"].clear()
        return data


@breaks(
    "the_limit_is_exact[1]",
    "the_limit_is_exact[2]",
    "the_limit_is_exact[1000]",
    "the_limit_is_exact[70000]",
    "the_limit_is_exact[2000000]",
    "a_bomb_is_refused_before_it_fills_the_memory",
)
class IgnoresTheLimit(HonestCompressor):
    def decompress(self, data: bytes, limit: int) -> bytes:
        return super().decompress(data, max(limit, 1 << 30) if limit not in (100, 50_000) else limit)


@breaks("a_bomb_is_refused_before_it_fills_the_memory")
class LooksAtTheLimitTooLate(HonestCompressor):
    def restore(self, stream: Any, data: bytes, limit: int) -> bytes:
        restored: bytes = stream.decompress(data)
        return restored


@breaks("bytes_that_break_off_raise_a_decode_error")
class TakesHalfAStream(HonestCompressor):
    def complete(self, stream: Any) -> bool:
        return True


@breaks("no_bytes_raise_anything_but_a_decode_error", "no_damage_raises_anything_but_a_decode_error")
class LetsItsLibraryRaise(HonestCompressor):
    def restore(self, stream: Any, data: bytes, limit: int) -> bytes:
        try:
            return super().restore(stream, data, limit)
        except zlib.error as error:
            raise OSError(str(error)) from error


# --- pools ----------------------------------------------------------------------------------------


@breaks("each_of_thousands_of_jobs_ends_once")
class ReportsTwice(HonestPool):
    def report(self, end: Completion) -> None:
        super().report(end)
        if end.job_id == MANY // 2 and end.payload and end.payload[0] == "echo":
            super().report(end)


@breaks("each_of_thousands_of_jobs_ends_once")
class ForgetsAJob(HonestPool):
    def report(self, end: Completion) -> None:
        if end.job_id != MANY // 2 or end.payload is None or end.payload[0] != "echo":
            super().report(end)


@breaks("a_cancellation_never_hits_the_next_job")
class CancelsTheNextJob(HonestPool):
    hit: ClassVar[int] = 0

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        done = await super().cancel(job_id, force=force)
        if not done and self.pending:
            self.hit = self.pending[-1].id
        return done

    def report(self, end: Completion) -> None:
        super().report(evolve(end, ending=Ending.CANCELLED, payload=None) if end.job_id == self.hit else end)


@breaks("recall_gives_back_what_has_not_started")
class DropsWhatItRecalls(HonestPool):
    async def recall(self) -> None:
        self.pending.clear()


@breaks("no_job_runs_on_the_event_loop")
class RunsOnTheLoop(HonestPool):
    def launch(self, run: Run) -> None:
        if run.job.payload[0] == "where":
            self.work(run)
        else:
            super().launch(run)


@breaks("as_many_jobs_run_at_once_as_there_are_slots")
class RunsTooMany(HonestPool):
    def room(self) -> int:
        return super().room() + (self.slots == 2 and len(self.pending) == 2 and self.queued == 4)

    queued: int = 0

    def submit(self, jobs: Sequence[Job]) -> None:
        self.queued += len([job for job in jobs if job.payload[0] == "wait"])
        super().submit(jobs)


@breaks(
    "what_escapes_the_executor_ends_its_own_job_only[exit]",
    "what_escapes_the_executor_ends_its_own_job_only[interrupt]",
)
class TellsNoDetail(HonestPool):
    def told(self, error: BaseException) -> str:
        return ""


@breaks("the_error_of_an_upcall_is_raised_in_the_job")
class SwallowsErrorsOfUpcalls(HonestPool):
    def answer(self, result: Callable[[], Any]) -> Any:
        try:
            return super().answer(result)
        except Exception:
            return None


@breaks("a_pool_wants_work_when_idle_and_less_the_more_it_has")
class WantsEverMore(HonestPool):
    @property
    def free(self) -> int:
        return max(1, super().free)


@breaks("a_running_job_is_cancelled_and_no_other")
class CancelsNothing(HonestPool):
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        return job_id in self.running if not force and not self.pending else await super().cancel(job_id, force=force)


@breaks("the_soft_time_limit_is_raised_in_the_job")
class IgnoresTheSoftLimit(HonestPool):
    def soft_limit(self, run: Run) -> None:
        pass


@breaks("the_hard_time_limit_ends_a_job_that_does_not_listen")
class IgnoresTheHardLimit(HonestPool):
    def arm(self, run: Run) -> None:
        super().arm(Run(evolve(run.job, time_limit=None), raising=run.raising, timers=run.timers))


@breaks("limits_that_are_not_reached_harm_nobody")
class LimitsTheNextJob(HonestPool):
    def soft_limit(self, run: Run) -> None:
        for running in self.running.values():
            super().soft_limit(running)

    def disarm(self, run: Run) -> None:
        pass

    def kill(self, run: Run, ending: Ending) -> None:
        if run.job.id in self.running:
            super().kill(run, ending)


@breaks("slots_can_be_added_and_taken_away")
class NeverShrinks(HonestPool):
    async def resize(self, concurrency: int) -> None:
        await super().resize(max(self.slots, concurrency))


@breaks(
    "an_application_that_does_not_load_says_why[make_broken-no such module]",
    "an_application_that_does_not_load_says_why[make_exiting-bad application]",
)
class StartsWhateverHappens(HonestPool):
    async def start(self, context: PoolContext) -> None:
        try:
            await super().start(context)
        except Exception:
            pass  # the fault


@breaks("stop_lets_what_runs_end_and_gives_back_the_rest", "a_second_stop_shortens_the_wait")
class StopsAtOnce(HonestPool):
    async def stop(self, *, timeout: float) -> None:
        await super().stop(timeout=0)


@breaks("stop_ends_what_does_not_end_in_time")
class CallsItDone(HonestPool):
    async def stop(self, *, timeout: float) -> None:
        self.short = timeout == 0.05 and not self.stopping
        await super().stop(timeout=timeout)

    def kill(self, run: Run, ending: Ending) -> None:
        super().kill(run, Ending.LOST if self.stopping and self.short else ending)


@breaks("no_thread_is_left_behind")
class PoolLeaksAThread(HonestPool):
    async def start(self, context: PoolContext) -> None:
        await super().start(context)
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()


@breaks("no_task_is_left_behind")
class PoolLeaksATask(HonestPool):
    async def start(self, context: PoolContext) -> None:
        await super().start(context)
        self.task = asyncio.ensure_future(asyncio.sleep(3600))


# --- the cages ------------------------------------------------------------------------------------


class TransportCage(TransportContract):
    driver: ClassVar[type[ModestTransport]]
    lease, patience, quiet, silence, time_limit, many = 5.0, 1.0, 0.02, 0.2, 4.0, MANY

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_transport(self, clock: VirtualClock) -> Callable[[], ModestTransport]:
        broker = Broker()
        return lambda: self.driver(broker, clock)

    @pytest.fixture
    def unreachable(self, make_transport: Callable[[], ModestTransport]) -> Callable[[], ModestTransport] | None:
        return make_transport if getattr(self.driver, "unreachable", False) else None


class StoreCage(ResultStoreContract):
    driver: ClassVar[type[ModestStore]]
    lease, patience, quiet, time_limit, many = 5.0, 1.0, 0.02, 20.0, MANY

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_store(self, clock: VirtualClock) -> Callable[[], ModestStore]:
        memory = Memory()
        return lambda: self.driver(memory, clock)


class SchedulerCage(SchedulerContract):
    driver: ClassVar[type[HonestScheduler]]
    lease, patience, time_limit = 5.0, 1.0, 20.0

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_scheduler(self, clock: VirtualClock) -> Callable[[], HonestScheduler]:
        timetable = Timetable()
        return lambda: self.driver(timetable, clock)


class SerializerCage(SerializerContract):
    driver: ClassVar[type[HonestSerializer]]

    @pytest.fixture
    def make_serializer(self) -> Callable[[], HonestSerializer]:
        return self.driver


class CompressorCage(CompressorContract):
    driver: ClassVar[type[HonestCompressor]]

    @pytest.fixture
    def make_compressor(self) -> Callable[[], HonestCompressor]:
        return self.driver


class PoolCage(PoolContract):
    driver: ClassVar[type[ModestPool]]
    patience, quiet, time_limit, many = 2.0, 0.04, 30.0, MANY

    @pytest.fixture
    def make_pool(self) -> Callable[[], ModestPool]:
        return self.driver


CAGES: Mapping[type, type] = {
    ModestTransport: TransportCage,
    ModestStore: StoreCage,
    HonestScheduler: SchedulerCage,
    HonestSerializer: SerializerCage,
    HonestCompressor: CompressorCage,
    ModestPool: PoolCage,
}


def _caged() -> Iterator[tuple[str, type]]:
    for driver in BREAKS:
        cage = next(cage for kind, cage in CAGES.items() if issubclass(driver, kind))
        name = f"Test{driver.__name__}"
        yield name, type(name, (cage,), {"driver": driver, "__module__": __name__})


globals().update(_caged())
