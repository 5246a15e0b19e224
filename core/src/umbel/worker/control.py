"""Remote control over the broker's broadcast: the worker's side of ``umbel.pidbox``."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, cast

from umbel.errors import BrokerUnavailable, UmbelError
from umbel.pidbox import REPLIES, REQUESTS, ask
from umbel.ports.step import Step
from umbel.ports.transport import Broadcaster
from umbel.revocation import GRACE, Revocation
from umbel.worker.intake import describe

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.control")


class Control(Step):
    """Answers requests addressed to this worker."""

    name: ClassVar[str] = "control"
    requires: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._listening: asyncio.Task[None] | None = None
        self._commands: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
            "ping": lambda _: {"ok": "pong"},
            "stats": lambda _: worker.operations.stats(),
            "active": self._active,
            "registered": lambda _: sorted(worker.app.tasks),
            "active_queues": lambda _: [{"name": queue, "routing_key": queue} for queue in worker.intake.queues],
            "revoke": self._revoke,
            "restore": self._restore,
            "revoked": lambda _: [each.to_plain() for each in worker.operations.revocations()],
            "limit": self._limit,
            "shutdown": self._shutdown,
        }

    async def start(self, worker: Worker) -> None:
        if worker.settings.worker.control and worker.gateway.transport.capabilities.broadcast:
            self._listening = asyncio.create_task(self._listen(), name="umbel-control")
            worker.watch(self._listening)

    async def stop(self, worker: Worker) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])

    async def _listen(self) -> None:
        while True:
            transport = self._worker.gateway.transport
            try:
                async for _, payload in cast("Broadcaster", transport).subscribe(REQUESTS):
                    await self._answer(cast("Broadcaster", transport), payload)
            except BrokerUnavailable as exc:
                logger.warning("remote control is cut off for a moment: %s", exc)
            await asyncio.sleep(1)
            self._worker.revocations.look_soon()

    async def _answer(self, transport: Broadcaster, payload: bytes) -> None:
        try:
            request = json.loads(payload)
            if not _addressed(self._worker.name, request):
                return
            method, arguments = str(request["method"]), request.get("arguments") or {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as exc:
            logger.warning("a remote-control request cannot be read and is ignored: %s", exc)
            return
        command = self._commands.get(method)
        try:
            value = {"error": f"unknown command {method!r}"} if command is None else command(arguments)
        except Exception as exc:
            logger.exception("remote-control command %s failed", method)
            value = {"error": repr(exc)}
        reply_to = request.get("reply_to")
        if isinstance(reply_to, Mapping) and value is not None:
            answer = {"ticket": request.get("ticket"), "reply": {self._worker.name: value}}
            await transport.broadcast(
                REPLIES, json.dumps(answer, default=repr).encode(), key=str(reply_to.get("routing_key", ""))
            )

    # --- commands ---

    def _active(self, _: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return [
            {
                **describe(task.delivery),
                "hostname": self._worker.name,
                "time_start": task.started,
                "worker_pid": task.pid,
            }
            for task in self._worker.operations.held()
        ]

    def _revoke(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """``revocation`` as plain data, and whether it is ``kept`` already; or its fields by themselves, ``task_id`` for ids."""
        if (plain := arguments.get("revocation")) is not None:
            revocation = Revocation.from_plain(plain)
            struck = self._worker.revocations.revoke(revocation, is_kept=bool(arguments.get("kept")))
            what = revocation.describe()
        else:
            given = arguments.get("task_id")
            ids = [given] if isinstance(given, str) else list(given or ())
            struck = self._worker.operations.revoke(
                ids,
                task=arguments.get("task"),
                headers=arguments.get("headers"),
                terminate=bool(arguments.get("terminate")),
                grace=float(arguments.get("grace", GRACE)),
                expires=arguments.get("expires"),
            )
            what = ", ".join(ids) or "of that name or header"
        return {"ok": f"tasks {what} flagged as revoked", **struck}

    def _restore(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        revocation = Revocation.from_plain(arguments["revocation"])
        self._worker.revocations.restore(revocation)
        return {"ok": f"tasks {revocation.describe()} may run again"}

    def _limit(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change limits of ``task`` (``changes``, by the names of ``TaskOptions``), and tell those in force."""
        task = arguments.get("task")
        try:
            if changes := arguments.get("changes"):
                self._worker.operations.change_limits(str(task), changes)
            return self._worker.operations.limits([] if task is None else [str(task)])
        except (UmbelError, ValueError, TypeError) as exc:
            return {"error": str(exc)}

    def _shutdown(self, _: Mapping[str, Any]) -> None:
        self._worker.operations.shutdown()


def _addressed(name: str, request: Mapping[str, Any]) -> bool:
    destination, pattern = request.get("destination"), request.get("pattern")
    if destination:
        return name in destination
    if pattern:
        return bool(re.search(pattern, name)) if request.get("matcher") == "pcre" else fnmatchcase(name, pattern)
    return True


__all__ = ["REPLIES", "REQUESTS", "Control", "ask"]
