"""Crontab: the language, and its instants against a walker that looks at every minute."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

import pytest

from umbel.scheduling.crontab import ALIASES, Crontab, crontab, parse

ZONES = (
    "Africa/Cairo", "Africa/Casablanca", "America/Asuncion", "America/Havana", "America/New_York", "America/Nuuk",
    "America/Santiago", "America/St_Johns", "Antarctica/Troll", "Asia/Beirut", "Atlantic/Azores", "Australia/Lord_Howe",
    "Europe/Berlin", "Pacific/Chatham",
)  # fmt: skip
"""Changes of half an hour, of two hours, at midnight, over midnight, twice around Ramadan."""
FIRST, LAST = 2020, 2035
FULL = os.environ.get("UMBEL_TEST_FULL") == "1"


def unix(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def instants(text: str, zone: str, begin: float, end: float) -> list[float]:
    made, found, moment = Crontab(parse(text), ZoneInfo(zone)), [], begin
    while (following := made.next_after(moment)) is not None and following <= end:
        assert following > moment
        found.append(following)
        moment = following
    return found


def walls(text: str, zone: str, begin: str, end: str) -> list[str]:
    """The instants of the day as the wall shows them."""
    tz = ZoneInfo(zone)
    found = instants(text, zone, unix(begin, zone), unix(end, zone))
    return [datetime.fromtimestamp(instant, tz).strftime("%d %H:%M%z") for instant in found]


# --- the language ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes", "hours"),
    [
        ("*/15 * * * *", (0, 15, 30, 45), tuple(range(24))),
        ("5-20/5 3 * * *", (5, 10, 15, 20), (3,)),
        ("50/5 22-2 * * *", (50, 55), (0, 1, 2, 22, 23)),
        ("1,2,30-31 */8 * * *", (1, 2, 30, 31), (0, 8, 16)),
        ("@daily", (0,), (0,)),
        (" @Hourly ", (0,), tuple(range(24))),
    ],
)
def test_minutes_and_hours(text: str, minutes: tuple[int, ...], hours: tuple[int, ...]) -> None:
    assert (parse(text).minutes, parse(text).hours) == (minutes, hours)


@pytest.mark.parametrize(
    ("field", "weekdays"),
    [
        ("mon-fri", {1, 2, 3, 4, 5}),
        ("fri-mon", {5, 6, 0, 1}),
        ("Sunday", {0}),
        ("7", {0}),
        ("5-7", {5, 6, 0}),
        ("0", {0}),
        ("sat,wed", {6, 3}),
        ("*/2", {0, 2, 4, 6}),
        ("thu", {4}),
        ("thurs", {4}),
    ],
)
def test_weekdays(field: str, weekdays: set[int]) -> None:
    assert parse(f"0 0 * * {field}").weekdays == weekdays


def test_months_have_names() -> None:
    assert parse("0 0 1 jan,September-nov *").months == {1, 9, 10, 11}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("* * * *", "has 4 fields"),
        ("0 * * * * *", "has 6 fields"),
        ("60 * * * *", "60 is no minute: 0 to 59"),
        ("* 24 * * *", "24 is no hour"),
        ("* * 0 * *", "0 is no day of the month"),
        ("* * * 13 *", "13 is no month"),
        ("* * * * 8", "8 is no weekday"),
        ("* * * * mo", "'mo' is no weekday"),
        ("*/0 * * * *", "step '0'"),
        ("*-5 * * * *", "is no minute"),
        ("1;2 * * * *", "is no minute"),
        ("1, * * * *", "is no minute"),
        ("0 0 31 feb,apr *", "never comes"),
        ("@reboot", "is no alias: there are @yearly"),
    ],
)
def test_what_is_no_crontab_is_told(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("*", r"\*")):
        parse(text)


def test_every_alias_can_be_read() -> None:
    assert [parse(alias).minutes for alias in ALIASES] == [(0,)] * len(ALIASES)


def test_celery_s_names_make_the_string() -> None:
    assert crontab() == "* * * * *"
    assert crontab(minute=0, hour="*/3, 5", day_of_week="mon", day_of_month="1-7", month_of_year=6) == (
        "0 */3,5 1-7 6 mon"
    )
    assert crontab(minute=[0, 30], hour=(6, "18-20"), day_of_week={1}) == "0,30 6,18-20 * * 1"
    with pytest.raises(ValueError, match="no hour"):
        crontab(hour=25)


def test_all_five_fields_must_match() -> None:
    assert [d[:2] for d in walls("0 0 13 * fri", "UTC", "2026-01-01", "2026-04-30")] == ["13", "13"]


def test_the_29th_of_february_comes_over_a_century_without_one() -> None:
    made = Crontab(parse("0 0 29 2 *"), UTC)
    assert made.next_after(unix("2096-03-01")) == unix("2104-02-29")


# --- when the clocks are changed ------------------------------------------------------------------


def test_fixed_hours_that_the_clock_skips_are_due_once_after_the_gap() -> None:
    assert walls("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", "2026-03-30T12:00") == [
        "29 03:00+0200",
        "30 02:30+0200",
    ]
    assert walls("*/10 2 * * *", "Europe/Berlin", "2026-03-29T00:00", "2026-03-29T23:00") == ["29 03:00+0200"]
    assert walls("0 2,3 * * *", "Europe/Berlin", "2026-03-29T00:00", "2026-03-29T23:00") == ["29 03:00+0200"]


def test_fixed_hours_that_the_clock_shows_twice_are_due_at_the_first() -> None:
    assert walls("30 2 * * *", "Europe/Berlin", "2026-10-25T00:00", "2026-10-25T23:00") == ["25 02:30+0200"]


def test_every_hour_follows_the_time_that_passes() -> None:
    assert walls("30 * * * *", "Europe/Berlin", "2026-10-25T00:45", "2026-10-25T03:45") == [
        "25 01:30+0200", "25 02:30+0200", "25 02:30+0100", "25 03:30+0100",
    ]  # fmt: skip
    assert walls("30 * * * *", "Europe/Berlin", "2026-03-29T00:45", "2026-03-29T03:45") == [
        "29 01:30+0100",
        "29 03:30+0200",
    ]


def test_a_day_that_does_not_exist_is_made_up_for() -> None:
    assert walls("0 5 30 12 *", "Pacific/Apia", "2011-12-29T00:00", "2011-12-31T12:00") == ["31 00:00+1400"]


def transitions(zone: ZoneInfo) -> Iterator[int]:
    """The first minutes under another offset."""
    day, before = int(unix(f"{FIRST}-01-01")), None
    end = int(unix(f"{LAST + 1}-01-01"))
    while day < end:
        now = datetime.fromtimestamp(day, zone).utcoffset()
        if before is not None and now != before:
            low, high = day - 86_400, day
            while high - low > 60:
                middle = (low + high) // 120 * 60
                same = datetime.fromtimestamp(middle, zone).utcoffset() == before
                low, high = (middle, high) if same else (low, middle)
            yield high
        before = now
        day += 86_400


def shown(zone: ZoneInfo, begin: int, end: int) -> list[tuple[int, datetime]]:
    """Every minute, and what the wall shows, from a while before ``begin``."""
    minutes = range(begin - 90_000, end + 60, 60)
    return [(minute, datetime.fromtimestamp(minute, zone).replace(tzinfo=None, fold=0)) for minute in minutes]


def walk(text: str, minutes: list[tuple[int, datetime]], begin: int) -> list[float]:
    """Every minute that is due, by the rule's own words."""
    said = parse(text)
    fixed = len(said.hours) < 24
    due, seen, last = [], set(), minutes[0][1]
    for minute, wall in minutes:
        fits = wall.minute in said.minutes and said.at(wall)
        if fixed and wall in seen:
            fits = False  # the clock was put back
        elif fixed and wall - last > timedelta(minutes=1):  # the clock was put forward
            gap = int((wall - last).total_seconds()) // 60
            fits = fits or any(said.at(last + timedelta(minutes=after)) for after in range(1, gap))
        if fits and minute > begin:
            due.append(float(minute))
        seen.add(wall)
        last = max(last, wall)
    return due


