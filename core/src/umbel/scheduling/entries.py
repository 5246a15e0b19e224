"""Entries, made from what people give; and declared entries against stored ones. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack
from zoneinfo import ZoneInfo

from attrs import evolve, fields

from umbel.errors import EncodeError, NotSupported, ScheduleRefused
from umbel.model import ScheduleEntry
from umbel.ports.scheduler import definition_of
from umbel.ports.timetable import Timetable
from umbel.scheduling.clockwork import next_due
from umbel.scheduling.runs import check_overlap, plan_of, run_message, sentence
from umbel.scheduling.terms import Terms, terms_of
from umbel.scheduling.timetables import moment_of, timetable
from umbel.settings.units import parse_seconds

if TYPE_CHECKING:
    from umbel.app import Umbel

Duration = float | str | timedelta
Moment = float | str | datetime


class ScheduleOptions(TypedDict, total=False):
    """What an entry says. One of the first four is needed, and not two."""

    crontab: str
    """Minute, hour, day of the month, month, weekday: ``"0 3 * * mon-fri"``; or ``@daily`` and its like."""
    every: Duration
    """Time from one run to the next, counted from ``start``, else from the Unix epoch: ``"1h"`` is every full hour."""
    at: Moment | Sequence[Moment]
    """The moment of the only run, or several."""
    when: Mapping[str, Any]
    """What a plugin makes a timetable of."""
    timezone: str
    """Zone of ``crontab`` and of moments without an offset; else the app's."""
    jitter: Duration
    """Most that a run is put off; by how much is drawn from its name and time."""
    overlap: str
    """The earlier run has not ended: ``allow``, ``skip``, ``queue``, ``cancel_old``."""
    catch_up: str
    """Of several due times that nobody dealt with, send ``none``, the last ``one``, or ``all``."""
    catch_up_within: Duration | None
    """Due times older than this are passed over."""
    start: Moment | None
    """No run before."""
    end: Moment | None
    """No run after."""
    max_runs: int | None
    """Runs after which there are no more."""
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]
    """Of the sending, as for ``apply_async``."""
    enabled: bool
    """Whether it is sent at all."""


_WHEN: Final = ("crontab", "every", "at", "when")
_KNOWN: Final = frozenset(ScheduleOptions.__annotations__)


def table_of(app: Umbel, terms: Terms) -> Timetable:
    """The timetable of an entry. Raises ``ValueError``, and whatever a plugin raises."""
    return timetable(terms.when, terms.timezone, terms.start, app.plugins.make_timetable)


def make_entry(
    app: Umbel, name: str, task: str, *, declared: bool = False, **given: Unpack[ScheduleOptions]
) -> ScheduleEntry:
    """A new entry, due from now on. Raises ``ScheduleRefused`` saying what is wrong with it."""
    now = app.clock.time()
    return evolve(_checked(app, name, task, {"since": now}, dict(given)), declared=declared)


def change_entry(app: Umbel, known: ScheduleEntry, changes: Mapping[str, Any]) -> ScheduleEntry:
    """``known`` with ``changes``; due from now on, if when it is due is among them. Raises ``ScheduleRefused``."""
    terms = terms_of(known)
    given: dict[str, Any] = {name: getattr(known, name) for name in ("args", "kwargs", "options")}
    given |= {field.name: getattr(terms, field.name) for field in fields(Terms) if field.name in _KNOWN - {"when"}}
    given["enabled"] = not terms.disabled
    changes = dict(changes)
    task = changes.pop("task", known.task)
    if not changes.keys() & set(_WHEN):
        own = terms.when.keys() & {"crontab", "every", "at"}
        given |= terms.when if own and len(terms.when) == 1 else {"when": terms.when}
    made = _checked(app, known.name, task, {"since": app.clock.time(), "paused": terms.paused}, given | changes)
    return settle(app, made, known)


def settle(app: Umbel, made: ScheduleEntry, known: ScheduleEntry) -> ScheduleEntry:
    """``made`` in the place of ``known``: where both are due at the same times, what ``known`` still owes stays due."""
    old, new = terms_of(known), terms_of(made)
    new = evolve(new, paused=old.paused)
    if _timing(old) == _timing(new) and old.enabled:
        new = evolve(new, since=old.since)
    made = evolve(made, last_due=known.last_due, last_sent=known.last_sent, total_runs=known.total_runs)
    return planned(app, evolve(made, schedule=new.to_plain(), enabled=new.enabled))


