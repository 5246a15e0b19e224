"""``umbel dead-letters``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from umbel.cli.letters import Act, Letter, Selection, Taken, find, take
from umbel.cli.output import clean, confirm, count, emit, moment, pairs, shorten, table
from umbel.cli.queues import depths
from umbel.cli.session import Group, Session, json_option, on_gateway, pass_session
from umbel.errors import DecodeError, UmbelError
from umbel.model import DEAD_SUFFIX, dead_letter_queue
from umbel.protocol import parse_time

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.gateway import LocalGateway

_CAUSE_SHOWN = 80
_BYTES_SHOWN = 256


@click.group("dead-letters", cls=Group)
def command() -> None:
    """List, show, replay or purge what could not be run.

    A task that kills its process again and again, that is unknown, unreadable or rejected goes to the dead letters of
    its queue, which are the queue QUEUE.dead, with its cause.

    \b
    Examples:
      umbel -A tasks dead-letters list --cause lost
      umbel -A tasks dead-letters replay --all --task 'mail.*'
    """


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option("--cause", metavar="TEXT", help="Only those whose cause contains this."),
        click.option("--task", metavar="NAME", help="Only tasks of this name or glob."),
        click.option("--queue", metavar="NAME", help="Only those that came from this queue."),
    ):
        function = decorate(function)
    return function


@command.command("list")
@_filters
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most letters listed.")
@json_option
@pass_session
def list_(
    session: Session, *, queue: str | None, task: str | None, cause: str | None, limit: int, as_json: bool
) -> None:
    """List dead letters, by queue.

    \b
    Example:
      umbel -A tasks dead-letters list --task 'mail.*' --cause timeout
    """
    app = session.app()
    letters = _found(app, queue, Selection(task=task, cause=cause), limit + 1)
    shown = letters[:limit]
    if as_json:
        emit([_summary(letter) for letter in shown])
        return
    if not letters:
        click.echo("no dead letters", err=True)
        return
    headings = ("id", "task", "queue", "died", "deliveries", "cause")
    rows = [
        (
            letter.id or "?",
            letter.message.task or "?",
            letter.origin,
            moment(letter.died_at, app.timezone),
            letter.deliveries,
            shorten(letter.cause, _CAUSE_SHOWN),
        )
        for letter in shown
    ]
    click.echo(table(headings, rows))
    if len(letters) > limit:
        click.echo(f"there are more; --limit {limit * 10} shows more of them", err=True)


@command.command("show")
@click.argument("task_id", metavar="ID")
@json_option
@pass_session
def show(session: Session, *, task_id: str, as_json: bool) -> None:
    """Show one dead letter whole: headers, and the body where its content type is accepted.

    --json prints a list, for duplicates of a task may lie there.

    \b
    Example:
      umbel -A tasks dead-letters show 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e
    """
    app = session.app()
    letters = _found(app, None, Selection(ids=frozenset([task_id])))
    if not letters:
        raise UmbelError(f"no dead letter has the id {task_id!r} (umbel dead-letters list)")
    if as_json:
        emit(
            [{**_summary(letter), "headers": dict(letter.message.headers), **_body(app, letter)} for letter in letters]
        )
        return
    for letter in letters:
        body = _body(app, letter)
        rows: list[tuple[str, object]] = [
            *((name, value) for name, value in _summary(letter).items() if name != "died_at"),
            ("died", moment(letter.died_at, app.timezone)),
            ("content type", letter.message.content_type),
            ("size", f"{len(letter.message.body):,} bytes"),
            ("body", body["body"] if "body" in body else f"{body['unreadable']}; it begins {body['hex']}"),
        ]
        click.echo(pairs(rows) + "\n\nheaders")
        click.echo(pairs((f"  {clean(name)}", repr(value)) for name, value in letter.message.headers.items()))


@command.command("replay")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that the other options leave.")
@_filters
@pass_session
@click.pass_context
def replay(
    ctx: click.Context, session: Session, /, *, ids: Sequence[str], everything: bool, **filters: str | None
) -> None:
    """Send dead letters again, each to the queue it came from, under the same task id.

    A letter is taken off only after the broker has accepted the message: a crash between the two sends it twice, and
    never loses it. The failure stored under its id is forgotten, so that the new end can be stored.

    \b
    Examples:
      umbel -A tasks dead-letters replay 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e
      umbel -A tasks dead-letters replay --all --task mail.send
    """
    app = session.app()
    selection = _selection(ids, everything, filters)
    expired: list[str] = []

    def sending(gateway: LocalGateway) -> Act:
        async def send(letters: Sequence[Letter]) -> None:
            if gateway.has_store:
                await gateway.do_forget([letter.id for letter in letters if letter.id])
            messages = [letter.revived() for letter in letters]
            await gateway.do_publish(messages, app.settings.broker.publish_timeout)
            expired.extend(letter.id for letter in letters if _expired(letter, app.clock.time()))

        return send

    taken = _taken(app, filters["queue"], selection, sending, "replayed")
    if expired:
        click.echo(f"{len(expired)} of them had expired: a worker will not run those", err=True)
    ctx.exit(_missing(ids, taken))


@command.command("purge")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that the other options leave.")
@_filters
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
@click.pass_context
def purge(
    ctx: click.Context, session: Session, /, *, ids: Sequence[str], everything: bool, yes: bool, **filters: str | None
) -> None:
    """Delete dead letters, for good.

    \b
    Example:
      umbel -A tasks dead-letters purge --all --queue mail --cause expired --yes
    """
    app = session.app()
    selection = _selection(ids, everything, filters)
    if not yes:
        found = _found(app, filters["queue"], selection)
        confirm(f"Delete {count(len(found), 'dead letter')}?", yes=False)

    def deleting(gateway: LocalGateway) -> Act:
        async def delete(letters: Sequence[Letter]) -> None:
            """Taking it off is all."""

        return delete

    taken = _taken(app, filters["queue"], selection, deleting, "deleted")
    ctx.exit(_missing(ids, taken))


# --- the broker's side ----------------------------------------------------------------------------


async def _dead_queues(app: Umbel, gateway: LocalGateway, only: str | None) -> list[str]:
    if only is not None:
        return [only if only.endswith(DEAD_SUFFIX) else dead_letter_queue(only)]
    return sorted(name for name in await depths(gateway, app.settings) if name.endswith(DEAD_SUFFIX))


def _found(app: Umbel, queue: str | None, selection: Selection, limit: int | None = None) -> list[Letter]:
    """The chosen letters, without taking any."""

    async def work(gateway: LocalGateway) -> list[Letter]:
        letters: list[Letter] = []
        for name in await _dead_queues(app, gateway, queue):
            async for letter in find(gateway.transport, name, selection):
                if len(letters) == limit:
                    return letters
                letters.append(letter)
        return letters

    return on_gateway(app, work)


def _taken(
    app: Umbel, queue: str | None, selection: Selection, acting: Callable[[LocalGateway], Act], done: str
) -> Taken:
    """Take the chosen letters off their queues, and say how many it were, even if it fails half-way."""
    taken = Taken()

    async def work(gateway: LocalGateway) -> None:
        act = acting(gateway)
        for name in await _dead_queues(app, gateway, queue):
            if at_most := len([letter async for letter in find(gateway.transport, name, selection)]):
                await take(gateway.transport, name, selection, act, at_most=at_most, taken=taken)

    try:
        on_gateway(app, work)
    finally:
        click.echo(f"{count(len(taken.ids), 'dead letter')} {done}")
        if taken.late:
            click.echo(f"{taken.late} of them may still be there: their lease had ended meanwhile", err=True)
    return taken


# --- words ----------------------------------------------------------------------------------------


def _selection(ids: Sequence[str], everything: bool, filters: Mapping[str, str | None]) -> Selection:
    if bool(ids) == everything:
        raise click.UsageError("say which: either the ids, or --all with --queue, --task or --cause as you like")
    return Selection(ids=frozenset(ids), task=filters["task"], cause=filters["cause"])


def _missing(ids: Sequence[str], taken: Taken) -> int:
    """Name the ids of which there was no letter; return the exit status."""
    missing = [task_id for task_id in dict.fromkeys(ids) if task_id not in taken.ids]
    for task_id in missing:
        click.echo(f"Error: no dead letter has the id {task_id!r} (umbel dead-letters list)", err=True)
    return 1 if missing else 0


def _summary(letter: Letter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "task": letter.message.task,
        "queue": letter.origin,
        "cause": letter.cause,
        "died_at": letter.died_at,
        "deliveries": letter.deliveries,
    }


def _body(app: Umbel, letter: Letter) -> dict[str, Any]:
    """The body where it can and may be read, otherwise why not and how it begins."""
    message = letter.message
    try:
        return {"body": app.codec.decode(message.body, message.content_type, message.headers.get("compression"))}
    except DecodeError as error:
        return {"unreadable": str(error), "hex": message.body[:_BYTES_SHOWN].hex(), "size": len(message.body)}


def _expired(letter: Letter, now: float) -> bool:
    try:
        expires = parse_time(letter.message.headers.get("expires"))
    except DecodeError:
        return False
    return expires is not None and expires < now
