"""The clock that a test holds in its hand."""

from __future__ import annotations

import pytest

from umbel.ports.clock import VirtualClock


def test_it_stands_still_until_it_is_moved() -> None:
    clock = VirtualClock(100.0)
    assert (clock.time(), clock.time()) == (100.0, 100.0)
    clock.advance(5)
    assert clock.time() == 105.0
    clock.set(50.0)
    assert clock.time() == 50.0


def test_it_wakes_those_who_wait_until_they_wait_no_more() -> None:
    clock = VirtualClock(0.0)
    seen: list[float] = []

    def listener() -> None:
        seen.append(clock.time())

    clock.subscribe(listener)
    clock.advance(1)
    clock.set(7)
    clock.unsubscribe(listener)
    clock.advance(1)
    assert seen == [1, 7]


def test_it_only_moves_forward_by_advancing() -> None:
    with pytest.raises(ValueError, match="only moves forward"):
        VirtualClock().advance(-1)
