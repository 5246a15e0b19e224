"""The store of periodic entries, and who leads: dictionaries in this process, shared by all instances for one URL."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from attrs import define, evolve, field

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import SchedulerUnavailable
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock
from umbel.ports.scheduler import RUNS, Scheduler

NOBODY: Final = Lease(name="scheduler", owner="", fence=0, until=0.0)


@define
class _Store:
    """What the instances for one URL share, under one lock."""

    lock: threading.Lock = field(factory=threading.Lock)
    entries: dict[str, ScheduleEntry] = field(factory=dict)
    revision: int = 0
    """The last one given."""
    leader: Lease = NOBODY
    """Whoever led last; an ended lease keeps its owner and its number until another takes it."""


_stores: Final[dict[str, _Store]] = {}


def _runs(entry: ScheduleEntry) -> dict[str, Any]:
    """The record of past runs."""
    return {name: getattr(entry, name) for name in RUNS}


class {{ cookiecutter.__class }}(Scheduler):
    """``{{ cookiecutter.name }}://name``: everything is gone when the process ends. Nothing blocks."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    capabilities: SchedulerCapabilities = SchedulerCapabilities(durable=False, shared=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self._store = _stores.setdefault(url, _Store())
        self._owners: set[str] = set()
        self._closed = False

    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        with self._enter().lock:
            entries = self._store.entries
            found = [entries[name] for name in (entries if names is None else names) if name in entries]
            return [entry for entry in found if entry.declared or not declared]

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        with self._enter().lock:
            for entry in entries:
                known = self._store.entries.get(entry.name, entry)
                self._store.revision += 1
                self._store.entries[entry.name] = evolve(entry, **_runs(known), revision=self._store.revision)

    async def remove(self, names: Sequence[str]) -> int:
        with self._enter().lock:
            return sum(self._store.entries.pop(name, None) is not None for name in names)

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        with self._enter().lock:
            times = {
                entry.name: entry.next_due
                for entry in self._store.entries.values()
                if entry.enabled and entry.next_due is not None and entry.next_due <= now
            }
            return [self._store.entries[name] for name in sorted(times, key=times.__getitem__)[:limit]]

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        with self._enter().lock:
            if fence != self._store.leader.fence or self.clock.time() >= self._store.leader.until:
                return False
            for entry in entries:
                if (known := self._store.entries.get(entry.name)) is not None:  # else it was removed meanwhile
                    changed = known.revision != entry.revision  # then who changed it has said when it is due
                    next_due = known.next_due if changed else entry.next_due
                    self._store.entries[entry.name] = evolve(known, **_runs(entry), next_due=next_due)
            return True

    async def lead(self, owner: str, *, lease: float) -> Lease:
        with self._enter().lock:
            now, leader = self.clock.time(), self._store.leader
            if now >= leader.until:
                leader = Lease(name="scheduler", owner=owner, fence=leader.fence + 1, until=now)
            if leader.owner == owner:
                self._owners.add(owner)
                self._store.leader = leader = evolve(leader, until=now + lease)
            return leader

    async def leader(self) -> Lease | None:
        leader = self._enter().leader
        return leader if self.clock.time() < leader.until else None

    async def close(self) -> None:
        self._closed = True
        with self._store.lock:
            if self._store.leader.owner in self._owners:
                self._store.leader = evolve(self._store.leader, until=0.0)

    def _enter(self) -> _Store:
        if self._closed:
            raise SchedulerUnavailable(f"this scheduler at {self.url} is closed; make a new instance")
        return self._store
