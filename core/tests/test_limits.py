"""Rate limits: a slot for every start."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import SettingsError
from umbel.worker import limits
from umbel.worker.limits import RateLimiter, parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10/s", 10), ("100/m", 100 / 60), ("5/h", 5 / 3600), ("2/d", 2 / 86400), ("0.5/s", 0.5)],
)
def test_a_rate_is_starts_in_a_time(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "10", "10/", "/s", "10/x", "0/s", "-1/s", "ten/s", "10/s/s", "1e3/s", "nan/s"])
def test_what_is_no_rate_says_how_to_write_one(text: str) -> None:
    with pytest.raises(SettingsError, match=r"rate_limit .*10/s"):
        parse_rate(text)


def test_the_settings_and_the_decorator_know_the_same_rates() -> None:
    from umbel.settings.units import parse_rate as settings_rate

    for text in ("10/s", "100/m", "5/h", "2/d", "0.5/s"):
        assert parse_rate(text) == settings_rate(text)


def test_a_seconds_worth_may_start_at_once_and_the_rest_is_spaced_evenly() -> None:
    limiter = RateLimiter(10)
    assert [limiter.wait(f"a{n}", 1000.0) for n in range(10)] == [0] * 10
    waits = [limiter.wait(f"b{n}", 1000.0) for n in range(5)]
    assert waits == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_less_than_one_a_second_has_no_burst_but_the_first() -> None:
    limiter = RateLimiter(0.5)
    assert limiter.wait("a", 1000.0) == 0
    assert limiter.wait("b", 1000.0) == pytest.approx(2)
    assert limiter.wait("c", 1000.0) == pytest.approx(4)


def test_time_that_was_not_used_is_not_saved_up_beyond_the_burst() -> None:
    limiter = RateLimiter(2)
    assert limiter.wait("a", 1000.0) == 0
    starts = [limiter.wait(f"b{n}", 5000.0) for n in range(4)]
    assert starts == pytest.approx([0, 0, 0.5, 1.0])


def test_a_slot_is_remembered_and_charged_once() -> None:
    limiter = RateLimiter(0.5)
    limiter.wait("a", 1000.0)
    assert limiter.wait("b", 1000.0) == pytest.approx(2)
    assert limiter.wait("b", 1001.0) == pytest.approx(1)
    assert limiter.wait("b", 1002.0) == 0
    assert limiter.wait("c", 1002.0) == pytest.approx(2)


def test_a_slot_that_was_used_is_used_up() -> None:
    limiter = RateLimiter(0.5)
    limiter.wait("a", 1000.0)
    limiter.wait("b", 1000.0)
    assert limiter.wait("b", 1002.0) == 0
    assert limiter.wait("b", 1002.0) == pytest.approx(2)


def test_over_a_long_time_no_more_start_than_the_rate_allows() -> None:
    limiter, started, pending = RateLimiter(5), 0, [f"t{n}" for n in range(500)]
    now = 0.0
    while now < 20:
        for task_id in list(pending):
            if limiter.wait(task_id, now) == 0:
                started += 1
                pending.remove(task_id)
        now += 0.05
    assert 5 * 20 - 1 <= started <= 5 * 20 + 5


def test_slots_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_REMEMBERED", 3)
    limiter = RateLimiter(1)
    for n in range(10):
        limiter.wait(f"t{n}", 1000.0)
    assert limiter.wait("t9", 1000.0) == pytest.approx(9)
    assert limiter.wait("t1", 1000.0) == pytest.approx(10)


def test_a_crowd_that_comes_late_does_not_start_at_once() -> None:
    """Messages whose time came while nobody looked: the rate is kept all the same."""
    limiter = RateLimiter(10)
    names = [f"t{n}" for n in range(60)]
    assert sum(limiter.wait(name, 1000.0) == 0 for name in names) == 10
    assert sum(limiter.wait(name, 1100.0) == 0 for name in names[10:]) == 10
    assert sum(limiter.wait(name, 1100.5) == 0 for name in names[20:]) <= 5


def test_a_place_whose_message_went_to_another_worker_is_used_by_the_next_that_comes() -> None:
    limiter = RateLimiter(0.5)
    limiter.wait("a", 1000.0)
    assert limiter.wait("elsewhere", 1000.0) == pytest.approx(2)
    assert limiter.wait("b", 1000.0) == pytest.approx(4)
    assert limiter.wait("c", 1002.5) == 0
    assert limiter.wait("b", 1004.5) == 0


def test_what_waits_long_is_looked_at_again_and_keeps_its_place() -> None:
    limiter = RateLimiter(0.1)
    waits = [limiter.wait(f"t{n}", 1000.0) for n in range(20)]
    assert waits[7] == limits._LONGEST
    assert limiter.wait("t7", 1060.0) == pytest.approx(10)


def test_another_rate_holds_at_once_and_is_no_new_burst() -> None:
    limiter = RateLimiter(1)
    limiter.wait("a", 1000.0)
    for n in range(100):
        limiter.wait(f"b{n}", 1000.0)
    limiter.change(100, 1000.5)
    assert limiter.rate == 100
    assert sum(limiter.wait(f"b{n}", 1000.5) == 0 for n in range(100)) <= 100
    slower = RateLimiter(10)
    assert sum(slower.wait(f"c{n}", 1000.0) == 0 for n in range(20)) == 10
    slower.change(1, 1000.0)
    assert slower.wait("d", 1000.0) == pytest.approx(10)


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    limiter = RateLimiter(1)
    limiter.wait("a", 1000.0)
    assert limiter.wait("b", 1000.0) == pytest.approx(1)
    assert limiter.wait("b", 910.0) == pytest.approx(1)
    assert limiter.wait("b", 911.0) == 0


@settings(deadline=None)
@given(
    rate=st.sampled_from([0.2, 0.5, 1.0, 3.0, 10.0]),
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 30)), min_size=1, max_size=60),
)
def test_in_no_time_more_starts_than_one_second_s_worth_and_what_the_rate_adds(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    limiter, now, starts = RateLimiter(rate), 1000.0, []
    for seconds, name in steps:
        now += seconds
        starts += [now] * (limiter.wait(f"t{name}", now) == 0)
    burst = max(1.0, rate)
    for first, start in enumerate(starts):
        for last in range(first, len(starts)):
            assert last - first + 1 <= burst + (starts[last] - start) * rate + 0.1
