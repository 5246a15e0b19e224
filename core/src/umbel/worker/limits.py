"""Rate limits of one worker: a start is given a time slot, and what must wait goes back to the queue until then."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from umbel.errors import SettingsError
from umbel.settings import units

_TOLERANCE: Final = 0.001
"""Seconds by which a start may come early: less than a way through the queue costs."""
_REMEMBERED: Final = 100_000
"""Slots kept for messages that went back to the queue; the oldest are forgotten first, and then wait once more."""


def parse_rate(text: str) -> float:
    """``10/s``, ``100/m``, ``5/h``, ``2/d`` as starts a second. Raises ``SettingsError``."""
    try:
        return units.parse_rate(text)
    except ValueError as exc:
        raise SettingsError([f"rate_limit {text!r} {exc}"]) from None


class RateLimiter:
    """Spaces starts evenly (the generic cell rate algorithm with a burst of one second's worth, at least one)."""

    def __init__(self, rate: float) -> None:
        self._interval = 1.0 / rate
        self._burst = max(0.0, 1.0 - self._interval)
        self._next = 0.0
        self._slots: OrderedDict[str, float] = OrderedDict()

    def wait(self, task_id: str, now: float) -> float:
        """Seconds until ``task_id`` may start; 0: now, and its slot is used up.

        A positive answer reserves the slot: the same id asked again at or after its time starts without a second charge.
        """
        if (slot := self._slots.get(task_id)) is not None:
            if slot > now + _TOLERANCE:
                return slot - now
            del self._slots[task_id]
            return 0.0
        earliest = max(self._next, now - self._burst)
        self._next = earliest + self._interval
        if earliest <= now + _TOLERANCE:
            return 0.0
        self._slots[task_id] = earliest
        if len(self._slots) > _REMEMBERED:
            self._slots.popitem(last=False)
        return earliest - now
