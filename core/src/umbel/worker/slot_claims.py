"""Slots of a key as claims in the result store: taken, renewed, given up. What is done with them is decided in ``slots``."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from attrs import define, field

from umbel.errors import ResultStoreUnavailable
from umbel.ports.result_store import ClaimStore

if TYPE_CHECKING:
    from umbel.worker.held import Held

logger = logging.getLogger("umbel.worker")

STORE_PATIENCE: Final = 5.0
"""Seconds in which the store must have answered."""
FAULTS: Final = (ResultStoreUnavailable, TimeoutError)
"""How a store fails for a while."""
_FEW: Final = 4
"""Slots more than are wanted that are asked for before those that are free are looked up."""
_AT_ONCE: Final = 8
"""Claims under way at once, for one key."""

Key = tuple[str, str]
"""Task and key."""


@define(eq=False)
class Slot:
    """One claim of this worker."""

    place: Place
    index: int
    good_until: float = 0.0
    """``time.monotonic()`` until which nobody else can have it."""
    call: Held | None = None
    """Who runs under it."""
    since: float = 0.0
    """``time.monotonic()`` when that call got it."""
    given_up: bool = False
    lock: asyncio.Lock = field(factory=asyncio.Lock)
    """A renewal under way while the slot is given up would take it again, for nobody."""


@define(eq=False)
class Place:
    """What this worker knows of one key."""

    key: Key
    limit: int
    taken: set[int] = field(factory=set)
    """Slots that this worker holds, or is trying to take: the store lets an owner take what he has already."""
    spare: list[Slot] = field(factory=list)
    """Slots of this worker that no call has, for a moment."""
    waiting: deque[Held] = field(factory=deque)
    """Calls in hand that get the next slot that becomes free here."""
    asking: int = 0
    """Calls of ``take`` under way."""
    full_until: float = 0.0
    """``time.monotonic()`` until which asking is useless."""
    turn: float = 0.0
    """Unix time at which the last that went back to the queue comes again."""


class SlotClaims:
    """The claims of one worker. Lives on the I/O loop."""

    def __init__(self, store: Callable[[], ClaimStore], *, owner: str, lease: float) -> None:
        """``owner``: this worker's life, like no other's. ``lease``: seconds."""
        self._store = store
        self._owner = owner
        self._lease = lease

    async def claim(self, place: Place, wanted: int) -> list[Slot]:
        """Up to ``wanted`` slots that are free. Raises ``ResultStoreUnavailable``, ``TimeoutError`` if none was got."""
        # At random: workers that ask together do not all ask for the same. Not a secret.
        chosen = random.sample(range(place.limit), min(place.limit, wanted + len(place.taken) + _FEW))
        everything = len(chosen) == place.limit
        slots: list[Slot] = []
        while len(slots) < wanted:
            tried = [Slot(place, index) for index in chosen if index not in place.taken][
                : min(wanted - len(slots), _AT_ONCE)
            ]
            if not tried:
                if everything:
                    break
                others = await self._held_by_others(place.key)
                chosen, everything = [index for index in range(place.limit) if index not in others], True
                continue
            place.taken.update(slot.index for slot in tried)
            answers = await asyncio.gather(*map(self._try, tried))
            slots += [slot for slot, answer in zip(tried, answers, strict=True) if answer is True]
            place.taken.difference_update(slot.index for slot in tried if slot not in slots)
            asked = {slot.index for slot in tried}
            chosen = [index for index in chosen if index not in asked]
            if errors := [answer for answer in answers if isinstance(answer, Exception)]:
                if not slots:
                    raise errors[0]
                break  # what was got is used; the next call says it again
        return slots

    async def _try(self, slot: Slot) -> bool | Exception:
        try:
            return await self.renew(slot)
        except FAULTS as exc:
            return exc

    async def _held_by_others(self, key: Key) -> set[int]:
        """Slots that other workers hold; none where the store does not say, for then they are asked for."""
        prefix = _name(key, "")
        try:
            async with asyncio.timeout(STORE_PATIENCE):
                leases = await self._store().claims(prefix)
        except FAULTS as exc:
            logger.warning("the slots of task %s cannot be listed: %s", key[0], exc)
            return set()
        return {int(lease.name.removeprefix(prefix)) for lease in leases if lease.owner != self._owner}

    async def renew(self, slot: Slot) -> bool:
        """Claim a slot, or claim it again; whether it is ours. Raises ``ResultStoreUnavailable``, ``TimeoutError``."""
        asked = time.monotonic()
        async with asyncio.timeout(STORE_PATIENCE):
            lease = await self._store().claim(_name(slot.place.key, slot.index), self._owner, lease=self._lease)
        if lease.owner != self._owner:
            return False
        slot.good_until = asked + self._lease
        return time.monotonic() < slot.good_until

    async def release(self, slot: Slot) -> None:
        """Give a slot up. A store that cannot be told lets it end with its lease. Raises nothing."""
        async with slot.lock:
            try:
                async with asyncio.timeout(STORE_PATIENCE):
                    await self._store().release(_name(slot.place.key, slot.index), self._owner)
            except FAULTS as exc:
                logger.warning("a slot of task %s is free only when its lease ends: %s", slot.place.key[0], exc)
            finally:
                slot.place.taken.discard(slot.index)


def _name(key: Key, index: object) -> str:
    task, value = key
    return f"limit:{quote(task, safe='')}:{quote(value, safe='')}:{index}"
