"""As many slots as the work asks for, between two bounds: up at once while work waits, down after a time of too many.

``decide`` is pure: a look at the load in, the number of slots out. The step looks once a second, and asks the broker only
while every slot is busy.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from attrs import evolve, frozen

from umbel.errors import BrokerUnavailable, NotSupported
from umbel.ports.pool import Pool
from umbel.ports.step import Step

if TYPE_CHECKING:
    from umbel.settings.schema import WorkerSettings
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

EVERY: Final = 1.0
"""Seconds between two looks, and so between two changes."""
LATE: Final = 5.0
"""Seconds for which work may wait while slots are added step by step; after that as many are added as it asks for."""


@frozen(kw_only=True)
class Load:
    """One look at a worker and its queues."""

    running: int
    """Slots that are busy."""
    waiting: int = 0
    """Work in the worker's hands that no slot has started."""
    backlog: int = 0
    """Messages that the queues could hand out now."""
    waited: float = 0.0
    """Age in seconds of the oldest of both, where known."""


@frozen(kw_only=True)
class Bounds:
    least: int
    most: int
    idle: float
    """Seconds of too many slots before any is taken away."""


@frozen
class Memory:
    """What is kept from look to look."""

    slots: int
    peak: int = 0
    """Most slots that were needed since ``since``."""
    since: float = -math.inf
    """When slots were first too many, all of the time since; in the seconds of ``now``."""


def decide(load: Load, bounds: Bounds, memory: Memory, now: float) -> Memory:
    """How many slots there are to be from now on, ``Memory.slots``.

    Up: every slot is busy and work waits; by what waits, at most twice as many at once, or as many as wait where work has
    waited for ``LATE`` seconds. Down: some slot was idle, and nothing waited, at every look for ``bounds.idle`` seconds; to
    the most that were needed in that time. A change starts a new time.
    """
    slots = min(max(memory.slots, bounds.least), bounds.most)
    if slots != memory.slots:  # somebody has changed it, or the bounds
        return Memory(slots, 0, now)
    waits = load.waiting + load.backlog
    if load.running >= slots:
        if waits and slots < bounds.most:
            step = waits if load.waited >= LATE else min(waits, slots)
            return Memory(min(slots + step, bounds.most), 0, now)
        return Memory(slots, 0, now)
    needed = min(load.running + waits, slots)
    if needed == slots:
        return Memory(slots, 0, now)
    since = now if math.isinf(memory.since) else memory.since
    peak = max(memory.peak, needed)
    if now - since < bounds.idle:
        return Memory(slots, peak, since)
    return Memory(max(peak, bounds.least), 0, now)


def first_slots(chosen: WorkerSettings) -> int | None:
    """With how many slots a worker starts; None: the settings do not say."""
    if chosen.concurrency is not None or chosen.autoscale_max is None:
        return chosen.concurrency
    return chosen.autoscale_min or 1


def check_autoscale(worker: Worker) -> None:
    """Raises ``NotSupported`` for a pool whose size cannot change."""
    chosen = worker.settings.worker
    if chosen.autoscale_max is not None and not worker.pool.capabilities.resize:
        raise NotSupported(
            f"[worker] autoscale_max needs a pool whose size can change, and {chosen.pool!r} is none: take it away, or set "
            f'[worker] pool = "prefork"'
        )


class Autoscale(Step):
    """Changes the number of a pool's slots. Does nothing until the settings, or an operator, give bounds."""

    name: ClassVar[str] = "autoscale"
    requires: ClassVar[tuple[str, ...]] = ("pool", "intake")

    def __init__(self, worker: Worker) -> None:
        chosen = worker.settings.worker
        self._worker = worker
        self._looking: asyncio.Task[None] | None = None
        self._waiting: dict[int, float] = {}
        """When work in the worker's hands was first seen waiting for a slot, by job id."""
        self.bounds: Bounds | None = None
        if (most := chosen.autoscale_max) is not None:
            self.bounds = Bounds(least=chosen.autoscale_min or 1, most=most, idle=chosen.autoscale_idle)

    def stats(self) -> Mapping[str, Any]:
        """The bounds, where there are any."""
        if (bounds := self.bounds) is None:
            return {}
        return {"autoscaler": {"min": bounds.least, "max": bounds.most, "current": self._worker.concurrency}}

    def change(self, least: int | None, most: int | None) -> Mapping[str, int]:
        """See ``Operations.autoscale``. Kept from the next look on; where there were no bounds, looking begins."""
        worker, chosen = self._worker, self._worker.settings.worker
        if not worker.pool.capabilities.resize:
            raise NotSupported(f"pool {chosen.pool!r} cannot change its size while it runs")
        before = self.bounds or Bounds(least=1, most=worker.concurrency, idle=chosen.autoscale_idle)
        least, most = before.least if least is None else least, before.most if most is None else most
        if not 1 <= least <= most:
            raise ValueError(f"slots are between 1 and the most that there may be, not between {least} and {most}")
        self.bounds = evolve(before, least=least, most=most)
        if self._looking is None:
            self._begin()
        return {"min": least, "max": most, "current": worker.concurrency}

    def _begin(self) -> None:
        self._looking = asyncio.create_task(self._look_now_and_then(), name="umbel-autoscale")
        self._worker.watch(self._looking)

    async def start(self, worker: Worker) -> None:
        if self.bounds is not None:
            self._begin()

    async def stop(self, worker: Worker) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    async def _look_now_and_then(self) -> None:
        memory = Memory(self._worker.concurrency)
        while True:
            await asyncio.sleep(EVERY)
            bounds = self.bounds
            assert bounds is not None  # looking begins with bounds, and nobody takes them away
            before = self._worker.concurrency  # an operator may have changed it meanwhile
            load = await self._load(before, bounds)
            memory = decide(load, bounds, evolve(memory, slots=before), time.monotonic())
            if memory.slots != before:
                logger.info(
                    "slots: %s instead of %s; %s busy, %s waiting here, %s in the queues",
                    memory.slots,
                    before,
                    load.running,
                    load.waiting,
                    load.backlog,
                )
                await self._worker.operations.resize_pool(memory.slots)

    async def _load(self, slots: int, bounds: Bounds) -> Load:
        worker, now = self._worker, time.monotonic()
        held = worker.settlement.held
        # A pool that does not tell what runs starts what it is given.
        told = type(worker.pool).running is not Pool.running
        running = worker.pool.running() if told else dict.fromkeys(list(held)[:slots])
        waiting = [job_id for job_id in held if job_id not in running]
        self._waiting = {job_id: self._waiting.get(job_id, now) for job_id in waiting}
        load = Load(running=len(running), waiting=len(waiting))
        if len(running) < slots or slots >= bounds.most:
            return load
        try:
            depths = (await worker.gateway.transport.depth(worker.intake.queues)).values()
        except BrokerUnavailable:
            return evolve(load, waiting=0)  # nothing is claimed meanwhile: nothing to grow for
        wall = worker.app.clock.time()
        ages = [now - since for since in self._waiting.values()]
        ages += [wall - depth.oldest for depth in depths if depth.oldest is not None]
        return evolve(load, backlog=sum(depth.ready for depth in depths), waited=max(ages, default=0.0))
