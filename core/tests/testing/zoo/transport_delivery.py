"""Wrong transports: what is published does not arrive, is not held, or is settled wrongly."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from attrs import evolve

from umbel.errors import PublishRefused
from umbel.model import HEADER_DEAD_CAUSE, Action, Delivery, Message, Settlement
from umbel.ports.transport import QueueDepth

from ..honest.transport import HonestTransport, Kept, ModestTransport
from .house import MANY, House
from .transport import TransportCage

HOUSE = House(__file__, TransportCage, ModestTransport, HonestTransport)


@HOUSE.breaks("thousands_of_messages_are_delivered_once_each")
class LosesOneOfMany(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        super().accept(messages[:-1] if len(messages) == MANY // 12 else messages)


@HOUSE.breaks("thousands_of_messages_are_delivered_once_each")
class DoublesOneOfMany(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        super().accept([*messages, messages[-1]] if len(messages) == MANY // 12 else messages)


@HOUSE.breaks("what_is_published_is_delivered_whole")
class DropsAHeader(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, headers={name: value for name, value in message.headers.items() if name}))


@HOUSE.breaks("a_body_of_any_size_arrives_whole[65537]", "a_body_of_any_size_arrives_whole[10000000]")
class CutsLongBodies(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, body=message.body[:65_536]))


@HOUSE.breaks("a_body_beyond_the_declared_size_is_refused")
class TakesTooMuch(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        self.capabilities = evolve(self.capabilities, max_message_size=None)
        super().accept(messages)


@HOUSE.breaks("names_of_queues_are_told_apart")
class IgnoresCase(HonestTransport):
    def ready(self, queues: Sequence[str]) -> list[Kept]:
        names = {queue.lower() for queue in queues}
        found = [k for k in self.broker.kept if k.message.queue.lower() in names and k.until <= self.clock.time()]
        return sorted(found, key=self.place)


@HOUSE.breaks("sender_and_receiver_share_nothing")
class SharesHeaders(HonestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        super().accept(messages)
        if not any(message.properties for message in messages):
            for kept, message in zip(self.broker.kept[-len(messages) :], messages, strict=False):
                kept.message = evolve(kept.message, headers=message.headers)


@HOUSE.breaks("publish_returns_when_the_broker_has_it")
class ConfirmsTooSoon(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await self.enter()
        self.sent = [*getattr(self, "sent", ()), *(message.id for message in messages)]
        if self.sent == ["1", "2", "3"]:
            asyncio.get_running_loop().call_later(0.02, self.accept, messages)
        else:
            self.accept(messages)


@HOUSE.breaks("close_ends_what_is_under_way")
class LosesItsLastOnesAtTheEnd(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await super().publish(messages, timeout=timeout)
        self.sent = [*getattr(self, "sent", ()), *(message.id for message in messages)]

    async def close(self) -> None:
        if getattr(self, "sent", [])[:6] == [str(number) for number in range(6)]:
            del self.broker.kept[-2:]
        await super().close()


@HOUSE.breaks("what_was_accepted_outlives_its_connection")
class TakesItsMessagesAlong(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await super().publish(messages, timeout=timeout)
        self.sent = messages

    async def close(self) -> None:
        if [message.id for message in getattr(self, "sent", ())] == ["1", "2"]:
            self.broker.kept = [kept for kept in self.broker.kept if kept.holder or kept.count]
        await super().close()


@HOUSE.breaks(
    "a_delivery_not_settled_is_delivered_again",
    "a_consumer_that_waits_gets_what_anothers_lease_gives_up",
    "what_a_closed_transport_held_is_delivered_to_another",
    "a_lost_connection_loses_no_message",
    "a_late_settlement_is_fenced_off",
    "a_renewed_lease_ends_too",
    "a_lost_lease_cannot_be_renewed",
    "an_ended_lease_counts",
    "what_was_accepted_outlives_the_broker",
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


@HOUSE.breaks(
    "what_a_closed_transport_held_is_delivered_to_another", "the_leases_of_a_closed_transport_pass_to_another"
)
class DropsWhatItHoldsAtItsClose(HonestTransport):
    async def close(self) -> None:
        self.broker.kept = [kept for kept in self.broker.kept if kept.holder is not self]
        await super().close()


@HOUSE.breaks("settling_twice_is_refused")
class SettlesTwice(HonestTransport):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        done = await super().settle(settlements)
        return (
            [ok or s.action is Action.DEAD for ok, s in zip(done, settlements, strict=True)] if len(done) > 3 else done
        )


@HOUSE.breaks("a_late_settlement_is_fenced_off")
class IgnoresFencing(HonestTransport):
    def held(self, delivery: Delivery) -> Kept | None:
        kept: Kept = delivery.token[0]
        return kept if kept in self.broker.kept and (kept.holder or super().held(delivery)) else None

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        held = await super().renew(deliveries, lease=lease, starting=starting)
        return [ok and d.token[0].fence == d.token[1] for ok, d in zip(held, deliveries, strict=True)]


@HOUSE.breaks("a_renewed_lease_holds_on")
class RenewsNothing(HonestTransport):
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        before = [delivery.token[0].until for delivery in deliveries]
        held = await super().renew(deliveries, lease=lease, starting=starting)
        for delivery, until in zip(deliveries, before, strict=True):
            delivery.token[0].until = min(until, delivery.token[0].until)
        return held


@HOUSE.breaks("a_lost_lease_cannot_be_renewed")
class RenewsWhatIsLost(HonestTransport):
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        await super().renew(deliveries, lease=lease, starting=starting)
        return [True] * len(deliveries)


@HOUSE.breaks("a_delivery_tells_the_end_of_its_lease")
class TellsNoLease(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), leased_until=None)


@HOUSE.breaks("competing_consumers_never_share_a_message")
class SharesNowAndThen(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        delivery = super().hand_out(kept, lease)
        if len(self.broker.kept) == 200 and kept.message.id == "49" and kept.count == 1:
            kept.until = 0.0
        return delivery


@HOUSE.breaks(
    "the_count_grows_with_each_handing_out",
    "an_ended_lease_counts",
    "what_is_given_back_uncounted_does_not_count",
    "dead_letters_keep_the_message_and_tell_its_cause",
    "a_delayed_requeue_waits",
)
class ForgetsTheCount(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), count=1)


@HOUSE.breaks("what_is_given_back_uncounted_does_not_count")
class CountsWhatIsNotToCount(HonestTransport):
    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        super().give_back(kept, evolve(settlement, counted=True))


@HOUSE.breaks("starts_of_work_are_recorded")
class ForgetsStarts(HonestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), starts=0)


@HOUSE.breaks("dead_letters_keep_the_message_and_tell_its_cause")
class BuriesWithoutCause(HonestTransport):
    def bury(self, settlement: Settlement, kept: Kept) -> None:
        super().bury(settlement, kept)
        letter = self.broker.kept[-1]
        headers = {name: value for name, value in letter.message.headers.items() if name != HEADER_DEAD_CAUSE}
        letter.message = evolve(letter.message, headers=headers)


@HOUSE.breaks("a_message_without_headers_is_delivered")
class InventsAnId(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, headers=message.headers or {"id": "none"}))


@HOUSE.breaks("a_body_of_any_size_arrives_whole[0]")
class FillsEmptyBodies(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, body=message.body or b"null"))


@HOUSE.breaks("a_body_of_any_size_arrives_whole[1]", "a_body_of_any_size_arrives_whole[65537]")
class EndsBodiesAtNul(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, body=message.body.rstrip(b"\0")))


@HOUSE.breaks("a_publish_to_an_unknown_queue_creates_it")
class ListsNamesOfItsOwn(HonestTransport):
    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        depths = await super().depth(queues)
        return depths if queues else {f"honest:{name}": depth for name, depth in depths.items()}


@HOUSE.breaks("an_empty_name_of_a_queue_is_kept_or_refused")
class DropsWhatIsForNoName(HonestTransport):
    def keep(self, message: Message) -> None:
        if message.queue:
            super().keep(message)


@HOUSE.breaks("an_empty_name_of_a_queue_is_kept_or_refused")
class ClosesAtARefusal(HonestTransport):
    def route(self, message: Message) -> list[str]:
        if not message.queue:
            self.severed = True
            raise PublishRefused("a queue has a name")
        return super().route(message)


@HOUSE.breaks("nothing_published_is_nothing_done")
class NeedsAMessage(HonestTransport):
    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        self.first = messages[0]
        await super().publish(messages, timeout=timeout)


@HOUSE.breaks("an_acknowledged_delivery_never_comes_again")
class RollsBackAtItsClose(HonestTransport):
    def carry_out(self, settlement: Settlement) -> bool:
        done = super().carry_out(settlement)
        if done and settlement.action is Action.ACK:
            self.acked = settlement.delivery.token[0]
        return done

    async def close(self) -> None:
        if not self.closed and (acked := getattr(self, "acked", None)) is not None:
            self.broker.kept.append(acked)
        await super().close()


# --- what it does not declare, it neither does nor seems to do ---


@HOUSE.breaks("the_count_grows_with_each_handing_out")
class CountsUndeclared(ModestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), count=kept.count)


@HOUSE.breaks("starts_of_work_are_recorded")
class RecordsStartsUndeclared(ModestTransport):
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        for delivery in deliveries:
            delivery.token[0].starts += starting
        return await super().renew(deliveries, lease=lease, starting=starting)


@HOUSE.breaks("a_delivery_tells_the_end_of_its_lease")
class TellsALeaseThatItHasNot(ModestTransport):
    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        return evolve(super().hand_out(kept, lease), leased_until=self.clock.time() + lease)


@HOUSE.breaks(
    "a_delivery_not_settled_is_delivered_again", "a_late_settlement_is_fenced_off", "a_renewed_lease_ends_too"
)
class LetsGoAfterTheLease(ModestTransport):
    """As a broker with a time limit for acknowledgements, of which its session says nothing."""

    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        delivery = super().hand_out(kept, lease)
        kept.until = self.clock.time() + lease
        return delivery

    def held(self, delivery: Delivery) -> Kept | None:
        kept = super().held(delivery)
        return kept if kept is not None and kept.until > self.clock.time() else None

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        for kept in filter(None, map(self.held, deliveries)):
            kept.until = self.clock.time() + lease
        return await super().renew(deliveries, lease=lease, starting=starting)


@HOUSE.breaks(
    "a_lost_lease_cannot_be_renewed",
    "a_renewed_lease_ends_too",
    "a_renewed_lease_holds_on",
    "starts_of_work_are_recorded",
    "a_cancelled_call_disturbs_no_later_one",
)
class RefusesToRenew(ModestTransport):
    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        await super().renew(deliveries, lease=lease, starting=starting)
        return [False] * len(deliveries)


globals().update(HOUSE.tests())
