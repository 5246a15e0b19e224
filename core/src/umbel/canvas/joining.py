"""The store's joins as a process asks for them: directly, or from a worker's child through its parent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from attrs import frozen

from umbel.errors import NotSupported, ResultStoreUnavailable
from umbel.ports.result_store import JoinState, JoinStore, ResultStore

if TYPE_CHECKING:
    from umbel.gateway import Gateway, LocalGateway

T = TypeVar("T")

LEASE: Final = 30.0
"""Seconds that whoever may fire a join has for it, before another may."""


class Chords(Protocol):
    """Keeps the account of chords that came by the wire. Asked where tasks run; both methods block."""

    def part(self, group: str, index: int | None, task_id: str, part: bytes) -> Sequence[bytes] | None:
        """A member has ended. All parts in order, if the caller is to send the body now; else None."""
        ...

    def open(self, group: str, size: int) -> bool:
        """Begin the account of a chord of ``size`` members. False: peers keep none where results are kept."""
        ...

    def sent(self, group: str) -> None:
        """The body is sent."""
        ...


@frozen
class Marked:
    """One call of ``JoinStore.join``."""

    key: str
    marks: Mapping[str, bytes]
    size: int | None
    owner: str
    expires: float
    lease: float = LEASE


def joins_of(store: ResultStore) -> JoinStore:
    """The store, if it joins. Raises ``NotSupported`` naming the setting."""
    if not store.capabilities.join:
        raise NotSupported(
            "a chord, or a group that something follows, needs a result store that joins, and that of [results] url does not: "
            "use redis://, sqlite:/// or memory://"
        )
    return cast("JoinStore", store)


# --- on any thread, in any process ----------------------------------------------------------------


def join(gateway: Gateway, calls: Sequence[Marked]) -> list[JoinState]:
    """``JoinStore.join`` for each of ``calls``. Blocks. Raises ``NotSupported``, ``ResultStoreUnavailable``."""
    plain = [(call.key, dict(call.marks), call.size, call.owner, call.expires, call.lease) for call in calls]
    return [JoinState(count=count, size=size, fires=fires) for count, size, fires in gateway.ask("join", plain)]


def members(gateway: Gateway, key: str) -> Mapping[str, bytes]:
    """``JoinStore.members``. Blocks."""
    found: Mapping[str, bytes] = gateway.ask("members", key)
    return found


def fired(gateway: Gateway, key: str, owner: str) -> bool:
    """``JoinStore.fired``. Blocks."""
    done: bool = gateway.ask("fired", (key, owner))
    return done


def insist(call: Callable[[], T], seconds: float) -> T:
    """Repeat a call for so long while the store is away. Blocks. Raises ``ResultStoreUnavailable`` then."""
    pause, end = 0.05, time.monotonic() + seconds
    while True:
        try:
            return call()
        except ResultStoreUnavailable:
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause *= 2


# --- where the connections are --------------------------------------------------------------------


async def _join(gateway: LocalGateway, payload: Any) -> list[tuple[int, int | None, bool]]:
    store = joins_of(gateway.store)
    calls = [
        partial(store.join, key, marks, size=size, owner=owner, lease=lease, expires=expires)
        for key, marks, size, owner, expires, lease in payload
    ]
    if any(marks for _, marks, *_ in payload):
        # In order: what completes a join early is to find the mark of the same end in the join itself.
        states = [await call() for call in calls]
    else:
        states = await asyncio.gather(*(call() for call in calls))
    return [(state.count, state.size, state.fires) for state in states]


async def _members(gateway: LocalGateway, key: str) -> dict[str, bytes]:
    return dict(await joins_of(gateway.store).members(key))


async def _fired(gateway: LocalGateway, payload: Any) -> bool:
    key, owner = payload
    return await joins_of(gateway.store).fired(key, owner)


VERBS: Final[Mapping[str, Callable[[LocalGateway, Any], Coroutine[Any, Any, Any]]]] = {
    "join": _join,
    "members": _members,
    "fired": _fired,
}
