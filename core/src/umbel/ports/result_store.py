"""The result store port: what became of a task.

Lifecycle and threading are those of the transport port.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from attrs import frozen

from umbel.capabilities import ResultStoreCapabilities
from umbel.model import Lease, Result
from umbel.ports.clock import Clock, SystemClock
from umbel.ports.options import NoOptions


class ResultStore(ABC):
    """Keeps the latest state of each task, by task id."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = NoOptions
    """attrs class of the driver's own settings, ``[results.options]`` and the URL's query."""

    capabilities: ResultStoreCapabilities
    reply_to: str | None = None
    """Where results are to be sent that this instance shall see: what its process publishes carries it as ``reply_to``, and
    the worker gives it back with each ``Result``. May be a property, but is one value as long as the instance lives. None:
    results are kept in one place for all."""

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        """Remember the address. No I/O. ``options`` is an instance of ``Options``; None: the defaults."""
        self.url = url
        self.options = self.Options() if options is None else options
        self.clock: Clock = SystemClock() if clock is None else clock

    @abstractmethod
    async def put(self, results: Sequence[Result]) -> None:
        """Store ``results``, each replacing the record of its task, and wake whoever waits for it.

        A record in a final state never changes again: a later put for that task is silently ignored (a duplicate
        delivery is harmless). Nor does a passing state replace one of a higher ``Result.order``: what arrives late tells
        nothing new. Several of one task in one call are as if put one after the other (``surviving``).

        Raises ``ResultStoreUnavailable``; then some may have been stored, and the call may be repeated. Raises
        ``ResultRefused`` where a record can never be stored; then some of the others may have been, and each is worth a call
        of its own. A store that is full or forbidden is unavailable: it can be mended.
        """

    @abstractmethod
    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        """The records of those tasks that have one, ``expires`` as it was put.

        Raises ``ResultStoreUnavailable``; ``DecodeError`` for a record that another program wrote in a form that is not read.
        """

    @abstractmethod
    async def wait(self, task_id: str) -> Result:
        """Wait, without a bound, for the final record of a task. Cancel the call to stop waiting.

        Any number of calls may wait at once; together they use one subscription or one poll a process, never one for
        each task. A lost connection is mended inside. The record may have been stored before the call. Raises ``DecodeError``
        as ``get``.
        """

    @abstractmethod
    async def forget(self, task_ids: Sequence[str]) -> None:
        """Delete the records of those tasks. Raises ``ResultStoreUnavailable``."""

    @abstractmethod
    async def close(self) -> None:
        """Free every resource; pending ``wait`` calls are cancelled. Harmless when called twice."""


def surviving(results: Sequence[Result]) -> list[Result]:
    """What is left of one call of ``put``: one record for each task, the first final one, else the last of highest order."""
    latest: dict[str, Result] = {}
    for result in results:
        if (known := latest.get(result.task_id)) is None or replaces(result, known):
            latest[result.task_id] = result
    return list(latest.values())


def replaces(result: Result, known: Result) -> bool:
    """Whether ``result`` takes the place of the record ``known`` of the same task."""
    return not known.final and (result.final or result.order >= known.order)


@frozen(kw_only=True)
class JoinState:
    """A join after a mark was added."""

    count: int
    """Distinct members marked so far."""
    size: int | None
    """Members awaited; None while not known."""
    fires: bool
    """True for the one caller that must fire now, until its lease ends or ``fired`` is called."""


class JoinStore(ABC):
    """Ability ``join``: a set of finished members, each counted once, that fires once when complete."""

    @abstractmethod
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
        """Add ``marks`` (member id → its value; a member already there keeps its first value) and set ``size`` if given.

        ``owner`` names one execution: the holder of the right who asks again, before or after its lease has ended but before
        another has taken the right, is told to fire again, for a lease from now: its first answer may have been lost. One
        atomic step. When the set is complete and nobody holds the right to fire, ``owner``
        gets it for ``lease`` seconds. ``expires``: seconds without a mark after which the store may forget the join.
        """

    @abstractmethod
    async def members(self, key: str) -> Mapping[str, bytes]:
        """The marks so far, by member id."""

    @abstractmethod
    async def fired(self, key: str, owner: str) -> bool:
        """``owner`` has fired: nobody ever will again. False if the right has passed to another."""

    @abstractmethod
    async def unfired(self, limit: int = 100) -> Sequence[str]:
        """Keys of joins that are complete, not fired, and held by nobody: what a crash interrupted."""


class ClaimStore(ABC):
    """Ability ``claim``: leased, fenced keys."""

    @abstractmethod
    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        """Take ``name`` for ``owner`` if it is free, its lease has ended, or ``owner`` holds it already (then: renew).

        Returns the lease as it stands afterwards; it is the caller's if its ``owner`` is. ``value`` None: keep the value
        when renewing, else empty. The fence stays the same as long as the owner renews within its lease; it grows whenever
        the name is taken anew, by another or, after the lease has ended or was released, by the same owner.
        """

    @abstractmethod
    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        """Give ``name`` up. False, with nothing changed, if ``owner`` does not hold it, or with another value than ``value``.

        ``value`` None: with whatever value.
        """

    @abstractmethod
    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        """Leases that hold now, of names that begin with ``prefix``."""


class QueryableStore(ABC):
    """Ability ``query``: look records up by state."""

    @abstractmethod
    async def query(self, *, state: str | None = None, limit: int = 100, offset: int = 0) -> Sequence[Result]:
        """Records, newest first."""
