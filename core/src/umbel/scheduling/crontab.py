"""Crontab expressions: what they say, and which instants they mean in a time zone. Pure.

All instants are Unix time. What a change of the clocks does is a rule, not an accident:

- *The clock is put forward* and skips the times of an entry with fixed hours: it is due once, at the first minute after the gap.
- *The clock is put back* and shows times of such an entry twice: it is due at the first of the two only.
- An entry for every hour (hours are all 24) follows the time that passes: it skips what does not exist, and is due in both of
  the doubled hours.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final

from attrs import frozen

from umbel.ports.timetable import Timetable

ALIASES: Final[Mapping[str, str]] = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}

_MONTHS: Final = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_WEEKDAYS: Final = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_DAYS_IN: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_MINUTE: Final = 60
_DAY: Final = timedelta(days=1)
_LAST_YEAR: Final = 9998
_PART: Final = re.compile(r"(\*|\w+)(?:-(\w+))?(?:/(\w+))?")
_FARTHEST: Final = 366 * 41
"""Days within which an expression that is possible at all is due: 29 February on one weekday, over 2100 too."""


Part = int | str | Iterable[int | str]
"""What a field is made of: a number, text, or several of them."""


@frozen
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def read(self, text: str) -> frozenset[int]:
        """The values that ``text`` stands for. Raises ``ValueError``."""
        values: set[int] = set()
        for part in text.split(","):
            values.update(self._part(part))
        return frozenset(value % 7 if self.names is _WEEKDAYS else value for value in values)

    def _part(self, text: str) -> list[int]:
        match = _PART.fullmatch(text)
        if match is None or (match[1] == "*" and match[2]):
            raise ValueError(
                f'{text!r} is no {self.name}: write "*", a number, a range "a-b", steps "*/n", or a list of them'
            )
        first, last, step = match.groups()
        if first == "*":
            low, high = self.low, self.high
        else:
            low = self._value(first)
            high = self._value(last) if last else self.high if step else low
        # The second form, fri-mon or 22-4: over the end, and on from the beginning.
        span = list(range(low, high + 1)) if low <= high else [*range(low, self.high + 1), *range(self.low, high + 1)]
        if step is None:
            return span
        if not step.isdecimal() or not int(step):
            raise ValueError(f"{text!r} has the step {step!r}, which is no number above 0")
        return span[:: int(step)]

    def _value(self, text: str) -> int:
        if text.isdecimal():
            value = int(text)
            if self.low <= value <= self.high + (self.names is _WEEKDAYS):  # 7 is Sunday too
                return value
            raise ValueError(f"{text} is no {self.name}: {self.low} to {self.high}")
        lowered = text.lower()
        for number, name in enumerate(self.names, self.low):
            if len(lowered) >= 3 and name.startswith(lowered):
                return number
        raise ValueError(f"{text!r} is no {self.name}")


_FIELDS: Final = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("weekday", 0, 6, _WEEKDAYS),
)


@frozen
class Expression:
    """What a crontab expression says about the wall clock. All five fields must match, as in Celery."""

    text: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday."""

    @property
    def every_hour(self) -> bool:
        """Whether its hours are all 24, so that it follows the time that passes rather than the hands of the clock."""
        return len(self.hours) == 24

    def on(self, day: date) -> bool:
        """Whether its last three fields match that date."""
        return day.month in self.months and day.day in self.days and day.isoweekday() % 7 in self.weekdays

    def at(self, wall: datetime) -> bool:
        """Whether all of it matches that minute of the wall clock."""
        return wall.minute in self.minutes and wall.hour in self.hours and self.on(wall.date())


def parse(text: str) -> Expression:
    """Read five fields (minute, hour, day of the month, month, weekday) or an alias such as ``@daily``.

    Raises ``ValueError`` for what is no crontab, and for one that never comes, such as the 31st of February.
    """
    said = ALIASES.get(text.strip().lower(), text)
    fields = said.split()
    if text.strip().startswith("@") and said is text:
        raise ValueError(f"{text.strip()} is no alias: there are {', '.join(ALIASES)}")
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f"{text!r} has {len(fields)} fields: a crontab has five, minute, hour, day of the month, month, weekday"
        )
    minutes, hours, days, months, weekdays = (kind.read(part) for kind, part in zip(_FIELDS, fields, strict=True))
    if min(days) > max(_DAYS_IN[month - 1] for month in months):
        raise ValueError(f"{text!r} never comes: none of its months has so many days")
    return Expression(text, tuple(sorted(minutes)), tuple(sorted(hours)), days, months, weekdays)


