"""The scheduler port: the store of periodic entries, and who leads. Lifecycle as for the transport port."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from umbel.capabilities import SchedulerCapabilities
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock, SystemClock
from umbel.ports.options import NoOptions


class Scheduler(ABC):
    """Keeps periodic entries. The clockwork, which decides what is due, is the kernel's."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = NoOptions

    capabilities: SchedulerCapabilities

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        """Remember the address. No I/O."""
        self.url = url
        self.options = self.Options() if options is None else options
        self.clock: Clock = SystemClock() if clock is None else clock

    @abstractmethod
    async def load(self) -> Sequence[ScheduleEntry]:
        """Every entry."""

    @abstractmethod
    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        """Create or replace entries by name; the record of past runs is kept."""

    @abstractmethod
    async def remove(self, names: Sequence[str]) -> int:
        """Delete entries; return how many there were."""

    @abstractmethod
    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        """Enabled entries with ``next_due`` ≤ ``now``, earliest first."""

    @abstractmethod
    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        """Record runs and next due times. False, with nothing changed, if ``fence`` is not the leader's any more."""

    @abstractmethod
    async def lead(self, owner: str, *, lease: float) -> Lease:
        """Take or renew leadership; returns the lease of whoever leads now."""

    @abstractmethod
    async def close(self) -> None:
        """Give leadership up and free every resource. Harmless when called twice."""
