"""What is due, what of it is sent, and when to look again. Pure decisions: no clock of its own, no I/O.

A *slot* is a due time of the timetable, before jitter. ``ScheduleEntry.last_due`` is the last slot that was dealt with,
``next_due`` the moment at which the next one, put off by its jitter, is to be sent. Slots are dealt with in order, none twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from attrs import evolve, frozen

from umbel.model import ScheduleEntry
from umbel.ports.timetable import Timetable
from umbel.scheduling.terms import Terms, put_off

AT_ONCE = 100
"""Slots of one entry that one decision sends; what is left over is due at once again."""
LOOK_AGAIN = 1.0
"""Seconds after which a run that waits for something looks again: mostly for the end of the earlier one."""


@frozen(kw_only=True)
class Decision:
    """What to do about one entry that is due."""

    send: tuple[float, ...]
    """Slots, in order."""
    after: ScheduleEntry
    """The entry as it is to be marked once those are sent."""
    cancel: float | None = None
    """The slot of the earlier run that is to be ended first."""
    passed_over: str = ""
    """Why something that was due is not sent; empty: nothing is passed over."""


def base(entry: ScheduleEntry, terms: Terms) -> float:
    """Slots later than this are still to be dealt with."""
    last = -math.inf if entry.last_due is None else entry.last_due
    start = -math.inf if terms.start is None else math.nextafter(terms.start, -math.inf)
    return max(last, terms.since, start)


def slots(terms: Terms, table: Timetable, after: float) -> Iterator[float]:
    """Slots later than ``after``, as long as the entry's end allows."""
    while (slot := table.next_after(after)) is not None and (terms.end is None or slot <= terms.end):
        yield slot
        after = slot


def next_due(entry: ScheduleEntry, terms: Terms, table: Timetable) -> float | None:
    """When to look at ``entry`` the next time; None: never."""
    if terms.max_runs is not None and entry.total_runs >= terms.max_runs:
        return None
    slot = next(slots(terms, table, base(entry, terms)), None)
    return None if slot is None else slot + put_off(entry.name, slot, terms.jitter)


def decide(entry: ScheduleEntry, terms: Terms, table: Timetable, *, now: float, running: bool = False) -> Decision:
    """What to do about ``entry`` at Unix time ``now``; ``running``: whether its last run has not ended."""
    after = base(entry, terms)
    ended = _end_of_due(entry.name, terms, table, after, now)
    last = _last(terms, table, after, ended)
    if last is None:  # looked at too early: the clock was put back, or the entry was changed
        return Decision(send=(), after=evolve(entry, next_due=next_due(entry, terms, table)))
    horizon = -math.inf if terms.too_old is None else now - terms.too_old
    if terms.catch_up == "all":
        chosen = _first(terms, table, max(after, math.nextafter(horizon, -math.inf)), ended)
    else:
        chosen = [last] if last >= horizon else []
    passed_over = "" if chosen else "it is too late"
    cancel = None
    if chosen and terms.overlap != "allow":
        if running and terms.overlap == "queue":
            return look_again(entry, now)
        if running and terms.overlap == "skip":
            chosen, passed_over = [], "the earlier run has not ended"
        else:  # several at once would overlap each other; of a queue, the others stay due
            chosen = chosen[:1] if terms.overlap == "queue" else [last]
            cancel = entry.last_sent if running else None
    if terms.max_runs is not None:
        chosen = chosen[: max(0, terms.max_runs - entry.total_runs)]
    done = marked(entry, terms, table, last_due=chosen[-1] if chosen else last, sent=chosen)
    return Decision(send=tuple(chosen), after=done, cancel=cancel, passed_over=passed_over)


def marked(
    entry: ScheduleEntry, terms: Terms, table: Timetable, *, last_due: float | None, sent: Sequence[float]
) -> ScheduleEntry:
    """``entry`` once its slots up to ``last_due`` are dealt with, of which those of ``sent`` were sent."""
    done = evolve(
        entry,
        last_due=last_due,
        last_sent=sent[-1] if sent else entry.last_sent,
        total_runs=entry.total_runs + len(sent),
        problem="",
    )
    return evolve(done, next_due=next_due(done, terms, table))


def look_again(entry: ScheduleEntry, now: float) -> Decision:
    """Nothing yet: it is due again soon."""
    return Decision(send=(), after=evolve(entry, next_due=now + LOOK_AGAIN))


def _end_of_due(name: str, terms: Terms, table: Timetable, after: float, now: float) -> float:
    """The time before which every slot is due: at the first one whose jitter has not passed, nobody goes past it."""
    if terms.jitter:
        for slot in slots(terms, table, max(after, now - terms.jitter)):
            if slot > now:
                break
            if slot + put_off(name, slot, terms.jitter) > now:
                return slot
    return math.nextafter(now, math.inf)


def _last(terms: Terms, table: Timetable, after: float, ended: float) -> float | None:
    """The last slot later than ``after`` and before ``ended``, found from behind: an outage may have been long."""
    reach = 60.0
    while True:
        begin = max(after, ended - reach)
        found = None
        for slot in slots(terms, table, begin):
            if slot >= ended:
                break
            found = slot
        if found is not None or begin == after:
            return found
        reach *= 8


def _first(terms: Terms, table: Timetable, after: float, ended: float) -> list[float]:
    """The first slots later than ``after`` and before ``ended``."""
    found: list[float] = []
    for slot in slots(terms, table, after):
        if slot >= ended or len(found) == AT_ONCE:
            break
        found.append(slot)
    return found
