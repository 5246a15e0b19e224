"""An honest result store in memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, evolve, field

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import ResultStoreUnavailable
from umbel.model import Lease, Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore, JoinState, JoinStore, QueryableStore, ResultStore, replaces

POLL = 0.001


@define
class Join:
    marks: dict[str, bytes] = field(factory=dict)
    size: int | None = None
    fired: bool = False
    owner: str = ""
    until: float = 0.0


@define
class Memory:
    """What instances share."""

    records: dict[str, tuple[Result, float]] = field(factory=dict)
    """With the time at which they end."""
    joins: dict[str, Join] = field(factory=dict)
    claims: dict[str, Lease] = field(factory=dict)
    askers: dict[str, ModestReplies] = field(factory=dict)
    fences: itertools.count[int] = field(factory=lambda: itertools.count(1))


class ModestStore(ResultStore):
    """Can only what every store must."""

    capabilities = ResultStoreCapabilities()

    def __init__(self, memory: Memory, clock: Clock | None = None) -> None:
        super().__init__("honest://", clock=clock)
        self.memory = memory
        self.closed = False
        self.waiting: set[asyncio.Task[Any]] = set()

    async def enter(self) -> None:
        if self.closed:
            raise ResultStoreUnavailable("honest:// is closed")
        await asyncio.sleep(0)

    def live(self, task_id: str) -> Result | None:
        record, end = self.memory.records.get(task_id, (None, 0.0))
        return record if end > self.clock.time() or not self.capabilities.expires else None

    async def put(self, results: Sequence[Result]) -> None:
        await self.enter()
        self.keep(results)

    def keep(self, results: Sequence[Result]) -> None:
        for result in results:
            if not self.settled(result):
                end = float("inf") if result.expires is None else self.clock.time() + result.expires
                self.memory.records.pop(result.task_id, None)
                self.memory.records[result.task_id] = (result, end)

    def settled(self, result: Result) -> bool:
        known = self.live(result.task_id)
        return known is not None and not replaces(result, known)

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        await self.enter()
        return {task_id: result for task_id in task_ids if (result := self.live(task_id)) is not None}

    async def wait(self, task_id: str) -> Result:
        await self.enter()
        task = asyncio.current_task()
        assert task is not None
        self.waiting.add(task)
        try:
            while (result := self.live(task_id)) is None or not self.wakes(result):
                await self.pause()
            return result
        finally:
            self.waiting.discard(task)

    async def pause(self) -> None:
        await asyncio.sleep(POLL)

    def wakes(self, result: Result) -> bool:
        return result.final

    async def forget(self, task_ids: Sequence[str]) -> None:
        await self.enter()
        for task_id in task_ids:
            self.memory.records.pop(task_id, None)

    async def close(self) -> None:
        self.closed = True
        for task in self.waiting:
            task.cancel()


class ModestReplies(ModestStore):
    """Sends results to who asked, and keeps for itself what was sent to it."""

    def __init__(self, memory: Memory, clock: Clock | None = None) -> None:
        super().__init__(Memory(), clock)
        self.reply_to = f"asker-{next(memory.fences)}"
        self.askers = memory.askers
        self.askers[self.reply_to] = self

    async def put(self, results: Sequence[Result]) -> None:
        await self.enter()
        for result in results:
            if (asker := self.askers.get(result.reply_to or "")) is not None:
                asker.keep([result])


class HonestStore(ModestStore, JoinStore, ClaimStore, QueryableStore):
    """Can everything."""

    capabilities = ResultStoreCapabilities(durable=True, push=True, expires=True, join=True, claim=True, query=True)

    def sever(self) -> None:
        """What a lost connection does: it is mended inside."""

    def restart(self) -> None:
        """What the backend's death does."""

    async def join(
        self,
        key: str,
        marks: Mapping[str, bytes],
        *,
        size: int | None,
        owner: str,
        lease: float,
        expires: float | None = None,
    ) -> JoinState:
        await self.enter()
        join = self.memory.joins.setdefault(key, Join())
        join.marks = {**marks, **join.marks}
        join.size = join.size if size is None else size
        fires = self.fires(join) or self.fires_again(join, owner)
        if fires:
            join.owner, join.until = owner, self.clock.time() + lease
        return JoinState(count=len(join.marks), size=join.size, fires=fires)

    def fires(self, join: Join) -> bool:
        complete = join.size is not None and len(join.marks) >= join.size
        return complete and not join.fired and join.until <= self.clock.time()

    def fires_again(self, join: Join, owner: str) -> bool:
        return join.owner == owner and not join.fired

    async def members(self, key: str) -> Mapping[str, bytes]:
        await self.enter()
        return dict(self.memory.joins.get(key, Join()).marks)

    async def fired(self, key: str, owner: str) -> bool:
        await self.enter()
        join = self.memory.joins[key]
        if not self.may_fire(join, owner):
            return False
        join.fired = True
        return True

    def may_fire(self, join: Join, owner: str) -> bool:
        return join.owner == owner

    async def unfired(self, limit: int = 100) -> Sequence[str]:
        await self.enter()
        return [key for key, join in self.memory.joins.items() if self.fires(join)][:limit]

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        await self.enter()
        now, held = self.clock.time(), self.memory.claims.get(name)
        if held is not None and held.until > now and held.owner != owner:
            return held
        if held is None or held.until <= now:
            held = Lease(name=name, owner=owner, fence=self.next_fence(held), until=now)
        held = evolve(held, until=now + lease, value=held.value if value is None else value)
        self.memory.claims[name] = held
        return held

    def next_fence(self, former: Lease | None) -> int:
        return next(self.memory.fences)

    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        await self.enter()
        held = self.memory.claims.get(name)
        if held is None or not self.may_release(held, owner) or value not in (None, held.value):
            return False
        del self.memory.claims[name]
        return True

    def may_release(self, held: Lease, owner: str) -> bool:
        return held.owner == owner

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self.enter()
        now = self.clock.time()
        return [held for name, held in self.memory.claims.items() if name.startswith(prefix) and held.until > now]

    async def query(self, *, state: str | None = None, limit: int = 100, offset: int = 0) -> Sequence[Result]:
        await self.enter()
        found = [record for record, _ in self.newest_first() if state in (None, record.state)]
        return found[offset : offset + limit]

    def newest_first(self) -> Sequence[tuple[Result, float]]:
        return list(reversed(self.memory.records.values()))
