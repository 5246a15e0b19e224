"""The result store in a file."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import ResultRefused, ResultStoreUnavailable
from umbel.model import Lease, Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore, JoinState, JoinStore, QueryableStore, ResultStore
from umbel_sqlite.bells import RESULTS, Bell
from umbel_sqlite.database import Database
from umbel_sqlite.options import Options, file_of
from umbel_sqlite.records import SCHEMA, Claim, Join, Look, Records, Seen

log = logging.getLogger("umbel.sqlite")


class SqliteResultStore(ResultStore, JoinStore, ClaimStore, QueryableStore):
    """Keeps results in the file that the URL names, which may be the broker's. Every write is durable when it returns."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = Options
    capabilities = ResultStoreCapabilities(durable=True, push=True, expires=True, join=True, claim=True, query=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        file = file_of(url)
        self._records = Records(self.clock)
        self._db = Database(file, self.options, SCHEMA, ResultStoreUnavailable)
        self._bell = Bell(file, RESULTS)
        self._waiters: dict[str, set[asyncio.Future[Result]]] = {}
        self._unseen: set[str] = set()
        """Tasks waited for whose records the watcher has not looked up yet."""
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False

    # --- results ---------------------------------------------------------------------------------

    async def put(self, results: Sequence[Result]) -> None:
        if results:
            ring = RESULTS if any(result.final for result in results) else ""
            await self._db.submit(self._records.put, results, write=True, ring=ring, unfit=ResultRefused)

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        results: Mapping[str, Result] = await self._db.submit(self._records.get, task_ids)
        return results

    async def wait(self, task_id: str) -> Result:
        if self._closed:
            raise ResultStoreUnavailable(f"this connection to {self._db.file} is closed")
        waiter: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(task_id, set())
        waiters.add(waiter)
        self._unseen.add(task_id)
        if self._watcher is None:
            self._bell.open()
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
            self._watcher.add_done_callback(self._unwatched)
        elif len(self._unseen) == 1:
            self._bell.stir()
        try:
            return await waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(task_id) is waiters:
                del self._waiters[task_id]
                self._unseen.discard(task_id)

    async def _watch(self) -> None:
        """The one reader of all waiters: looks new ones up once, then follows what is newly stored.

        Records are looked up and the end of the sequence is read in one transaction, so that nothing falls between.
        """
        last: int | None = None
        while True:
            heard = self._bell.count
            asked, self._unseen = self._unseen, set()
            try:
                seen: Seen = await self._db.submit(self._records.look, Look(task_ids=list(asked), after=last))
                self._deliver(seen.results)
                ended = [task_id for task_id in seen.ended if task_id in self._waiters]
                self._deliver(await self.get(ended) if ended else {})
            except ResultStoreUnavailable as error:
                log.warning("waiting for results continues: %s", error)
                self._unseen |= asked & self._waiters.keys()
                await asyncio.sleep(self._poll())
                continue
            last = seen.last
            if not self._waiters:
                last = None
                await self._bell.wait(heard, 3600.0)
            elif not seen.more:
                await self._bell.wait(heard, self._poll())

    def _unwatched(self, watcher: asyncio.Task[None]) -> None:
        self._watcher = None
        error = None if watcher.cancelled() else watcher.exception()
        for waiter in [waiter for waiters in self._waiters.values() for waiter in waiters if not waiter.done()]:
            if error is None:
                waiter.cancel()
            else:
                waiter.set_exception(error)

    def _deliver(self, results: Mapping[str, Result]) -> None:
        for task_id, result in results.items():
            for waiter in self._waiters.get(task_id, ()):
                if not waiter.done():
                    waiter.set_result(result)

    def _poll(self) -> float:
        interval: float = self.options.poll_interval
        return interval * random.uniform(0.75, 1.25)

    async def forget(self, task_ids: Sequence[str]) -> None:
        await self._db.submit(self._records.forget, task_ids, write=True)

    async def query(self, *, state: str | None = None, limit: int = 100, offset: int = 0) -> Sequence[Result]:
        results: Sequence[Result] = await self._db.submit(self._records.query, (state, limit, offset))
        return results

    # --- joins -----------------------------------------------------------------------------------

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
        """The holder of the right that asks again, say after a lost answer, is told to fire again."""
        join = Join(key=key, marks=marks, size=size, owner=owner, lease=lease, expires=expires)
        state: JoinState = await self._db.submit(self._records.join, join, write=True)
        return state

    async def members(self, key: str) -> Mapping[str, bytes]:
        members: Mapping[str, bytes] = await self._db.submit(self._records.members, key)
        return members

    async def fired(self, key: str, owner: str) -> bool:
        fired: bool = await self._db.submit(self._records.fired, (key, owner), write=True)
        return fired

    async def unfired(self, limit: int = 100) -> Sequence[str]:
        keys: Sequence[str] = await self._db.submit(self._records.unfired, limit)
        return keys

    # --- claims ----------------------------------------------------------------------------------

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        """A lease that has ended is gone: taking the name anew has a new fence, whoever takes it."""
        claim = Claim(name=name, owner=owner, lease=lease, value=value)
        taken: Lease = await self._db.submit(self._records.claim, claim, write=True)
        return taken

    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        released: bool = await self._db.submit(self._records.release, (name, owner, value), write=True)
        return released

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        leases: Sequence[Lease] = await self._db.submit(self._records.claims, prefix)
        return leases

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bell.close()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        await self._db.close()
