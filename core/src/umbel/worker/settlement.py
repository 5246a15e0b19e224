"""From completion to settlement: follow-ups are published, results stored, deliveries settled, in that order, in batches.

A crash between two of these repeats the earlier ones when the delivery comes again: at least once, never lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field

from umbel import errors
from umbel.errors import BrokerUnavailable, DecodeError, NotSupported, PublishError, ResultStoreUnavailable, UmbelError
from umbel.model import (
    Action,
    Completion,
    Delivery,
    Ending,
    Job,
    Message,
    Outcome,
    Settlement,
    State,
    TaskOptions,
    Verdict,
    evolve,
)
from umbel.ports.step import Step
from umbel.protocol import read_limits
from umbel.worker import settle

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

_ENDINGS = {
    Ending.RETURNED: Verdict.RETURNED,
    Ending.LOST: Verdict.LOST,
    Ending.TIMED_OUT: Verdict.TIMED_OUT,
    Ending.CANCELLED: Verdict.CANCELLED,
}
LAST_WORDS = 5.0
"""Seconds that a stopping worker takes to tell what has ended."""
_UNSETTLED_KEPT = 10_000
"""Outcomes remembered of tasks that ended while the broker could not be told."""


@define(eq=False)
class Held:
    """One delivery from claim to settlement: the one mutable record of its execution."""

    delivery: Delivery
    options: TaskOptions
    job_id: int
    max_deliveries: int
    leased_until: float | None
    starts: int = 1
    """How often its work has begun, this time included."""
    delay: float = 0.0
    """Seconds that a return to the queue is to wait."""
    settled: bool = False
    """Acknowledged early: nothing is left to tell the broker."""
    lost: bool = False
    """The lease has passed to another: nothing of what is done here counts any more."""
    concluding: Verdict | None = None
    """The pool was asked to write the end of a task whose process was lost or killed."""

    def extend(self, until: float) -> None:
        """The broker has extended the lease."""
        if self.leased_until is not None:
            self.leased_until = until


@define
class _End:
    held: Held
    outcome: Outcome
    settlement: Settlement | None = field(default=None)


class SettlementStep(Step):
    """Holds every unsettled delivery, and ends each exactly once."""

    name: ClassVar[str] = "settlement"
    requires: ClassVar[tuple[str, ...]] = ("renewal",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._app = worker.app
        self._next_job = 1
        self._ends: list[_End] = []
        self._some = asyncio.Event()
        self._closing = False
        self._loop_task: asyncio.Task[None] | None = None
        self._observe = worker.app.plugins.observer("umbel_task_settled")
        self._before_publish = worker.app.plugins.observer("umbel_before_publish")
        self._after_publish = worker.app.plugins.observer("umbel_after_publish")
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
        held = Held(
            delivery=delivery,
            options=options,
            job_id=self._next_job,
            max_deliveries=options.max_deliveries or self._worker.settings.worker.max_deliveries,
            leased_until=delivery.leased_until,
        )
        self._next_job += 1
        self.held[held.job_id] = held
        return held

    def job(self, held: Held) -> Job:
        """The job that runs a delivery."""
        message = held.delivery.message
        hard, soft = held.options.time_limit, held.options.soft_time_limit
        try:
            called = read_limits(message.headers.get("timelimit"))
        except DecodeError:  # the executor refuses the message
            called = None, None
        hard, soft = called[0] or hard, called[1] or soft
        self._worker.tell_unkept_limits(message.task, hard, soft)
        return Job(
            id=held.job_id,
            task=message.task,
            payload=("run", message.to_plain(), held.delivery.queue, held.delivery.count, ""),
            time_limit=hard,
            soft_time_limit=soft,
        )

    def conclusion(self, held: Held, verdict: Verdict, detail: str) -> Job:
        """The job that writes the end of a delivery whose process was lost or killed, without running it."""
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
        settlements = [Settlement(delivery=held.delivery, action=Action.ACK) for held in batch]
        ours = await self._worker.gateway.transport.settle(settlements)
        for held, done in zip(batch, ours, strict=True):
            held.settled = done
            if not done:
                self.drop(held)

    # --- ends ---

    def complete(self, completions: Sequence[Completion]) -> None:
        """Jobs have left the pool."""
        for completion in completions:
            self.ended += completion.ending is not Ending.RETURNED
            if (held := self.held.get(completion.job_id)) is None:
                continue
            if completion.ending is Ending.DONE and completion.payload is not None:
                outcome = Outcome.from_plain(completion.payload)
                stopped = outcome.verdict is Verdict.CANCELLED and outcome.task_id in self._worker.revoked
                self.end(held, self._revoked(held) if stopped else outcome)
            else:
                self._end_without_word(held, completion)

    def _end_without_word(self, held: Held, completion: Completion) -> None:
        """A job that its executor did not answer: given back, cancelled, lost or killed."""
        message = held.delivery.message
        verdict = _ENDINGS[completion.ending]
        detail = completion.detail
        if held.concluding is not None and (
            held.settled or verdict is not Verdict.RETURNED
        ):  # it died too: no more of it
            verdict, held.starts = held.concluding, max(held.starts, held.max_deliveries)
        elif verdict is Verdict.CANCELLED and message.id in self._worker.revoked:
            self.end(held, self._revoked(held))
            return
        elif verdict is Verdict.TIMED_OUT and (limit := self.job(held).time_limit):
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
        self.end(held, outcome)

    def _revoked(self, held: Held) -> Outcome:
        exc = errors.TaskRevoked("terminated")
        return self._worker.records.ended(Verdict.REVOKED, held.delivery.message, exc, state=State.REVOKED)

    def end(self, held: Held, outcome: Outcome) -> None:
        """A delivery has come to its outcome; it is settled soon."""
        if held.settled and outcome.verdict is Verdict.RETURNED:  # acknowledged early, but never started: sent again
            again = evolve(held.delivery.message, queue=held.delivery.queue)
            outcome = evolve(outcome, follow_ups=(again,))
        self._ends.append(_End(held, outcome))
        self._some.set()

    def drop(self, held: Held) -> None:
        """The lease has passed to another: forget the delivery."""
        self.stale += 1
        self._forget([held])

    def _forget(self, batch: Sequence[Held]) -> None:
        number = sum(1 for held in batch if self.held.pop(held.job_id, None) is not None)
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

    async def _settle(self, ends: list[_End]) -> None:
        await self._check_leases(ends)
        live = [end for end in ends if not end.held.lost]
        await self._publish(live)
        for end in live:
            end.settlement = self._decide(end)
        # What goes back to its queue has not ended: a final record would stand against the one that it will get.
        ended = [e for e in live if e.held.settled or not (e.settlement and e.settlement.action is Action.REQUEUE)]
        if results := [result for end in ended for result in end.outcome.results]:
            await self._insist(lambda: self._worker.gateway.store.put(results), ResultStoreUnavailable, "result store")
        pending = [(end, s) for end in live if (s := end.settlement) is not None and not end.held.settled]
        if pending:
            await self._tell(pending)
        for end in ends:
            self._report(end)
        self._forget([end.held for end in ends])

    def _decide(self, end: _End) -> Settlement:
        held = end.held
        settlement = settle.decide(
            end.outcome,
            held.delivery,
            starts=held.starts,
            max_deliveries=held.max_deliveries,
            dead_letter=held.options.dead_letter,
        )
        return (
            evolve(settlement, delay=held.delay) if held.delay and settlement.action is Action.REQUEUE else settlement
        )

    async def _check_leases(self, ends: Sequence[_End]) -> None:
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
            ours = await self._insist(
                lambda: self._worker.gateway.transport.renew(deliveries, lease=lease), BrokerUnavailable, "broker"
            )
            for held, still in zip(doubtful, ours, strict=True):
                held.lost = not still

    async def _publish(self, ends: Sequence[_End]) -> None:
        """Publish follow-ups; a message that the broker refuses makes its own task a dead letter, no other's."""
        messages = [message for end in ends for message in end.outcome.follow_ups]
        if not messages:
            return
        try:
            await self._insist(lambda: self._send(messages), BrokerUnavailable, "broker")
        except (PublishError, NotSupported):
            for end in ends:
                follow_ups = list(end.outcome.follow_ups)
                try:
                    if follow_ups:
                        await self._insist(lambda m=follow_ups: self._send(m), BrokerUnavailable, "broker")  # type: ignore[misc]  # the default binds the loop's variable
                except (PublishError, NotSupported) as exc:
                    detail = f"a follow-up was refused by the broker: {exc}"
                    message = end.held.delivery.message
                    end.outcome = self._worker.records.ended(Verdict.REJECTED, message, exc, detail=detail)

    async def _send(self, messages: Sequence[Message]) -> None:
        if self._before_publish:
            self._before_publish(messages=messages)
        await self._worker.gateway.do_publish(messages, self._worker.settings.broker.publish_timeout)
        if self._after_publish:
            self._after_publish(messages=messages)

    async def _tell(self, pending: Sequence[tuple[_End, Settlement]]) -> None:
        settlements = [settlement for _, settlement in pending]
        carried_out = await self._insist(
            lambda: self._worker.gateway.transport.settle(settlements), BrokerUnavailable, "broker"
        )
        for (end, _), done in zip(pending, carried_out, strict=True):
            if done:
                continue
            end.held.lost = True
            self.stale += 1
            if end.outcome.verdict not in (Verdict.RETURNED, Verdict.CANCELLED, Verdict.LOST):
                # Stored and told, but not settled: if the broker hands it out again, to us, it is not run again.
                self.unsettled[end.outcome.task_id] = evolve(end.outcome, follow_ups=(), results=())
                if len(self.unsettled) > _UNSETTLED_KEPT:
                    self.unsettled.popitem(last=False)

    async def _insist(self, call: Callable[[], Awaitable[Any]], passing: type[UmbelError], what: str) -> Any:
        """Repeat a call through passing faults, until the worker's last words are over."""
        pause = 0.05
        while True:
            transport = self._worker.gateway.transport
            try:
                return await call()
            except passing as exc:
                logger.warning("%s unavailable; finished work is kept and tried again in %.1f s: %s", what, pause, exc)
                if passing is BrokerUnavailable:
                    await self._worker.gateway.replace_transport(transport)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
            pause = min(pause * 2, 5.0)

    def _report(self, end: _End) -> None:
        outcome, delivery = end.outcome, end.held.delivery
        name, task_id = outcome.task or delivery.message.task or "?", outcome.task_id
        if end.held.lost:
            logger.warning(
                "task %s[%s]: its lease had passed to another worker; this end does not count", name, task_id
            )
            return
        match outcome.verdict:
            case Verdict.SUCCESS:
                self.totals[name] = self.totals.get(name, 0) + 1
                if logger.isEnabledFor(logging.DEBUG):
                    logger.debug("task %s[%s] succeeded in %.3f s", name, task_id, outcome.runtime)
            case Verdict.FAILURE | Verdict.TIMED_OUT:
                self.totals[name] = self.totals.get(name, 0) + 1
                text = f"\n{outcome.traceback}" if outcome.traceback else ""
                logger.error("task %s[%s] failed: %s%s", name, task_id, outcome.detail, text)
            case Verdict.RETRY | Verdict.EXPIRED | Verdict.REVOKED | Verdict.IGNORED:
                logger.info("task %s[%s] %s: %s", name, task_id, outcome.verdict.value, outcome.detail)
            case Verdict.RETURNED | Verdict.CANCELLED:
                logger.debug("task %s[%s] given back: %s", name, task_id, outcome.verdict.value)
            case _:
                action = end.settlement.action.value if end.settlement else "?"
                where = "to the dead letters" if action == Action.DEAD.value else "back to the queue"
                logger.error("task %s[%s] %s, %s: %s", name, task_id, outcome.verdict.value, where, outcome.detail)
        if self._observe and end.settlement is not None:
            self._observe(settlement=end.settlement, outcome=outcome)
