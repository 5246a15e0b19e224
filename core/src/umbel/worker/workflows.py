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
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from umbel import errors
from umbel.canvas.again import failed_id, failed_record
from umbel.canvas.graph import CANCELS, NODE, ONCE, PREFIX, RIDES, TOGETHER, WORKFLOW, Slot
from umbel.canvas.growing import VERB as GROW
from umbel.canvas.joining import LEASE, Marked
from umbel.canvas.marks import Mark, fire_message, marking, place_of
from umbel.errors import BrokerUnavailable, DecodeError, ResultStoreUnavailable
from umbel.model import Action, Message, Outcome, Result, State, Verdict, evolve
from umbel.ports.result_store import ClaimStore, JoinStore
from umbel.ports.step import Step
from umbel.worker.admission import returned
from umbel.worker.outbox import Outbox

if TYPE_CHECKING:
    from umbel.worker.held import End, Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

START_LEASE: Final = 12.0
"""Seconds for which a start is claimed, renewed three times as often: after so long another may start what a dead worker ran."""
RECONCILE: Final = 5.0
"""Seconds between two looks for joins that are complete and that nobody fires."""
_PATIENCE: Final = 5.0
"""Seconds that the store has to say whether something may start; then it is given back."""
_STARTED: Final = "umbel-started/"
_LEADER: Final = "umbel-workflows/reconciler"
_ENDED: Final = b"ended"
_GROWN_KEPT: Final = 10_000
_GOES_ON: Final = (Verdict.RETRY, Verdict.FORWARDED)
"""Ways of ending that are no end of the task."""
_COPY: Final = "a copy of what has started elsewhere"


