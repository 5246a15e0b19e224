"""``umbel schedule``: periodic tasks at run time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from umbel.cli.output import clean, confirm, emit, moment, pairs, shorten, table
from umbel.cli.parsing import duration, value_of
from umbel.cli.session import Group, Session, json_option, pass_session
from umbel.errors import UmbelError, UnknownTask
from umbel.schedule_store import to_plain

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.model import ScheduleEntry

_WIDTH: Final = 40


@click.group("schedule", cls=Group)
def command() -> None:
    """List, make and change periodic tasks.

    What is changed while a scheduler runs takes effect within a second. Entries that the settings or the code declare can be
    paused, resumed and triggered; to change them, change the declaration.

    \b
    Examples:
      umbel -A tasks schedule list
      umbel -A tasks schedule create nightly tasks.report --crontab "0 3 * * *" --timezone Asia/Seoul
      umbel -A tasks schedule pause nightly
    """


def _terms(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of ``create`` and ``change``."""
    for option in reversed(
        [
            click.option("--crontab", metavar="TEXT", help='Minute, hour, day, month, weekday: "0 3 * * mon-fri".'),
            click.option("--every", type=duration, metavar="DURATION", help="Time from one run to the next."),
            click.option("--at", multiple=True, metavar="MOMENT", help="The moment of a run; as often as you like."),
            click.option("--when", metavar="OBJECT", help="What a plugin makes a timetable of, as JSON."),
            click.option("--timezone", metavar="ZONE", help="Zone of --crontab and of moments without an offset."),
            click.option("--jitter", type=duration, metavar="DURATION", help="Most that a run is put off."),
            click.option("--overlap", type=click.Choice(["allow", "skip", "queue", "cancel_old"])),
            click.option("--catch-up", type=click.Choice(["none", "one", "all"])),
            click.option("--catch-up-within", type=duration, metavar="DURATION", help="Pass over what is older."),
            click.option("--start", metavar="MOMENT", help="No run before."),
            click.option("--end", metavar="MOMENT", help="No run after."),
            click.option("--max-runs", type=click.IntRange(1), metavar="N", help="Runs after which there are no more."),
            click.option("--arg", "args", multiple=True, metavar="VALUE", help="A positional argument of the task."),
            click.option("--kw", "pairs", multiple=True, metavar="KEY=VALUE", help="A keyword argument of the task."),
            click.option("--queue", metavar="NAME", help="Queue to send it to."),
            click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher is sooner."),
            click.option("--expires", type=duration, metavar="DURATION", help="Do not start a run after this time."),
        ]
    ):
        function = option(function)
    return function


@command.command("list")
@json_option
@pass_session
def list_(session: Session, *, as_json: bool) -> None:
    """List the entries that the store has.

    \b
    Example:
      umbel -A tasks schedule list
    """
    app = session.app()
    entries = app.schedules.list()
    if as_json:
        emit([_document(entry) for entry in entries])
        return
    rows = [
        (
            clean(entry.name),
            clean(entry.task),
            shorten(clean(_when(entry, app)), _WIDTH),
            moment(entry.next_due if entry.enabled else None, app.timezone),
            entry.total_runs,
            _state(entry),
        )
        for entry in entries
    ]
    click.echo(table(("name", "task", "when", "next", "runs", ""), rows))
    stored = {entry.name for entry in entries}
    if missing := [entry.name for entry in app.schedules.declared() if entry.name not in stored]:
        click.echo(f"declared, and added when a scheduler starts: {', '.join(map(clean, missing))}", err=True)


def _of_one(word: str, call: str, text: str) -> None:
    """A command that takes a name, and prints the entry that ``Schedules.<call>`` gives."""

    @command.command(word, help=f"{text}\n\n\b\nExample:\n  umbel -A tasks schedule {word} nightly")
    @click.argument("name")
    @json_option
    @pass_session
    def run(session: Session, *, name: str, as_json: bool) -> None:
        app = session.app()
        _print(app, getattr(app.schedules, call)(name), as_json=as_json)


_of_one("show", "get", "Show one entry, and its next runs.")
_of_one("pause", "pause", "Send nothing of an entry until it is resumed.")
_of_one("resume", "resume", "Go on with a paused entry. What was due in the meantime is not made up for.")


@command.command("create")
@click.argument("name")
@click.argument("task")
@_terms
@click.option("--unchecked", is_flag=True, help="Make it even if the app knows no task of that name.")
@json_option
@pass_session
def create(session: Session, /, *, name: str, task: str, unchecked: bool, as_json: bool, **given: Any) -> None:
    """Add an entry. Needs one of --crontab, --every, --at, --when.

    \b
    Examples:
      umbel -A tasks schedule create nightly tasks.report --crontab "0 3 * * *" --overlap skip
      umbel -A tasks schedule create once tasks.add --at 2030-01-01T08:00 --arg 2 --arg 3
    """
    app = session.app()
    if session.has_tasks and not unchecked:
        app.load_tasks()
        try:
            _ = app.tasks[task]
        except UnknownTask as error:
            raise UnknownTask(f"{error} (--unchecked makes it all the same)") from None
    _print(app, app.schedules.create(name, task, **_given(given)), as_json=as_json)


