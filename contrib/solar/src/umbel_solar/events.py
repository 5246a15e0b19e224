"""When the sun does what at a place, by astral. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache, partial
from typing import Final

from astral import Depression, Observer
from astral import sun as astral_sun
from attrs import frozen

from umbel.ports.timetable import Timetable

Find = Callable[[Observer, date, tzinfo], datetime]


def _twilight(find: Callable[..., datetime], depression: Depression) -> Find:
    return lambda observer, day, zone: find(observer, day, depression, zone)


def _simple(find: Callable[..., datetime]) -> Find:
    return lambda observer, day, zone: find(observer, day, tzinfo=zone)


EVENTS: Final[Mapping[str, Find]] = {
    "dawn_astronomical": _twilight(astral_sun.dawn, Depression.ASTRONOMICAL),
    "dawn_nautical": _twilight(astral_sun.dawn, Depression.NAUTICAL),
    "dawn_civil": _twilight(astral_sun.dawn, Depression.CIVIL),
    "sunrise": _simple(astral_sun.sunrise),
    "solar_noon": _simple(astral_sun.noon),
    "sunset": _simple(astral_sun.sunset),
    "dusk_civil": _twilight(astral_sun.dusk, Depression.CIVIL),
    "dusk_nautical": _twilight(astral_sun.dusk, Depression.NAUTICAL),
    "dusk_astronomical": _twilight(astral_sun.dusk, Depression.ASTRONOMICAL),
}
"""By the names that Celery has for them."""

_FARTHEST: Final = 400
"""Days within which it happens again, if it happens there at all: a polar night is shorter."""


@frozen
class Solar(Timetable):
    """One event a day at a place; none on the days on which the sun does not do it there."""

    event: str
    latitude: float
    longitude: float

    def next_after(self, moment: float) -> float | None:
        # Days of the place itself, from midnight to midnight by the sun: each has its events in its middle, whatever the
        # time zone that people have agreed on.
        zone = timezone(timedelta(seconds=round(self.longitude * 240)))
        day = datetime.fromtimestamp(moment, zone).date() - timedelta(days=1)
        for _ in range(_FARTHEST):
            found = _instant(self.event, self.latitude, self.longitude, day)
            if found is not None and found > moment:
                return found
            day += timedelta(days=1)
        return None


@lru_cache(maxsize=4096)
def _instant(event: str, latitude: float, longitude: float, day: date) -> float | None:
    """Unix time in whole seconds; None: not on that day."""
    zone = timezone(timedelta(seconds=round(longitude * 240)))
    find = partial(EVENTS[event], Observer(latitude, longitude), day, zone)
    try:
        return float(round(find().astimezone(UTC).timestamp()))
    except ValueError:  # the sun does not reach that height
        return None
