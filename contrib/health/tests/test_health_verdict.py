"""What is known of a worker, and what that means."""

from __future__ import annotations

from typing import Any

import pytest

from umbel_health.verdict import CHILDLESS, HealthOptions, Phase, View, why_not_live, why_not_ready

OPTIONS = HealthOptions(max_poll_age=60, restart_after=600)


def running(**known: Any) -> View:
    return View(phase=Phase.RUNNING, **{"running_for": 10.0, "last_poll_age": 0.5, **known})


def test_a_worker_that_polls_is_live_and_ready() -> None:
    assert why_not_live(running(), OPTIONS) == why_not_ready(running(), OPTIONS) == []


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STOPPING])
def test_a_worker_that_starts_or_stops_is_live_and_not_ready(phase: Phase) -> None:
    view = View(phase=phase, running_for=10_000, last_poll_age=10_000)
    assert why_not_live(view, OPTIONS) == []
    assert why_not_ready(view, OPTIONS) == [f"the worker is {phase}"]


@pytest.mark.parametrize(
    ("known", "live", "ready"),
    [
        ({"last_poll_age": 60.0}, True, True),
        ({"last_poll_age": 61.0}, True, False),
        ({"last_poll_age": 600.0}, True, False),
        ({"last_poll_age": 601.0}, False, False),
        ({"last_poll_age": None, "running_for": 60.0}, True, True),
        ({"last_poll_age": None, "running_for": 61.0}, True, False),
        ({"last_poll_age": None, "running_for": 601.0}, False, False),
        ({"last_poll_age": 601.0, "consumes": False}, True, True),
        ({"childless": CHILDLESS}, True, True),
        ({"childless": CHILDLESS + 1}, True, False),
    ],
)
def test_the_bounds(known: dict[str, Any], live: bool, ready: bool) -> None:
    view = running(**known)
    assert (not why_not_live(view, OPTIONS), not why_not_ready(view, OPTIONS)) == (live, ready)


def test_without_restart_after_a_broker_that_is_gone_is_no_reason_to_restart() -> None:
    view = running(last_poll_age=1e6)
    assert why_not_live(view, HealthOptions()) == []
    assert why_not_ready(view, HealthOptions()) == [
        "the broker has not answered for 1000000 s, longer than max_poll_age = 60 s"
    ]


@pytest.mark.parametrize("wrong", [{"port": 70_000}, {"port": -1}, {"max_poll_age": 0}, {"restart_after": -1}])
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HealthOptions(**wrong)