def some_crontab(random: random.Random, near: datetime) -> str:
    """Any expression, more often than not about the hours around ``near``."""
    hours = [str((near.hour + shift) % 24) for shift in range(-2, 3)]
    minute = random.choice(["*", "*/7", "30", "0", "0,30", "15-45/15", str(random.randrange(60))])
    hour = random.choice([*hours, *hours, "*", "*", "*/2", "*/3", "22-2", ",".join(hours), str(random.randrange(24))])
    day = random.choice(["*", "*", "*", str(near.day), f"*/{random.randint(2, 9)}"])
    month = random.choice(["*", "*", str(near.month)])
    weekday = random.choice(["*", "*", "sat,sun", "mon-fri", str(near.isoweekday())])
    return f"{minute} {hour} {day} {month} {weekday}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_change_of_the_clocks_is_walked_through() -> None:
    chosen = sorted(available_timezones() - {"localtime"}) if FULL else ZONES
    dice, walked = random.Random(20), 0
    done: set[tuple[object, ...]] = set()
    for name in chosen:
        zone = ZoneInfo(name)
        changes = tuple(transitions(zone))
        for change in changes if FULL else dice.sample(changes, min(3, len(changes))):
            rule = (change, *(datetime.fromtimestamp(at, zone).utcoffset() for at in (change - 60, change)))
            if rule in done:  # another name of it
                continue
            done.add(rule)
            walked += 1
            near = datetime.fromtimestamp(change, zone)
            begin, end = change - 90_000, change + 90_000
            minutes = shown(zone, begin, end)
            for _ in range(4):
                text = some_crontab(dice, near)
                assert instants(text, name, begin, end) == walk(text, minutes, begin), (name, text, near.isoformat())
    assert walked > (600 if FULL else 20)


def test_a_restart_at_any_minute_of_such_a_day_gives_the_same_instants() -> None:
    zone, text = ZoneInfo("Europe/Berlin"), "*/20 1-3 * * *"
    begin, end = int(unix("2026-10-25T00:00", "Europe/Berlin")), int(unix("2026-10-25T05:00", "Europe/Berlin"))
    everything, made = instants(text, "Europe/Berlin", begin, end), Crontab(parse(text), zone)
    for minute in range(begin, end, 60):
        expected = next((instant for instant in everything if instant > minute), None)
        if expected is not None:
            assert made.next_after(minute) == expected