def crontab(
    minute: Part = "*",
    hour: Part = "*",
    day_of_week: Part = "*",
    day_of_month: Part = "*",
    month_of_year: Part = "*",
) -> str:
    """The five-field string of what Celery's ``crontab`` is given, by the same names. Raises ``ValueError``."""
    parts = (minute, hour, day_of_month, month_of_year, day_of_week)
    said = (str(part) if isinstance(part, int | str) else ",".join(map(str, part)) for part in parts)
    return parse(" ".join(part.replace(" ", "") for part in said)).text


@frozen
class Crontab(Timetable):
    """The instants of an expression in a time zone."""

    expression: Expression
    zone: tzinfo

    def next_after(self, moment: float) -> float | None:
        # From a day back: where the clock was put back over midnight, the wall shows a date that has begun before.
        day = datetime.fromtimestamp(moment, self.zone).date() - _DAY
        on = self.expression.on
        for _ in range(_FARTHEST):
            if day.year >= _LAST_YEAR:
                return None
            # Its neighbours too: a change of the clock at midnight moves minutes of one date into another.
            if (on(day) or on(day - _DAY) or on(day + _DAY)) and (found := self._on(day, moment)) is not None:
                return found
            day += _DAY
        return None

    def _on(self, day: date, moment: float) -> float | None:
        """The first instant after ``moment`` of those between the beginnings of ``day`` and of the next."""
        begin, even = _beginning(day, self.zone)
        if not even:
            due = _uneven(self.expression, day, self.zone)
            after = bisect_right(due, moment)
            return None if after == len(due) else float(due[after])
        if not self.expression.on(day) or (passed := moment - begin) >= 86_400:
            return None
        minutes, hours = self.expression.minutes, self.expression.hours
        hour, rest = divmod(passed, 3600) if passed >= 0 else (-1, 0.0)
        later = bisect_right(minutes, rest / _MINUTE)
        if hour in hours and later < len(minutes):
            return begin + hour * 3600 + minutes[later] * _MINUTE
        after = bisect_right(hours, hour)
        return None if after == len(hours) else float(begin + hours[after] * 3600 + minutes[0] * _MINUTE)


@lru_cache(maxsize=1024)
def _uneven(expression: Expression, day: date, zone: tzinfo) -> Sequence[int]:
    """The rule, minute by minute: for a day on which the clock is changed."""
    at, every_hour = expression.at, expression.every_hour
    return [
        instant
        for instant, wall, doubled, missing in _minutes(day, zone)
        if (every_hour and at(wall)) or (not every_hour and not doubled and (at(wall) or any(map(at, missing))))
    ]


# --- the clock on the wall ------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _beginning(day: date, zone: tzinfo) -> tuple[int, bool]:
    """The first instant at which the wall shows ``day`` or later; and whether the clock runs evenly from the minute before
    it until the next day begins, 24 hours later."""
    begin = _first_instant(day, zone)
    offsets = {_offset(instant, zone) for instant in (begin - _MINUTE, begin, begin + 86_400 - _MINUTE)}
    return begin, len(offsets) == 1 and _first_instant(day + _DAY, zone) == begin + 86_400


@lru_cache(maxsize=16)
def _minutes(day: date, zone: tzinfo) -> Sequence[tuple[int, datetime, bool, Sequence[datetime]]]:
    """Every minute between the beginnings of ``day`` and of the next: the instant, what the wall shows, whether it has
    shown that before, and what it has skipped just now."""
    begin, end = _beginning(day, zone)[0], _beginning(day + _DAY, zone)[0]
    highest = max(_wall(instant, zone) for instant in range(begin - 86_400, begin, _MINUTE))
    minutes = []
    for instant in range(begin, end, _MINUTE):
        wall = _wall(instant, zone)
        skipped = range(1, int((wall - highest).total_seconds()) // _MINUTE)
        missing = tuple([highest + timedelta(minutes=after) for after in skipped])
        minutes.append((instant, wall, wall <= highest, missing))
        highest = max(highest, wall)
    return minutes


def _offset(instant: int, zone: tzinfo) -> timedelta | None:
    return datetime.fromtimestamp(instant, zone).utcoffset()


def _wall(instant: int, zone: tzinfo) -> datetime:
    return datetime.fromtimestamp(instant, zone).replace(tzinfo=None, fold=0)


def _first_instant(day: date, zone: tzinfo) -> int:
    """The first whole minute at which the wall shows ``day``, or a later one where that day does not exist."""
    midnight = datetime(day.year, day.month, day.day)
    guess = round(midnight.replace(tzinfo=zone).timestamp()) // _MINUTE * _MINUTE
    if _wall(guess, zone) == midnight and _wall(guess - _MINUTE, zone) < midnight:
        return guess
    low, high = guess - 86_400, guess + 86_400
    while high - low > _MINUTE:
        middle = (low + high) // 2 // _MINUTE * _MINUTE
        low, high = (low, middle) if _wall(middle, zone) >= midnight else (middle, high)
    return high
