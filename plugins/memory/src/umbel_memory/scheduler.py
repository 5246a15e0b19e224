"""``memory://name``: periodic entries inside the process."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from attrs import define

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import SchedulerUnavailable
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler, definition_of, entry_of, runs_of
from umbel_memory.shared import Registry, Session

_NOBODY: Final = Lease(name="leader", owner="", fence=0, until=0.0)


@define(eq=False)
class Row:
    """One entry, as text: nobody shares a dictionary with the store."""

    definition: str
    enabled: bool
    declared: bool
    runs: str
    next_due: float | None
    revision: int


class Timetable:
    """The entries of one name, and who leads. ``lock`` guards every field."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: dict[str, Row] = {}
        self.leader = _NOBODY
        """Whoever led last: an ended lease keeps its number until another is given."""
        self._revisions: Iterator[int] = itertools.count(1)
        self._heap: list[tuple[float, str]] = []
        """Every due time ever set of an enabled entry; those that were replaced are skipped when they surface."""

    def put(self, entry: ScheduleEntry, definition: str) -> None:
        known = self.rows.get(entry.name)
        runs = runs_of(entry) if known is None else known.runs
        row = Row(definition, entry.enabled, entry.declared, runs, entry.next_due, next(self._revisions))
        self.rows[entry.name] = row
        self._index(entry.name, row)

    def mark(self, entry: ScheduleEntry) -> None:
        row = self.rows.get(entry.name)
        if row is None:
            return
        row.runs = runs_of(entry)
        if row.revision == entry.revision:
            row.next_due = entry.next_due
            self._index(entry.name, row)

    def due(self, now: float, limit: int) -> list[str]:
        found: dict[str, float] = {}
        while self._heap and self._heap[0][0] <= now and len(found) < limit:
            due, name = heapq.heappop(self._heap)
            if self._stands(due, name):
                found[name] = due
        for name, due in found.items():
            heapq.heappush(self._heap, (due, name))
        return list(found)

    def entry(self, name: str) -> ScheduleEntry:
        row = self.rows[name]
        return entry_of(name, row.definition, row.runs, row.next_due, row.revision)

    def _index(self, name: str, row: Row) -> None:
        if row.enabled and row.next_due is not None:
            heapq.heappush(self._heap, (row.next_due, name))
        if len(self._heap) > 2 * len(self.rows) + 64:
            self._heap = list({item for item in self._heap if self._stands(*item)})
            heapq.heapify(self._heap)

    def _stands(self, due: float, name: str) -> bool:
        row = self.rows.get(name)
        return row is not None and row.enabled and row.next_due == due


timetables: Registry[Timetable] = Registry(Timetable)


class MemoryScheduler(Scheduler):
    """Keeps every law of the port, and forgets everything when the process ends.

    All instances for one name share one timetable. Nothing blocks: the lock is held for the length of dictionary
    operations. Leases follow ``clock``.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    capabilities: SchedulerCapabilities = SchedulerCapabilities(durable=False, shared=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self._timetable = timetables.get(url)
        self._session = Session(url, SchedulerUnavailable)
        self._owners: set[str] = set()

    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        await self._session.checkpoint()
        with self._timetable.lock:
            rows = self._timetable.rows
            wanted = list(rows) if names is None else [name for name in dict.fromkeys(names) if name in rows]
            return [self._timetable.entry(name) for name in wanted if rows[name].declared or not declared]

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        await self._session.checkpoint()
        definitions = [definition_of(entry) for entry in entries]
        with self._timetable.lock:
            for entry, definition in zip(entries, definitions, strict=True):
                self._timetable.put(entry, definition)

    async def remove(self, names: Sequence[str]) -> int:
        await self._session.checkpoint()
        with self._timetable.lock:
            return sum(self._timetable.rows.pop(name, None) is not None for name in names)

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        await self._session.checkpoint()
        with self._timetable.lock:
            return [self._timetable.entry(name) for name in self._timetable.due(now, limit)]

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        await self._session.checkpoint()
        with self._timetable.lock:
            leader = self._timetable.leader
            if fence != leader.fence or leader.until <= self.clock.time():
                return False
            for entry in entries:
                self._timetable.mark(entry)
            return True

    async def lead(self, owner: str, *, lease: float) -> Lease:
        await self._session.checkpoint()
        now = self.clock.time()
        with self._timetable.lock:
            leader = self._timetable.leader
            held = leader.until > now
            if held and leader.owner != owner:
                return leader
            fence = leader.fence if held else leader.fence + 1
            self._timetable.leader = Lease(name="leader", owner=owner, fence=fence, until=now + lease)
            self._owners.add(owner)
            return self._timetable.leader

    async def leader(self) -> Lease | None:
        await self._session.checkpoint()
        with self._timetable.lock:
            leader = self._timetable.leader
            return leader if leader.until > self.clock.time() else None

    async def close(self) -> None:
        """See the port. No entry is lost."""
        self._session.closed = True
        with self._timetable.lock:
            leader = self._timetable.leader
            if leader.owner in self._owners:
                self._timetable.leader = Lease(name="leader", owner=leader.owner, fence=leader.fence, until=0.0)
        self._owners.clear()
