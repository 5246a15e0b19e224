"""``app.schedules``: entries made, changed and looked at while schedulers run; and those that code declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack, cast, overload
from urllib.parse import urlsplit

import attrs
from attrs import evolve, frozen

from umbel import unique
from umbel.errors import NotSupported, ScheduleRefused, SettingsError, UnknownSchedule
from umbel.model import Message, ScheduleEntry
from umbel.plugins.kinds import SCHEDULER
from umbel.protocol import new_id
from umbel.result import AsyncResult
from umbel.schedule_store import to_plain
from umbel.scheduling.clockwork import base, slots
from umbel.scheduling.entries import ScheduleOptions, change_entry, make_entry, planned, reconcile, table_of
from umbel.scheduling.runs import HEADER_SCHEDULE, call_message, plan_of, sentence
from umbel.scheduling.terms import Terms, put_off, terms_of

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.ports.scheduler import Scheduler
    from umbel.settings.schema import ScheduleSettings
    from umbel.task import Task

_OPEN: Final[tuple[object, ...]] = (None, (), {})
T = TypeVar("T", bound="Task[..., Any]")


@frozen(kw_only=True)
class SchedulerAddress:
    """Where entries are kept."""

    url: str
    options: Mapping[str, Any]
    origin: str
    """The setting that says so."""


class Schedules:
    """The entries of an app. Thread-safe; each call that asks the store blocks, and has an awaitable twin ``a…``.

    Works in scripts, in event loops (``a…``), and inside tasks. All raise ``SchedulerUnavailable`` where the store cannot be
    reached, and ``SettingsError`` where there is none. What is changed takes effect in a running scheduler within a second.
    """

    def __init__(self, app: Umbel) -> None:
        self._app = app
        self._declared: dict[str, tuple[str, ScheduleOptions]] = {}

    # --- declaring ------------------------------------------------------------------------------

    @overload
    def declare(self, task: T, /, name: str | None = None, **given: Unpack[ScheduleOptions]) -> T: ...

    @overload
    def declare(self, task: str, /, name: str | None = None, **given: Unpack[ScheduleOptions]) -> str: ...

    @overload
    def declare(self, /, *, name: str | None = None, **given: Unpack[ScheduleOptions]) -> Callable[[T], T]: ...

    def declare(self, task: Any = None, /, name: str | None = None, **given: Unpack[ScheduleOptions]) -> Any:
        """Say in code when a task is due: ``@app.schedule(every="10m")`` above ``@app.task``, or
        ``app.schedule(task, "nightly", crontab="0 3 * * *", args=[2])``. No I/O.

        The entry is named like its task unless given a name. A scheduler adds it to the store when it begins to lead, and
        removes it once it is declared no more. Raises ``ScheduleRefused`` for a name that is declared already; what else is
        wrong with it is told when the scheduler starts.
        """
        if task is None:
            return lambda task: self.declare(task, name, **given)
        task_name = task if isinstance(task, str) else task.name
        if (name := name or task_name) in self._declared:
            raise ScheduleRefused(f"schedule {name!r} is declared twice: give one of them another name")
        self._declared[name] = (task_name, given)
        return task

    def declared(self) -> Sequence[ScheduleEntry]:
        """Every entry that the settings and the code declare, as it is now. Raises ``SettingsError`` with every problem."""
        problems: list[str] = []
        entries = []
        wanted: dict[str, tuple[str, ScheduleOptions]] = dict(self._declared)
        for name, settings in self._app.settings.schedules.items():
            if name in wanted:
                problems.append(f"[schedules.{name}] is declared in code too: give one of them another name")
            wanted[name] = settings.task, _given(settings)
        for name, (task, given) in wanted.items():
            try:
                entries.append(make_entry(self._app, name, task, declared=True, **given))
            except (ScheduleRefused, NotSupported) as error:
                problems.append(str(error))
        if problems:
            raise SettingsError(problems)
        return entries

    async def reconcile(self) -> tuple[Sequence[str], Sequence[str]]:
        """Make the stored entries those that are declared, and leave alone those made at run time. What a scheduler does
        when it begins to lead. Returns the names of those that were added or changed, and of those that were removed."""
        declared, ask = self.declared(), self._app.gateway.aask
        stored = {entry.name: entry for entry in _sorted(await ask("schedules.load", (None, True)))}
        named = await ask("schedules.load", ([entry.name for entry in declared], False))
        stored |= {entry.name: entry for entry in _sorted(named)}
        upserts, removals = reconcile(self._app, declared, list(stored.values()))
        if upserts:
            await ask("schedules.upsert", [to_plain(entry) for entry in upserts])
        if removals:
            await ask("schedules.remove", removals)
        return [entry.name for entry in upserts], removals

    # --- looking --------------------------------------------------------------------------------

    def list(self) -> Sequence[ScheduleEntry]:
        """Every entry, by name."""
        return _sorted(self._app.gateway.ask("schedules.load", (None, False)))

    async def alist(self) -> Sequence[ScheduleEntry]:
        """``list`` for event loops."""
        return _sorted(await self._app.gateway.aask("schedules.load", (None, False)))

    def get(self, name: str) -> ScheduleEntry:
        """One entry. Raises ``UnknownSchedule``."""
        return _one(name, self._app.gateway.ask("schedules.load", ([name], False)))

    async def aget(self, name: str) -> ScheduleEntry:
        """``get`` for event loops."""
        return _one(name, await self._app.gateway.aask("schedules.load", ([name], False)))

    def next(self, name: str, number: int = 5) -> Sequence[float]:
        """Unix times of the next runs of an entry, whether or not it is paused. Raises ``UnknownSchedule``."""
        return self.upcoming(self.get(name), number)

    async def anext(self, name: str, number: int = 5) -> Sequence[float]:
        """``next`` for event loops."""
        return self.upcoming(await self.aget(name), number)

    def upcoming(self, entry: ScheduleEntry, number: int = 5) -> Sequence[float]:
        """Unix times of the next runs of ``entry``, jitter included; those it still owes are not among them. No I/O."""
        terms = _readable(entry)
        left = number if terms.max_runs is None else min(number, terms.max_runs - entry.total_runs)
        found: list[float] = []
        for slot in slots(terms, table_of(self._app, terms), max(base(entry, terms), self._app.clock.time())):
            if len(found) >= left:
                break
            found.append(slot + put_off(entry.name, slot, terms.jitter))
        return found

    def leader(self) -> Mapping[str, Any] | None:
        """Which scheduler leads (``owner``, ``fence``, ``until``); None: none does."""
        return cast("Mapping[str, Any] | None", self._app.gateway.ask("schedules.leader", None))

    async def aleader(self) -> Mapping[str, Any] | None:
        """``leader`` for event loops."""
        return cast("Mapping[str, Any] | None", await self._app.gateway.aask("schedules.leader", None))

    # --- changing -------------------------------------------------------------------------------

    def create(self, name: str, task: str | Task[..., Any], **given: Unpack[ScheduleOptions]) -> ScheduleEntry:
        """Add an entry. Raises ``ScheduleRefused`` for a name that is taken, and for what cannot be kept to."""
        entry = self._new(name, task, given)
        _check_free(name, self._app.gateway.ask("schedules.load", ([name], False)))
        self._app.gateway.ask("schedules.upsert", [to_plain(entry)])
        return entry

    async def acreate(self, name: str, task: str | Task[..., Any], **given: Unpack[ScheduleOptions]) -> ScheduleEntry:
        """``create`` for event loops."""
        entry = self._new(name, task, given)
        _check_free(name, await self._app.gateway.aask("schedules.load", ([name], False)))
        await self._app.gateway.aask("schedules.upsert", [to_plain(entry)])
        return entry

    def change(self, name: str, **changes: Any) -> ScheduleEntry:
        """Change what an entry says (``ScheduleOptions``, and ``task``); what is not named stays.

        Due times up to now are the old ones; with another timetable, those it still owed are dropped. Raises
        ``UnknownSchedule``, ``ScheduleRefused`` also for a declared entry.
        """
        return self._keep(self._changed(self.get(name), changes))

    async def achange(self, name: str, **changes: Any) -> ScheduleEntry:
        """``change`` for event loops."""
        return await self._akeep(self._changed(await self.aget(name), changes))

    def pause(self, name: str) -> ScheduleEntry:
        """Send nothing of an entry until it is resumed; a restart and another declaration do not end that."""
        return self._keep(_paused(self.get(name)))

    async def apause(self, name: str) -> ScheduleEntry:
        """``pause`` for event loops."""
        return await self._akeep(_paused(await self.aget(name)))

    def resume(self, name: str) -> ScheduleEntry:
        """Go on with a paused entry; what was due in the meantime is not made up for. Raises ``ScheduleRefused`` for one
        that its declaration has switched off."""
        return self._keep(self._resumed(self.get(name)))

    async def aresume(self, name: str) -> ScheduleEntry:
        """``resume`` for event loops."""
        return await self._akeep(self._resumed(await self.aget(name)))

    def trigger(self, name: str) -> AsyncResult[Any]:
        """Send the task of an entry once, now, whatever its schedule and its overlap policy say; needs no scheduler.

        It does not count among the entry's runs. A unique task is sent as by ``Task.delay``. Raises ``UnknownSchedule``, and
        as that.
        """
        message, plan = self._call(self.get(name))
        if plan is not None:
            return unique.handle(self._app, unique.send(self._app, plan, message, None))
        self._app.client.send([message])
        return AsyncResult(message.id, self._app)

    async def atrigger(self, name: str) -> AsyncResult[Any]:
        """``trigger`` for event loops."""
        message, plan = self._call(await self.aget(name))
        if plan is not None:
            return unique.handle(self._app, await unique.asend(self._app, plan, message, None))
        await self._app.client.asend([message])
        return AsyncResult(message.id, self._app)

    def delete(self, name: str) -> None:
        """Remove an entry. Raises ``UnknownSchedule``, ``ScheduleRefused`` for a declared one."""
        _check_own(self.get(name), "deleted")
        self._app.gateway.ask("schedules.remove", [name])

    async def adelete(self, name: str) -> None:
        """``delete`` for event loops."""
        _check_own(await self.aget(name), "deleted")
        await self._app.gateway.aask("schedules.remove", [name])

    def _new(self, name: str, task: str | Task[..., Any], given: ScheduleOptions) -> ScheduleEntry:
        entry = make_entry(self._app, name, task if isinstance(task, str) else task.name, **given)
        if entry.next_due is None:
            raise ScheduleRefused(f"schedule {name!r} would never be due: give it a moment that is still to come")
        return entry

    def _changed(self, known: ScheduleEntry, changes: Mapping[str, Any]) -> ScheduleEntry:
        _check_own(known, "changed")
        _readable(known)
        return change_entry(self._app, known, changes)

    def _resumed(self, known: ScheduleEntry) -> ScheduleEntry:
        terms = _readable(known)
        if terms.disabled:
            where = "where it is declared" if known.declared else "by change(enabled=True)"
            raise ScheduleRefused(f"schedule {known.name!r} is switched off: set enabled = true {where}")
        if not terms.paused:
            return known
        terms = evolve(terms, paused=False, since=self._app.clock.time())
        return planned(self._app, evolve(known, schedule=terms.to_plain(), enabled=True))

    def _call(self, entry: ScheduleEntry) -> tuple[Message, unique.Plan | None]:
        try:
            message = call_message(self._app, entry, task_id=new_id(), headers={HEADER_SCHEDULE: entry.name})
            return message, plan_of(self._app, entry)
        except (TypeError, ValueError) as error:
            raise ScheduleRefused(f"schedule {entry.name!r} cannot be sent: {sentence(error)}") from error

    def _keep(self, entry: ScheduleEntry) -> ScheduleEntry:
        self._app.gateway.ask("schedules.upsert", [to_plain(entry)])
        return entry

    async def _akeep(self, entry: ScheduleEntry) -> ScheduleEntry:
        await self._app.gateway.aask("schedules.upsert", [to_plain(entry)])
        return entry

    # --- the store ------------------------------------------------------------------------------

    def address(self) -> SchedulerAddress:
        """Where entries are kept: where ``[scheduler] url`` says, else with the results if a store is installed that keeps
        schedules there, else with the broker likewise. Raises ``SettingsError``."""
        from umbel.plugins.loader import installed

        settings = self._app.settings
        if settings.scheduler.url:
            return SchedulerAddress(
                url=settings.scheduler.url, options=settings.scheduler.options, origin="[scheduler] url"
            )
        schemes = {point.name for point in installed(SCHEDULER)}
        for origin, table in (("[results] url", settings.results), ("[broker] url", settings.broker)):
            if table.url and urlsplit(table.url).scheme in schemes:
                options = settings.scheduler.options or table.options
                return SchedulerAddress(url=table.url, options=options, origin=origin)
        raise SettingsError(
            [
                "there is no store for schedules: neither [results] url nor [broker] url names one that keeps them; set "
                f"[scheduler] url to one of {', '.join(sorted(schemes)) or 'redis, sqlite'}"
            ]
        )

    def make_store(self) -> Scheduler:
        """A new scheduler store as the settings want it. Raises ``PluginError``, ``SettingsError``."""
        address = self.address()
        return self._app.plugins.make_scheduler(address.url, address.options, self._app.clock)


def _given(settings: ScheduleSettings) -> ScheduleOptions:
    """What a table ``[schedules.NAME]`` says, without what it leaves open."""
    given = attrs.asdict(
        settings, recurse=False, filter=lambda field, value: field.name != "task" and value not in _OPEN
    )
    return cast("ScheduleOptions", given)


def _sorted(plain: Sequence[Mapping[str, Any]]) -> Sequence[ScheduleEntry]:
    return sorted((ScheduleEntry(**entry) for entry in plain), key=lambda entry: entry.name)


def _one(name: str, plain: Sequence[Mapping[str, Any]]) -> ScheduleEntry:
    if not plain:
        raise UnknownSchedule(f"there is no schedule {name!r}: `umbel schedule list` shows those there are")
    return ScheduleEntry(**plain[0])


def _check_free(name: str, found: Sequence[object]) -> None:
    if found:
        raise ScheduleRefused(f"there is a schedule {name!r} already: change it, or delete it first")


def _check_own(entry: ScheduleEntry, what: str) -> None:
    if entry.declared:
        raise ScheduleRefused(
            f"schedule {entry.name!r} is declared in the settings or in code, and can only be {what} there; pause it instead"
        )


def _readable(entry: ScheduleEntry) -> Terms:
    try:
        return terms_of(entry)
    except ValueError as error:
        raise ScheduleRefused(f"schedule {entry.name!r} cannot be read: {error}") from error


def _paused(known: ScheduleEntry) -> ScheduleEntry:
    terms = evolve(_readable(known), paused=True)
    return evolve(known, schedule=terms.to_plain(), enabled=False)
