"""A scheduler at work: it leads or waits to lead, and while it leads it sends what is due.

The order of the outer steps is what the promises rest on: publish, then mark. A crash between the two leaves slots that the
next leader sends again, under the same ids and with numbers of their own, and ``umbel.worker.once`` lets one message of
each id start. A leader whose lease is over is told so by ``mark``; until then it may have sent what its successor sends too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from umbel.errors import BrokerUnavailable, ResultStoreUnavailable, SchedulerUnavailable, UmbelError
from umbel.gateway import LocalGateway
from umbel.scheduling.leading import Lead
from umbel.scheduling.sending import LeadOver, Sender, Work

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.ports.scheduler import Scheduler

logger = logging.getLogger("umbel.scheduler")

_BATCH: Final = 500
"""Entries that are sent and marked together."""
_SHORTEST_SLEEP: Final = 0.01
_FAULT_PAUSE: Final = (0.25, 2.0)
"""First and longest pause in seconds after a fault of a store or the broker."""


class SchedulerService:
    """One of any number of schedulers. Everything runs on the app's I/O loop."""

    def __init__(self, app: Umbel, *, name: str | None = None) -> None:
        """No I/O. Raises ``UmbelError`` inside a worker's child, ``SettingsError`` for entries that are declared wrongly or
        where no store keeps schedules."""
        gateway = app.gateway
        if not isinstance(gateway, LocalGateway):
            raise UmbelError("a scheduler cannot be started inside a worker's child")
        self._app = app
        self.gateway = gateway
        self._settings = app.settings.scheduler
        self.address = app.schedules.address()
        app.schedules.declared()
        self.owner = f"{name or f'scheduler-{os.getpid()}@{socket.gethostname()}'}.{secrets.token_hex(4)}"
        self.sent = 0
        """Messages."""
        self._lead = Lead(self.owner, self._settings.lease, self._reach_broker)
        self._sender = Sender(app, gateway, self._lead)

    # --- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is due until cancelled; leadership is then left to its lease, or given up when the store is closed.

        Faults of broker and stores are waited out; who leads and cannot send for half a lease lets another try. Raises what
        was wrong from the beginning: ``SettingsError``, ``PluginError``, ``NotSupported``.
        """
        store = self.gateway.scheduler
        if not store.capabilities.durable:
            logger.warning("the store of %s forgets its entries when this process ends", self.address.origin)
        self._tell_guarantee()
        keeping = asyncio.create_task(self._lead.keep(store), name="umbel-lead")
        try:
            pause, longest = _FAULT_PAUSE
            while not keeping.done():
                try:
                    await self._turn(store)
                    pause = _FAULT_PAUSE[0]
                except (BrokerUnavailable, ResultStoreUnavailable, SchedulerUnavailable) as error:
                    logger.warning("nothing can be sent on time, trying again in %.1f s: %s", pause, error)
                    await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
                    pause = min(pause * 2, longest, self._settings.lease / 4)
            keeping.result()
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])

    async def send_due(self) -> float | None:
        """Send all that is due now; when the next is. For the only scheduler of a store, whose clock the caller moves.

        Raises as ``run``, and what broker and stores raise.
        """
        store = self.gateway.scheduler
        if not self._lead.left:
            await self._lead.ask(store)
            await self._app.schedules.reconcile()
        while await self._tick(store):
            pass
        upcoming = await store.due(math.inf, 1)
        return upcoming[0].next_due if upcoming else None

    def _tell_guarantee(self) -> None:
        if self.gateway.has_store and self.gateway.store.capabilities.claim:
            return
        logger.warning(
            "the store of [results] url has no claims: a run that two schedulers send, when one was held up beyond its lease, "
            "may start twice"
        )

    async def _reach_broker(self) -> None:
        """Return when the broker has answered. Raises ``PublishError``, ``TimeoutError``."""
        transport = self.gateway.transport
        try:
            async with asyncio.timeout(self._app.settings.broker.publish_timeout):
                await transport.depth([self._app.settings.default_queue])
        except (BrokerUnavailable, TimeoutError):
            await self.gateway.replace_transport(transport)
            raise

    async def _turn(self, store: Scheduler) -> None:
        """Wait for something to change about the lead; where it is ours then, put the declared entries in order, and send until
        it is lost."""
        if not self._lead.left:
            await self._lead.wait()
            return
        fence = self._lead.fence
        changed, removed = await self._app.schedules.reconcile()
        if changed or removed:
            logger.info("declared entries: %d added or changed, %d removed", len(changed), len(removed))
        while self._lead.left and self._lead.fence == fence:
            if not await self._tick(store):
                await self._sleep(store)

    async def _sleep(self, store: Scheduler) -> None:
        """Until the next entry is due, and no longer than a change may go unnoticed."""
        poll, now = self._settings.poll, self._app.clock.time()
        upcoming = await store.due(now + poll, 1)
        seconds = poll if not upcoming else (upcoming[0].next_due or 0.0) - self._app.clock.time()
        await asyncio.sleep(min(poll, max(_SHORTEST_SLEEP, seconds)))

    async def _tick(self, store: Scheduler) -> int:
        """Send and mark some of what is due; how many entries that were."""
        fence, now = self._lead.fence, self._app.clock.time()
        due = await store.due(now, _BATCH)
        if not due or fence is None:
            return 0
        try:
            work = await self._sender.send(due, now)
        except LeadOver:  # a store took its time, or this process was held up
            return 0
        if not await store.mark([each.decision.after for each in work], fence=fence):
            logger.warning(
                "another scheduler has taken the lead meanwhile; what was sent carries the ids of its own runs"
            )
            self._lead.fence = None
        else:
            self._count(work, now)
        return len(work)

    def _count(self, work: Sequence[Work], now: float) -> None:
        for each in work:
            if each.decision.passed_over:
                logger.info("schedule %r: a run is passed over: %s", each.entry.name, each.decision.passed_over)
        if sent := [each for each in work if each.messages]:
            number = sum(len(each.messages) for each in sent)
            self.sent += number
            late = now - min(each.entry.next_due or now for each in sent)
            logger.debug("%d sent, %.3f s late at most", number, late)
