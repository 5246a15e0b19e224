"""A rate limit of the whole fleet, kept in a store that has nothing but claims.

The starts are written down in a log that all workers share: entry ``rate:TASK:7`` is a claim, and its value is the state of
the bucket after the starts that its maker has taken. Whoever wants starts claims the entry after the last one that he knows.
A claim has one winner, so the winner has taken his starts from the state that he knew; whoever loses is told the winner's
state, and tries the next entry. So no start is counted twice or forgotten, however many ask at once; a worker that dies loses
what it had taken and not used, and nothing else; a restart of the whole fleet changes nothing.

Entries end by their leases, and an entry may be claimed anew after that. So an old place in the log must not be gone on from:
``_Place.since`` is a moment before which no entry after it was made, and after a third of the shortest lease the place is
found again, by listing what there is. Nothing at all in the list: nothing has started for longer than the bucket remembers.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from typing import Final
from urllib.parse import quote

from attrs import frozen

from umbel.errors import ResultStoreUnavailable
from umbel.model import Lease
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore
from umbel.worker.limits import TOLERANCE, Bucket

_LEASE: Final = 60.0
"""Seconds for which an entry stays after the bucket has forgotten its starts."""
_FRESH: Final = _LEASE / 3
"""Seconds for which a place in the log is good."""
_SKEW: Final = 5.0
"""Seconds by which the clocks of a fleet may differ; a clock that was set back further holds nothing up for longer."""
_TRIES: Final = 50
"""Entries that are tried in one call: with so many workers ahead, others are served meanwhile."""
_REMEMBERED: Final = 100_000
"""Turns kept of those that were put off."""
_SOON: Final = 0.02
"""Least time in seconds for which anything is put off."""
_LONGEST: Final = 60.0
"""Seconds after which what waits is looked at again."""
_LOOKS: Final = 200.0
"""Messages a second that may come only to be put off again: more of them wait longer."""


@frozen
class _Place:
    """The end of the log as it is known here."""

    index: int
    full: float
    """State of the bucket there (``Bucket.full``)."""
    since: float
    """``time.monotonic()`` before the call after which no later entry can have been there yet."""
    clock: float
    """The same moment on the app's clock: leases may be counted on that."""


