"""``when = { solar = "sunset", latitude = 37.57, longitude = 126.98 }``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from umbel.markers import hookimpl
from umbel.ports.timetable import Timetable
from umbel_solar.events import EVENTS, Solar

_PLACE = {"latitude": 90.0, "longitude": 180.0}


class SolarHook:
    """Makes the timetables of schedules with the key ``solar``."""

    @hookimpl
    def umbel_make_timetable(self, schedule: Mapping[str, Any]) -> Timetable | None:
        """Raises ``ValueError`` for what is no event, or not a place on Earth."""
        if "solar" not in schedule:
            return None
        if (event := schedule["solar"]) not in EVENTS:
            raise ValueError(f"there is no solar event {event!r}; there are {', '.join(EVENTS)}")
        if unknown := sorted(schedule.keys() - {"solar", "timezone", *_PLACE}):
            raise ValueError(f"a solar schedule has no {unknown[0]}; it has solar, latitude and longitude")
        latitude, longitude = (_degrees(schedule, name, bound) for name, bound in _PLACE.items())
        return Solar(event, latitude, longitude)


def _degrees(schedule: Mapping[str, Any], name: str, bound: float) -> float:
    value = schedule.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -bound <= value <= bound:
        raise ValueError(f"a solar schedule needs {name}, from -{bound:g} to {bound:g} degrees, not {value!r}")
    return float(value)
