"""The timetable port: the instants at which something is due. Made by ``umbel_make_timetable``, used by the clockwork."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Timetable(ABC):
    """An ascending sequence of instants, the same on every machine that asks. Pure: no I/O, no state, no clock."""

    @abstractmethod
    def next_after(self, moment: float) -> float | None:
        """The first instant later than ``moment``, both Unix time; None: there is none any more. Never blocks."""
