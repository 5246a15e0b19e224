"""An honest store of periodic entries in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from attrs import define, evolve, field

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import UmbelError
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler


@define
class Timetable:
    """What instances share."""

    entries: dict[str, ScheduleEntry] = field(factory=dict)
    leader: Lease = field(factory=lambda: Lease(name="leader", owner="", fence=0, until=0.0))


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
            raise UmbelError("honest:// is closed")
        await asyncio.sleep(0)

    async def load(self) -> Sequence[ScheduleEntry]:
        await self.enter()
        return list(self.timetable.entries.values())

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        await self.enter()
        for entry in entries:
            known = self.timetable.entries.get(entry.name)
            self.timetable.entries[entry.name] = entry if known is None else self.merged(known, entry)

    def merged(self, known: ScheduleEntry, entry: ScheduleEntry) -> ScheduleEntry:
        return evolve(entry, last_due=known.last_due, total_runs=known.total_runs)

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
            if entry.name in self.timetable.entries:
                self.timetable.entries[entry.name] = entry
        return True

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

    def restart(self) -> None:
        """What the backend's death does."""

    async def close(self) -> None:
        self.closed = True
        self.give_up()

    def give_up(self) -> None:
        if self.owner and self.timetable.leader.owner == self.owner:
            self.timetable.leader = evolve(self.timetable.leader, owner="", until=0.0)