class FleetRate:
    """The starts of one task that one worker takes out of the fleet's. Lives on the I/O loop."""

    def __init__(self, store: ClaimStore, task: str, rate: float, *, owner: str, clock: Clock) -> None:
        """``owner``: this worker's life, like no other's."""
        self._store = store
        self._prefix = f"rate:{quote(task, safe='')}:"
        self._owner = owner
        self._clock = clock
        self._bucket = Bucket(rate)
        self._attempts = 0
        self._place: _Place | None = None
        self._asking = asyncio.Lock()
        self._doubted: tuple[float, float] | None = None
        """A state that is too far ahead, and how long it is waited for."""
        self._turns: OrderedDict[str, float] = OrderedDict()
        """When those that were put off are to come again, by task id; the earliest first."""
        self._next = 0.0
        self._seen = 0.0

    @property
    def rate(self) -> float:
        return self._bucket.rate

    def change(self, rate: float) -> None:
        """Another rate from now on; what has started still counts."""
        self._bucket = Bucket(rate)
        self._forget_turns()

    async def take(self, wanted: int) -> int:
        """Take up to ``wanted`` starts for now; returns how many. They are gone, used or not.

        No call to the store if the last known state says that there are none. Raises ``ResultStoreUnavailable``; then some
        may be lost.
        """
        async with self._asking:
            for _ in range(_TRIES):
                place = self._place
                if place is not None and self._affordable(place.full, 1) == 0 and self._is_fresh(place):
                    return 0  # the state only ever grows
                if place is None or not self._is_fresh(place):
                    place = self._place = await self._find()
                if (number := self._affordable(place.full, wanted)) == 0:
                    return 0
                if await self._append(place, number):
                    return number
            return 0

    def _affordable(self, full: float, wanted: int) -> int:
        """How many of ``wanted`` starts the bucket allows now."""
        now, bucket = self._clock.time(), self._bucket
        room = now + TOLERANCE - self._opens(full, now)
        return 0 if room < 0 else min(wanted, int(room / bucket.interval) + 1)

    def _opens(self, full: float, now: float) -> float:
        """When the bucket allows its next start."""
        return max(self._credible(full, now), now) - self._bucket.burst

    def _credible(self, full: float, now: float) -> float:
        """A state that is further ahead than starts can have brought it was written by another clock, or under a lower rate:
        it is waited for no longer than one that could be."""
        furthest = now + self._bucket.burst + self._bucket.interval + _SKEW
        if full <= furthest:
            return full
        if self._doubted is None or self._doubted[0] != full or self._doubted[1] > furthest:
            self._doubted = full, furthest
        return self._doubted[1]

    def _is_fresh(self, place: _Place) -> bool:
        return max(time.monotonic() - place.since, self._clock.time() - place.clock) < _FRESH

    async def _find(self) -> _Place:
        """The end of the log, listed."""
        since, clock = time.monotonic(), self._clock.time()
        entries = {
            int(lease.name.removeprefix(self._prefix)): lease for lease in await self._store.claims(self._prefix)
        }
        if not entries:
            return _Place(-1, 0.0, since, clock)
        last = max(entries)
        return _Place(last, _full(entries[last]), since, clock)

    async def _append(self, place: _Place, number: int) -> bool:
        """Write ``number`` starts after ``place``. False if another entry stands there, which is the place then."""
        since, clock, bucket = time.monotonic(), self._clock.time(), self._bucket
        full = max(self._credible(place.full, clock), clock) + number * bucket.interval
        # The same owner would win its own entry again, and change what others have read: each attempt has its own.
        self._attempts += 1
        owner = f"{self._owner}:{self._attempts}"
        name = f"{self._prefix}{place.index + 1}"
        lease = await self._store.claim(
            name,
            owner,
            lease=max(0.0, full - clock) + _LEASE,
            value=json.dumps({"full": full}).encode(),
        )
        if not self._is_fresh(
            place
        ):  # the answer took so long that the entry may have been there before, and have ended
            self._place = None
            await self._store.release(name, owner)
            return False
        if lease.owner == owner:
            self._place = _Place(place.index + 1, full, since, clock)
            return True
        self._place = _Place(place.index + 1, _full(lease), place.since, place.clock)
        return False

    def put_off(self, task_id: str) -> float:
        """Seconds until one that has got no start is to ask again: those that wait come one after another."""
        now, interval = self._clock.time(), self._bucket.interval
        if now < self._seen:  # the clock was set back
            self._forget_turns()
        self._seen = now
        while self._turns and next(iter(self._turns.values())) <= now:
            self._turns.popitem(last=False)
        if (turn := self._turns.get(task_id)) is None:
            opens = max(self._opens(0.0 if self._place is None else self._place.full, now), now + _SOON)
            if next(iter(self._turns.values()), math.inf) > opens:  # nobody else comes in time for the next start
                turn = self._turns[task_id] = opens
                self._turns.move_to_end(task_id, last=False)
                self._next = max(self._next, opens + interval)
            else:
                turn = self._turns[task_id] = max(self._next, opens)
                self._next = turn + interval
            if len(self._turns) > _REMEMBERED:
                self._turns.popitem(last=False)
        return min(turn - now, max(_LONGEST, interval, len(self._turns) / _LOOKS))

    def _forget_turns(self) -> None:
        self._turns.clear()
        self._next = 0.0


def _full(lease: Lease) -> float:
    try:
        return float(json.loads(lease.value)["full"])
    except (ValueError, KeyError, TypeError) as exc:
        raise ResultStoreUnavailable(f"the claim {lease.name!r} in the result store is none of ours: {exc}") from exc
