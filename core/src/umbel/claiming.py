"""Claims of the result store as a process asks for them: directly, or from a worker's child through its parent.

What is claimed: keys of unique tasks (``umbel.unique``) and locks (``umbel.locks``). A claim belongs to its owner until its
lease ends; whoever dies frees it by that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import attrs
from attrs import frozen

from umbel.errors import NotSupported, ResultStoreUnavailable
from umbel.model import Lease, Message
from umbel.ports.result_store import ClaimStore, ResultStore

if TYPE_CHECKING:
    from umbel.gateway import Gateway, LocalGateway

UNIQUE: Final = "umbel-unique:"
LOCK: Final = "umbel-lock:"
"""What the names of claims begin with."""

KEY: Final = "umbel-unique"
"""Header of a unique call, for the worker: the claim's name, how long it is held, and the fence of its sender's claim; of a call
in a workflow, which nobody has claimed yet, what it does on a conflict."""

SENDING: Final = b"sending"
"""Value of a unique key whose call is on its way to the broker."""
WAITS: Final = b"waits"
"""Its message waits in its queue; behind a space, the time of the first call that it stands for."""
RUNS: Final = b"runs"
"""A worker has taken it on."""


@frozen
class Key:
    """What a message says about its unique key."""

    name: str
    """Of the claim."""
    until: str | float
    """``until_start``, ``until_done``, or seconds from when it is taken on."""
    on_conflict: str | None = None
    """Of a call in a workflow, which claims its key only when it is taken on; None: its sender has claimed it."""
    fence: int | None = None
    """Of its sender's claim; None: it is not known."""

    @classmethod
    def of(cls, message: Message) -> Key | None:
        """None: it has none, or one that makes no sense."""
        match message.headers.get(KEY):
            case [str(name), ("until_start" | "until_done") as until, int(fence)] if name.startswith(UNIQUE):
                return cls(name, until, fence=fence)
            case [str(name), ("until_start" | "until_done" | float() | int()) as until, str(on_conflict)] if (
                name.startswith(UNIQUE)
            ):
                return cls(name, until, on_conflict)
        return None


def waits(lease: Lease) -> bool:
    """Whether the call that holds a unique key has been sent and not been taken on."""
    return lease.value.startswith(WAITS)


def claims_of(store: ResultStore, what: str) -> ClaimStore:
    """The store, if it has claims. Raises ``NotSupported`` saying ``what`` it is that needs them."""
    if not store.capabilities.claim:
        raise NotSupported(
            f"{what} need a result store that keeps claims, and that of [results] url is none: use redis://, sqlite:/// or memory://"
        )
    return cast("ClaimStore", store)


# --- on any thread, in any process ----------------------------------------------------------------


def claim(gateway: Gateway, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
    """``ClaimStore.claim``. Blocks. Raises ``NotSupported``, ``ResultStoreUnavailable``."""
    return Lease(**gateway.ask("claim", (name, owner, lease, value)))


async def aclaim(gateway: Gateway, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
    """``claim`` for event loops."""
    return Lease(**await gateway.aask("claim", (name, owner, lease, value)))


def release(gateway: Gateway, name: str, owner: str, *, value: bytes | None = None) -> bool:
    """``ClaimStore.release``. Blocks. Raises as ``claim``."""
    return bool(gateway.ask("release", (name, owner, value)))


async def arelease(gateway: Gateway, name: str, owner: str, *, value: bytes | None = None) -> bool:
    """``release`` for event loops."""
    return bool(await gateway.aask("release", (name, owner, value)))


def renew(gateway: Gateway, claims: Sequence[tuple[str, str, float]]) -> list[Lease | None]:
    """Renew claims by name, owner and lease, all at once; None: the store has not answered. Blocks. Raises as ``claim``."""
    return [None if plain is None else Lease(**plain) for plain in gateway.ask("renew", list(claims))]


def claims(gateway: Gateway, prefix: str = "") -> list[Lease]:
    """``ClaimStore.claims``. Blocks. Raises as ``claim``."""
    return [Lease(**plain) for plain in gateway.ask("claims", prefix)]


# --- on the I/O loop ------------------------------------------------------------------------------


async def free_waiting(store: ClaimStore, task_ids: Sequence[str]) -> None:
    """Free the unique keys of tasks that will not run: another call may be sent at once. Raises ``ResultStoreUnavailable``.

    Looks through all unique keys that are held: for what happens now and then.
    """
    chosen = set(task_ids)
    for lease in await store.claims(UNIQUE) if chosen else ():
        if lease.owner in chosen and waits(lease):
            await store.release(lease.name, lease.owner, value=lease.value)


async def _claim(gateway: LocalGateway, payload: tuple[str, str, float, bytes | None]) -> dict[str, Any]:
    name, owner, lease, value = payload
    store = claims_of(gateway.store, _what(name))
    return attrs.asdict(await store.claim(name, owner, lease=lease, value=value))


async def _renew(gateway: LocalGateway, payload: Sequence[tuple[str, str, float]]) -> list[dict[str, Any] | None]:
    store = claims_of(gateway.store, "claims")
    answers = await asyncio.gather(
        *(store.claim(name, owner, lease=lease) for name, owner, lease in payload), return_exceptions=True
    )
    faults = [answer for answer in answers if isinstance(answer, BaseException)]
    if unforeseen := [fault for fault in faults if not isinstance(fault, ResultStoreUnavailable)]:
        raise unforeseen[0]
    return [None if isinstance(answer, BaseException) else attrs.asdict(answer) for answer in answers]


async def _release(gateway: LocalGateway, payload: tuple[str, str, bytes | None]) -> bool:
    name, owner, value = payload
    return await claims_of(gateway.store, _what(name)).release(name, owner, value=value)


async def _claims(gateway: LocalGateway, prefix: str) -> list[dict[str, Any]]:
    store = claims_of(gateway.store, _what(prefix))
    return [attrs.asdict(lease) for lease in await store.claims(prefix)]


def _what(name: str) -> str:
    return "unique tasks" if name.startswith(UNIQUE) else "locks" if name.startswith(LOCK) else "claims"


VERBS: Final[Mapping[str, Callable[[LocalGateway, Any], Coroutine[Any, Any, Any]]]] = {
    "claim": _claim,
    "renew": _renew,
    "release": _release,
    "claims": _claims,
}
"""What a gateway can be asked."""
