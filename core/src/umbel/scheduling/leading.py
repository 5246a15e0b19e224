"""Who leads, as one of any number of schedulers sees it.

Nobody asks for the lead who has not just reached the broker, and who leads and cannot send gives the lead up: of those that
share a store, one that can send leads. Every call of ``Scheduler.lead`` comes from one coroutine, so that a renewal under way
cannot undo what is given up.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from umbel.errors import PublishError, SchedulerUnavailable

if TYPE_CHECKING:
    from umbel.model import Lease
    from umbel.ports.scheduler import Scheduler

logger = logging.getLogger("umbel.scheduler")


def _now() -> float:
    """Seconds, those included for which the machine was suspended where the system counts them: leases end meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


class Lead:
    """The lease of one scheduler. Lives on one event loop."""

    def __init__(self, owner: str, lease: float, reach_broker: Callable[[], Awaitable[None]]) -> None:
        """``reach_broker`` returns when the broker has answered. Raises ``PublishError``, ``TimeoutError`` otherwise."""
        self.owner = owner
        self.fence: int | None = None
        """The number of our lease; None: another leads, or nobody."""
        self._lease = lease
        self._reach_broker = reach_broker
        self._until = 0.0
        """When, by ``_now``, our lease may have ended."""
        self._unsent_since: float | None = None
        """``time.monotonic()`` from which on the broker has taken nothing."""
        self._given_up = False
        """The store is still to be told."""
        self._changed = asyncio.Event()
        self._hurry = asyncio.Event()

    @property
    def left(self) -> float:
        """Seconds for which the lead is ours for certain; 0: it may be another's."""
        return 0.0 if self.fence is None else max(0.0, self._until - _now())

    async def keep(self, store: Scheduler) -> None:
        """Take the lead where nobody has it, and renew it at a third of its length, until cancelled.

        Faults of store and broker are waited out; whatever else they raise is raised.
        """
        first, longest = self._lease / 24, min(1.0, self._lease / 3)
        pause = first
        try:
            while True:
                self._hurry.clear()
                try:
                    async with asyncio.timeout(self._lease):
                        rest = await self._step(store)
                    pause = first
                except (SchedulerUnavailable, PublishError, TimeoutError) as error:
                    logger.warning("who leads cannot be settled: %s", error or "there is no answer")
                    rest = pause * random.uniform(0.5, 1)  # jitter, not a secret
                    pause = min(pause * 2, longest)
                try:
                    async with asyncio.timeout(rest):
                        await self._hurry.wait()
                except TimeoutError:
                    pass
        finally:
            self._changed.set()

    async def _step(self, store: Scheduler) -> float:
        """One call of the store; seconds until the next."""
        if self._given_up:
            await store.lead(self.owner, lease=0.0)
            self._given_up = False
            return self._lease / 2  # the others ask at each third: it is their turn
        if self.fence is None:
            await self._reach_broker()
        await self.ask(store)
        return self._lease / 3

    async def ask(self, store: Scheduler) -> None:
        """Take or renew the lead, if it is to be had."""
        asked = _now()
        leader = await store.lead(self.owner, lease=self._lease)
        if self._given_up:  # meanwhile
            return
        before, self.fence = self.fence, leader.fence if leader.owner == self.owner else None
        if self.fence is not None:
            self._until = asked + self._lease
        if before != self.fence:
            self._tell(leader)

    def _tell(self, leader: Lease) -> None:
        if self.fence is None:
            logger.info("%s leads", leader.owner)
        else:
            logger.info("%s leads now (%d)", self.owner, self.fence)
        self._changed.set()

    async def wait(self) -> None:
        """Return when there may be something new about who leads, or ``keep`` has ended."""
        if self.fence is not None:  # its renewal is late
            await asyncio.sleep(self._lease / 100)
        else:
            await self._changed.wait()
            self._changed.clear()

    def sent(self) -> None:
        """The broker has taken what was sent."""
        self._unsent_since = None

    def unsent(self, begun: float, error: Exception) -> None:
        """It has not, tried since ``begun`` (``time.monotonic()``). After half a lease of that we lead no more: the store is
        told soon, or finds out when the lease ends."""
        self._unsent_since = self._unsent_since or begun
        if time.monotonic() - self._unsent_since > self._lease / 2:
            logger.warning("the lead is given up, for nothing can be sent from here: %s", error)
            self.fence, self._given_up, self._unsent_since = None, True, None
            self._hurry.set()
