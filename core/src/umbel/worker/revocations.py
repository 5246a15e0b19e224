"""What is revoked, as one worker knows it: loaded before it claims anything, heard of since, looked up again now and then.

Asking costs a look into a few tables in memory, and one truth test where nothing is revoked: no round trip per task. What is
kept in the result store is read at the start; what is said later is heard at once, and found within ``REFRESH`` seconds by a
worker that did not hear it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from umbel.errors import BrokerUnavailable, ResultStoreUnavailable, TaskRevoked
from umbel.model import Message, Outcome, State, Verdict
from umbel.pidbox import ask
from umbel.ports.step import Step
from umbel.revocation import Revocation, keep, keeper, kept, named

if TYPE_CHECKING:
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

REFRESH: Final = 10.0
"""Seconds between two looks into the store; the first look after a failed one comes after ``_AGAIN`` seconds."""
_AGAIN: Final = 1.0
_PATIENCE: Final = 5.0
"""Seconds for which a starting worker waits for a store that does not answer, before it works without."""
_ANSWER: Final = 5.0
"""Seconds after which a task that was ended by force, and still runs, is called unstoppable."""
_MOST_TOLD: Final = 50_000
"""Ids that are remembered though no store keeps them; the oldest are forgotten first."""
_LOOK: Final = 0.05
"""Seconds between two looks at a job that is on its way into the pool or out of it."""


class Revocations(Step):
    """``worker.revocations``. Belongs on the I/O loop, but for ``cancelled``."""

    name: ClassVar[str] = "revocations"
    requires: ClassVar[tuple[str, ...]] = ("settlement",)
    before: ClassVar[tuple[str, ...]] = ("intake",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ids: OrderedDict[str, Revocation] = OrderedDict()
        self._rules: dict[str, Revocation] = {}
        """By name or header; by the revocation's name."""
        self._kept: dict[str, Revocation] = {}
        """Those that the store had at the last look, or that were kept since, by name."""
        self._unkept: dict[str, Revocation] = {}
        """Those that the store is to keep and has not taken yet."""
        self._first_end = math.inf
        """Unix time at which the first of all stops to hold."""
        self._cancelled: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._soon = asyncio.Event()

    # --- asking ---

    def covers(self, message: Message) -> bool:
        """Whether ``message`` is not to run."""
        return bool(self._ids or self._rules) and self._find(named(message))

    def hidden(self, message: Message) -> bool:
        """Whether something is revoked, and only an executor can read what ``message`` calls."""
        return bool(self._ids or self._rules) and not named(message).task

    def _find(self, message: Message) -> bool:
        now = self._worker.app.clock.time()
        if now >= self._first_end:
            self._forget_ended(now)
        return message.id in self._ids or any(rule.covers(message) for rule in self._rules.values())

    def refused(self, message: Message) -> Outcome:
        """The outcome of what has not been started."""
        return self._outcome(message, "revoked")

    def ended(self, message: Message) -> Outcome:
        """The outcome of what was ended while it ran."""
        return self._outcome(message, "terminated")

    def _outcome(self, message: Message, why: str) -> Outcome:
        return self._worker.records.ended(Verdict.REVOKED, named(message), TaskRevoked(why), state=State.REVOKED)

    def cancelled(self, task_id: str) -> bool:
        """Whether the running task is asked to end. From any thread."""
        return task_id in self._cancelled

    @property
    def ids(self) -> Mapping[str, Revocation]:
        """What is revoked by id, the oldest first."""
        return self._ids

    def all(self) -> Sequence[Revocation]:
        """Everything that is revoked here."""
        unique = {revocation.name: revocation for revocation in self._ids.values()}
        return [*unique.values(), *self._rules.values()]

    # --- changing ---

    def revoke(self, revocation: Revocation, *, is_kept: bool) -> Mapping[str, Sequence[str]]:
        """From now on nothing that it covers is started; with ``terminate``, what runs of it is ended.

        ``is_kept``: whoever says so has put it into the store already; otherwise this worker does, if it can, soon.
        Returns the ids of the ``running`` tasks that it covers, and of those ``waiting`` here for a slot.
        """
        new = self._add(revocation)
        if is_kept:
            self._kept[revocation.name] = revocation
        elif new and self._can_keep:
            self._unkept[revocation.name] = revocation
            self._soon.set()
        return self._strike(revocation)

    def restore(self, revocation: Revocation) -> None:
        """What ``revocation`` chooses may run again."""
        for known in self.all():
            rest = known.without(revocation)
            if rest is not known:
                self._remove(known)
                if rest is not None:
                    self._add(rest)

    def _add(self, revocation: Revocation) -> bool:
        """False if all of it was known."""
        before = len(self._ids) + len(self._rules)
        if revocation.ids:
            self._ids.update(dict.fromkeys(revocation.ids, revocation))
            while len(self._ids) > _MOST_TOLD and not self._can_keep:
                self._ids.popitem(last=False)
        else:
            self._rules[revocation.name] = revocation
        self._first_end = min(self._first_end, revocation.until)
        return len(self._ids) + len(self._rules) > before

    def _remove(self, revocation: Revocation) -> None:
        for task_id in revocation.ids:
            if self._ids.get(task_id) == revocation:
                del self._ids[task_id]
        for table in (self._rules, self._kept, self._unkept):
            table.pop(revocation.name, None)

    def _forget_ended(self, now: float) -> None:
        for revocation in self.all():
            if revocation.until <= now:
                self._remove(revocation)
        self._first_end = min((revocation.until for revocation in self.all()), default=math.inf)

    @property
    def _can_keep(self) -> bool:
        gateway = self._worker.gateway
        return gateway.has_store and keeper(gateway.store) is not None

    # --- what is held here ---

    def _strike(self, revocation: Revocation) -> Mapping[str, Sequence[str]]:
        running = self._worker.pool.running()
        struck: dict[str, list[str]] = {"running": [], "waiting": []}
        for held in list(self._worker.settlement.held.values()):
            if held.concluding is not None or not revocation.covers(message := named(held.delivery.message)):
                continue
            runs = held.job_id in running
            struck["running" if runs else "waiting"].append(message.id)
            if not runs:
                self._do(self._take_back(held, held.job_id, revocation))
            elif revocation.terminate:
                self._do(self._end(held, held.job_id, revocation.grace))
        return struck

    async def _take_back(self, held: Held, job_id: int, revocation: Revocation) -> None:
        """It waits in the pool, or for its turn to go there. Should it start before it is caught, it runs."""
        worker, pause = self._worker, _LOOK
        while job_id in worker.settlement.held and self._worker.revocations.covers(held.delivery.message):
            if worker.intake.withdraw(held):
                worker.settlement.end(held, self.refused(held.delivery.message))
                return
            if job_id in worker.pool.running():
                if revocation.terminate:
                    await self._end(held, job_id, revocation.grace)
                return
            if await worker.pool.cancel(job_id, force=False):
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _end(self, held: Held, job_id: int, grace: float) -> None:
        """Ask the running task to end; after ``grace`` seconds, end the process that runs exactly this job."""
        worker, message = self._worker, named(held.delivery.message)
        self._cancelled.add(message.id)
        try:
            if grace > 0:
                if held.options.cancel == "raise":
                    await worker.pool.cancel(job_id, force=False)
                if await self._left(job_id, grace):
                    return
            going = await worker.pool.cancel(job_id, force=True)
            if not (going and await self._left(job_id, _ANSWER)) and job_id in worker.settlement.held:
                pool = worker.settings.worker.pool
                what = (
                    f"pool {pool!r} cannot end it"
                    if not going
                    else f"it does not end, and pool {pool!r} has no means left"
                )
                logger.warning("task %s[%s] was revoked and runs on: %s", message.task, message.id, what)
        finally:
            self._cancelled.discard(message.id)

    async def _left(self, job_id: int, seconds: float) -> bool:
        """Whether the job leaves within ``seconds``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (there := job_id in self._worker.settlement.held) and loop.time() < end:  # noqa: ASYNC110  # rare, so not told
            await asyncio.sleep(_LOOK)
        return not there

    # --- the store ---

    async def start(self, worker: Worker) -> None:
        """Load what is kept, so that nothing revoked is started; a store that is down is waited for, but not for ever."""
        worker.gateway.is_cancelled = self.cancelled
        if self._can_keep:
            try:
                async with asyncio.timeout(_PATIENCE):
                    while not await self._look():  # noqa: ASYNC110  # it is the store that is asked each time
                        await asyncio.sleep(_AGAIN / 4)
            except TimeoutError:
                logger.warning("the worker starts without knowing what is revoked: the result store does not answer")
        elif worker.gateway.transport.capabilities.broadcast:
            self._do(self._learn())
        if self._can_keep:
            self._do(self._look_again(), "umbel-revocations")

    async def stop(self, worker: Worker) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def look_soon(self) -> None:
        """Something may have been said that was not heard."""
        self._soon.set()

    async def _look_again(self) -> None:
        again = _AGAIN
        while True:
            try:
                async with asyncio.timeout(again):
                    await self._soon.wait()
            except TimeoutError:
                pass  # it is time
            self._soon.clear()
            again = REFRESH if await self._look() else _AGAIN

    async def _look(self) -> bool:
        """Bring this worker and the store to the same state. False if the store does not answer."""
        store = keeper(self._worker.gateway.store)
        assert store is not None
        known = set(self._kept)
        try:
            for name, revocation in list(self._unkept.items()):
                await keep(store, revocation, self._worker.app.clock.time())
                self._unkept.pop(name, None)
                self._kept[name] = revocation
            found = {revocation.name: revocation for revocation in await kept(store)}
        except ResultStoreUnavailable as exc:
            logger.debug("what is revoked could not be looked up: %s", exc)
            return False
        for name in known - found.keys():  # taken back, or over; not those that were said meanwhile
            if (over := self._kept.get(name)) is not None:
                self._remove(over)
        for name, revocation in found.items():
            if self._kept.get(name) != revocation:
                self._kept[name] = revocation
                self._add(revocation)
                self._strike(revocation)
        return True

    async def _learn(self) -> None:
        """Without a store that keeps them: what the other workers know."""
        worker = self._worker
        try:
            answers = await ask(worker.gateway.transport, "revoked")
        except BrokerUnavailable as exc:
            logger.warning("the other workers cannot be asked what is revoked: %s", exc)
            return
        for name, answer in answers.items():
            if name == worker.name or not isinstance(answer, list):
                continue
            for plain in answer:
                try:
                    self.revoke(Revocation.from_plain(plain), is_kept=True)
                except (ValueError, TypeError, KeyError, AttributeError) as exc:
                    logger.warning("worker %s tells of a revocation that cannot be read: %s", name, exc)

    def _do(self, work: Coroutine[Any, Any, None], name: str | None = None) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)
        if name is not None:
            self._worker.watch(task)
