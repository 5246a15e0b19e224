"""Time as the kernel and the drivers ask for it, so that a test can hold it in its hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of Unix time."""

    def time(self) -> float:
        """Unix time now, in seconds."""
        ...


class SystemClock:
    """The machine's own clock."""

    def time(self) -> float:
        return time.time()


class VirtualClock:
    """A clock that stands still until told to move. In-memory drivers wake whoever waits for a due time."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._now = start
        self._listeners: list[object] = []

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward by ``seconds`` (not negative) and wake those who wait for a time."""
        if seconds < 0:
            raise ValueError("a virtual clock only moves forward; use set() to step it back on purpose")
        self.set(self._now + seconds)

    def set(self, now: float) -> None:
        """Step the clock to Unix time ``now`` and wake those who wait for a time."""
        self._now = now
        for listener in list(self._listeners):
            listener()  # type: ignore[operator]  # registered by subscribe, always callable

    def subscribe(self, listener: object) -> None:
        """Call ``listener()`` after each step, on the thread that steps."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: object) -> None:
        """Stop calling ``listener``."""
        self._listeners.remove(listener)
