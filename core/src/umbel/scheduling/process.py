"""A scheduler as a process of its own: signals on the main thread, the service on the I/O loop."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

from umbel.scheduling.service import SchedulerService

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.scheduler")


class SchedulerProcess:
    """``umbel scheduler``. Made on any thread; ``run`` belongs on the main thread."""

    def __init__(self, app: Umbel) -> None:
        """Import the tasks and check every declared entry. Raises ``SettingsError``, ``PluginError``, ``UmbelError``."""
        app.load_tasks()
        self.app = app
        self.service = SchedulerService(app)
        self._stop = asyncio.Event()

    def run(self) -> int:
        """Send what is due until stopped; returns 0. Blocks. On the main thread it takes TERM and INT for itself meanwhile.

        Raises ``UmbelError`` where it cannot work at all: a wrong address, an entry that is declared wrongly.
        """
        done = threading.Event()
        on_main = threading.current_thread() is threading.main_thread()
        before = {s: signal.signal(s, self._signalled) for s in (signal.SIGTERM, signal.SIGINT)} if on_main else {}
        try:
            future = self.app.runtime.submit(self._main())
            future.add_done_callback(lambda _: done.set())
            done.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        future.result()
        return 0

    def request_stop(self) -> None:
        """Stop as TERM does. From any thread; returns at once."""
        self.app.runtime.loop.call_soon_threadsafe(self._stop.set)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        logger.warning("%s: stopping", signal.Signals(number).name)
        self.request_stop()

    async def _main(self) -> None:
        gateway = self.service.gateway
        running = asyncio.create_task(self.service.run(), name="umbel-scheduler")
        told = asyncio.create_task(self._stop.wait())
        try:
            await gateway.scheduler.leader()  # answers a wrong address at once, instead of trying for ever
            logger.info("%s is ready", self.service.owner)
            await asyncio.wait([running, told], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            for task in (running, told):
                task.cancel()
            await asyncio.wait([running, told])
            await gateway.close_components()  # gives the lead up
            logger.info("%s has stopped; it sent %d", self.service.owner, self.service.sent)
