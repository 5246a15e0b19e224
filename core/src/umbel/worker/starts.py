"""Telling that work on a delivery has begun: pools are asked what runs, and only where somebody listens."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, ClassVar, Final

from umbel.model import Completion, Ending
from umbel.ports.step import Step

if TYPE_CHECKING:
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

LOOK: Final = 0.05
"""Seconds between two looks at the pool."""


class Starts(Step):
    """Calls ``umbel_task_started``, once for each delivery whose work begins."""

    name: ClassVar[str] = "starts"
    requires: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._observe = worker.app.plugins.observer("umbel_task_started")
        self.heard = bool(self._observe)
        """Whether anybody listens; if not, ``ended`` need not be called."""
        self._looking: asyncio.Task[None] | None = None

    async def start(self, worker: Worker) -> None:
        if self._observe:
            self._looking = asyncio.create_task(self._look(), name="umbel-starts")
            worker.watch(self._looking)

    async def stop(self, worker: Worker) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    async def _look(self) -> None:
        held = self._worker.settlement.held
        while True:
            await asyncio.sleep(LOOK)
            if not any(not h.told_started for h in held.values()):
                continue
            for job_id, running in self._worker.pool.running().items():
                if (one := held.get(job_id)) is not None:
                    self._tell(one, running.since, running.pid)

    def ended(self, held: Held, completion: Completion) -> None:
        """A job has left the pool. If its start was not seen, it is told now."""
        if self._observe and completion.ending is not Ending.RETURNED:
            self._tell(held, time.monotonic() - completion.runtime, None)

    def _tell(self, held: Held, since: float, pid: int | None) -> None:
        if held.told_started or held.concluding is not None:
            return
        held.told_started = True
        self._observe(delivery=held.delivery, started=self._worker.wall(since), pid=pid)
