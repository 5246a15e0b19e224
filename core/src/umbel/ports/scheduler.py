"""The scheduler port: the store of periodic entries, and who leads. Lifecycle as for the transport port."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from umbel.capabilities import SchedulerCapabilities
from umbel.errors import EncodeError
from umbel.model import Lease, ScheduleEntry
from umbel.ports.clock import Clock, SystemClock
from umbel.ports.options import NoOptions


class Scheduler(ABC):
    """Keeps periodic entries. The clockwork, which decides what is due, is the kernel's.

    Every coroutine raises ``SchedulerUnavailable`` where the store cannot be reached, does not answer, or is closed; then a
    change may have been made, and the call may be repeated.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = NoOptions

    capabilities: SchedulerCapabilities

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        """Remember the address. No I/O."""
        self.url = url
        self.options = self.Options() if options is None else options
        self.clock: Clock = SystemClock() if clock is None else clock

    @abstractmethod
    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        """Entries of those names that are there; None: every entry. ``declared``: only those that are; reads no others."""

    @abstractmethod
    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        """Create or replace entries by name, each under a ``revision`` that was never used before.

        The record of past runs (``last_due``, ``last_sent``, ``total_runs``, ``problem``) of an entry that is there is kept.
        Raises ``EncodeError``, with nothing changed, for an entry that cannot be stored.
        """

    @abstractmethod
    async def remove(self, names: Sequence[str]) -> int:
        """Delete entries; return how many there were."""

    @abstractmethod
    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        """Enabled entries with ``next_due`` ≤ ``now``, earliest first. Reads no others, however many there are."""

    @abstractmethod
    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        """Record runs (``last_due``, ``last_sent``, ``total_runs``, ``problem``), and ``next_due`` of those whose ``revision``
        is still the stored one: who changes an entry says when it is due next. One atomic step.

        Entries that are not there stay away. False, with nothing changed, if ``fence`` is not the leader's any more.
        """

    @abstractmethod
    async def lead(self, owner: str, *, lease: float) -> Lease:
        """Take or renew leadership for ``lease`` seconds; returns the lease of whoever leads now.

        With a ``lease`` of 0, ``owner`` gives up what it has: nobody leads then, or another as before.
        """

    @abstractmethod
    async def leader(self) -> Lease | None:
        """Who leads now; None: nobody."""

    @abstractmethod
    async def close(self) -> None:
        """Give leadership up and free every resource. Harmless when called twice."""


# --- for drivers that keep text -------------------------------------------------------------------

RUNS: Final = ("last_due", "last_sent", "total_runs", "problem")
"""What ``mark`` records and ``upsert`` keeps, beside ``next_due``, which each sets by a rule of its own."""


def definition_of(entry: ScheduleEntry) -> str:
    """What ``upsert`` replaces, as JSON. Raises ``EncodeError`` naming the entry."""
    flags = (entry.enabled, entry.declared)
    plain = [entry.task, *flags, dict(entry.schedule), list(entry.args), dict(entry.kwargs), dict(entry.options)]
    try:
        return json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodeError(f"schedule entry {entry.name!r} cannot be stored: {error}") from None


def runs_of(entry: ScheduleEntry) -> str:
    """``RUNS`` as JSON."""
    return json.dumps([getattr(entry, name) for name in RUNS])


def entry_of(
    name: str, definition: str | bytes, runs: str | bytes, next_due: float | None, revision: int
) -> ScheduleEntry:
    """The entry of what ``definition_of`` and ``runs_of`` gave."""
    task, enabled, declared, schedule, args, kwargs, options = json.loads(definition)
    return ScheduleEntry(
        name=name,
        task=task,
        enabled=enabled,
        declared=declared,
        schedule=schedule,
        args=tuple(args),
        kwargs=kwargs,
        options=options,
        next_due=next_due,
        revision=revision,
        **dict(zip(RUNS, json.loads(runs), strict=True)),
    )
