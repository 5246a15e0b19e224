"""Wrong stores of periodic entries."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

import pytest
from attrs import evolve

from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import VirtualClock
from umbel.testing.contracts import SchedulerContract

from ..honest.scheduler import HonestScheduler, Timetable
from .house import House


class SchedulerCage(SchedulerContract):
    driver: ClassVar[type[HonestScheduler]]
    lease, patience, time_limit = 5.0, 1.0, 20.0

    @pytest.fixture
    def clock(self) -> VirtualClock:
        return VirtualClock()

    @pytest.fixture
    def make_scheduler(self, clock: VirtualClock) -> Callable[[], HonestScheduler]:
        timetable = Timetable()
        return lambda: self.driver(timetable, clock)

    @pytest.fixture
    def restart(self, make_scheduler: Callable[[], HonestScheduler]) -> Callable[[], Awaitable[None]]:
        async def again() -> None:
            make_scheduler().restart()

        return again


HOUSE = House(__file__, SchedulerCage, HonestScheduler)


@HOUSE.breaks("a_former_leader_marks_nothing")
class MarksForAnybody(HonestScheduler):
    def leads(self, fence: int) -> bool:
        return True


@HOUSE.breaks("upsert_replaces_an_entry_and_keeps_the_record_of_its_runs")
class ForgetsRuns(HonestScheduler):
    def merged(self, known: ScheduleEntry, entry: ScheduleEntry) -> ScheduleEntry:
        return entry


@HOUSE.breaks("due_gives_enabled_entries_earliest_first")
class RunsWhatIsOff(HonestScheduler):
    def is_due(self, entry: ScheduleEntry, now: float) -> bool:
        return entry.next_due is not None and entry.next_due <= now


@HOUSE.breaks("close_gives_leadership_up")
class LeadsFromTheGrave(HonestScheduler):
    def give_up(self) -> None:
        pass


@HOUSE.breaks("a_lease_of_no_time_gives_leadership_up")
class KeepsTheLeadItWasGiven(HonestScheduler):
    async def lead(self, owner: str, *, lease: float) -> Lease:
        return await super().lead(owner, lease=lease or 1.0)


@HOUSE.breaks(
    "one_leads", "a_leader_renews_its_lease", "a_lease_of_no_time_gives_leadership_up", "who_leads_can_be_asked"
)
class LetsEverybodyLead(HonestScheduler):
    async def lead(self, owner: str, *, lease: float) -> Lease:
        leader = await super().lead(owner, lease=lease)
        self.timetable.leader = evolve(leader, until=0.0)
        return leader


@HOUSE.breaks("a_driver_says_what_it_is")
class ComesFromTheFuture(HonestScheduler):
    api_version = (99, 0)


@HOUSE.breaks("an_entry_comes_back_whole")
class LosesTheOptions(HonestScheduler):
    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        await super().upsert([evolve(entry, options={}) for entry in entries])


@HOUSE.breaks("there_is_nothing_at_first")
class NeedsAnEntry(HonestScheduler):
    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        self.first = entries[0]
        await super().upsert(entries)


@HOUSE.breaks("removed_is_gone_and_counted", "there_is_nothing_at_first")
class CountsWhatItWasAskedFor(HonestScheduler):
    async def remove(self, names: Sequence[str]) -> int:
        await super().remove(names)
        return len(names)


@HOUSE.breaks("a_thousand_entries_are_kept")
class CutsLongTimetables(HonestScheduler):
    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        return (await super().load(names, declared=declared))[:500]


@HOUSE.breaks(
    "leadership_passes_on_when_its_lease_ends",
    "a_lease_of_no_time_gives_leadership_up",
    "a_former_leader_marks_nothing",
)
class LeadsForEver(HonestScheduler):
    async def lead(self, owner: str, *, lease: float) -> Lease:
        leader = self.timetable.leader
        if leader.owner not in ("", owner):
            await self.enter()
            return leader
        return await super().lead(owner, lease=lease)


@HOUSE.breaks("a_leader_renews_its_lease", "a_lease_of_no_time_gives_leadership_up")
class RenewsNoLead(HonestScheduler):
    async def lead(self, owner: str, *, lease: float) -> Lease:
        leader = self.timetable.leader
        return (
            leader
            if leader.owner == owner and leader.until > self.clock.time()
            else await super().lead(owner, lease=lease)
        )


@HOUSE.breaks("a_mark_does_not_undo_a_change")
class MarksOverAChange(HonestScheduler):
    def next_due(self, known: ScheduleEntry, marked: ScheduleEntry) -> float | None:
        return marked.next_due


@HOUSE.breaks("entries_are_loaded_by_name")
class LoadsThemAll(HonestScheduler):
    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        return await super().load(names if declared else None, declared=declared)


@HOUSE.breaks("declared_entries_are_loaded_alone")
class TellsThemNotApart(HonestScheduler):
    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        return await super().load(names)


@HOUSE.breaks("who_leads_can_be_asked", "a_lease_of_no_time_gives_leadership_up")
class RemembersFormerLeaders(HonestScheduler):
    async def leader(self) -> Lease | None:
        await self.enter()
        return self.timetable.leader if self.timetable.leader.owner else None


@HOUSE.breaks("mark_records_runs")
class MarksTheFirstOnly(HonestScheduler):
    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        return await super().mark(entries[:1], fence=fence)


@HOUSE.breaks("a_removed_entry_is_not_brought_back_by_a_mark")
class BringsBackTheRemoved(HonestScheduler):
    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        done = await super().mark(entries, fence=fence)
        if done:
            self.timetable.entries |= {e.name: e for e in entries if e.name not in self.timetable.entries}
        return done


@HOUSE.breaks("entries_outlive_their_connection")
class TakesItsEntriesAlong(HonestScheduler):
    async def close(self) -> None:
        if not self.closed and not self.owner:
            self.timetable.entries.clear()
        await super().close()


@HOUSE.breaks("entries_and_runs_outlive_the_backend")
class ForgetsRunsAtARestart(HonestScheduler):
    def restart(self) -> None:
        for name, entry in self.timetable.entries.items():
            self.timetable.entries[name] = evolve(entry, last_due=None, last_sent=None, total_runs=0)


@HOUSE.breaks("cancelled_calls_can_be_repeated", "declared_entries_are_loaded_alone")
class TakesAnUpsertForDone(HonestScheduler):
    tried: frozenset[str] = frozenset()

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        fresh = [entry for entry in entries if entry.name not in self.tried or len(self.timetable.entries) < 2]
        self.tried |= {entry.name for entry in entries}
        await asyncio.sleep(0.0005)
        await super().upsert(fresh)


@HOUSE.breaks("close_is_harmless_unused_and_twice")
class SchedulerClosesOnce(HonestScheduler):
    used: bool = False

    async def enter(self) -> None:
        self.used = True
        await super().enter()

    async def close(self) -> None:
        if self.closed and not self.used:
            raise RuntimeError("closed already")
        await super().close()


@HOUSE.breaks("use_after_close_raises")
class LoadsAfterClose(HonestScheduler):
    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        return [] if self.closed else await super().load(names, declared=declared)


@HOUSE.breaks("nothing_is_left_behind")
class SchedulerLeaksAFile(HonestScheduler):
    async def close(self) -> None:
        if not self.closed:
            os.open(os.devnull, os.O_RDONLY)
        await super().close()


@HOUSE.breaks("nothing_is_left_behind")
class SchedulerLeaksATask(HonestScheduler):
    async def close(self) -> None:
        if not self.closed:
            self.task = asyncio.ensure_future(asyncio.sleep(3600))
        await super().close()


globals().update(HOUSE.tests())
