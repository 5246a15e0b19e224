"""The laws of the scheduler port."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import attrs
import pytest

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import SchedulerUnavailable
from umbel.model import ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import Scheduler
from umbel.testing.contracts.bench import AMPLE, TURNS, Belongings, Bench, interrupt, law

LONG: Final = 3600.0


class SchedulerBench(Bench):
    """Instances over one backend."""

    def __init__(
        self, make: Callable[[], Scheduler], *, clock: Clock | None, time_limit: float, patience: float, lease: float
    ) -> None:
        super().__init__(clock=clock, time_limit=time_limit, patience=patience)
        self._make = make
        self.lease = lease

    def scheduler(self) -> Scheduler:
        """One more machine."""
        made = self._make()
        self.close_after(made.close)
        return made

    @property
    def capabilities(self) -> SchedulerCapabilities:
        return self._make().capabilities

    def entry(self, name: str, **fields: Any) -> ScheduleEntry:
        return ScheduleEntry(name=name, task="kit.task", schedule={"every": 10.0}, **fields)

    async def lease_ends(self, times: int = 1) -> None:
        """Let leases of ``self.lease`` seconds, or ``times`` as many, that were taken before this call end."""
        await self.elapse(self.lease * times * 1.05 + 0.02)


def by_name(entries: Sequence[ScheduleEntry]) -> list[ScheduleEntry]:
    return sorted(entries, key=lambda entry: entry.name)


async def mark(scheduler: Scheduler, fence: int, name: str, **runs: Any) -> ScheduleEntry:
    """Mark the entry as it is stored now, with ``runs``; return what was marked."""
    ran = attrs.evolve((await scheduler.load([name]))[0], **runs)
    assert await scheduler.mark([ran], fence=fence)
    return ran


class SchedulerContract:
    """Subclass it and give the fixture ``make_scheduler``: a callable that makes an instance on one and the same backend,
    which has no entries when a test begins.
    """

    lease: float = 0.5
    """Seconds, in the drivers' time: the leases that laws let end. The shortest that the store keeps exactly."""
    patience: float = 10.0
    """Seconds within which what must happen does happen."""
    time_limit: float = 60.0
    """Seconds that one law may take."""

    @pytest.fixture
    def clock(self) -> Clock | None:
        """The clock that the factory gives to the drivers, if it does; a ``VirtualClock`` makes the laws wait in no time."""
        return None

    @pytest.fixture
    def restart(self) -> Callable[[], Awaitable[None]] | None:
        """Kills the backend and starts it again with what it has kept. None: no way to, or it is declared not durable."""
        return None

    @pytest.fixture
    def bench(self, make_scheduler: Callable[[], Scheduler], clock: Clock | None) -> SchedulerBench:
        return SchedulerBench(
            make_scheduler, clock=clock, time_limit=self.time_limit, patience=self.patience, lease=self.lease
        )

    @law
    async def test_a_driver_says_what_it_is(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        assert isinstance(scheduler, Scheduler)
        assert isinstance(scheduler.capabilities, SchedulerCapabilities)
        assert attrs.has(type(scheduler).Options)
        assert type(scheduler).api_version[0] == Scheduler.api_version[0]

    # --- entries --------------------------------------------------------------------------------

    @law
    async def test_an_entry_comes_back_whole(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        entry = ScheduleEntry(
            name="ü nightly 🌸",
            task="kit.task",
            schedule={"crontab": "0 3 * * *", "timezone": "Asia/Seoul", "nested": [1, None, 2.5, {"a": True}]},
            args=(1, "ü", None, [1.5]),
            kwargs={"key": {"deep": []}},
            options={"queue": "mail", "priority": 3},
            enabled=False,
            declared=True,
            next_due=1e9 + 0.25,
            last_due=1.5,
            last_sent=0.5,
            total_runs=7,
            problem="ü cannot be sent",
        )
        await scheduler.upsert([entry, bench.entry("plain")])
        found = {found.name: found for found in await scheduler.load()}
        assert found == {entry.name: entry, "plain": bench.entry("plain")}

    @law
    async def test_there_is_nothing_at_first(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        assert list(await scheduler.load()) == []
        assert list(await scheduler.due(bench.now())) == []
        assert await scheduler.remove(["none"]) == 0
        await scheduler.upsert([])

    @law
    async def test_upsert_replaces_an_entry_and_keeps_the_record_of_its_runs(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        fence = (await scheduler.lead("me", lease=LONG)).fence
        await scheduler.upsert([bench.entry("1", next_due=100.0)])
        ran = {"last_due": 100.0, "last_sent": 90.0, "total_runs": 3, "problem": "none"}
        await mark(scheduler, fence, "1", **ran, next_due=110.0)
        await scheduler.upsert([attrs.evolve(bench.entry("1"), task="other", schedule={"every": 20.0}, next_due=120.0)])
        (entry,) = await scheduler.load()
        assert (entry.task, entry.schedule, entry.next_due) == ("other", {"every": 20.0}, 120.0)
        assert {name: getattr(entry, name) for name in ran} == ran

    @law
    async def test_entries_are_loaded_by_name(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry(name) for name in "abc"])
        assert {entry.name for entry in await scheduler.load(["c", "none", "a"])} == {"a", "c"}
        assert list(await scheduler.load(["none"])) == []
        assert list(await scheduler.load([])) == []

    @law
    async def test_declared_entries_are_loaded_alone(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry(name, declared=name in "bcd") for name in "abcd"])
        assert {entry.name for entry in await scheduler.load(declared=True)} == {"b", "c", "d"}
        assert {entry.name for entry in await scheduler.load(["a", "b"], declared=True)} == {"b"}
        await scheduler.upsert([bench.entry("b")])
        await scheduler.remove(["c"])
        assert [entry.name for entry in await scheduler.load(declared=True)] == ["d"]

    @law
    async def test_removed_is_gone_and_counted(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry(name) for name in "abc"])
        assert await scheduler.remove(["a", "c", "none"]) == 2
        assert await scheduler.remove(["a"]) == 0
        assert [entry.name for entry in await scheduler.load()] == ["b"]

    @law
    async def test_due_gives_enabled_entries_earliest_first(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert(
            [
                bench.entry("third", next_due=30.0),
                bench.entry("first", next_due=10.0),
                bench.entry("off", next_due=15.0, enabled=False),
                bench.entry("second", next_due=20.0),
                bench.entry("later", next_due=30.5),
                bench.entry("never"),
            ]
        )
        assert [entry.name for entry in await scheduler.due(30.0)] == ["first", "second", "third"]
        assert [entry.name for entry in await scheduler.due(30.0, limit=2)] == ["first", "second"]
        assert list(await scheduler.due(9.9)) == []

    @law
    async def test_a_thousand_entries_are_kept(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        entries = [bench.entry(f"{n:04}", next_due=float(n)) for n in range(1000)]
        await scheduler.upsert(entries)
        assert by_name(await scheduler.load()) == entries
        assert list(await scheduler.due(1e9)) == entries

    # --- leading --------------------------------------------------------------------------------

    @law
    async def test_one_leads(self, bench: SchedulerBench) -> None:
        first, second = bench.scheduler(), bench.scheduler()
        machines = (first, second) if bench.capabilities.shared else (first, first)
        leases = await asyncio.gather(*(machines[n % 2].lead(f"owner-{n}", lease=LONG) for n in range(20)))
        assert len({(lease.owner, lease.fence) for lease in leases}) == 1
        assert bench.now() + LONG - 5 <= leases[0].until <= bench.now() + LONG + 1

    @law
    async def test_a_leader_renews_its_lease(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        first = await scheduler.lead("me", lease=bench.lease * AMPLE)
        renewed = await scheduler.lead("me", lease=LONG)
        assert (renewed.owner, renewed.fence) == ("me", first.fence)
        await bench.lease_ends(AMPLE)
        assert (await scheduler.lead("you", lease=LONG)).owner == "me"

    @law
    async def test_leadership_passes_on_when_its_lease_ends(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        first = await scheduler.lead("me", lease=bench.lease)
        await bench.lease_ends()
        second = await scheduler.lead("you", lease=LONG)
        assert second.owner == "you"
        assert second.fence > first.fence

    @law
    async def test_close_gives_leadership_up(self, bench: SchedulerBench) -> None:
        first, second = bench.scheduler(), bench.scheduler()
        before = await first.lead("me", lease=LONG)
        await first.close()
        after = await second.lead("you", lease=LONG)
        assert after.owner == "you"
        assert after.fence > before.fence

    @law
    async def test_a_lease_of_no_time_gives_leadership_up(self, bench: SchedulerBench) -> None:
        first, second = bench.scheduler(), bench.scheduler()
        machine = second if bench.capabilities.shared else first
        before = await first.lead("me", lease=LONG)
        assert (await machine.lead("you", lease=0.0)).owner == "me"
        assert await first.leader() is not None
        await first.lead("me", lease=0.0)
        assert await first.leader() is None
        after = await machine.lead("you", lease=LONG)
        assert after.owner == "you"
        assert after.fence > before.fence

    @law
    async def test_who_leads_can_be_asked(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        assert await scheduler.leader() is None
        lease = await scheduler.lead("me", lease=bench.lease * AMPLE)
        told = await scheduler.leader()
        assert told is not None
        assert (told.owner, told.fence) == ("me", lease.fence)
        await bench.lease_ends(AMPLE)
        assert await scheduler.leader() is None

    @law
    async def test_mark_records_runs(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry(name, next_due=10.0) for name in "12"])
        fence = (await scheduler.lead("me", lease=LONG)).fence
        ran = [
            attrs.evolve(entry, last_due=10.0, last_sent=10.0, next_due=20.0, total_runs=1)
            for entry in await scheduler.due(10.0)
        ]
        assert await scheduler.mark(ran, fence=fence)
        assert by_name(await scheduler.load()) == by_name(ran)
        assert list(await scheduler.due(19.0)) == []
        await mark(scheduler, fence, "1", next_due=None)
        assert [entry.name for entry in await scheduler.due(1e9)] == ["2"]

    @law
    async def test_a_mark_does_not_undo_a_change(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry("1", next_due=10.0)])
        fence = (await scheduler.lead("me", lease=LONG)).fence
        (read,) = await scheduler.due(10.0)
        await scheduler.upsert([attrs.evolve(read, task="other", next_due=15.0)])
        assert await scheduler.mark([attrs.evolve(read, last_due=10.0, next_due=20.0, total_runs=1)], fence=fence)
        (entry,) = await scheduler.due(15.0)
        assert (entry.task, entry.next_due, entry.last_due, entry.total_runs) == ("other", 15.0, 10.0, 1)

    @law
    async def test_a_former_leader_marks_nothing(self, bench: SchedulerBench) -> None:
        scheduler, entry = bench.scheduler(), bench.entry("1", next_due=10.0)
        await scheduler.upsert([entry])
        former = (await scheduler.lead("me", lease=bench.lease)).fence
        await bench.lease_ends()
        fence = (await scheduler.lead("you", lease=LONG)).fence
        late = attrs.evolve((await scheduler.load())[0], last_due=10.0, next_due=20.0, total_runs=1)
        assert not await scheduler.mark([late], fence=former)
        assert list(await scheduler.load()) == [entry]
        assert await scheduler.mark([late], fence=fence)

    @law
    async def test_a_removed_entry_is_not_brought_back_by_a_mark(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry("1", next_due=10.0)])
        fence = (await scheduler.lead("me", lease=LONG)).fence
        await scheduler.remove(["1"])
        assert await scheduler.mark([bench.entry("1", last_due=10.0, total_runs=1)], fence=fence)
        assert list(await scheduler.load()) == []

    # --- the end --------------------------------------------------------------------------------

    @law
    async def test_entries_outlive_their_connection(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry("1")])
        await scheduler.close()
        if bench.capabilities.durable or bench.capabilities.shared:
            assert list(await bench.scheduler().load()) == [bench.entry("1")]

    @law
    async def test_entries_and_runs_outlive_the_backend(
        self, bench: SchedulerBench, restart: Callable[[], Awaitable[None]] | None
    ) -> None:
        if restart is None or not bench.capabilities.durable:
            return
        scheduler = bench.scheduler()
        await scheduler.upsert([bench.entry("1", next_due=10.0)])
        fence = (await scheduler.lead("me", lease=LONG)).fence
        ran = await mark(scheduler, fence, "1", last_due=10.0, last_sent=10.0, next_due=20.0, total_runs=1)
        await restart()
        assert list(await bench.scheduler().load()) == [ran]

    @law
    async def test_cancelled_calls_can_be_repeated(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        for turn in TURNS:
            entry = bench.entry(f"{turn:02}", next_due=float(turn))
            await interrupt(scheduler.upsert([entry]), turn)
            await scheduler.upsert([entry])
            await interrupt(scheduler.due(1e9), turn)
        assert [entry.name for entry in await scheduler.due(1e9)] == [f"{turn:02}" for turn in TURNS]

    @law
    async def test_close_is_harmless_unused_and_twice(self, bench: SchedulerBench) -> None:
        unused, used = bench.scheduler(), bench.scheduler()
        await unused.close()
        await used.load()
        await used.close()
        await used.close()

    @law
    async def test_use_after_close_raises(self, bench: SchedulerBench) -> None:
        scheduler = bench.scheduler()
        await scheduler.load()
        await scheduler.close()
        calls: list[Callable[[], Awaitable[object]]] = [
            scheduler.load,
            lambda: scheduler.upsert([bench.entry("1")]),
            lambda: scheduler.remove(["1"]),
            lambda: scheduler.due(0.0),
            lambda: scheduler.mark([bench.entry("1")], fence=1),
            lambda: scheduler.lead("me", lease=1.0),
            scheduler.leader,
        ]
        for call in calls:
            with pytest.raises(SchedulerUnavailable):
                await call()

    @law
    async def test_nothing_is_left_behind(self, bench: SchedulerBench) -> None:
        async def live() -> None:
            scheduler = bench.scheduler()
            await scheduler.upsert([bench.entry("1")])
            await scheduler.lead("me", lease=LONG)
            await scheduler.load()
            await scheduler.close()

        await live()  # what a process makes once is no leak
        before = Belongings.now()
        for _ in range(3):
            await live()
        for kind in ("tasks", "threads", "files"):
            await bench.until(lambda kind=kind: not before.left_over(kind), f"the end of all {kind}")  # type: ignore[misc]  # no lambda has a type
