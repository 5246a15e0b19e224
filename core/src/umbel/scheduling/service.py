"""A scheduler at work: it leads or waits to lead, and while it leads it sends what is due.

The order of the outer steps is what the promises rest on: publish, then mark. A crash between the two leaves slots that the
next leader sends again, under the same ids and with numbers of their own, and ``umbel.worker.once`` lets one message of
each id start. A leader whose lease is over is told so by ``mark``; until then it may have sent what its successor sends too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from attrs import define, evolve, field

from umbel.errors import (
    BrokerUnavailable,
    NotSupported,
    PublishError,
    PublishRefused,
    ResultStoreUnavailable,
    UmbelError,
)
from umbel.gateway import LocalGateway
from umbel.model import Message, ScheduleEntry
from umbel.scheduling.clockwork import Decision, decide, next_due
from umbel.scheduling.entries import table_of
from umbel.scheduling.runs import check_overlap, run_message, sentence
from umbel.scheduling.terms import Terms, run_id, terms_of

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.ports.scheduler import Scheduler

logger = logging.getLogger("umbel.scheduler")

_BATCH: Final = 500
"""Entries that are sent and marked together."""
_AGAIN: Final = 60.0
"""Seconds after which an entry that cannot be sent is tried again, with its next due time."""
_SHORTEST_SLEEP: Final = 0.01
_LATE_RENEWAL: Final = 0.05
_FAULT_PAUSE: Final = (0.25, 2.0)
"""First and longest pause in seconds after a fault of the store or the broker."""


@define
class Figures:
    """What a scheduler has done since its start."""

    sent: int = 0
    passed_over: int = 0
    failed: int = 0
    latest: float = 0.0
    """Seconds by which the last batch was late."""
    terms: int = 0
    """Times that it began to lead."""


@define
class _Work:
    """One due entry on its way."""

    entry: ScheduleEntry
    decision: Decision
    messages: list[Message] = field(factory=list)


class SchedulerService:
    """One of any number of schedulers. Everything runs on the app's I/O loop."""

    def __init__(self, app: Umbel, *, name: str | None = None) -> None:
        """No I/O. Raises ``UmbelError`` inside a worker's child, ``SettingsError`` for entries that are declared wrongly or
        where no store keeps schedules."""
        gateway = app.gateway
        if not isinstance(gateway, LocalGateway):
            raise UmbelError("a scheduler cannot be started inside a worker's child")
        self._app = app
        self._gateway = gateway
        self._settings = app.settings.scheduler
        self.address = app.schedules.address()
        app.schedules.declared()
        self.owner = f"{name or f'scheduler-{os.getpid()}@{socket.gethostname()}'}.{secrets.token_hex(4)}"
        self.figures = Figures()
        self._fence: int | None = None
        """The number of our lease; None: another leads, or nobody."""
        self._leads_until = 0.0
        """``time.monotonic()`` at which our lease may have ended."""
        self._changed = asyncio.Event()
        self._before = app.plugins.observer("umbel_before_publish")
        self._after = app.plugins.observer("umbel_after_publish")
        self._told: set[tuple[str, str]] = set()
        """Entries, and what was wrong with them, that the log has already."""

    @property
    def leads(self) -> bool:
        """Whether this scheduler may send."""
        return self._fence is not None and time.monotonic() < self._leads_until

    # --- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is due until cancelled; leadership is then left to its lease, or given up when the store is closed.

        Faults of broker and store are waited out. Raises what was wrong from the beginning: ``SettingsError``,
        ``PluginError``, ``NotSupported``.
        """
        store = self._gateway.scheduler
        if not store.capabilities.durable:
            logger.warning("the store of %s forgets its entries when this process ends", self.address.origin)
        self._tell_guarantee()
        keeping = asyncio.create_task(self._keep_leading(store), name="umbel-lead")
        keeping.add_done_callback(lambda _: self._changed.set())
        try:
            pause = _FAULT_PAUSE[0]
            while not keeping.done():
                try:
                    await self._turn(store)
                    pause = _FAULT_PAUSE[0]
                except (BrokerUnavailable, ResultStoreUnavailable) as error:
                    logger.warning("nothing can be sent on time, trying again in %.1f s: %s", pause, error)
                    await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
                    pause = min(pause * 2, _FAULT_PAUSE[1])
            keeping.result()
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])

    def _tell_guarantee(self) -> None:
        if self._gateway.has_store and self._gateway.store.capabilities.claim:
            return
        logger.warning(
            "the store of [results] url has no claims: a run that two schedulers send, when one was held up beyond its lease, "
            "may start twice"
        )

    async def _keep_leading(self, store: Scheduler) -> None:
        """Take the lead where nobody has it, and renew it at a third of its length."""
        lease = self._settings.lease
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(lease):
                    leader = await store.lead(self.owner, lease=lease)
            except (ResultStoreUnavailable, TimeoutError) as error:
                logger.warning("who leads cannot be settled: %s", error or "the store does not answer")
                await asyncio.sleep(min(1.0, lease / 3) * random.uniform(0.5, 1))  # jitter, not a secret
                continue
            before, self._fence = self._fence, leader.fence if leader.owner == self.owner else None
            if self._fence is not None:
                self._leads_until = asked + lease
            if before != self._fence:
                self._tell_lead(leader.owner)
                self._changed.set()
            await asyncio.sleep(lease / 3)

    def _tell_lead(self, leader: str) -> None:
        if self._fence is None:
            logger.info("%s leads", leader)
        else:
            self.figures.terms += 1
            logger.info("%s leads now (%d)", self.owner, self._fence)

    async def _turn(self, store: Scheduler) -> None:
        """Wait for something to change about the lead; where it is ours then, put the declared entries in order, and send until
        it is lost."""
        if not self.leads:
            if self._fence is not None:  # its renewal is late
                await asyncio.sleep(_LATE_RENEWAL)
            else:
                await self._changed.wait()
                self._changed.clear()
            return
        fence = self._fence
        changed, removed = await self._app.schedules.reconcile()
        if changed or removed:
            logger.info("declared entries: %d added or changed, %d removed", len(changed), len(removed))
        while self.leads and self._fence == fence:
            if not await self._tick(store):
                await self._sleep(store)

    async def _sleep(self, store: Scheduler) -> None:
        """Until the next entry is due, and no longer than a change may go unnoticed."""
        poll, now = self._settings.poll, self._app.clock.time()
        upcoming = await store.due(now + poll, 1)
        seconds = poll if not upcoming else (upcoming[0].next_due or 0.0) - self._app.clock.time()
        await asyncio.sleep(min(poll, max(_SHORTEST_SLEEP, seconds)))

    # --- sending --------------------------------------------------------------------------------

    async def _tick(self, store: Scheduler) -> int:
        """Send and mark some of what is due; how many entries that were."""
        fence, now = self._fence, self._app.clock.time()
        due = await store.due(now, _BATCH)
        if not due or fence is None or not self.leads:
            return 0
        work = await self._decided(due, now)
        if time.monotonic() >= self._leads_until:  # the store took its time, or the machine was suspended
            return 0
        await self._cancel([each for each in work if each.decision.cancel is not None], now)
        await self._publish(work)
        if not await store.mark([each.decision.after for each in work], fence=fence):
            logger.warning(
                "another scheduler has taken the lead meanwhile; what was sent carries the ids of its own runs"
            )
            self._fence = None
        else:
            self._count(work, now)
        return len(work)

    async def _decided(self, due: Sequence[ScheduleEntry], now: float) -> list[_Work]:
        read = [(entry, terms) for entry in due if (terms := self._terms(entry)) is not None]
        running = await self._running([entry for entry, terms in read if terms.overlap != "allow"])
        work = []
        for entry, terms in read:
            try:
                check_overlap(self._app, entry, terms.overlap)
                decision = decide(entry, terms, table_of(self._app, terms), now=now, running=entry.name in running)
                messages = [run_message(self._app, entry, slot) for slot in decision.send]
                work.append(_Work(entry, decision, messages))
            except Exception as error:  # a plugin's timetable may raise anything; one entry must not stop the others
                work.append(self._failed(entry, error, now))
        broken = {entry.name for entry, _ in read}
        work += [self._failed(entry, self._wrong(entry), now) for entry in due if entry.name not in broken]
        return work

    def _terms(self, entry: ScheduleEntry) -> Terms | None:
        try:
            return terms_of(entry)
        except (ValueError, TypeError):
            return None

    def _wrong(self, entry: ScheduleEntry) -> Exception:
        try:
            terms_of(entry)
        except (ValueError, TypeError) as error:
            return error
        return UmbelError("it can be read now")

    async def _running(self, entries: Sequence[ScheduleEntry]) -> set[str]:
        """Names of entries whose last run has not ended, as far as anybody can tell.

        A run that nobody has heard of for as long as results are kept counts as ended: its message may have been purged.
        """
        ids = {run_id(entry.name, entry.last_sent): entry for entry in entries if entry.last_sent is not None}
        if not ids or not self._gateway.has_store:  # without a store, what asks is refused one by one
            return set()
        ended = {task_id for task_id, record in (await self._gateway.do_get(list(ids))).items() if record.final}
        kept, now = self._app.settings.results.expires, self._app.clock.time()
        return {
            entry.name
            for task_id, entry in ids.items()
            if task_id not in ended and (kept is None or now - (entry.last_sent or 0.0) < kept)
        }

    async def _cancel(self, work: Sequence[_Work], now: float) -> None:
        """End the runs that make way for the next ones. Raises ``ResultStoreUnavailable``, ``BrokerUnavailable``."""
        ids = [run_id(each.entry.name, each.decision.cancel) for each in work if each.decision.cancel is not None]
        if not ids:
            return
        try:
            await self._app.control.arevoke(*ids, terminate=True)
        except NotSupported as error:
            for each in work:
                each.decision, each.messages = self._failed(each.entry, error, now).decision, []

    async def _publish(self, work: Sequence[_Work]) -> None:
        """Publish all messages; those that the broker refuses are told, and the rest sent. Raises ``BrokerUnavailable``."""
        messages = [message for each in work for message in each.messages]
        if not messages:
            return
        try:
            await self._send(messages)
        except BrokerUnavailable:
            raise
        except (PublishError, NotSupported):
            now = self._app.clock.time()
            for each in work:  # one at a time: one of them is at fault
                await self._publish_alone(each, now)

    async def _publish_alone(self, each: _Work, now: float) -> None:
        try:
            await self._send(each.messages)
        except (PublishRefused, NotSupported) as error:
            each.decision, each.messages = self._failed(each.entry, error, now).decision, []

    async def _send(self, messages: Sequence[Message]) -> None:
        if not messages:
            return
        if self._before:
            self._before(messages=messages)
        # Not tried again with the same messages: each that reaches the broker is to have a number of its own.
        await self._gateway.do_publish(messages, self._app.settings.broker.publish_timeout, again=False)
        if self._after:
            self._after(messages=messages)

    def _failed(self, entry: ScheduleEntry, error: BaseException, now: float) -> _Work:
        """An entry that cannot be sent: it is told why, and its due time is over, or looked at again in a while."""
        problem = sentence(error)
        if (entry.name, problem) not in self._told:
            if len(self._told) > 1000:
                self._told.clear()
            self._told.add((entry.name, problem))
            logger.error("schedule %r cannot be sent: %s", entry.name, problem)
        self.figures.failed += 1
        after = evolve(entry, problem=problem, next_due=now + _AGAIN)
        try:
            terms = terms_of(entry)
            passed = evolve(after, last_due=max(now, entry.last_due or 0.0))
            after = evolve(passed, next_due=next_due(passed, terms, table_of(self._app, terms)))
        except Exception:  # its timetable is what is wrong; it may be mended by another version or plugin
            pass
        return _Work(entry, Decision(send=(), after=after))

    def _count(self, work: Sequence[_Work], now: float) -> None:
        for each in work:
            self.figures.sent += len(each.messages)
            if each.decision.passed_over:
                self.figures.passed_over += 1
                logger.info("schedule %r: a run is passed over: %s", each.entry.name, each.decision.passed_over)
        sent = [each for each in work if each.messages]
        if sent:
            self.figures.latest = now - min(each.entry.next_due or now for each in sent)
            logger.debug("%d sent, %.3f s late at most", sum(len(each.messages) for each in sent), self.figures.latest)

    def stats(self) -> dict[str, Any]:
        """Figures as plain data."""
        figures = self.figures
        return {
            "owner": self.owner,
            "leads": self.leads,
            "sent": figures.sent,
            "passed_over": figures.passed_over,
            "failed": figures.failed,
            "terms": figures.terms,
            "lateness": round(figures.latest, 3),
        }