def planned(app: Umbel, entry: ScheduleEntry) -> ScheduleEntry:
    """``entry`` with the time at which it is due next."""
    terms = terms_of(entry)
    return evolve(entry, next_due=next_due(entry, terms, table_of(app, terms)))


def reconcile(
    app: Umbel, declared: Sequence[ScheduleEntry], stored: Sequence[ScheduleEntry]
) -> tuple[list[ScheduleEntry], list[str]]:
    """What to upsert, and what to remove, so that the declared entries are the stored ones that are marked so. ``stored``: all
    that are, and whatever else bears the name of a declared one.

    An entry that says the same is left alone; a pause survives; what was made at run time stays, unless its name is declared.
    """
    known = {entry.name: entry for entry in stored}
    upserts = []
    for made in declared:
        there = known.get(made.name)
        if there is None or _unreadable(there):
            upserts.append(made)
        elif _definition(there) != _definition(made):
            upserts.append(settle(app, made, there))
    names = {entry.name for entry in declared}
    removals = [entry.name for entry in stored if entry.declared and entry.name not in names]
    return upserts, removals


def _unreadable(entry: ScheduleEntry) -> bool:
    try:
        terms_of(entry)
    except ValueError:
        return True
    return False


def _definition(entry: ScheduleEntry) -> str:
    """What was declared of it, to be compared."""
    terms = evolve(terms_of(entry), since=0.0, paused=False)
    return definition_of(evolve(entry, schedule=terms.to_plain(), enabled=True))


def _timing(terms: Terms) -> tuple[object, ...]:
    return terms.when, terms.timezone, terms.jitter, terms.start, terms.end


def _checked(app: Umbel, name: str, task: str, record: Mapping[str, Any], given: dict[str, Any]) -> ScheduleEntry:
    try:
        if not name or not name.isprintable() or len(name) > 200:
            raise ValueError("its name must be printable, and of 1 to 200 characters")
        if unknown := sorted(given.keys() - _KNOWN):
            raise ValueError(f"it has no {unknown[0]}; there are {', '.join(ScheduleOptions.__annotations__)}")
        terms = _terms(app, record, given)
        entry = planned(
            app,
            ScheduleEntry(
                name=name,
                task=task,
                schedule=terms.to_plain(),
                args=tuple(given.get("args", ())),
                kwargs=dict(given.get("kwargs", {})),
                options=dict(given.get("options", {})),
                enabled=terms.enabled,
            ),
        )
        definition_of(entry)
        run_message(app, entry, 0.0)
        plan_of(app, entry)
    except (EncodeError, ValueError, TypeError, NotSupported) as error:
        raise ScheduleRefused(f"schedule {name!r}: {sentence(error)}") from error
    check_overlap(app, entry, terms.overlap)
    return entry


def _terms(app: Umbel, record: Mapping[str, Any], given: Mapping[str, Any]) -> Terms:
    zone_name = given.get("timezone") or app.settings.timezone
    try:
        zone = ZoneInfo(zone_name)
    except (ValueError, OSError, KeyError):
        raise ValueError(f'{zone_name!r} is no time zone such as "Asia/Seoul"') from None
    said = [word for word in _WHEN if given.get(word) is not None]
    if len(said) != 1:
        raise ValueError(f"needs one of crontab, every, at or when, and has {' and '.join(said) or 'none'}")
    return Terms(
        when=_when(said[0], given[said[0]], zone),
        timezone=zone_name,
        jitter=seconds_of(given.get("jitter") or 0.0),
        overlap=given.get("overlap", "allow"),
        catch_up=given.get("catch_up", "one"),
        catch_up_within=_optional(given.get("catch_up_within"), seconds_of),
        start=_optional(given.get("start"), lambda value: moment_of(value, zone)),
        end=_optional(given.get("end"), lambda value: moment_of(value, zone)),
        max_runs=given.get("max_runs"),
        disabled=not given.get("enabled", True),
        **record,
    )


def _when(word: str, value: Any, zone: tzinfo) -> dict[str, Any]:
    match word:
        case "every":
            return {"every": seconds_of(value)}
        case "at":
            moments = [value] if isinstance(value, str | datetime | int | float) else list(value)
            return {"at": sorted(moment_of(moment, zone) for moment in moments)}
        case "when":
            return dict(value)
    return {"crontab": value}


def seconds_of(value: Duration) -> float:
    """Seconds of a number, a ``timedelta``, or ``"30s"``. Raises ``ValueError``."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    return parse_seconds(value) if isinstance(value, str) else float(value)


def _optional(value: Any, read: Any) -> Any:
    return None if value is None else read(value)
