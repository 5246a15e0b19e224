"""Remote control over the broker's broadcast.

A request goes to everybody on ``umbel.pidbox``; replies come back on ``reply.umbel.pidbox`` under the asker's key. The topics
are ours alone: a plugin that answers Celery's requests must not find each of them carried out already.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, cast

from umbel.errors import BrokerUnavailable
from umbel.ports.step import Step
from umbel.ports.transport import Broadcaster, Transport
from umbel.protocol import new_id
from umbel.worker.intake import describe

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.control")

REQUESTS = "umbel.pidbox"
REPLIES = "reply.umbel.pidbox"


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
            "shutdown": self._shutdown,
        }

    async def start(self, worker: Worker) -> None:
        if worker.gateway.transport.capabilities.broadcast:
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
        given = arguments.get("task_id")
        ids = [given] if isinstance(given, str) else list(given or ())
        self._worker.operations.revoke(ids, terminate=bool(arguments.get("terminate")))
        return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}

    def _shutdown(self, _: Mapping[str, Any]) -> None:
        self._worker.operations.shutdown()


def _addressed(name: str, request: Mapping[str, Any]) -> bool:
    destination, pattern = request.get("destination"), request.get("pattern")
    if destination:
        return name in destination
    if pattern:
        return bool(re.search(pattern, name)) if request.get("matcher") == "pcre" else fnmatchcase(name, pattern)
    return True


async def ask(
    transport: Transport,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    destination: Sequence[str] | None = None,
    timeout: float = 1.0,
) -> dict[str, Any]:
    """Send a request to workers and collect what they answer within ``timeout`` seconds, by worker name.

    Returns early when every worker of ``destination`` has answered. Raises ``BrokerUnavailable``.
    """
    broadcaster = cast("Broadcaster", transport)
    key, ticket = new_id(), new_id()
    request = {
        "method": method,
        "arguments": dict(arguments or {}),
        "destination": None if destination is None else list(destination),
        "pattern": None,
        "matcher": None,
        "ticket": ticket,
        "reply_to": {"exchange": REPLIES, "routing_key": key},
    }
    replies: dict[str, Any] = {}
    stream = broadcaster.subscribe(REPLIES)

    async def listen() -> None:
        async for reply_key, payload in stream:
            answer = json.loads(payload)
            if reply_key == key and answer.get("ticket") == ticket:
                replies.update(answer["reply"])
                if destination is not None and set(destination) <= replies.keys():
                    return

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.05)  # the subscription begins with its first wait
    await broadcaster.broadcast(REQUESTS, json.dumps(request).encode())
    await asyncio.wait([listening], timeout=timeout)
    listening.cancel()
    await asyncio.wait([listening])
    return replies
