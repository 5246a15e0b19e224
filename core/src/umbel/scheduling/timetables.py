"""Timetables that need no library: intervals, dates, crontab; and who makes the others. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo

from attrs import frozen

from umbel.ports.timetable import Timetable
from umbel.scheduling.crontab import Crontab, parse

Make = Callable[[Mapping[str, Any]], Timetable | None]
"""``umbel_make_timetable`` of an app's plugins."""


@frozen
class Every(Timetable):
    """Every so many seconds, counted from an anchor and not from the last run: nothing drifts, whoever was late."""

    seconds: float
    anchor: float = 0.0

    def next_after(self, moment: float) -> float | None:
        number = math.floor((moment - self.anchor) / self.seconds)
        while (instant := self._instant(number)) <= moment:
            number += 1
        return instant

    def _instant(self, number: int) -> float:
        # Rounded, so that it is the same number however it was come to; an id is made of it.
        return round(self.anchor + number * self.seconds, 6)


@frozen
class Dates(Timetable):
    """Some instants, and no more."""

    instants: tuple[float, ...]

    def next_after(self, moment: float) -> float | None:
        after = bisect_right(self.instants, moment)
        return None if after == len(self.instants) else self.instants[after]


def timetable(when: Mapping[str, Any], zone: str, start: float | None, make: Make) -> Timetable:
    """The timetable that ``when`` names: ``crontab``, ``every``, ``at``, or whatever a plugin makes of it.

    ``when`` is plain data, times as Unix time. Plugins are asked first, and are told ``timezone`` too. Raises ``ValueError``.
    """
    if not (when.keys() & _OWN.keys() and len(when) == 1) and (made := make({**when, "timezone": zone})) is not None:
        return made
    match dict(when):
        case {"crontab": str(text), **rest} if not rest:
            return _crontab(text, zone)
        case {"every": int() | float() as seconds, **rest} if not rest:
            if not (seconds >= _SHORTEST and math.isfinite(seconds)):
                raise ValueError(f"every must be {_SHORTEST:g} s or more, not {seconds!r}")
            return Every(float(seconds), 0.0 if start is None else start)
        case {"at": list() | tuple() as instants, **rest} if not rest:
            if not instants:
                raise ValueError("at must name one moment at least")
            return Dates(tuple(sorted({float(instant) for instant in instants})))
    named = ", ".join(map(repr, when)) or "nothing"
    raise ValueError(
        f"no timetable is made of {named}: give crontab, every, at, or what a plugin takes that [plugins] hooks names"
    )


_OWN: Final = dict.fromkeys(("crontab", "every", "at"))
_SHORTEST: Final = 0.01


@lru_cache(maxsize=4096)
def _crontab(text: str, zone: str) -> Timetable:
    return Crontab(parse(text), ZoneInfo(zone))


def moment_of(value: object, zone: tzinfo) -> float:
    """Unix time of what a person gives: a number, a ``datetime``, or ISO 8601; without an offset it is in ``zone``.

    Raises ``ValueError``.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f'{value!r} is no moment such as "2026-03-01T08:00" or "2026-03-01T08:00+09:00"') from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