@command.command("change")
@click.argument("name")
@click.option("--task", metavar="NAME", help="Another task.")
@_terms
@json_option
@pass_session
def change(session: Session, /, *, name: str, task: str | None, as_json: bool, **given: Any) -> None:
    """Change what an entry says; what is not named stays.

    \b
    Example:
      umbel -A tasks schedule change nightly --crontab "30 4 * * *"
    """
    changes = {**_given(given), **({} if task is None else {"task": task})}
    if not changes:
        raise click.UsageError("nothing is to be changed: see umbel schedule change --help")
    app = session.app()
    if "options" in changes:
        changes["options"] = {**app.schedules.get(name).options, **changes["options"]}
    _print(app, app.schedules.change(name, **changes), as_json=as_json)


@command.command("trigger")
@click.argument("name")
@json_option
@pass_session
def trigger(session: Session, *, name: str, as_json: bool) -> None:
    """Send the task of an entry once, now. Prints the task's id; of a unique task that is not sent, why.

    \b
    Example:
      umbel -A tasks schedule trigger nightly
    """
    from umbel.result import NotSent

    app = session.app()
    if session.has_tasks:
        app.load_tasks()
    sent = app.schedules.trigger(name)
    if isinstance(sent, NotSent):
        raise sent.why
    if as_json:
        emit({"task_id": sent.id})
    else:
        click.echo(sent.id)


@command.command("delete")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def delete(session: Session, *, name: str, yes: bool) -> None:
    """Remove an entry that was made at run time.

    \b
    Example:
      umbel -A tasks schedule delete nightly --yes
    """
    app = session.app()
    app.schedules.get(name)
    confirm(f"Delete schedule {clean(name)!r}?", yes=yes)
    app.schedules.delete(name)


@command.command("next")
@click.argument("name")
@click.option("-n", "number", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many.")
@json_option
@pass_session
def next_(session: Session, *, name: str, number: int, as_json: bool) -> None:
    """Show the next runs of an entry.

    \b
    Example:
      umbel -A tasks schedule next nightly -n 10
    """
    app = session.app()
    times = app.schedules.next(name, number)
    if as_json:
        emit(times)
        return
    for due in times:
        click.echo(moment(due, app.timezone))


# --- reading and telling --------------------------------------------------------------------------


def _given(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, as ``Schedules.create`` takes it."""
    said = {name: value for name, value in given.items() if value is not None and value != ()}
    if "when" in said:
        said["when"] = _object(said["when"])
    if "at" in said:
        said["at"] = list(said["at"])
    if "args" in said:
        said["args"] = [value_of(arg) for arg in said["args"]]
    if "pairs" in said:
        said["kwargs"] = _keywords(said.pop("pairs"))
    if options := {name: said.pop(name) for name in ("queue", "priority", "expires") if name in said}:
        said["options"] = options
    return said


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"is not JSON: {error}", param_hint="--when") from None
    if not isinstance(value, dict):
        raise click.BadParameter('must be a JSON object, such as {"solar": "sunset"}', param_hint="--when")
    return value


def _keywords(texts: Sequence[str]) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    for text in texts:
        key, is_pair, value = text.partition("=")
        if not (is_pair and key) or key in keywords:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE, or given twice", param_hint="--kw")
        keywords[key] = value_of(value)
    return keywords


def _when(entry: ScheduleEntry, app: Umbel) -> str:
    when = entry.schedule.get("when")
    match when:
        case {"crontab": text}:
            zone = entry.schedule.get("timezone", "UTC")
            return f"{text} {zone}"
        case {"every": seconds}:
            return f"every {seconds:g} s"
        case {"at": [first, *rest]}:
            return f"at {moment(first, app.timezone)}" + (f" and {len(rest)} more" if rest else "")
    return json.dumps(when)


def _state(entry: ScheduleEntry) -> str:
    words = [word for word in ("paused", "disabled") if entry.schedule.get(word)]
    if entry.problem:
        words.append(f"cannot be sent: {shorten(clean(entry.problem), 60)}")
    elif entry.next_due is None:
        words.append("over")
    return ", ".join(words) or ("declared" if entry.declared else "")


def _document(entry: ScheduleEntry) -> dict[str, Any]:
    plain = {name: value for name, value in to_plain(entry).items() if name not in ("schedule", "revision")}
    return {**plain, **entry.schedule}


def _print(app: Umbel, entry: ScheduleEntry, *, as_json: bool) -> None:
    try:
        upcoming = app.schedules.upcoming(entry, 3)
    except (UmbelError, ValueError):  # what is wrong with it is among its fields
        upcoming = []
    if as_json:
        emit({**_document(entry), "upcoming": list(upcoming)})
        return
    schedule = {name: value for name, value in entry.schedule.items() if name not in ("when", "timezone", "since")}
    rows = [
        ("name", entry.name),
        ("task", entry.task),
        ("when", _when(entry, app)),
        ("args", json.dumps(list(entry.args))),
        ("kwargs", json.dumps(dict(entry.kwargs))),
        ("options", json.dumps(dict(entry.options))),
        *((name, json.dumps(value)) for name, value in schedule.items()),
        ("runs", f"{entry.total_runs}, the last for {moment(entry.last_sent, app.timezone)}"),
        ("state", _state(entry) or "waits for its time"),
        ("next", ", ".join(moment(due, app.timezone) for due in upcoming) or "never"),
    ]
    click.echo(pairs([(name, clean(value)) for name, value in rows]))
