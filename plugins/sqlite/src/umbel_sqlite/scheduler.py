"""The store of periodic entries in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import SchedulerUnavailable
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler, definition_of, runs_of
from umbel_sqlite.database import Database
from umbel_sqlite.entries import SCHEMA, Entries
from umbel_sqlite.options import TransportOptions, file_of


class SqliteScheduler(Scheduler):
    """Keeps entries in the file that the URL names, which may be the broker's. Every write is durable when it returns.

    One leads by a fenced lease, on the clock of the host that all who share the file are on.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = TransportOptions
    """So that the options of the broker's or of the result store's file can be this one's."""
    capabilities = SchedulerCapabilities(durable=True, shared=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self._entries = Entries(self.clock)
        self._db = Database(file_of(url), self.options, SCHEMA, SchedulerUnavailable)
        self._leads: str | None = None
        """Who was told here that he leads."""
        self._closed = False

    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        found: Sequence[ScheduleEntry] = await self._db.submit(self._entries.load, (names, declared))
        return found

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        rows = [(e.name, e.enabled, e.declared, definition_of(e), runs_of(e), e.next_due) for e in entries]
        await self._db.submit(self._entries.upsert, rows, write=True)

    async def remove(self, names: Sequence[str]) -> int:
        removed: int = await self._db.submit(self._entries.remove, names, write=True)
        return removed

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        found: Sequence[ScheduleEntry] = await self._db.submit(self._entries.due, (now, limit))
        return found

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        marked: bool = await self._db.submit(self._entries.mark, (entries, fence), write=True)
        return marked

    async def lead(self, owner: str, *, lease: float) -> Lease:
        leader: Lease = await self._db.submit(self._entries.lead, (owner, lease), write=True)
        self._leads = owner if leader.owner == owner else None
        return leader

    async def leader(self) -> Lease | None:
        leader: Lease | None = await self._db.submit(self._entries.leader, None)
        return leader

    async def close(self) -> None:
        """See the port. Where the file is locked, leadership ends with its lease."""
        if self._closed:
            return
        self._closed = True
        if self._leads is not None:
            try:
                await self._db.submit(self._entries.resign, self._leads, write=True, timeout=1.0)
            except SchedulerUnavailable:
                pass  # what the lease is for
        await self._db.close()
