"""Revocations: which tasks are not to run, as values; and how they are kept for workers that cannot hear of them now.

A revocation is one leased key of the result store (ability ``claim``) whose value is the revocation itself: durable, the
same for whoever says it again, and forgotten by the store when its time is over. Nothing is guessed from it about what has
become of a task: a record REVOKED is written by the worker that did not run the task, or ended it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from attrs import evolve, field, frozen

from umbel.claiming import free_waiting
from umbel.errors import NotSupported
from umbel.model import Message
from umbel.pidbox import tell
from umbel.ports.result_store import ClaimStore, ResultStore

if TYPE_CHECKING:
    from umbel.gateway import LocalGateway

_PREFIX: Final = "umbel-revoked:"
_OWNER: Final = "umbel"
"""All who revoke are one owner: whoever says it again renews it."""
_MOST_IDS: Final = 500
"""Ids in one key."""
_READ: Final = 65_536
"""Bytes of a body that may be read for the name and the id that headers lack: tenths of a millisecond at most."""
IDS_KEPT: Final = 30 * 86_400.0
RULES_KEPT: Final = 86_400.0
"""Seconds for which a revocation by id, and one by name or header, holds unless it says otherwise."""
GRACE: Final = 5.0
"""Seconds that a running task has to answer ``TaskCancelled`` before the process that runs it is killed."""


@frozen(kw_only=True)
class Revocation:
    """Tasks that are not to run: those with one of ``ids``, or those of a name and with headers, all that is given."""

    until: float
    """Unix time from which it does not hold any more."""
    ids: tuple[str, ...] = ()
    task: str | None = None
    headers: Mapping[str, Any] = field(factory=dict)
    """Header or stamp by name, and its value, or a list of which it is one. Standard headers count: ``root_id``, ``group``."""
    terminate: bool = False
    """End those that run as well."""
    grace: float = GRACE
    """With ``terminate``: seconds between ``TaskCancelled`` in the task and the end of its process; 0: at once by force."""

    def __attrs_post_init__(self) -> None:
        if bool(self.ids) == bool(self.task or self.headers):
            raise ValueError("a revocation names task ids, or else a task's name, headers, or both")
        if self.grace < 0:
            raise ValueError(f"grace is a number of seconds, 0 or more, not {self.grace!r}")

    @property
    def name(self) -> str:
        """The same for what chooses the same tasks."""
        chosen = json.dumps([self.ids, self.task, sorted(self.headers.items())], default=str)
        return _PREFIX + hashlib.sha256(chosen.encode()).hexdigest()[:32]

    def covers(self, message: Message) -> bool:
        """Whether ``message`` is among those chosen. Reads headers only."""
        if self.ids:
            return message.id in self.ids
        if self.task is not None and message.task != self.task:
            return False
        return all(_carries(message.headers, name, wanted) for name, wanted in self.headers.items())

    def without(self, other: Revocation) -> Revocation | None:
        """What is left of this one when ``other`` is taken back: itself, a part of its ids, or nothing."""
        if self.ids and other.ids:
            rest = tuple(each for each in self.ids if each not in other.ids)
            return self if len(rest) == len(self.ids) else evolve(self, ids=rest) if rest else None
        return None if self.name == other.name else self

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "ids": list(self.ids),
            "task": self.task,
            "headers": dict(self.headers),
            "terminate": self.terminate,
            "grace": self.grace,
            "until": self.until,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Revocation:
        """The inverse of ``to_plain``; for what a stranger sent. Raises ``ValueError``, ``TypeError``, ``KeyError``."""
        task = plain.get("task")
        return cls(
            ids=tuple(str(each) for each in plain.get("ids") or ()),
            task=None if task is None else str(task),
            headers=dict(plain.get("headers") or {}),
            terminate=bool(plain.get("terminate")),
            grace=float(plain.get("grace", GRACE)),
            until=float(plain["until"]),
        )

    def describe(self) -> str:
        """What it chooses, in words."""
        if self.ids:
            return ", ".join(self.ids)
        parts = [] if self.task is None else [f"task {self.task}"]
        return " with ".join([*parts, *(f"{name}={value}" for name, value in self.headers.items())])


def named(message: Message) -> Message:
    """``message``; one of protocol 1, whose headers name no task, with name, id and group of its body among them: to look at.

    A body that is large, compressed or not JSON is not read: then it stays as it is, without a name.
    """
    if message.headers.get("task") or "compression" in message.headers or len(message.body) > _READ:
        return message
    try:
        body = json.loads(message.body) if message.content_type == "application/json" else None
    except (ValueError, RecursionError):
        return message
    if not isinstance(body, dict):
        return message
    fields = {"task": body.get("task"), "id": body.get("id"), "group": body.get("group") or body.get("taskset")}
    return evolve(message, headers={**message.headers, **{name: value for name, value in fields.items() if value}})


def _carries(headers: Mapping[str, Any], name: str, wanted: Any) -> bool:
    stamps = headers.get("stamps")
    found = [headers.get(name), stamps.get(name) if isinstance(stamps, Mapping) else None]
    values = [value for each in found if each is not None for value in _as_list(each)]
    # As text too: what a command line gives is text, whatever the sender's value was.
    return any(value == one or str(value) == str(one) for value in values for one in _as_list(wanted))


def _as_list(value: Any) -> Sequence[Any]:
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def revocations(
    ids: Iterable[str],
    *,
    task: str | None,
    headers: Mapping[str, Any] | None,
    terminate: bool,
    grace: float,
    expires: float | None,
    now: float,
) -> list[Revocation]:
    """What one call revokes: several values where it names more ids than one key holds. Raises ``ValueError``."""
    chosen = list(dict.fromkeys(ids))
    if "" in chosen:
        raise ValueError("a task id is never empty")
    if expires is not None and expires <= 0:
        raise ValueError(f"expires is a number of seconds from now, not {expires!r}")
    until = now + (expires or (IDS_KEPT if chosen else RULES_KEPT))
    parts = [tuple(chosen[start : start + _MOST_IDS]) for start in range(0, len(chosen), _MOST_IDS)] or [()]
    return [
        Revocation(ids=part, task=task, headers=headers or {}, terminate=terminate, grace=grace, until=until)
        for part in parts
    ]


# --- in the result store, on the I/O loop ---------------------------------------------------------


def keeper(store: ResultStore | None) -> ClaimStore | None:
    """The store, if it keeps revocations."""
    return cast("ClaimStore", store) if store is not None and store.capabilities.claim else None


async def keep(store: ClaimStore, revocation: Revocation, now: float) -> None:
    """Keep it until its time is over; said again, it is renewed. Raises ``ResultStoreUnavailable``."""
    value = json.dumps(revocation.to_plain(), default=str).encode()
    await store.claim(revocation.name, _OWNER, lease=max(revocation.until - now, 0.001), value=value)


async def kept(store: ClaimStore) -> list[Revocation]:
    """All that hold now. Raises ``ResultStoreUnavailable``."""
    return [
        Revocation.from_plain(json.loads(lease.value)) for lease in await store.claims(_PREFIX) if lease.value != b""
    ]


async def lift(store: ClaimStore, revocation: Revocation, now: float) -> bool:
    """Keep what ``revocation`` chooses no more. False if nothing of it was kept. Raises ``ResultStoreUnavailable``."""
    found = False
    for mark in await kept(store):
        rest = mark.without(revocation)
        if rest is not mark:
            found = True
            if rest is not None:
                await keep(store, rest, now)
            await store.release(mark.name, _OWNER)
    return found


# --- verbs of the gateway: for a client, a task in a worker's child, the command line --------------


async def _revoke(gateway: LocalGateway, payload: tuple[Mapping[str, Any], float]) -> bool:
    """Keep ``revocation`` where the store can, then tell the workers. True if it is kept.

    Workers that run hear of it even if the store is down; then ``ResultStoreUnavailable`` is raised all the same. Raises
    ``NotSupported`` where it can neither be kept nor told, ``BrokerUnavailable`` where it cannot be told.
    """
    revocation, now = Revocation.from_plain(payload[0]), payload[1]
    store, told = _ways(gateway)
    try:
        if store is not None:
            await keep(store, revocation, now)
            await free_waiting(store, revocation.ids)
    finally:
        if told:
            arguments = {"revocation": revocation.to_plain(), "kept": store is not None}
            await tell(gateway.transport, "revoke", arguments)
    return store is not None


async def _restore(gateway: LocalGateway, payload: tuple[Mapping[str, Any], float]) -> bool:
    """Take a revocation back. False if it was not kept; workers that know it without the store forget it too."""
    revocation, now = Revocation.from_plain(payload[0]), payload[1]
    store, told = _ways(gateway)
    was_kept = store is not None and await lift(store, revocation, now)
    if told:
        await tell(gateway.transport, "restore", {"revocation": revocation.to_plain()})
    return was_kept


async def _revoked(gateway: LocalGateway, payload: None) -> list[dict[str, Any]]:
    """What the store keeps. Raises ``NotSupported`` where it keeps none, ``ResultStoreUnavailable``."""
    store = keeper(gateway.store if gateway.has_store else None)
    if store is None:
        raise NotSupported("the result store of [results] url keeps no revocations: it has no claims; ask the workers")
    return [revocation.to_plain() for revocation in await kept(store)]


VERBS: Final[Mapping[str, Callable[[LocalGateway, Any], Coroutine[Any, Any, Any]]]] = {
    "revoke": _revoke,
    "restore": _restore,
    "revoked": _revoked,
}
"""What a gateway can be asked: a revocation as plain data with the time now (``revoked``: None), plain data back."""


def _ways(gateway: LocalGateway) -> tuple[ClaimStore | None, bool]:
    store = keeper(gateway.store if gateway.has_store else None)
    told = gateway.transport.capabilities.broadcast
    if store is None and not told:
        raise NotSupported(
            "a revocation would reach nobody: the broker of [broker] url has no broadcast, and no result store that has "
            "claims is set in [results] url (redis://, sqlite:///)"
        )
    return store, told
