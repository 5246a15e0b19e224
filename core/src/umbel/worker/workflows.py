"""Workflows in a worker: ends are marked, what is complete is fired, and only one copy of what a join started may start.

Crashes, between every two steps: what is not marked comes again by its delivery, which is settled afterwards. A right to fire
that was not used ends by its lease, and the reconciler of some worker takes it. What is fired twice has one id and starts once:
its start is a claim, held while it runs and kept once it has ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from umbel import errors
from umbel.canvas.again import failed_id, failed_record
from umbel.canvas.graph import (
    CANCELS,
    FIRE,
    FIRES,
    NODE,
    PREFIX,
    TOGETHER,
    WORKFLOW,
    Slot,
    plan_id,
)
from umbel.canvas.growing import VERB as GROW
from umbel.canvas.joining import LEASE, Marked
from umbel.canvas.marks import EARLY, Mark, fire_message, marking, place_of
from umbel.errors import BrokerUnavailable, DecodeError, ResultStoreUnavailable
from umbel.model import Message, Result, State, Verdict, evolve
from umbel.ports.result_store import ClaimStore, JoinStore
from umbel.ports.step import Step
from umbel.worker.copies import COPY, START_LEASE, Copies, given_back
from umbel.worker.outbox import Outbox

if TYPE_CHECKING:
    from umbel.worker.held import End
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

RECONCILE: Final = 5.0
"""Seconds between two looks for joins that are complete and that nobody fires, of a worker that has to do with workflows."""
IDLE: Final = 30.0
"""Seconds between two such looks of a worker that has had nothing of a workflow in hand for ``_BUSY``."""
_BUSY: Final = 60.0
_LEADER: Final = "umbel-workflows/reconciler"
_GROWN_KEPT: Final = 10_000
_GOES_ON: Final = (Verdict.RETRY, Verdict.FORWARDED)
"""Ways of ending that are no end of the task."""


class Workflows(Step):
    """One worker's part in workflows, on its I/O loop. Nothing costs anything where no message belongs to one."""

    name: ClassVar[str] = "workflows"
    requires: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._app = worker.app
        self._owner = f"{worker.name}/{worker.incarnation}"
        self._grown: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """What tasks here have added to their groups: the join of that, and how many there are, themselves included. Kept
        beyond a task's end, for copies of it that run beside it; the oldest are forgotten first."""
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox = Outbox(worker)
        self._busy_until = 0.0
        """``time.monotonic()`` until which this worker counts as one that has to do with workflows."""
        self._busy = asyncio.Event()
        self._copies = Copies(worker, self._insist)
        worker.gates.append(self._copies)

    async def start(self, worker: Worker) -> None:
        if self._joins is not None:
            worker.gateway.added[GROW] = self._grow
            for name, work, pause in (
                ("reconciler", self.reconcile, self._next_look),
                ("starts", self._copies.renew, partial(asyncio.sleep, START_LEASE / 4)),
            ):
                task = asyncio.create_task(self._again(pause, work), name=f"umbel-workflow-{name}")
                worker.watch(task)
                self._tasks.append(task)

    async def stop(self, worker: Worker) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def _joins(self) -> JoinStore | None:
        gateway = self._worker.gateway
        able = gateway.has_store and gateway.store.capabilities.join
        return cast("JoinStore", gateway.store) if able else None

    async def _again(self, pause: Callable[[], Awaitable[None]], work: Callable[[], Awaitable[object]]) -> None:
        while True:
            await pause()
            try:
                await work()
            except (ResultStoreUnavailable, BrokerUnavailable) as exc:
                logger.warning("workflows are looked after again in a while: %s", exc)

    async def _next_look(self) -> None:
        """Wait until the reconciler is to look again: soon as long as there are workflows, and else now and then."""
        jitter = random.uniform(0.5, 1)  # not a secret
        if time.monotonic() >= self._busy_until:
            self._busy.clear()
            try:
                async with asyncio.timeout(IDLE * jitter):
                    await self._busy.wait()
            except TimeoutError:
                return
        await asyncio.sleep(RECONCILE * jitter)

    def _has_to_do(self) -> None:
        self._busy_until = time.monotonic() + _BUSY
        self._busy.set()

    async def _grow(self, payload: Any) -> None:
        """A running task adds members to its group."""
        task_id, join, size = payload
        _, known = self._grown.get(task_id, (join, 0))
        self._grown[task_id] = (join, max(known, size))  # a copy of the task may have come further
        if len(self._grown) > _GROWN_KEPT:
            self._grown.popitem(last=False)

    # --- ending: between the storing of results and the settling of deliveries ---

    async def ended(self, ends: Sequence[End]) -> None:
        """Mark what has ended among ``ends``, all of which belong to workflows. Waits out a store that is away."""
        self._has_to_do()
        calls: list[Marked] = []
        failed: list[Result] = []
        for end in ends:
            if end.held.delivery.message.task == FIRE:
                await self._fire_ended(end)
                continue
            if (mark := self._mark(end, failed)) is None:
                continue
            headers = end.held.delivery.message.headers
            workflow, slot = str(headers[WORKFLOW]), Slot.read(headers[NODE])
            size = None
            if (grown := self._grown.get(end.held.delivery.message.id)) is not None:
                slot, size = Slot(grown[0]), grown[1]
            if not mark.succeeded:
                failed.append(self._kept(end, workflow, slot))
            calls += marking(workflow, slot, mark, secrets.token_hex(8), self._app.settings.workflows.expires, size)
            if slot.join.endswith(CANCELS) and not mark.succeeded:
                await self._cancel_others(workflow, slot.join)
        for record in failed:
            try:
                await self._insist(partial(self._worker.gateway.store.put, [record]))
            except errors.ResultRefused as exc:  # the failure itself is marked all the same
                logger.warning("%s could not be kept for being tried again: %s", record.task_id, exc)
        together, queue = _together(calls), ends[0].held.delivery.queue
        # What completes a join early is to find the mark of the same end in the join itself.
        for early in (False, True):
            await asyncio.gather(*(self._join(call, queue) for call in together if call.key.endswith(EARLY) is early))
        await self._copies.ended(ends)

    def _mark(self, end: End, kept: list[Result]) -> Mark | None:
        """What is to be marked of ``end``; None where the node goes on: given back, retried, replaced, or next in its chain.

        Records that it is to have beside that are added to ``kept``.
        """
        message, outcome = end.held.delivery.message, end.outcome
        headers = message.headers
        if NODE not in headers or outcome.verdict in _GOES_ON or outcome.detail == COPY or given_back(end):
            return None
        if any(carries_on(message, follow_up) for follow_up in outcome.follow_ups):
            return None
        if _place(message) is None:
            return None
        for result in outcome.results:
            # One that the store has refused is a success no more.
            if result.task_id == message.id and result.final and _tells(result, outcome.verdict):
                return Mark.of(result)
        revoked = outcome.verdict in (Verdict.REVOKED, Verdict.EXPIRED, Verdict.IGNORED)
        error = (errors.TaskRevoked if revoked else errors.WorkerLost)(outcome.detail or outcome.verdict.value)
        state = State.REVOKED if revoked else State.FAILURE
        made = self._worker.records.final(message.id, state, error, headers=headers, properties=message.properties)
        if outcome.verdict is Verdict.IGNORED:  # who waits for a member, or for what rides behind it, is to hear of it
            kept.extend(self._worker.records.ended(outcome.verdict, message, error, state=state).results)
        return Mark.of(made[0]) if made else None

    def _kept(self, end: End, workflow: str, slot: Slot) -> Result:
        """The message of what has failed, for who tries it again."""
        delivery = end.held.delivery
        return failed_record(self._app, failed_id(workflow, slot), delivery.message, delivery.queue)

    async def _join(self, call: Marked, queue: str) -> None:
        joins = self._joins
        if joins is None:
            logger.error(
                "a member of workflow %s has ended here, and [results] url names no store that joins: it cannot go on",
                call.key.removeprefix(PREFIX),
            )
            return
        marking = partial(
            joins.join, call.key, call.marks, size=call.size, owner=call.owner, lease=LEASE, expires=call.expires
        )
        if (await self._insist(marking)).fires:
            await self._fire(joins, call.key, call.owner, queue)

    async def _fire(self, joins: JoinStore, key: str, owner: str, queue: str) -> None:
        place = place_of(key)
        assert place is not None  # the key is one of ours: it was made, or looked at, here
        message = fire_message(self._app, *place, queue)
        timeout = self._worker.settings.broker.publish_timeout
        publish = partial(self._worker.gateway.do_publish, [message], timeout)
        await self._outbox.insist(publish, BrokerUnavailable, "broker")
        await self._insist(partial(joins.fired, key, owner))

    async def _fire_ended(self, end: End) -> None:
        """The task that goes on with a workflow is nobody's member: should it be lost, another lets the workflow fail."""
        outcome, message = end.outcome, end.held.delivery.message
        if outcome.verdict in (Verdict.SUCCESS, *_GOES_ON) or given_back(end) or (place := _place(message)) is None:
            return
        workflow = str(message.headers[WORKFLOW]).removeprefix(FIRES)
        why = f"the task that was to go on with it has ended: {outcome.verdict.value}" + (
            f", {outcome.detail}" if outcome.detail else ""
        )
        logger.error("workflow %s fails at %s: %s", workflow, place.join, why)
        if place.index == 0:
            again = fire_message(self._app, workflow, place.join, end.held.delivery.queue, why)
            publish = partial(self._worker.gateway.do_publish, [again], self._worker.settings.broker.publish_timeout)
            await self._outbox.insist(publish, BrokerUnavailable, "broker")
            return
        # That was lost too: at least the workflow is known to have ended.
        store, shown = self._worker.gateway.store, plan_id(workflow)
        found = await self._insist(partial(store.get, [shown]))
        if (record := found.get(shown)) is not None and not record.final:
            ended = evolve(record, state=State.FAILURE.value, expires=self._app.settings.workflows.expires)
            await self._insist(partial(store.put, [ended]))

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        return await self._outbox.insist(call, ResultStoreUnavailable, "result store")

    async def _cancel_others(self, workflow: str, join: str) -> None:
        try:
            await self._app.control.arevoke(
                headers={TOGETHER: f"{workflow}/{join}"}, terminate=True, expires=self._app.settings.workflows.expires
            )
        except errors.UmbelError as exc:  # cancelling is a saving: the others end by themselves
            logger.warning("the other members of a group in workflow %s run on: %s", workflow, exc)

    # --- what a crash has interrupted ---

    async def reconcile(self) -> int:
        """Fire what is complete, unless another worker is at it; how many that were."""
        if (joins := self._joins) is None:
            return 0
        store = self._worker.gateway.store
        if store.capabilities.claim:
            claims = cast("ClaimStore", store)
            leader = await claims.claim(_LEADER, self._owner, lease=3 * RECONCILE)
            if leader.owner != self._owner:
                return 0
        number = 0
        for key in await joins.unfired():
            if place_of(key) is None:
                continue
            owner = secrets.token_hex(8)
            state = await joins.join(key, {}, size=None, owner=owner, lease=LEASE)
            if state.fires:
                queue = next(iter(self._worker.intake.queues), self._app.settings.default_queue)
                await self._fire(joins, key, owner, queue)
                number += 1
        return number


def _place(message: Message) -> Slot | None:
    """Where the end of ``message`` is marked; None, and logged, where its header makes no sense."""
    try:
        return Slot.read(message.headers.get(NODE))
    except DecodeError as exc:
        logger.error("task %s[%s] belongs to no workflow that could be told: %s", message.task, message.id, exc)
        return None


def _tells(result: Result, verdict: Verdict) -> bool:
    return verdict is Verdict.SUCCESS or verdict is Verdict.IGNORED or result.state != State.SUCCESS


def carries_on(message: Message, follow_up: Message) -> bool:
    """Whether the end of ``message``'s node is now the business of ``follow_up``."""
    ours, theirs = message.headers, follow_up.headers
    return bool(ours[NODE] == theirs.get(NODE) and ours[WORKFLOW] == theirs.get(WORKFLOW))


def _together(calls: Sequence[Marked]) -> list[Marked]:
    """One call for each join."""
    by_key: dict[str, Marked] = {}
    for call in calls:
        if (known := by_key.get(call.key)) is not None:
            size = known.size if call.size is None else call.size
            call = Marked(call.key, {**call.marks, **known.marks}, size, known.owner, call.expires)
        by_key[call.key] = call
    return list(by_key.values())
