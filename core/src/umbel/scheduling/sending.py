"""From entries that are due to messages in the broker. What is wrong with one entry keeps back no other.

Who sends must lead: the lead is looked at after all that may take time, immediately before the broker is called, and the call
ends when the lease may have ended. So a leader that was held up sends nothing late, wherever it was held up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from attrs import define, evolve, field

from umbel import unique
from umbel.claiming import claims_of
from umbel.errors import (
    BrokerUnavailable,
    DecodeError,
    DuplicateTask,
    NotSupported,
    PublishError,
    PublishRefused,
    ResultStoreUnavailable,
)
from umbel.model import Message, ScheduleEntry
from umbel.scheduling.clockwork import Decision, decide, look_again, marked, next_due
from umbel.scheduling.entries import table_of
from umbel.scheduling.runs import HEADER_COPY, START, check_overlap, plan_of, run_message, sentence
from umbel.scheduling.terms import run_id, terms_of

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.gateway import LocalGateway
    from umbel.scheduling.leading import Lead

logger = logging.getLogger("umbel.scheduler")

_AGAIN: Final = 60.0
"""Seconds after which an entry that cannot be sent is tried again, with its next due time."""
_GLANCE: Final = 0.001
"""Seconds of a lease that is taken to see whether another holds."""


class LeadOver(Exception):
    """Our lease may have ended: nothing may be sent."""


@define
class Work:
    """One due entry on its way."""

    entry: ScheduleEntry
    decision: Decision
    messages: Sequence[Message] = field(default=())
    """One for each slot of the decision."""
    plan: unique.Plan | None = None
    """How its runs are unique."""


class Sender:
    """Carries decisions out. On the I/O loop."""

    def __init__(self, app: Umbel, gateway: LocalGateway, lead: Lead) -> None:
        self._app = app
        self._gateway = gateway
        self._lead = lead
        self._before = app.plugins.observer("umbel_before_publish")
        self._after = app.plugins.observer("umbel_after_publish")
        self._told: set[tuple[str, str]] = set()
        """Entries, and what was wrong with them, that the log has already."""

    async def send(self, due: Sequence[ScheduleEntry], now: float) -> list[Work]:
        """Send what of ``due`` is to be sent at Unix time ``now``; what is to be marked then.

        Raises ``BrokerUnavailable``, ``LeadOver``: then some may have been sent, and nothing is to be marked.
        """
        running = await self._running(due)
        work = [self._decided(entry, now, running) for entry in due]
        await self._cancel([each for each in work if each.decision.cancel is not None], now)
        await self._publish([each for each in work if each.messages and each.plan is None], now)
        await self._publish_unique([each for each in work if each.messages and each.plan is not None], now)
        return work

    # --- deciding -------------------------------------------------------------------------------

    async def _running(self, entries: Sequence[ScheduleEntry]) -> set[str] | None:
        """Names of those entries that want to know it whose last run has not ended; None: nobody can tell now.

        A run that nobody has heard of for as long as results are kept counts as ended: its message may have been purged.
        """
        asking = [e for e in entries if e.last_sent is not None and e.schedule.get("overlap", "allow") != "allow"]
        ids = {run_id(entry.name, entry.last_sent or 0.0): entry for entry in asking}
        if not ids or not self._gateway.has_store:  # without a store, what asks is refused one by one
            return set()
        try:
            records = await self._gateway.do_get(list(ids))
        except (ResultStoreUnavailable, DecodeError) as error:
            logger.warning("%d entries wait: whether their last runs have ended cannot be seen: %s", len(ids), error)
            return None
        kept, now = self._app.settings.results.expires, self._app.clock.time()
        return {
            entry.name
            for task_id, entry in ids.items()
            if not ((record := records.get(task_id)) and record.final)
            and (kept is None or now - (entry.last_sent or 0.0) < kept)
        }

    def _decided(self, entry: ScheduleEntry, now: float, running: set[str] | None) -> Work:
        try:
            terms = terms_of(entry)
            check_overlap(self._app, entry, terms.overlap)
            if running is None and terms.overlap != "allow":
                return Work(entry, look_again(entry, now))
            runs = running is not None and entry.name in running
            decision = decide(entry, terms, table_of(self._app, terms), now=now, running=runs)
            messages = [run_message(self._app, entry, slot) for slot in decision.send]
            return Work(entry, decision, messages, plan_of(self._app, entry) if messages else None)
        except Exception as error:  # a plugin's timetable may raise anything; one entry must not stop the others
            return self._failed(entry, error, now)

    def _failed(self, entry: ScheduleEntry, error: BaseException, now: float) -> Work:
        """An entry that cannot be sent: it is told why, and its due time is over, or looked at again in a while."""
        problem = sentence(error)
        if (entry.name, problem) not in self._told:
            if len(self._told) > 1000:
                self._told.clear()
            self._told.add((entry.name, problem))
            logger.error("schedule %r cannot be sent: %s", entry.name, problem)
        after = evolve(entry, problem=problem, next_due=now + _AGAIN)
        try:
            terms = terms_of(entry)
            passed = evolve(after, last_due=max(now, entry.last_due or 0.0))
            after = evolve(passed, next_due=next_due(passed, terms, table_of(self._app, terms)))
        except Exception:  # its timetable is what is wrong; it may be mended by another version or plugin
            pass
        return Work(entry, Decision(send=(), after=after))

    def _fail(self, each: Work, error: BaseException, now: float) -> None:
        each.decision, each.messages = self._failed(each.entry, error, now).decision, ()

    # --- carrying out ---------------------------------------------------------------------------

    async def _cancel(self, work: Sequence[Work], now: float) -> None:
        """End the runs that make way for the next ones. Raises ``BrokerUnavailable``, ``LeadOver``."""
        ids = [run_id(each.entry.name, each.decision.cancel or 0.0) for each in work]
        if not ids:
            return
        self._check_lead()
        try:
            await self._app.control.arevoke(*ids, terminate=True)
        except (PublishRefused, NotSupported) as error:
            for each in work:
                self._fail(each, error, now)
        except ResultStoreUnavailable as error:
            logger.warning("%d entries wait: their earlier runs cannot be ended now: %s", len(work), error)
            for each in work:
                each.decision, each.messages = look_again(each.entry, now), ()

    async def _publish(self, work: Sequence[Work], now: float) -> None:
        """Publish all messages; those that the broker refuses are told, and the rest sent. Raises ``BrokerUnavailable``."""
        try:
            await self._send([message for each in work for message in each.messages])
        except BrokerUnavailable:
            raise
        except (PublishError, NotSupported):
            for each in work:  # one at a time: one of them is at fault
                try:
                    await self._send(each.messages)
                except (PublishRefused, NotSupported) as error:
                    self._fail(each, error, now)

    async def _publish_unique(self, work: Sequence[Work], now: float) -> None:
        ends = (self._publish_claimed(each, now) for each in work)
        for error in await asyncio.gather(*ends, return_exceptions=True):
            if error is not None:
                raise error

    async def _publish_claimed(self, each: Work, now: float) -> None:
        """Send the runs of one entry, as far as their key is free; the others are passed over.

        Where the key is held by the entry's own earlier run, the overlap policy says whether a run waits for its end.
        """
        sent: list[float] = []
        last_due, waits, why = each.entry.last_due, False, ""
        try:
            for slot, message in zip(each.decision.send, each.messages, strict=True):
                if (other := await self._send_claimed(each, message)) is None:
                    sent.append(slot)
                elif waits := _waits_for(each.entry, other):
                    break
                else:
                    why = f"task {other} has the same unique key"
                last_due = slot
        except (PublishRefused, NotSupported) as error:
            self._fail(each, error, now)
            return
        except ResultStoreUnavailable as error:
            logger.warning("schedule %r waits: its unique key cannot be claimed: %s", each.entry.name, error)
            waits = True
        if len(sent) < len(each.messages):
            terms = terms_of(each.entry)
            after = marked(each.entry, terms, table_of(self._app, terms), last_due=last_due, sent=sent)
            after = look_again(after, now).after if waits else after
            each.decision = Decision(send=tuple(sent), after=after, passed_over=why)
            each.messages = each.messages[: len(sent)]

    async def _send_claimed(self, each: Work, message: Message) -> str | None:
        """Send a unique run, unless it has begun already; the id of the task that has its key, and keeps it from being sent."""
        assert each.plan is not None
        store = claims_of(self._gateway.store, "unique tasks")
        number = str(message.headers[HEADER_COPY])
        first = await store.claim(f"{START}{message.id}", number, lease=_GLANCE)
        if (
            first.owner != number
        ):  # a former leader's, and begun: to claim its key again would undo what its worker said
            return None
        try:
            sent = await unique.asend(self._app, each.plan, message, None, publish=self._send)
        except DuplicateTask as error:
            return error.existing
        return None if isinstance(sent, str) else sent.existing

    async def _send(self, messages: Sequence[Message]) -> None:
        if not messages:
            return
        if self._before:
            self._before(messages=messages)
        self._check_lead()
        begun = time.monotonic()
        timeout = min(self._app.settings.broker.publish_timeout, self._lead.left)
        try:
            # Not tried again with the same messages: each that reaches the broker is to have a number of its own.
            await self._gateway.do_publish(messages, timeout, again=False)
        except BrokerUnavailable as error:
            self._lead.unsent(begun, error)
            raise
        self._lead.sent()
        await self._app.client.note(messages)
        if self._after:
            self._after(messages=messages)

    def _check_lead(self) -> None:
        if not self._lead.left:
            raise LeadOver


def _waits_for(entry: ScheduleEntry, other: str) -> bool:
    """Whether a new run of ``entry`` is to wait for the end of task ``other``: it is the earlier run."""
    waiting = entry.schedule.get("overlap") in ("queue", "cancel_old")
    return waiting and entry.last_sent is not None and other == run_id(entry.name, entry.last_sent)
