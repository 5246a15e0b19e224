"""Intervals, dates, and who makes a timetable."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.ports.timetable import Timetable
from umbel.scheduling.clockwork import slots
from umbel.scheduling.crontab import Crontab
from umbel.scheduling.terms import Terms
from umbel.scheduling.timetables import Dates, Every, moment_of, timetable


def following(table: Timetable, after: float, number: int) -> list[float]:
    return list(islice(slots(Terms(when={}), table, after), number))


def nobody(schedule: Mapping[str, Any]) -> Timetable | None:
    return None


@given(st.floats(0.01, 1e6), st.floats(0, 2e9), st.floats(0, 2e9))
def test_an_interval_gives_the_same_instants_from_everywhere(seconds: float, anchor: float, moment: float) -> None:
    table = Every(seconds, anchor)
    first = table.next_after(moment)
    assert first is not None
    assert moment < first <= moment + seconds + 1e-4
    second = table.next_after(first)
    assert second is not None
    assert second > first
    assert table.next_after((first + second) / 2) == second


def test_an_interval_counts_from_its_anchor() -> None:
    assert following(Every(3600.0), 1_700_000_000.0, 2) == [1_700_002_800.0, 1_700_006_400.0]
    assert following(Every(0.1, 0.05), 10.0, 3) == [10.05, 10.15, 10.25]


def test_dates_end() -> None:
    assert following(Dates((5.0, 7.0)), 5.0, 9) == [7.0]


def test_each_kind_is_made() -> None:
    assert timetable({"every": 5}, "UTC", None, nobody) == Every(5.0)
    assert timetable({"every": 5}, "UTC", 3.0, nobody) == Every(5.0, 3.0)
    assert timetable({"at": [7, 5.0, 5]}, "UTC", None, nobody) == Dates((5.0, 7.0))
    made = timetable({"crontab": "@daily"}, "Asia/Seoul", None, nobody)
    assert isinstance(made, Crontab)
    assert made.zone == ZoneInfo("Asia/Seoul")


def test_a_plugin_is_asked_for_what_is_not_the_kernel_s() -> None:
    asked = []

    def plugin(schedule: Mapping[str, Any]) -> Timetable | None:
        asked.append(dict(schedule))
        return Dates((1.0,))

    assert timetable({"moon": "full"}, "Asia/Seoul", None, plugin) == Dates((1.0,))
    assert timetable({"every": 5}, "UTC", None, plugin) == Every(5.0)
    assert asked == [{"moon": "full", "timezone": "Asia/Seoul"}]


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({}, "no timetable is made of nothing"),
        ({"moon": "full"}, r"no timetable is made of 'moon'.* \[plugins\] hooks"),
        ({"every": 5, "at": [1]}, "no timetable is made of 'every', 'at'"),
        ({"every": 0}, "every must be 0.01 s or more"),
        ({"every": float("nan")}, "every must be 0.01 s or more"),
        ({"every": "5"}, "no timetable is made of 'every'"),
        ({"at": []}, "at must name one moment"),
        ({"crontab": "nonsense"}, "has 1 fields"),
    ],
)
def test_what_is_no_timetable_is_told(when: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        timetable(when, "UTC", None, nobody)


def test_moments() -> None:
    seoul = ZoneInfo("Asia/Seoul")
    assert moment_of("2026-03-01T09:00", seoul) == moment_of("2026-03-01T00:00+00:00", seoul)
    assert moment_of(datetime(2026, 3, 1, tzinfo=UTC), seoul) == moment_of("2026-03-01T09:00:00", seoul)
    assert moment_of(5, seoul) == 5.0
    with pytest.raises(ValueError, match="'tomorrow' is no moment"):
        moment_of("tomorrow", seoul)
