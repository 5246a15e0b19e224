"""The listener ``health``: a step that serves ``/live``, ``/ready`` and ``/`` as long as the worker lives."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Final

from umbel.markers import hookimpl
from umbel.ports.step import Step
from umbel_health.server import Answer, Server
from umbel_health.verdict import HealthOptions, Phase, View, why_not_live, why_not_ready

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.health")

_TICK: Final = 0.5
"""Seconds between two looks at the loop's clock and at the pool."""
_REMEMBERED: Final = 120
"""Looks whose lateness is remembered: a minute."""


class HealthHook:
    """Makes the step, and tells it how far its worker is."""

    Options: ClassVar[type] = HealthOptions

    def __init__(self, options: HealthOptions | None = None) -> None:
        self._options = HealthOptions() if options is None else options
        self._step: HealthStep | None = None

    @hookimpl
    def umbel_add_steps(self, worker: Worker) -> Sequence[Step]:
        self._step = HealthStep(worker, self._options)
        return [self._step]

    @hookimpl
    def umbel_worker_ready(self) -> None:
        if self._step is not None:
            self._step.enter(Phase.RUNNING)

    @hookimpl
    def umbel_worker_stopping(self) -> None:
        if self._step is not None:
            self._step.enter(Phase.STOPPING)


class HealthStep(Step):
    """Listens before anything else starts and until everything else has stopped.

    Whoever gets an answer knows that the I/O loop turns: the answer is made on it.
    """

    name: ClassVar[str] = "health"
    before: ClassVar[tuple[str, ...]] = ("renewal", "settlement")

    def __init__(self, worker: Worker, options: HealthOptions) -> None:
        self._worker = worker
        self._options = options
        self._phase = Phase.STARTING
        self._since = self._seen_process = time.monotonic()
        self._late: list[float] = []
        self._looking: asyncio.Task[None] | None = None
        self._server = Server({"/": self._all, "/live": self._live, "/ready": self._ready})

    async def start(self, worker: Worker) -> None:
        """Listen. Raises ``UmbelError``."""
        host = self._options.host
        port = await self._server.start(host, self._options.port)
        self._looking = asyncio.create_task(self._look(), name="umbel-health-look")
        logger.info("health is served at http://%s:%d/", f"[{host}]" if ":" in host else host, port)

    async def stop(self, worker: Worker) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self._server.stop()

    def enter(self, phase: Phase) -> None:
        """The worker has come so far."""
        self._phase = phase
        self._since = self._seen_process = time.monotonic()

    async def _look(self) -> None:
        while True:
            expected = time.monotonic() + _TICK
            await asyncio.sleep(_TICK)
            self._late.append(max(0.0, time.monotonic() - expected))
            del self._late[:-_REMEMBERED]
            if self._phase is Phase.RUNNING and self._worker.operations.stats()["pool"].get("processes", True):
                self._seen_process = time.monotonic()

    def _view(self, stats: dict[str, Any]) -> View:
        now = time.monotonic()
        return View(
            phase=self._phase,
            running_for=now - self._since,
            consumes=bool(self._worker.operations.queues()),
            last_poll_age=stats["last_poll_age"],
            childless=now - self._seen_process,
        )

    # --- pages ---

    def _live(self) -> Answer:
        return _plain(why_not_live(self._view(self._stats()), self._options))

    def _ready(self) -> Answer:
        return _plain(why_not_ready(self._view(self._stats()), self._options))

    def _all(self) -> Answer:
        stats = self._stats()
        view = self._view(stats)
        not_live, not_ready = why_not_live(view, self._options), why_not_ready(view, self._options)
        document = {
            "worker": self._worker.name,
            "phase": view.phase,
            "live": not not_live,
            "ready": not not_ready,
            "reasons": [*dict.fromkeys([*not_live, *not_ready])],
            "last_poll_age": view.last_poll_age,
            "loop_lag": round(max(self._late, default=0.0), 3),
            "queues": [queue.name for queue in self._worker.operations.queues()],
            **{name: stats[name] for name in ("held", "pool", "uptime")},
        }
        text = json.dumps(document, indent=2, default=repr) + "\n"
        return Answer(_status(not_live or not_ready), text, "application/json")

    def _stats(self) -> dict[str, Any]:
        return dict(self._worker.operations.stats())


def _status(reasons: Sequence[str]) -> HTTPStatus:
    return HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK


def _plain(reasons: Sequence[str]) -> Answer:
    return Answer(_status(reasons), "".join(f"{reason}\n" for reason in reasons) or "ok\n")
