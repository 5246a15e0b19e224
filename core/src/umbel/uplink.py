"""The way out of a worker's child, which has no connections: every operation goes up to the parent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from umbel.gateway import Gateway
from umbel.model import Message, Result
from umbel.ports.pool import Upcall

_LOOK: Final = 0.1
"""Seconds between two questions whether one task is cancelled."""
_MOST_LOOKED: Final = 1000
"""Tasks that it is remembered of when they were last asked for."""


class UplinkGateway(Gateway):
    """Sends every operation to the parent worker. Awaitable forms wait in a thread where the upcall has none of its own."""

    def __init__(self, upcall: Upcall, reply_to: str | None = None) -> None:
        """``reply_to``: the parent's, which waits for its children."""
        self._upcall = upcall
        self._ask: Callable[[str, Any], Awaitable[Any]] = getattr(upcall, "awaitable", self._in_a_thread)
        self._reply_to = reply_to
        self._looked: dict[str, float] = {}
        """When it was last asked whether a task is cancelled, by its id; of those that were not."""

    @property
    def reply_to(self) -> str | None:
        return self._reply_to

    def publish(self, messages: Sequence[Message], timeout: float) -> None:
        self._upcall("publish", ([m.to_plain() for m in messages], timeout))

    def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        records = [Result.from_plain(r) for r in self._upcall("get", list(task_ids))]
        return {r.task_id: r for r in records}

    def wait(self, task_id: str, timeout: float | None) -> Result:
        return Result.from_plain(self._upcall("wait", (task_id, timeout)))

    def put(self, results: Sequence[Result]) -> None:
        self._upcall("put", [r.to_plain() for r in results])

    def forget(self, task_ids: Sequence[str]) -> None:
        self._upcall("forget", list(task_ids))

    async def apublish(self, messages: Sequence[Message], timeout: float) -> None:
        await self._ask("publish", ([m.to_plain() for m in messages], timeout))

    async def aget(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        records = [Result.from_plain(r) for r in await self._ask("get", list(task_ids))]
        return {r.task_id: r for r in records}

    async def await_(self, task_id: str, timeout: float | None) -> Result:
        return Result.from_plain(await self._ask("wait", (task_id, timeout)))

    async def aput(self, results: Sequence[Result]) -> None:
        await self._ask("put", [r.to_plain() for r in results])

    async def aforget(self, task_ids: Sequence[str]) -> None:
        await self._ask("forget", list(task_ids))

    def ask(self, verb: str, payload: Any) -> Any:
        return self._upcall(verb, payload)

    async def aask(self, verb: str, payload: Any) -> Any:
        return await self._ask(verb, payload)

    async def _in_a_thread(self, verb: str, payload: Any) -> Any:
        return await asyncio.to_thread(self._upcall, verb, payload)

    def cancelled(self, task_id: str) -> bool:
        now = time.monotonic()
        if now - self._looked.get(task_id, 0.0) < _LOOK:
            return False
        if self._upcall("cancelled", task_id):
            return True
        if len(self._looked) > _MOST_LOOKED:
            self._looked.clear()
        self._looked[task_id] = now
        return False
