"""The sun over places whose times are known, over the poles, and through a scheduler."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from umbel import Umbel
from umbel.errors import ScheduleRefused
from umbel_solar.events import EVENTS, Solar
from umbel_solar.hook import SolarHook


def unix(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("event", "latitude", "longitude", "after", "at"),
    [
        ("sunrise", 51.48, 0.0, "2026-06-21T00:00", "2026-06-21T03:43"),  # Greenwich
        ("sunset", 51.48, 0.0, "2026-06-21T00:00", "2026-06-21T20:21"),
        ("solar_noon", 51.48, 0.0, "2026-06-21T00:00", "2026-06-21T12:02"),
        ("sunset", 37.57, 126.98, "2026-03-20T00:00", "2026-03-20T09:44"),  # Seoul
        ("sunrise", -36.85, 174.76, "2026-12-20T20:00", "2026-12-21T16:58"),  # Auckland
        ("sunset", 21.31, -157.86, "2026-01-01T00:00", "2026-01-01T04:00"),  # Honolulu: of the day before there
    ],
)
def test_known_times(event: str, latitude: float, longitude: float, after: str, at: str) -> None:
    found = Solar(event, latitude, longitude).next_after(unix(after))
    assert found is not None
    assert abs(found - unix(at)) <= 180


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize(("latitude", "longitude"), [(0.0, 179.9), (-33.9, 151.2), (47.0, -179.9), (40.7, -74.0)])
def test_every_event_comes_once_a_day(event: str, latitude: float, longitude: float) -> None:
    table, moment, found = Solar(event, latitude, longitude), unix("2026-01-01"), []
    while (following := table.next_after(moment)) is not None and following < unix("2027-01-01"):
        assert following > moment
        found.append(following)
        moment = following
    assert len(found) in (364, 365, 366)
    assert all(86_000 < after - before < 86_800 for before, after in pairwise(found))


def test_the_polar_night_has_no_sunrise() -> None:
    longyearbyen = Solar("sunrise", 78.22, 15.65)
    first = longyearbyen.next_after(unix("2026-11-15"))
    assert first is not None
    assert timedelta(days=80) < timedelta(seconds=first - unix("2026-11-15")) < timedelta(days=100)
    assert Solar("dawn_astronomical", 90.0, 0.0).next_after(unix("2026-06-01")) is not None


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        (
            {"solar": "moonrise", "latitude": 1, "longitude": 1},
            "no solar event 'moonrise'; there are dawn_astronomical",
        ),
        ({"solar": "sunset", "latitude": 91, "longitude": 1}, "needs latitude, from -90 to 90 degrees, not 91"),
        ({"solar": "sunset", "latitude": 1}, "needs longitude, from -180 to 180 degrees, not None"),
        ({"solar": "sunset", "latitude": 1, "longitude": 1, "height": 3}, "has no height"),
    ],
)
def test_what_is_no_place_or_event_is_told(when: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SolarHook().umbel_make_timetable(schedule=when)


def test_other_schedules_are_left_to_others() -> None:
    assert SolarHook().umbel_make_timetable(schedule={"moon": "full", "timezone": "UTC"}) is None


def test_an_app_that_names_the_plugin_can_use_it() -> None:
    settings = {"plugins.hooks": ["solar"], "results.url": "memory://solar", "broker.url": "memory://solar"}
    with Umbel("city", settings=settings) as app:
        entry = app.schedules.create(
            "lamps", "lamps.on", when={"solar": "sunset", "latitude": 37.57, "longitude": 126.98}
        )
        first, second = app.schedules.upcoming(entry, 2)
        assert first == entry.next_due
        assert abs(second - first - 86_400) < 180
        with pytest.raises(ScheduleRefused, match="no solar event 'x'"):
            app.schedules.create("x", "lamps.on", when={"solar": "x"})
