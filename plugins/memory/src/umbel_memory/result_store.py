"""``memory://name``: a result store inside the process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from attrs import evolve

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import ResultStoreUnavailable
from umbel.model import Lease, Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore, JoinState, JoinStore, QueryableStore, ResultStore, replaces, surviving
from umbel_memory.memory import Join, Waiter, memories
from umbel_memory.shared import Session


class MemoryResultStore(ResultStore, JoinStore, ClaimStore, QueryableStore):
    """Keeps every law of the port, and forgets everything when the process ends.

    All instances for one name share one memory; each has its own event loop, on whatever thread. Only ``wait`` waits;
    the lock is held for the length of a dictionary operation. Expiry and leases follow ``clock``.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    capabilities: ResultStoreCapabilities = ResultStoreCapabilities(
        durable=False, push=True, expires=True, join=True, claim=True, query=True
    )

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self._memory = memories.get(url)
        self._session = Session(url, ResultStoreUnavailable)
        self._waiting: set[asyncio.Future[Result]] = set()

    async def put(self, results: Sequence[Result]) -> None:
        await self._session.checkpoint()
        now = self.clock.time()
        with self._memory.lock:
            for result in surviving(results):
                known = self._memory.records.live(now).get(result.task_id)
                if known is not None and not replaces(result, known):
                    continue
                end = None if result.expires is None else now + result.expires
                self._memory.records.set(result.task_id, result, end=end)
                if result.final:
                    self._memory.wake(result)

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        await self._session.checkpoint()
        with self._memory.lock:
            records = self._memory.records.live(self.clock.time())
            return {task_id: records[task_id] for task_id in task_ids if task_id in records}

    async def wait(self, task_id: str) -> Result:
        await self._session.checkpoint()
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop, loop.create_future())
        with self._memory.lock:
            known = self._memory.records.live(self.clock.time()).get(task_id)
            if known is not None and known.final:
                return known
            self._memory.waiters.setdefault(task_id, set()).add(waiter)
        self._waiting.add(waiter.future)
        try:
            return await waiter.future
        finally:
            self._waiting.discard(waiter.future)
            with self._memory.lock:
                self._memory.unwait(task_id, waiter)

    async def forget(self, task_ids: Sequence[str]) -> None:
        await self._session.checkpoint()
        with self._memory.lock:
            for task_id in task_ids:
                self._memory.records.remove(task_id)

    async def close(self) -> None:
        """See the port. Nothing of what is stored is lost."""
        self._session.closed = True
        for future in self._waiting:
            future.cancel()

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
        """See the port. The holder of the right that asks again, say after a lost answer, is told to fire again."""
        await self._session.checkpoint()
        now = self.clock.time()
        with self._memory.lock:
            join = self._memory.joins.live(now).get(key)
            if join is None:
                join = Join(marked=now)
            if marks:
                join.marks = {**marks, **join.marks}
                join.marked = now
            if size is not None:
                join.size = size
            if expires is not None:
                join.expires = expires
            end = None if join.expires is None else join.marked + join.expires
            self._memory.joins.set(key, join, end=end)
            fires = join.fireable and (not join.held(now) or join.holder == owner)
            if fires:
                join.holder, join.held_until = owner, now + lease
            return JoinState(count=len(join.marks), size=join.size, fires=fires)

    async def members(self, key: str) -> Mapping[str, bytes]:
        await self._session.checkpoint()
        with self._memory.lock:
            join = self._memory.joins.live(self.clock.time()).get(key)
            return {} if join is None else dict(join.marks)

    async def fired(self, key: str, owner: str) -> bool:
        """See the port. A right whose lease has ended is still ``owner``'s until another takes it."""
        await self._session.checkpoint()
        with self._memory.lock:
            join = self._memory.joins.live(self.clock.time()).get(key)
            if join is None or join.holder != owner:
                return False
            join.fired = True
            return True

    async def unfired(self, limit: int = 100) -> Sequence[str]:
        await self._session.checkpoint()
        now = self.clock.time()
        with self._memory.lock:
            joins = self._memory.joins.live(now).items()
            return list(itertools.islice((key for key, join in joins if join.fireable and not join.held(now)), limit))

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        """See the port. A lease that has ended is gone: taking the name anew has a new fence, whoever takes it."""
        await self._session.checkpoint()
        now = self.clock.time()
        with self._memory.lock:
            held = self._memory.claims.live(now).get(name)
            if held is not None and held.owner != owner:
                return held
            if held is None:
                held = Lease(name=name, owner=owner, fence=next(self._memory.fences), until=0.0)
            held = evolve(held, until=now + lease, value=held.value if value is None else value)
            self._memory.claims.set(name, held, end=held.until)
            return held

    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        await self._session.checkpoint()
        with self._memory.lock:
            held = self._memory.claims.live(self.clock.time()).get(name)
            if held is None or held.owner != owner or (value is not None and held.value != value):
                return False
            self._memory.claims.remove(name)
            return True

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self._session.checkpoint()
        with self._memory.lock:
            held = self._memory.claims.live(self.clock.time())
            return [lease for name, lease in held.items() if name.startswith(prefix)]

    async def query(self, *, state: str | None = None, limit: int = 100, offset: int = 0) -> Sequence[Result]:
        await self._session.checkpoint()
        with self._memory.lock:
            newest = reversed(list(self._memory.records.live(self.clock.time()).values()))
            wanted = (result for result in newest if state is None or result.state == state)
            return list(itertools.islice(wanted, offset, offset + limit))
