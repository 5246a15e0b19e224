"""The listener ``systemd``: a step that tells the service manager how the worker is."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from attrs import Attribute, field, frozen

from umbel.markers import hookimpl
from umbel.ports.step import Step
from umbel_systemd.notifier import Notifier, take_from

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.systemd")

_STATUS_SECONDS: Final = 5.0
"""Seconds between two looks at what the status line says, at most."""
_MARGIN: Final = 15.0
"""Seconds beyond the bounds of the settings within which a start or a stop has ended."""


def _positive(instance: object, attribute: Attribute[float | None], value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{attribute.name} must be more than 0, not {value!r}")


@frozen(kw_only=True)
class SystemdOptions:
    """What the listener ``systemd`` takes: ``[plugins.options.systemd]``."""

    restart_after: float | None = field(default=None, validator=_positive)
    """Seconds since the last answer of the broker after which the watchdog is told nothing more, so that systemd restarts
    the worker; not set: never, since to restart it would not bring the broker back."""


class SystemdHook:
    """Makes the step, and tells it how far its worker is."""

    Options: ClassVar[type] = SystemdOptions

    def __init__(self, options: SystemdOptions | None = None) -> None:
        self._options = SystemdOptions() if options is None else options
        self._step: SystemdStep | None = None

    @hookimpl
    def umbel_add_steps(self, worker: Worker) -> Sequence[Step]:
        self._step = SystemdStep(worker, self._options)
        return [self._step]

    @hookimpl
    def umbel_worker_ready(self) -> None:
        if self._step is not None:
            self._step.ready()

    @hookimpl
    def umbel_worker_stopping(self) -> None:
        if self._step is not None:
            self._step.stopping()


class SystemdStep(Step):
    """Speaks from before anything else starts until everything else has stopped. The watchdog hears of the I/O loop: what
    tells it runs there."""

    name: ClassVar[str] = "systemd"
    before: ClassVar[tuple[str, ...]] = ("renewal", "settlement")

    def __init__(self, worker: Worker, options: SystemdOptions) -> None:
        self._worker = worker
        self._options = options
        self._notifier: Notifier | None = None
        self._watchdog: float | None = None
        self._beating: asyncio.Task[None] | None = None
        self._ready_at: float | None = None
        self._stopping = False
        self._status = ""

    async def start(self, worker: Worker) -> None:
        """Say that the worker starts. Raises ``UmbelError`` for a NOTIFY_SOCKET that cannot be."""
        self._notifier, self._watchdog = take_from(os.environ)
        if self._notifier is None:
            logger.info("systemd has not asked for notifications (NOTIFY_SOCKET is not set)")
            return
        self._tell("starting", EXTEND_TIMEOUT_USEC=_microseconds(worker.settings.worker.start_timeout + _MARGIN))
        self._beating = asyncio.create_task(self._beat(), name="umbel-systemd")
        worker.watch(self._beating)

    async def stop(self, worker: Worker) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        if self._notifier is not None:
            self._notifier.close()
            self._notifier = None

    def ready(self) -> None:
        """Every step is started."""
        self._ready_at = time.monotonic()
        self._tell(self._how(), READY=1)

    def stopping(self) -> None:
        """The worker drains, for which systemd is to give it as long as its own settings do."""
        self._stopping = True
        patience = _microseconds(self._worker.settings.worker.grace + _MARGIN)
        self._tell(self._how(), STOPPING=1, EXTEND_TIMEOUT_USEC=patience)

    async def _beat(self) -> None:
        pause = min(_STATUS_SECONDS, self._watchdog / 2 if self._watchdog else _STATUS_SECONDS)
        while True:
            if self._watchdog and self._alive():
                self._tell(self._how(), WATCHDOG=1)
            else:
                self._tell(self._how())
            await asyncio.sleep(pause)

    def _tell(self, status: str, **fields: Any) -> None:
        if status != self._status:
            fields["STATUS"] = self._status = status
        if self._notifier is not None:
            self._notifier.send(**fields)

    def _alive(self) -> bool:
        bound = self._options.restart_after
        return bound is None or self._silence() <= bound

    def _silence(self) -> float:
        """Seconds for which a broker that is being asked has not answered."""
        if self._ready_at is None or self._stopping or not self._worker.operations.queues():
            return 0.0
        age: float | None = self._worker.operations.stats()["last_poll_age"]
        return time.monotonic() - self._ready_at if age is None else age

    def _how(self) -> str:
        """The status line."""
        if self._ready_at is None and not self._stopping:
            return "starting"
        active = len(self._worker.operations.active())
        work = f"{active} running, {len(self._worker.operations.reserved())} waiting"
        if self._stopping:
            return f"stopping: {work}"
        silence = self._silence()
        quiet = (
            f"; no answer of the broker for {silence:.0f} s" if silence > self._worker.settings.worker.watchdog else ""
        )
        return work + quiet


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)