class Workflows(Step):
    """One worker's part in workflows, on its I/O loop. Nothing costs anything where no message belongs to one."""

    name: ClassVar[str] = "workflows"
    requires: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._app = worker.app
        self._owner = f"{worker.name}/{worker.incarnation}"
        self._starts: list[tuple[Held, str, str]] = []
        """What runs here under a claimed start: its delivery, the claim, the claim's owner."""
        self._grown: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """What tasks here have added to their groups: the join of that, and how many there are, themselves included. Kept
        beyond a task's end, for copies of it that run beside it; the oldest are forgotten first."""
        self._tasks: list[asyncio.Task[None]] = []
        self._outbox = Outbox(worker)
        worker.gates.append(self)

    async def start(self, worker: Worker) -> None:
        if self._joins is not None:
            worker.gateway.added[GROW] = self._grow
            for name, work, pause in (
                ("reconciler", self.reconcile, RECONCILE),
                ("starts", self._renew, START_LEASE / 3),
            ):
                task = asyncio.create_task(self._every(pause, work), name=f"umbel-workflow-{name}")
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

    @property
    def _claims(self) -> ClaimStore | None:
        gateway = self._worker.gateway
        able = gateway.has_store and gateway.store.capabilities.claim
        return cast("ClaimStore", gateway.store) if able else None

    async def _every(self, pause: float, work: object) -> None:
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
            try:
                await work()  # type: ignore[operator]  # one of the two coroutine functions of `start`
            except (ResultStoreUnavailable, BrokerUnavailable) as exc:
                logger.warning("workflows are looked after again in a while: %s", exc)

    # --- starting: the gate ---

    async def admit(self, batch: Sequence[Held]) -> Sequence[Held]:
        """See ``Gate``: of what a join has started, one copy."""
        guarded = [held for held in batch if ONCE in held.delivery.message.headers]
        if not guarded or not self._worker.gateway.has_store:
            return batch
        ready = [held for held in batch if ONCE not in held.delivery.message.headers]
        undecided = list(guarded)
        try:
            async with asyncio.timeout(_PATIENCE):
                records = await self._worker.gateway.store.get([held.delivery.message.id for held in guarded])
                while undecided:
                    held = undecided[0]
                    record = records.get(held.delivery.message.id)
                    if record is not None and record.final:  # it has ended: only what follows from that may be missing
                        rides_on = record.state == State.SUCCESS and held.delivery.message.headers[ONCE] == RIDES
                        results = () if rides_on else (record,)
                        self._end(
                            held, Outcome(verdict=Verdict.IGNORED, results=results, detail=_COPY if rides_on else "")
                        )
                    elif await self._claim(held):
                        ready.append(held)
                    del undecided[0]
        except (ResultStoreUnavailable, TimeoutError):
            for held in undecided:
                held.delay = 1.0
                self._worker.settlement.end(held, returned(held))
        return ready

    async def _claim(self, held: Held) -> bool:
        """Whether it may start here. Where not, it is ended: it runs elsewhere, or has run."""
        if (claims := self._claims) is None:
            return True
        name, owner = _attempt(held.delivery.message), f"{self._owner}/{held.job_id}"
        lease = await claims.claim(name, owner, lease=START_LEASE)
        if lease.owner == owner:
            self._starts.append((held, name, owner))
            return True
        if lease.value == _ENDED:
            self._end(held, Outcome(verdict=Verdict.IGNORED, detail=_COPY))
        else:
            held.delay = max(0.1, min(START_LEASE, lease.until - self._app.clock.time()))
            self._worker.settlement.end(held, returned(held))
        return False

    def _end(self, held: Held, outcome: Outcome) -> None:
        message = held.delivery.message
        self._worker.settlement.end(held, evolve(outcome, task_id=message.id, task=message.task))

    async def _renew(self) -> None:
        if (claims := self._claims) is None:
            return
        self._starts = [start for start in self._starts if start[0].job_id in self._worker.settlement.held]
        for _, name, owner in list(self._starts):
            await claims.claim(name, owner, lease=START_LEASE)

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
        calls: list[Marked] = []
        failed: list[Result] = []
        for end in ends:
            if (mark := self._mark(end)) is None:
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
        if calls:
            await asyncio.gather(*(self._join(call, ends[0].held.delivery.queue) for call in _together(calls)))
        await self._end_starts(ends)

    def _mark(self, end: End) -> Mark | None:
        """What is to be marked of ``end``; None where the node goes on: given back, retried, replaced, or next in its chain."""
        message, outcome = end.held.delivery.message, end.outcome
        headers = message.headers
        if NODE not in headers or outcome.verdict in _GOES_ON or outcome.detail == _COPY or _given_back(end):
            return None
        if any(carries_on(message, follow_up) for follow_up in outcome.follow_ups):
            return None
        try:
            Slot.read(headers[NODE])
        except DecodeError as exc:
            logger.error("task %s[%s] belongs to no workflow that could be told: %s", message.task, message.id, exc)
            return None
        for result in outcome.results:
            if result.task_id == message.id and result.final:
                return Mark.of(result)
        revoked = outcome.verdict in (Verdict.REVOKED, Verdict.EXPIRED, Verdict.IGNORED)
        error = (errors.TaskRevoked if revoked else errors.WorkerLost)(outcome.detail or outcome.verdict.value)
        made = self._worker.records.final(
            message.id,
            State.REVOKED if revoked else State.FAILURE,
            error,
            headers=headers,
            properties=message.properties,
        )
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

    async def _end_starts(self, ends: Sequence[End]) -> None:
        """Keep the claims of what has ended, so that no copy starts; give up those of what was given back."""
        held_of = {id(end.held): end for end in ends}
        mine = [start for start in self._starts if id(start[0]) in held_of]
        if not mine or (claims := self._claims) is None:
            return
        self._starts = [start for start in self._starts if id(start[0]) not in held_of]
        kept = self._app.settings.workflows.expires
        for held, name, owner in mine:
            end = held_of[id(held)]
            if _given_back(end):
                await self._insist(partial(claims.release, name, owner))
            else:
                await self._insist(partial(claims.claim, name, owner, lease=kept, value=_ENDED))

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
        joins, claims = self._joins, self._claims
        if joins is None:
            return 0
        if claims is not None:
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
                await self._fire(joins, key, owner, self._worker.intake.queues[0])
                number += 1
        return number


def _attempt(message: Message) -> str:
    """The claim of one attempt: a retry, and what a task was replaced by, start anew under the same id."""
    headers = message.headers
    return f"{_STARTED}{message.id}/{headers.get('retries') or 0}/{headers.get('replaced_task_nesting') or 0}"


def _given_back(end: End) -> bool:
    return end.settlement is not None and end.settlement.action is Action.REQUEUE


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
