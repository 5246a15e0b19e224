"""A scheduler in a worker: ``umbel worker --with-scheduler``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from umbel.ports.step import Step
from umbel.scheduling.service import SchedulerService

if TYPE_CHECKING:
    from umbel.worker.worker import Worker


class SchedulerStep(Step):
    """Leads or waits to lead as long as the worker runs; the lead is given up when the worker's connections are closed."""

    name: ClassVar[str] = "scheduler"

    def __init__(self, worker: Worker) -> None:
        self.service = SchedulerService(worker.app, name=worker.name)
        self._running: asyncio.Task[None] | None = None

    async def start(self, worker: Worker) -> None:
        self._running = asyncio.create_task(self.service.run(), name="umbel-scheduler")
        worker.watch(self._running)

    async def stop(self, worker: Worker) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
