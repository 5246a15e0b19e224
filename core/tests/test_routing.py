"""Which options a task gets: the decorator's, then the operator's, general before particular."""

from __future__ import annotations

from umbel.model import TaskOptions
from umbel.routing import effective_options
from umbel.settings.schema import TaskSettings

DECLARED = TaskOptions(queue="own", max_retries=7)


def test_without_settings_the_declared_options_hold_as_they_are() -> None:
    assert effective_options("a.b", DECLARED, {}) is DECLARED
    assert effective_options("a.b", DECLARED, {"x.*": TaskSettings(queue="q")}) is DECLARED


def test_a_setting_that_is_not_given_overrides_nothing() -> None:
    got = effective_options("a.b", DECLARED, {"a.b": TaskSettings(priority=3)})
    assert got == TaskOptions(queue="own", max_retries=7, priority=3)


def test_falsy_settings_are_settings() -> None:
    got = effective_options("a.b", DECLARED, {"a.b": TaskSettings(max_retries=0, ignore_result=False, priority=0)})
    assert (got.max_retries, got.ignore_result, got.priority) == (0, False, 0)


def test_a_glob_applies_to_all_that_match_it() -> None:
    settings = {"a.*": TaskSettings(queue="globbed")}
    assert effective_options("a.b.c", DECLARED, settings).queue == "globbed"
    assert effective_options("A.b", DECLARED, settings).queue == "own"


def test_longer_globs_win_over_shorter_and_the_exact_name_over_all_in_whatever_order_they_stand() -> None:
    patterns = {
        "a.b": TaskSettings(queue="exact"),
        "a.?": TaskSettings(queue="longer", priority=1, time_limit=10),
        "*": TaskSettings(queue="any", priority=2, time_limit=20, expires=30),
    }
    for settings in (patterns, dict(reversed(patterns.items()))):
        got = effective_options("a.b", DECLARED, settings)
        assert (got.queue, got.priority, got.time_limit, got.expires) == ("exact", 1, 10, 30)
    wide = effective_options("a.b", DECLARED, {"a.b": TaskSettings(queue="exact"), "a.b*": TaskSettings(queue="wide")})
    assert wide.queue == "exact"


def test_a_name_with_glob_characters_is_matched_as_it_is_written() -> None:
    assert effective_options("a[1]", DECLARED, {"a[1]": TaskSettings(queue="exact")}).queue == "exact"
