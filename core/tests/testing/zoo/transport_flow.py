"""Wrong transports: too much is handed out, in the wrong order, too early; queues and exchanges are mistaken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from attrs import evolve

from umbel.model import Message, QueueSpec, Settlement, without_route
from umbel.ports.transport import Credit, QueueDepth

from ..honest.transport import HonestTransport, Kept, ModestTransport, carried
from .house import House
from .transport import TransportCage

HOUSE = House(__file__, TransportCage)


@HOUSE.breaks("credit_is_respected")
class IgnoresCredit(HonestTransport):
    def room(self, credit: Credit) -> int:
        return credit.limit


@HOUSE.breaks("a_quiet_consumer_yields_empty_batches")
class NeverSpeaks(HonestTransport):
    def speaks(self, silent: float) -> bool:
        return False


@HOUSE.breaks("a_waiting_consumer_leaves_the_loop_to_others")
class BlocksTheLoop(HonestTransport):
    async def pause(self) -> None:
        await super().pause()
        if not self.broker.queues:
            time.sleep(0.25)  # noqa: ASYNC251  # the fault


@HOUSE.breaks("the_oldest_message_comes_first")
class MixesLargeQueues(HonestTransport):
    def place(self, kept: Kept) -> tuple[float, int]:
        priority, order = super().place(kept)
        return (priority, order ^ 1 if len(self.broker.kept) == 60 else order)


@HOUSE.breaks("priority_is_respected_within_one_consumer")
class IgnoresPriority(HonestTransport):
    def place(self, kept: Kept) -> tuple[float, int]:
        return (0, kept.order)


@HOUSE.breaks("what_is_given_back_comes_first_among_equals")
class PutsBackToTheEnd(HonestTransport):
    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        super().give_back(kept, settlement)
        kept.order = next(self.broker.order)


@HOUSE.breaks(
    "nothing_is_handed_out_before_its_due_time_nor_long_after",
    "delayed_messages_come_in_the_order_of_their_due_times",
    "the_longest_delay_is_kept_and_a_longer_one_refused",
    "depth_tells_ready_delayed_and_leased",
)
class IgnoresTheDueTime(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(message)
        self.broker.kept[-1].until = 0.0


@HOUSE.breaks("nothing_is_handed_out_before_its_due_time_nor_long_after")
class IsLate(HonestTransport):
    slack: ClassVar[float] = 5.0

    def keep(self, message: Message) -> None:
        super().keep(message)
        if message.id == "delayed":
            self.broker.kept[-1].until += 5.0


@HOUSE.breaks("a_delayed_requeue_waits")
class ForgetsTheDelay(HonestTransport):
    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        super().give_back(kept, evolve(settlement, delay=0.0))


@HOUSE.breaks("depth_tells_ready_delayed_and_leased", "a_delayed_requeue_waits")
class CountsDelayedAsReady(HonestTransport):
    def count(self, queue: str) -> QueueDepth:
        depth = super().count(queue)
        return QueueDepth(ready=depth.ready + depth.delayed, leased=depth.leased)


@HOUSE.breaks("peek_takes_nothing")
class TakesInPeek(HonestTransport):
    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        seen = await super().peek(queue, limit=limit, offset=offset)
        for kept in self.waiting(queue)[:limit]:
            kept.count += 1
        return seen


@HOUSE.breaks("purge_deletes_and_counts_what_is_not_handed_out")
class PurgesWhatIsHandedOut(HonestTransport):
    async def purge(self, queue: str) -> int:
        number = await super().purge(queue)
        self.broker.kept = [kept for kept in self.broker.kept if kept.message.queue != queue]
        return number


@HOUSE.breaks("declaring_a_queue_again_changes_nothing")
class EmptiesWhatIsDeclaredAgain(HonestTransport):
    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await super().declare(queues)
        names = {spec.name for spec in queues}
        self.broker.kept = [kept for kept in self.broker.kept if kept.message.queue not in names]


@HOUSE.breaks("declaring_a_queue_differently_is_refused")
class DeclaresAnything(HonestTransport):
    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await super().declare([evolve(spec, arguments={}) for spec in queues])


@HOUSE.breaks("a_growing_credit_is_noticed")
class LooksAtTheCreditOnce(HonestTransport):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.limits: dict[Credit, int] = {}

    def room(self, credit: Credit) -> int:
        return max(0, self.limits.setdefault(credit, credit.limit) - credit.out)


@HOUSE.breaks("one_consumer_serves_several_queues")
class ServesTheFirstQueue(HonestTransport):
    def ready(self, queues: Sequence[str]) -> list[Kept]:
        return super().ready(queues[:1])


@HOUSE.breaks("a_due_time_that_has_passed_means_at_once")
class TakesTheDistanceForTheDelay(HonestTransport):
    def keep(self, message: Message) -> None:
        now = self.clock.time()
        due = None if message.due is None else now + abs(message.due - now)
        super().keep(evolve(message, due=due))


@HOUSE.breaks("an_unknown_queue_is_empty")
class KnowsOnlyWhatItHas(HonestTransport):
    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        self.broker.queues[queue]
        return await super().peek(queue, limit=limit, offset=offset)


@HOUSE.breaks("the_longest_delay_is_kept_and_a_longer_one_refused")
class DeclaresLessThanItKeeps(HonestTransport):
    capabilities = evolve(HonestTransport.capabilities, max_delay=86_400.0)

    def accept(self, messages: Sequence[Message]) -> None:
        self.capabilities = HonestTransport.capabilities
        super().accept(messages)


# --- exchanges ---


@HOUSE.breaks("a_message_for_an_exchange_reaches_the_queues_bound_to_it[topic]")
class KnowsNoPatterns(HonestTransport):
    def reached(self, exchange: str, key: str) -> list[str]:
        found = self.broker.exchanges.get(exchange)
        return (
            super().reached(exchange, key)
            if found is None or found.type != "topic"
            else [queue for queue, binding in found.bindings if binding in (key, "#")]
        )


@HOUSE.breaks("a_message_for_an_exchange_reaches_the_queues_bound_to_it")
class DeliversOncePerBinding(HonestTransport):
    def reached(self, exchange: str, key: str) -> list[str]:
        found = self.broker.exchanges.get(exchange)
        reached = super().reached(exchange, key)
        return reached if found is None else [queue for queue, _ in found.bindings if queue in reached]


@HOUSE.breaks("a_message_for_an_exchange_reaches_the_queues_bound_to_it")
class DoesNotSayWhichWayItCame(HonestTransport):
    def keep(self, message: Message) -> None:
        super().keep(evolve(message, properties=without_route(message.properties)))


@HOUSE.breaks("a_queue_with_an_exchange_is_reached_by_its_name_too")
class SendsByNameToTheExchange(HonestTransport):
    def route(self, message: Message) -> list[str]:
        spec = self.broker.queues.get(message.queue)
        if spec is None or spec.exchange is None:
            return super().route(message)
        return self.reached(spec.exchange, message.queue)


@HOUSE.breaks("a_message_that_reaches_no_queue_is_refused")
class DropsWhatReachesNoQueue(HonestTransport):
    def route(self, message: Message) -> list[str]:
        told = message.properties
        return self.reached(told["exchange"], told["routing_key"]) if told.get("exchange") else [message.queue]


@HOUSE.breaks("an_exchange_of_another_type_is_refused")
class TakesAnyTypeOfExchange(HonestTransport):
    def bind(self, spec: QueueSpec, name: str) -> None:
        known = self.broker.exchanges.get(name)
        super().bind(spec if known is None else evolve(spec, exchange_type=known.type), name)


# --- what it does not declare, it neither does nor seems to do ---


@HOUSE.breaks("an_exchange_is_refused_where_there_are_none")
class IgnoresExchanges(ModestTransport):
    def bind(self, spec: QueueSpec, name: str) -> None:
        pass


@HOUSE.breaks(
    "nothing_is_handed_out_before_its_due_time_nor_long_after", "the_longest_delay_is_kept_and_a_longer_one_refused"
)
class DelaysUndeclared(ModestTransport):
    def accept(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.keep(carried(message))


@HOUSE.breaks("a_delayed_requeue_waits")
class RequeuesAtOnceInstead(ModestTransport):
    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        return await super().settle([evolve(settlement, delay=0.0) for settlement in settlements])


globals().update(HOUSE.tests())
