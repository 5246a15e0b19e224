"""What an entry's schedule says, as a value: when it is due, and what to do when that is not simple. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final
from uuid import UUID, uuid5

import attrs
from attrs import frozen

from umbel.model import ScheduleEntry

OVERLAPS: Final = ("allow", "skip", "queue", "cancel_old")
CATCH_UPS: Final = ("none", "one", "all")
_RUNS: Final = UUID("9d2a4c1e-52d7-5f0b-8d0e-7f6f3c1b0a55")
"""Namespace of the ids of runs: changing it would double the runs of a moment in which old and new schedulers meet."""


@frozen(kw_only=True)
class Terms:
    """``ScheduleEntry.schedule``, read. Times are Unix time, durations seconds."""

    when: Mapping[str, Any]
    """``{"crontab": …}``, ``{"every": seconds}``, ``{"at": [times]}``, or what a plugin understands."""
    timezone: str = "UTC"
    """In which crontab counts, and a plugin may."""
    jitter: float = 0.0
    """Each run is put off by a part of this, drawn from the entry's name and the due time: the same for every scheduler."""
    overlap: str = "allow"
    """The earlier run has not ended: run all the same, ``skip`` the new one, ``queue`` it, or ``cancel_old``."""
    catch_up: str = "one"
    """Of several due times that nobody dealt with: only the last, if it is no older than a minute (``none``); the last
    (``one``); each (``all``)."""
    catch_up_within: float | None = None
    """Due times older than this are passed over; None: a minute with ``none``, else no due time is too old."""
    start: float | None = None
    """The first possible due time; intervals count from it."""
    end: float | None = None
    """The last possible due time."""
    max_runs: int | None = None
    """Runs after which there are no more."""
    since: float = 0.0
    """Due times up to this are not the entry's: when it was made, changed or resumed."""
    disabled: bool = False
    """Its declaration says ``enabled = false``."""
    paused: bool = False
    """By ``pause``, at run time."""

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot be kept to. Raises ``ValueError``."""
        for name, words in (("overlap", OVERLAPS), ("catch_up", CATCH_UPS)):
            if (word := getattr(self, name)) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}, not {word!r}")
        for name in ("jitter", "catch_up_within"):
            if (seconds := getattr(self, name)) is not None and not 0 <= seconds < 366 * 86_400:
                raise ValueError(f"{name} is a number of seconds up to a year, not {seconds!r}")
        if self.max_runs is not None and self.max_runs < 1:
            raise ValueError(f"max_runs is 1 or more, not {self.max_runs!r}")
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ValueError("end comes before start: it would never be due")

    @property
    def enabled(self) -> bool:
        return not (self.paused or self.disabled)

    def to_plain(self) -> dict[str, Any]:
        """As ``ScheduleEntry.schedule`` holds it: what is not default, and always ``when``."""
        fields = attrs.fields(Terms)
        plain = {
            field.name: getattr(self, field.name) for field in fields if getattr(self, field.name) != field.default
        }
        return {**plain, "when": dict(self.when)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Terms:
        """The inverse. Raises ``ValueError`` for what no version of this kernel has written."""
        known = {field.name for field in attrs.fields(cls)}
        if unknown := sorted(plain.keys() - known):
            raise ValueError(f"its schedule says {', '.join(unknown)}, which this umbel-core does not know: upgrade it")
        if not isinstance(plain.get("when"), Mapping):
            raise ValueError("its schedule does not say when")
        return cls(**plain)

    @property
    def too_old(self) -> float | None:
        """Seconds after which a due time is passed over."""
        return 60.0 if self.catch_up == "none" and self.catch_up_within is None else self.catch_up_within


def put_off(name: str, slot: float, jitter: float) -> float:
    """Seconds by which the run of ``slot`` is put off."""
    if not jitter:
        return 0.0
    drawn = int.from_bytes(sha256(f"{name}\n{slot:.6f}".encode()).digest()[:6])
    return round(jitter * drawn / 2**48, 3)


@lru_cache(maxsize=1024)
def _namespace(name: str) -> UUID:
    return uuid5(_RUNS, name)


def run_id(name: str, slot: float) -> str:
    """The task id of an entry's run of one due time, the same wherever it is made."""
    return str(uuid5(_namespace(name), f"{slot:.6f}"))


def terms_of(entry: ScheduleEntry) -> Terms:
    """Raises ``ValueError``."""
    return Terms.from_plain(entry.schedule)
