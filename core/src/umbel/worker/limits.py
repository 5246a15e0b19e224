"""Rate limits of one worker: a start is given a place in time, and what must wait goes back to the queue until then."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from umbel.errors import SettingsError
from umbel.settings import units

TOLERANCE: Final = 0.001
"""Seconds by which a start may come early: less than a way through the queue costs."""
_REMEMBERED: Final = 100_000
"""Places kept for messages that went back to the queue; the oldest are forgotten first, and then wait once more."""
_LATE: Final = 0.1
"""Seconds after which a place whose message has not come is anybody's: another worker has taken its message."""
_LONGEST: Final = 60.0
"""Seconds after which what waits is looked at again, so that a rate that is raised does not find it put off for hours."""
_LOOKS: Final = 1000.0
"""Messages a second that may come only to be put off again: more of them wait longer."""


def parse_rate(text: str) -> float:
    """``10/s``, ``100/m``, ``5/h``, ``2/d`` as starts a second. Raises ``SettingsError``."""
    try:
        return units.parse_rate(text)
    except ValueError as exc:
        raise SettingsError([f"rate_limit {text!r} {exc}"]) from None


class Bucket:
    """Counts starts (the generic cell rate algorithm): in any time no more than one second's worth (at least one), and what
    the rate adds meanwhile."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.full = 0.0
        """When the bucket will be full again if nothing starts: the theoretical arrival time."""

    @property
    def interval(self) -> float:
        """Seconds from one start to the next."""
        return 1.0 / self.rate

    @property
    def burst(self) -> float:
        """Seconds by which a start may come before its evenly spaced moment."""
        return max(0.0, 1.0 - self.interval)

    def next(self, now: float) -> float:
        """When the next start is allowed; not after ``now``: at once."""
        return max(self.full, now) - self.burst

    def take(self, now: float) -> None:
        """Something starts."""
        self.full = max(self.full, now) + self.interval


class RateLimiter:
    """Gives each message its place, in the order in which they come.

    What starts is counted by a bucket that knows of nothing else, so that late comers cannot break the rate, however many
    come at once.
    """

    def __init__(self, rate: float) -> None:
        self._bucket = Bucket(rate)
        self._next = 0.0
        """Where the next place is."""
        self._places: OrderedDict[str, float] = OrderedDict()
        """Places of those that wait, by task id; the earliest first."""
        self._seen = 0.0

    @property
    def rate(self) -> float:
        return self._bucket.rate

    def change(self, rate: float, now: float) -> None:
        """Another rate from now on. Places are void; what has started still counts, so a change is no new burst."""
        bucket = Bucket(rate)
        behind = (self._bucket.full - now) * self._bucket.rate  # starts that the bucket has not won back
        bucket.full = now + max(0.0, behind) * bucket.interval
        self._bucket, self._next = bucket, bucket.next(now)
        self._places.clear()

    def wait(self, task_id: str, now: float) -> float:
        """Seconds until ``task_id`` is to be asked for again; 0: it may start now, and has used up its place."""
        if now < self._seen:
            self._step_back(self._seen - now)
        self._seen = now
        bucket = self._bucket
        place = self._places.get(task_id)
        if place is None and (place := self._unused(now)) is None:
            place = self._take_place(now)
        if place <= now + TOLERANCE:
            self._places.pop(task_id, None)
            if bucket.next(now) <= now + TOLERANCE:
                bucket.take(now)
                return 0.0
            place = self._take_place(now)  # many come late, and at once
        if task_id not in self._places:
            self._places[task_id] = place
            if len(self._places) > _REMEMBERED:
                self._places.popitem(last=False)
        return min(place - now, max(_LONGEST, bucket.interval, len(self._places) / _LOOKS))

    def _take_place(self, now: float) -> float:
        place = max(self._next, self._bucket.next(now))
        self._next = place + self._bucket.interval
        return place

    def _unused(self, now: float) -> float | None:
        """The place of one that should have come, and has not: without this, several workers would waste each other's."""
        if not self._places or (place := next(iter(self._places.values()))) > now - _LATE:
            return None
        self._places.popitem(last=False)
        return place

    def _step_back(self, seconds: float) -> None:
        """The clock was set back: everything that was counted on it is that much earlier."""
        self._next -= seconds
        self._bucket.full -= seconds
        for task_id in self._places:
            self._places[task_id] -= seconds
