"""Unique keys in the worker's hands: claimed anew when a message is taken on, renewed while it runs, freed at its end.

What is unique until it is done is held under a short lease, renewed by this worker: if the worker is killed, the key is free
within that lease, and whoever claims it first, the message handed out again or another call, is the one that counts. What is
unique until it starts is held by its message and by no process; where its work begins, the key is released (``unique.started``).

A message whose key has passed to another call gives way to that one: both were never in the queue by the rules, but a claim
ended between them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from umbel.claiming import RUNS, SENDING, WAITS, Key, claims_of, waits
from umbel.errors import DuplicateTask, NotSupported, ResultStoreUnavailable, TaskRevoked
from umbel.model import Action, Lease, Message, State, Verdict, evolve
from umbel.ports.result_store import ClaimStore
from umbel.ports.step import Step
from umbel.unique import HEADER, WINDOW, held_for, replaced_by
from umbel.worker import copies
from umbel.worker.admission import returned
from umbel.worker.once import COPY

if TYPE_CHECKING:
    from umbel.worker.held import End, Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.unique")

_PATIENCE: Final = 5.0
"""Seconds that the result store has to answer; after them a message goes back to its queue, and a key ends by its lease."""
_PAUSE: Final = 1.0
"""Seconds for which such a message, or one beside which another is just being sent, is left in its queue."""
_FAULTS: Final = (ResultStoreUnavailable, TimeoutError)
_NEWER: Final = "that has taken its place"
_WORDS: Final = ("until_start", "until_done")
"""A key that is held for a time is so whatever becomes of its task."""
_AGAIN: Final = frozenset(
    {Verdict.RETRY, Verdict.RETURNED, Verdict.CANCELLED, Verdict.REQUEUED, Verdict.LOST, Verdict.UNKNOWN_TASK}
)
"""After these the message may wait again; where it was only sent on (FORWARDED), its key is as its sender left it."""
_UNSTARTED: Final = frozenset({Verdict.RETURNED, Verdict.CANCELLED, Verdict.FORWARDED})
"""After these it is as if it had not been started."""


class Uniques(Step):
    """A gate before the start, a renewal beside it, and two words at the end."""

    name: ClassVar[str] = "uniques"
    before: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._settings = worker.settings.unique
        self._renewing: asyncio.Task[None] | None = None
        self._running: dict[str, str] = {}
        """Keys that are renewed, and the ids of their tasks."""
        self._turn = asyncio.Lock()
        """Held while keys are renewed, and while keys are taken out of those: a late renewal would undo what was said last."""
        self._told = False

    async def start(self, worker: Worker) -> None:
        """Nothing is to be done before the first unique task."""

    async def stop(self, worker: Worker) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])

    @property
    def _store(self) -> ClaimStore:
        return claims_of(self._worker.gateway.store, "unique tasks")

    # --- before the start -------------------------------------------------------------------------

    async def admit(self, batch: Sequence[Held]) -> Sequence[Held]:
        """A gate (``umbel.worker.admission.Gate``)."""
        marked = [held for held in batch if HEADER in held.delivery.message.headers]
        if not marked:
            return batch
        leases = await asyncio.gather(*(self._take(held) for held in marked))
        refused = {held.job_id for held, lease in zip(marked, leases, strict=True) if not self._let(held, lease)}
        return [held for held in batch if held.job_id not in refused]

    async def _take(self, held: Held) -> Lease | None:
        """The key's lease as it is now; None: it does not matter to this message, or (``held.delay``) nobody knows."""
        message = held.delivery.message
        if (key := Key.of(message)) is None:
            return None
        retried = bool(message.headers.get("retries"))
        if key.until != "until_done" and (retried or (key.until == "until_start" and held.delivery.count > 1)):
            return None  # it has begun before, and is nobody's duplicate any more
        lasts, value = held_for(message, self._worker.app.clock.time(), self._settings.bound), RUNS
        if key.until == "until_done":
            lasts = self._settings.lease
        elif not isinstance(key.until, str):
            lasts, value = float(key.until), WINDOW
        try:
            async with asyncio.timeout(_PATIENCE):
                lease = await self._claim(key, message.id, lasts, value)
                # Another claim than its sender's: the key was free meanwhile, perhaps because another took its place.
                if (
                    lease.owner == message.id
                    and key.fence not in (None, lease.fence)
                    and held.delivery.count == 1
                    and not retried
                ):
                    return await self._unless_replaced(lease)
                return lease
        except _FAULTS as exc:
            logger.warning(
                "task %s[%s]: its unique key cannot be seen, trying again: %s", message.task, message.id, exc
            )
            held.delay = _PAUSE
        except NotSupported as exc:
            if not self._told:
                self._told = True
                logger.warning(
                    "task %s[%s] was sent as unique, and runs all the same: %s", message.task, message.id, exc
                )
        return None

    async def _claim(self, key: Key, task_id: str, lasts: float, value: bytes) -> Lease:
        """Claim a key; of a call in a workflow that replaces others, from one that waits too."""
        lease = await self._store.claim(key.name, task_id, lease=lasts, value=value)
        while lease.owner != task_id and key.on_conflict == "replace" and waits(lease):
            if await self._store.release(key.name, lease.owner, value=lease.value):
                await self._worker.gateway.store.put([replaced_by(self._worker.app, lease.owner, task_id)])
            lease = await self._store.claim(key.name, task_id, lease=lasts, value=value)
        return lease

    async def _unless_replaced(self, lease: Lease) -> Lease:
        """The lease, or one of whoever has taken the place of the call that holds it."""
        record = (await self._worker.gateway.store.get([lease.owner])).get(lease.owner)
        if record is None or record.state != State.REVOKED:
            return lease
        await self._store.release(lease.name, lease.owner)
        return evolve(lease, owner=_NEWER, value=b"")

    def _let(self, held: Held, lease: Lease | None) -> bool:
        """Whether the message may start; one that may not is ended."""
        message = held.delivery.message
        if lease is None:
            if held.delay:
                self._worker.settlement.end(held, returned(held))
            return not held.delay
        key = Key.of(message)
        assert key is not None  # it has a lease
        if lease.owner == message.id:
            if key.until == "until_done":
                self._running[lease.name] = message.id
                self._renew()
            return True
        if lease.value == SENDING:  # whoever sends it may die before it is sent
            held.delay = _PAUSE
            self._worker.settlement.end(held, returned(held))
            return False
        records = self._worker.records
        if key.on_conflict == "raise":
            duplicate = DuplicateTask(message.id, message.task, lease.owner)
            self._worker.settlement.end(held, records.ended(Verdict.FAILURE, message, duplicate))
        else:
            why = TaskRevoked(f"gives way to task {lease.owner}, which was sent with the same unique key")
            self._worker.settlement.end(held, records.ended(Verdict.REVOKED, message, why, state=State.REVOKED))
        return False

    # --- while it runs ----------------------------------------------------------------------------

    def _renew(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_all(), name="umbel-uniques")
            self._worker.watch(self._renewing)

    async def _renew_all(self) -> None:
        while self._running:
            await asyncio.sleep(self._settings.lease / 3)
            async with self._turn:
                held = list(self._running.items())
                await asyncio.gather(*(self._renew_one(name, task_id) for name, task_id in held))

    async def _renew_one(self, name: str, task_id: str) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                # The value too: its sender may say only now that it waits.
                lease = await self._store.claim(name, task_id, lease=self._settings.lease, value=RUNS)
        except _FAULTS as exc:
            logger.warning("the unique key of task %s could not be renewed, trying again: %s", task_id, exc)
            return
        if lease.owner != task_id:
            logger.warning("the unique key of task %s had ended, and task %s has it now", task_id, lease.owner)
            del self._running[name]

    # --- at its end -------------------------------------------------------------------------------

    async def keep(self, ends: Sequence[End]) -> None:
        """Before anything is told: the keys of messages that will wait again are held for that long.

        ``ends`` of messages with the header, here and in ``release``.
        """
        said = []
        now = self._worker.app.clock.time()
        for end in ends:
            message = end.held.delivery.message
            if end.outcome.verdict not in _AGAIN or (key := Key.of(message)) is None or key.until not in _WORDS:
                continue
            if key.until == "until_start" and end.outcome.verdict not in _UNSTARTED:
                continue  # it has started
            if key.on_conflict and end.outcome.verdict in _UNSTARTED and self._running.get(key.name) != message.id:
                continue  # its key has not been claimed yet
            waiting = next((again for again in end.outcome.follow_ups if again.id == message.id), message)
            said.append((key.name, message.id, self._hold(key.name, waiting, now)))
        await self._say(said)

    async def _hold(self, name: str, message: Message, now: float) -> None:
        lease = held_for(message, now, self._settings.bound)
        await self._store.claim(name, message.id, lease=lease, value=WAITS)

    async def _free(self, name: str, task_id: str) -> None:
        await self._store.release(name, task_id)

    async def release(self, ends: Sequence[End]) -> None:
        """After it is told: the keys of messages that have ended are free; a copy of a run has the id of one that has not."""
        said = []
        for end in ends:
            message = end.held.delivery.message
            if end.held.lost or end.outcome.detail in (COPY, copies.COPY):
                continue
            if (key := Key.of(message)) is None or key.until not in _WORDS:
                continue
            requeued = end.settlement is not None and end.settlement.action is Action.REQUEUE
            again = requeued or any(follow_up.id == message.id for follow_up in end.outcome.follow_ups)
            if again and (key.until == "until_done" or end.outcome.verdict in _UNSTARTED):
                continue
            said.append((key.name, message.id, self._free(key.name, message.id)))
        await self._say(said)

    async def _say(self, said: Sequence[tuple[str, str, Coroutine[Any, Any, object]]]) -> None:
        """Carry out what is only to be tried: what fails ends by its lease."""
        if not said:
            return
        try:
            async with asyncio.timeout(_PATIENCE), self._turn:
                for name, task_id, _ in said:
                    if self._running.get(name) == task_id:
                        del self._running[name]
                answers = await asyncio.gather(*(call for _, _, call in said), return_exceptions=True)
        except TimeoutError as exc:
            answers = [exc] * len(said)
            for _, _, call in said:
                call.close()
        for (name, task_id, _), answer in zip(said, answers, strict=True):
            if isinstance(answer, BaseException):
                logger.warning("the key %s of task %s ends by its lease only: %r", name, task_id, answer)
