"""From completion to settlement: follow-ups are published, results stored, deliveries settled, in that order, in batches.

A crash between two of these repeats the earlier ones when the delivery comes again: at least once, never lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, ClassVar

from umbel import errors
from umbel.canvas.graph import WORKFLOW
from umbel.errors import BrokerUnavailable
from umbel.model import (
    Action,
    Completion,
    Delivery,
    Ending,
    Job,
    Outcome,
    Settlement,
    TaskOptions,
    Verdict,
    evolve,
    make_job,
    make_settlement,
    without_route,
)
from umbel.ports.step import Step
from umbel.unique import HEADER as UNIQUE
from umbel.worker import settle
from umbel.worker.held import End, Held
from umbel.worker.logs import log_end
from umbel.worker.outbox import Outbox

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

_ENDINGS = {
    Ending.RETURNED: Verdict.RETURNED,
    Ending.LOST: Verdict.LOST,
    Ending.TIMED_OUT: Verdict.TIMED_OUT,
    Ending.CANCELLED: Verdict.CANCELLED,
    Ending.COLLATERAL: Verdict.CANCELLED,
}
_COUNTED = (Verdict.SUCCESS, Verdict.FAILURE, Verdict.TIMED_OUT)
"""Verdicts of tasks that have run to an end: a tuple, for sets ask an enum for its hash."""
_NO_LIMITS = [None, None]
LAST_WORDS = 5.0
"""Seconds that a stopping worker takes to tell what has ended."""
_UNSETTLED_KEPT = 10_000
"""Outcomes remembered of tasks that ended while the broker could not be told."""


class SettlementStep(Step):
    """Holds every unsettled delivery, and ends each exactly once."""

    name: ClassVar[str] = "settlement"
    requires: ClassVar[tuple[str, ...]] = ("renewal",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._app = worker.app
        self._next_job = 1
        self._max_deliveries = worker.settings.worker.max_deliveries
        self._ends: list[End] = []
        self._some = asyncio.Event()
        self._closing = False
        self._loop_task: asyncio.Task[None] | None = None
        self._observe = worker.app.plugins.observer("umbel_task_settled")
        self._outbox = Outbox(worker)
        self.held: dict[int, Held] = {}
        """Every delivery that is not settled yet, by job id."""
        self.unsettled: OrderedDict[str, Outcome] = OrderedDict()
        """Outcomes of finished tasks whose settlement did not arrive, by task id: their next delivery is not run."""
        self.totals: dict[str, int] = {}
        """Settled deliveries by task name."""
        self.ended = 0
        """Jobs that the pool has run, to whatever end."""
        self.stale = 0
        """Settlements that came too late: the lease had passed to another."""

    async def start(self, worker: Worker) -> None:
        self._loop_task = asyncio.create_task(self._settle_all(), name="umbel-settlement")
        worker.watch(self._loop_task)

    async def stop(self, worker: Worker) -> None:
        """Settle what has ended. What cannot be stored and told in ``LAST_WORDS`` seconds comes back by its lease."""
        self._closing = True
        self._some.set()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task], timeout=LAST_WORDS)
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])

    # --- in ---

    def hold(self, delivery: Delivery, options: TaskOptions) -> Held:
        """Take responsibility for a delivery."""
        number = self._next_job
        most = options.max_deliveries or self._max_deliveries
        held = self.held[number] = Held(delivery, options, number, most, delivery.leased_until)
        self._next_job = number + 1
        return held

    def job(self, held: Held) -> Job:
        """The job that runs a delivery."""
        delivery, message = held.delivery, held.delivery.message
        hard, soft = held.options.time_limit, held.options.soft_time_limit
        if (called := message.headers.get("timelimit")) is not None and called != _NO_LIMITS:
            hard, soft = self._worker.time_limits.called(message.task, called, (hard, soft))
        if hard or soft:
            self._worker.tell_unkept_limits(message.task, hard, soft)
        payload = ("run", message.to_plain(), delivery.queue, delivery.count, "")
        alone = held.starts > 1 and held.starts >= held.max_deliveries
        return make_job(held.job_id, message.task, payload, hard, soft, alone)

    def conclusion(self, held: Held, verdict: Verdict, detail: str) -> Job:
        """The job that writes the end of a delivery whose process was lost or killed, or that is revoked; nothing is called."""
        held.concluding = verdict
        message = held.delivery.message
        del self.held[held.job_id]  # ids are used once: the conclusion is a job of its own
        held.job_id = self._next_job
        self._next_job += 1
        self.held[held.job_id] = held
        return Job(
            id=held.job_id,
            task=message.task,
            payload=(verdict.value, message.to_plain(), held.delivery.queue, held.delivery.count, detail),
        )

    async def acknowledge_early(self, batch: Sequence[Held]) -> None:
        """Settle before the start (``ack="early"``), and drop what has passed to another. Raises ``BrokerUnavailable``."""
        while batch:
            settlements = [Settlement(delivery=held.delivery, action=Action.ACK) for held in batch]
            ours = await self._worker.gateway.transport.settle(settlements)
            for held, settlement, done in zip(batch, settlements, ours, strict=True):
                held.settled = done
                if not done and held.delivery is settlement.delivery:
                    self.drop(held)
            batch = [held for held in batch if not held.settled and held.job_id in self.held]  # come again meanwhile

    def adopt(self, delivery: Delivery) -> bool:
        """Whether this redelivery is of something held here; it is not started beside itself then, but goes on as it is."""
        now = self._app.clock.time()
        if (mine := next((h for h in self.held.values() if h.awaits(delivery, now)), None)) is None:
            return False
        mine.adopt(delivery)
        self._worker.intake.credit.give(1)
        logger.info("task %s[%s] has come again and goes on", delivery.message.task, delivery.message.id)
        return True

    def set_adrift(self) -> None:
        """The broker's session is lost: what is held by it alone will be handed out again."""
        for held in self.held.values():
            held.adrift = held.leased_until is None

    # --- ends ---

    def complete(self, completions: Sequence[Completion]) -> None:
        """Jobs have left the pool."""
        told, read = self._worker.starts.heard, self._worker.records.from_plain
        for completion in completions:
            ending, payload = completion.ending, completion.payload
            self.ended += ending is not Ending.RETURNED
            if (held := self.held.get(completion.job_id)) is None:
                continue
            if told:
                self._worker.starts.ended(held, completion)
            if ending is Ending.DONE and payload is not None:
                outcome = read(payload, held.delivery.message)
                if outcome.verdict is Verdict.CANCELLED and self._worker.revocations.covers(held.delivery.message):
                    outcome = self._worker.revocations.ended(held.delivery.message)
                self.end(held, outcome)
            else:
                self._end_without_word(held, completion)

    def _end_without_word(self, held: Held, completion: Completion) -> None:
        """A job that its executor did not answer: given back, cancelled, lost or killed."""
        message = held.delivery.message
        verdict = _ENDINGS[completion.ending]
        if completion.ending is Ending.COLLATERAL and held.settled:
            verdict = Verdict.LOST  # acknowledged early: it does not run again, and that is to be told
        detail = completion.detail
        unread = (Verdict.RETURNED, Verdict.CANCELLED) if held.concluding is Verdict.REVOKED else (Verdict.RETURNED,)
        if held.concluding is not None and (held.settled or verdict not in unread):  # it died too: no more of it
            verdict, held.starts = held.concluding, max(held.starts, held.max_deliveries)
        elif (
            held.concluding is None
            and verdict in (Verdict.CANCELLED, Verdict.RETURNED)
            and self._worker.revocations.covers(message)
        ):
            started, revoked = verdict is Verdict.CANCELLED, self._worker.revocations
            self.end(held, revoked.ended(message) if started else revoked.refused(message))
            return
        elif (
            verdict is Verdict.TIMED_OUT and (limit := self.job(held).time_limit) and not 0 < completion.runtime < limit
        ):
            detail = f"{limit:g}"
        outcome = Outcome(verdict=verdict, task_id=message.id, task=message.task, detail=detail)
        needs_word = held.concluding is None and settle.concludes(
            outcome, held.delivery, starts=held.starts, max_deliveries=held.max_deliveries, early=held.settled
        )
        if needs_word and not self._worker.stopping:
            self._worker.pool.submit([self.conclusion(held, verdict, detail)])
            return
        if (
            needs_word or held.concluding is not None
        ):  # nobody is left to read the body: the failure itself is still stored
            exc = (errors.TimeLimitExceeded if verdict is Verdict.TIMED_OUT else errors.WorkerLost)(detail)
            outcome = self._worker.records.ended(verdict, message, exc, detail=detail)
            if verdict is Verdict.REVOKED:
                outcome = self._worker.revocations.refused(message)
        self.end(held, outcome)

    def end(self, held: Held, outcome: Outcome) -> None:
        """A delivery has come to its outcome; it is settled soon."""
        if outcome.verdict is Verdict.REVOKED and self._app.chords is not None and held.concluding is None:
            if not self._worker.stopping:  # somebody has to read whose chord is to hear of it
                self._worker.pool.submit([self.conclusion(held, Verdict.REVOKED, outcome.detail)])
                return
            if not held.settled:
                outcome = Outcome(verdict=Verdict.RETURNED, task_id=outcome.task_id, task=outcome.task)
        if held.settled and outcome.verdict is Verdict.RETURNED:  # acknowledged early, but never started: sent again
            message = held.delivery.message
            due = self._app.clock.time() + outcome.delay if outcome.delay else message.due
            properties = without_route(message.properties)
            again = evolve(message, queue=held.delivery.queue, due=due, properties=properties)
            outcome = evolve(outcome, follow_ups=(again,))
        self._ends.append(End(held, outcome))
        self._some.set()

    def drop(self, held: Held) -> None:
        """The lease has passed to another: forget the delivery."""
        self.stale += 1
        self._forget([held])

    def _forget(self, batch: Sequence[Held]) -> None:
        number, forget = 0, self.held.pop
        for held in batch:
            number += forget(held.job_id, None) is not None
        if self._worker.slots.held:
            self._worker.slots.release(batch)
        if number:
            self._worker.intake.credit.give(number)

    # --- out ---

    async def _settle_all(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            ends, self._ends = self._ends, []
            if ends:
                await self._settle(ends)
                if self._worker.intake.waiting and not self._worker.stopping:
                    try:
                        await self._worker.intake.admit_suspects()
                    except BrokerUnavailable as exc:
                        logger.warning("broker unavailable: %s", exc)
                self._worker.intake.refill()
            elif self._closing:
                return

    async def _settle(self, ends: list[End]) -> None:
        await self._check_leases(ends)
        live = [end for end in ends if not end.held.lost]
        unique, members = [], []
        for end in live:
            headers = end.held.delivery.message.headers
            if UNIQUE in headers:
                unique.append(end)
            if WORKFLOW in headers:
                members.append(end)
        if unique:
            await self._worker.uniques.keep(unique)
        await self._outbox.publish(live)
        for end in live:
            end.settlement = self._decide(end)
        # What goes back to its queue has not ended: a final record would stand against the one that it will get.
        ended = [e for e in live if e.held.settled or not (e.settlement and e.settlement.action is Action.REQUEUE)]
        await self._outbox.store(ended)
        if members:
            await self._worker.workflows.ended(members)
        if pending := [end for end in live if not end.held.settled]:
            await self._tell(pending)
        if unique:
            await self._worker.uniques.release(unique)
        told = set(live) if len(live) < len(ends) else ()
        over = [end for end in ends if end in told or end.held.lost] if told else ends
        if len(over) < len(ends):  # given up for lost, and come again meanwhile
            self._ends += [end for end in ends if end not in over]
            self._some.set()
        self._report(over)
        self._forget([end.held for end in over])

    def _decide(self, end: End) -> Settlement:
        held = end.held
        if end.outcome.verdict is Verdict.SUCCESS:
            return make_settlement(held.delivery, Action.ACK)
        settlement = settle.decide(
            end.outcome,
            held.delivery,
            starts=held.starts,
            max_deliveries=held.max_deliveries,
            dead_letter=held.options.dead_letter,
        )
        if settlement.action is Action.REQUEUE and held.concluding is not None:  # its start did end in a loss
            settlement = evolve(settlement, counted=True)
        return (
            evolve(settlement, delay=held.delay) if held.delay and settlement.action is Action.REQUEUE else settlement
        )

    async def _check_leases(self, ends: Sequence[End]) -> None:
        """Law of the late worker: what outlived its lease here asks the broker first whether it still counts."""
        now = self._app.clock.time()
        doubtful = [
            end.held
            for end in ends
            if not end.held.settled and end.held.leased_until is not None and end.held.leased_until < now
        ]
        if doubtful:
            deliveries = [held.delivery for held in doubtful]
            lease = self._worker.settings.broker.lease
            ours = await self._outbox.insist(
                lambda: self._worker.gateway.transport.renew(deliveries, lease=lease), BrokerUnavailable, "broker"
            )
            for held, delivery, still in zip(doubtful, deliveries, ours, strict=True):
                held.lost = not still and held.delivery is delivery

    async def _tell(self, ends: Sequence[End]) -> None:
        """Settle; what comes again while it is being told is told once more, for the new handing-out."""
        pending = ends

        def settle() -> Awaitable[Sequence[bool]]:
            settlements: list[Settlement] = []
            for end in pending:
                settlement = end.settlement
                if settlement is None or settlement.delivery is not end.held.delivery:
                    settlement = end.settlement = self._decide(end)
                settlements.append(settlement)
            return self._worker.gateway.transport.settle(settlements)

        while pending:
            carried_out = await self._outbox.insist(settle, BrokerUnavailable, "broker")
            for end, done in zip(pending, carried_out, strict=True):
                if done:
                    end.held.lost = False  # a renewal that came in between found it settled, by us
                elif end.settlement is not None and end.settlement.delivery is end.held.delivery:
                    self._settled_too_late(end)
            pending = [e for e in ends if e.settlement is not None and e.settlement.delivery is not e.held.delivery]

    def _settled_too_late(self, end: End) -> None:
        end.held.lost = True
        self.stale += 1
        if end.outcome.verdict not in (Verdict.RETURNED, Verdict.CANCELLED, Verdict.LOST):
            # Stored and told, but not settled: if the broker hands it out again, to us, it is not run again.
            self.unsettled[end.outcome.task_id] = evolve(end.outcome, follow_ups=(), results=())
            if len(self.unsettled) > _UNSETTLED_KEPT:
                self.unsettled.popitem(last=False)

    def _report(self, ends: Sequence[End]) -> None:
        totals, told, debug = self.totals, self._observe, logger.isEnabledFor(logging.DEBUG)
        for end in ends:
            outcome, lost = end.outcome, end.held.lost
            name = outcome.task or end.held.delivery.message.task or "?"
            if not lost and outcome.verdict in _COUNTED:
                totals[name] = totals.get(name, 0) + 1
            if outcome.verdict is not Verdict.SUCCESS or lost or debug:
                log_end(name, outcome, end.settlement, lost=lost)
            if told and end.settlement is not None and not lost:
                told(settlement=end.settlement, outcome=outcome)
