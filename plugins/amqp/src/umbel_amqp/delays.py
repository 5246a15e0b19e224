"""How a message waits in the broker: in queues whose messages all wait for the same time, one after another.

RabbitMQ lets a message expire only at the head of its queue, so that every queue of ours has one fixed time to live, ten
milliseconds to some years. A delay is a sum of such times, and its message passes through their queues, the longest first:
each queue hands it, when its time is over, to an exchange of its own, where the message's routing keys name the next. The
keys are in its ``BCC``, so that all of it is said when the message is published, and nobody sees it on arrival.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

from attrs import frozen

from umbel_amqp.options import UNCOUNTED

_UNIT: Final = 10
"""Milliseconds: the shortest step. What the broker needs to pass a message on is of that order."""

# Four steps a decade make every digit of at most three, and delays that people write of one or two.
_DIGITS: Final = ((), (1,), (2,), (3,), (3, 1), (3, 2), (6,), (6, 1), (6, 2), (6, 3))
LONGEST: Final = 3650 * 86_400.0
"""Seconds; the broker allows no longer time to live."""
_LARGEST: Final = 300_000_000_000

STEPS: Final = tuple(
    step for exponent in range(11) for digit in (1, 2, 3, 6) if (step := digit * _UNIT * 10**exponent) <= _LARGEST
)
"""Times to live, in milliseconds."""

_SLACK: Final = 100
"""A message may be late by a hundredth of its delay, but by no more than as many milliseconds, where that saves steps."""

ENTRY: Final = "umbel.delay"
"""The exchange to which a delayed message is published."""


@functools.lru_cache(4096)
def plan(delay: int) -> tuple[int, ...]:
    """The steps, longest first, that make ``delay`` milliseconds or a little more."""
    units = max(1, math.ceil(delay / _UNIT))
    slack = max(1, min(delay // 100, _SLACK) // _UNIT)
    return min((_split(number) for number in range(units, units + slack + 1)), key=len)


def _split(units: int) -> tuple[int, ...]:
    steps: list[int] = []
    weight = _UNIT
    while units:
        units, digit = divmod(units, 10)
        steps[:0] = (part * weight for part in _DIGITS[digit])
        weight *= 10
    return tuple(steps)


def exchange_of(step: int) -> str:
    """Where messages go after ``step``."""
    return f"{ENTRY}.{step}"


@frozen
class Target:
    """Where delayed messages go in the end: a queue, or an exchange."""

    name: str
    exchange: bool = False

    def queue(self, step: int) -> str:
        return f"{'exchange ' if self.exchange else ''}{self.name}.delay.{step}"

    def key(self, before: int, after: int) -> str:
        """Routing key from one step to the next; 0 is the beginning and the end. No queue of a user's is named like it."""
        return f"umbel:{before}>{after}:{'exchange ' if self.exchange else ''}{self.name}"

    def keys(self, path: tuple[int, ...]) -> list[str]:
        """Those that lead along ``path``."""
        return [self.key(before, after) for before, after in zip((0, *path), (*path, 0), strict=True)]


def arguments_of(step: int) -> dict[str, Any]:
    """Of a queue whose messages wait for ``step``. A message leaves it only when the next queue has confirmed it."""
    return {
        "x-queue-type": "quorum",
        "x-delivery-limit": UNCOUNTED,  # what was looked at goes back to its place
        "x-message-ttl": step,
        "x-dead-letter-exchange": exchange_of(step),
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
