"""An honest store of periodic entries in memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import define, evolve, field

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import SchedulerUnavailable
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler


@define
class Timetable:
    """What instances share."""

    entries: dict[str, ScheduleEntry] = field(factory=dict)
    revisions: Iterator[int] = field(factory=lambda: itertools.count(1))
    leader: Lease = field(factory=lambda: Lease(name="leader", owner="", fence=0, until=0.0))


def runs(entry: ScheduleEntry) -> dict[str, Any]:
    """The record of past runs."""
    return {name: getattr(entry, name) for name in ("last_due", "last_sent", "total_runs", "problem")}


class HonestScheduler(Scheduler):
    """Keeps every law."""

    capabilities = SchedulerCapabilities(durable=True, shared=True)

    def __init__(self, timetable: Timetable, clock: Clock | None = None) -> None:
        super().__init__("honest://", clock=clock)
        self.timetable = timetable
        self.owner = ""
        self.closed = False

    async def enter(self) -> None:
        if self.closed:
            raise SchedulerUnavailable("honest:// is closed")
        await asyncio.sleep(0)

    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        await self.enter()
        entries = self.timetable.entries
        found = [entries[name] for name in (entries if names is None else names) if name in entries]
        return [entry for entry in found if entry.declared or not declared]

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        await self.enter()
        for entry in entries:
            known = self.timetable.entries.get(entry.name)
            merged = entry if known is None else self.merged(known, entry)
            self.timetable.entries[entry.name] = evolve(merged, revision=next(self.timetable.revisions))

    def merged(self, known: ScheduleEntry, entry: ScheduleEntry) -> ScheduleEntry:
        return evolve(entry, **runs(known))

    async def remove(self, names: Sequence[str]) -> int:
        await self.enter()
        return sum(self.timetable.entries.pop(name, None) is not None for name in names)

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        await self.enter()
        found = [entry for entry in self.timetable.entries.values() if self.is_due(entry, now)]
        return sorted(found, key=lambda entry: entry.next_due or 0.0)[:limit]

    def is_due(self, entry: ScheduleEntry, now: float) -> bool:
        return entry.enabled and entry.next_due is not None and entry.next_due <= now

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        await self.enter()
        if not self.leads(fence):
            return False
        for entry in entries:
            if (known := self.timetable.entries.get(entry.name)) is not None:
                self.timetable.entries[entry.name] = evolve(known, **runs(entry), next_due=self.next_due(known, entry))
        return True

    def next_due(self, known: ScheduleEntry, marked: ScheduleEntry) -> float | None:
        return marked.next_due if marked.revision == known.revision else known.next_due

    def leads(self, fence: int) -> bool:
        return fence == self.timetable.leader.fence

    async def lead(self, owner: str, *, lease: float) -> Lease:
        await self.enter()
        now, leader = self.clock.time(), self.timetable.leader
        if leader.owner != owner and leader.until > now:
            return leader
        fence = leader.fence + (leader.owner != owner)
        self.owner = owner
        self.timetable.leader = evolve(leader, owner=owner, fence=fence, until=now + lease)
        return self.timetable.leader

    async def leader(self) -> Lease | None:
        await self.enter()
        leader = self.timetable.leader
        return leader if leader.until > self.clock.time() else None

    def restart(self) -> None:
        """What the backend's death does."""

    async def close(self) -> None:
        self.closed = True
        self.give_up()

    def give_up(self) -> None:
        if self.owner and self.timetable.leader.owner == self.owner:
            self.timetable.leader = evolve(self.timetable.leader, owner="", until=0.0)
