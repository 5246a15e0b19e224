"""``umbel call``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from umbel.cli.output import emit
from umbel.cli.parsing import duration, value_of
from umbel.cli.result import conclude, final_document
from umbel.cli.session import Command, Session, json_option, pass_session
from umbel.errors import UmbelError, UnknownTask

if TYPE_CHECKING:
    from umbel.app import Umbel


@click.command("call", cls=Command)
@click.argument("task")
@click.argument("args", nargs=-1)
@click.option("--kw", "pairs", metavar="KEY=VALUE", multiple=True, help="A keyword argument; as often as you like.")
@click.option("--args-json", metavar="LIST", help="All positional arguments as one JSON list.")
@click.option("--kwargs-json", metavar="OBJECT", help="Keyword arguments as one JSON object.")
@click.option("--queue", metavar="NAME", help="Queue to send it to.")
@click.option("--countdown", type=duration, metavar="DURATION", help="Run it no sooner than this from now.")
@click.option("--expires", type=duration, metavar="DURATION", help="Do not run it any more after this time.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher is sooner.")
@click.option("--id", "task_id", metavar="ID", help="Id of the task; else a random one.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--timeout", type=duration, metavar="DURATION", help="Wait no longer than this.")
@click.option("--unchecked", is_flag=True, help="Send it even if the app knows no task of that name.")
@json_option
@pass_session
@click.pass_context
def command(
    ctx: click.Context,
    session: Session,
    /,
    *,
    task: str,
    args: Sequence[str],
    pairs: Sequence[str],
    args_json: str | None,
    kwargs_json: str | None,
    wait: bool,
    timeout: float | None,
    unchecked: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Send a task.

    Each argument is read as JSON if it is JSON (2, true, '[1, 2]', '"2"'), else as text. Negative numbers, which look
    like options, stand after --. Prints the task's id; with --wait its result, and then exits with 1 if it failed.

    \b
    Examples:
      umbel -A tasks call tasks.add 2 3 --wait
      umbel -A tasks call --wait tasks.add -- -2 3
      umbel -A tasks call mail.send --kw to=ada@example.org --kw retry=true --countdown 5m
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is for --wait")
    positional = _positional(args, args_json)
    keywords = _keywords(pairs, kwargs_json)
    app = session.app()
    if session.has_tasks and not unchecked:
        app.load_tasks()
        try:
            _ = app.tasks[task]
        except UnknownTask as error:
            raise UnknownTask(f"{error} (--unchecked sends it all the same)") from None
    if wait:
        _check_result_kept(app, task)
    given: Any = {name: value for name, value in options.items() if value is not None}
    sent = app.send_task(task, positional, keywords, **given)
    if wait:
        ctx.exit(conclude(final_document(app, sent.id, timeout), as_json=as_json))
    if as_json:
        emit({"task_id": sent.id})
    else:
        click.echo(sent.id)


def _positional(args: Sequence[str], text: str | None) -> list[Any]:
    if text is None:
        return [value_of(arg) for arg in args]
    if args:
        raise click.UsageError("give the arguments one by one or by --args-json, not both")
    if not isinstance(value := _json(text, "--args-json"), list):
        raise click.BadParameter("must be a JSON list, such as [2, 3]", param_hint="--args-json")
    return value


def _keywords(pairs: Sequence[str], text: str | None) -> dict[str, Any]:
    keywords = {} if text is None else _json(text, "--kwargs-json")
    if not isinstance(keywords, dict):
        raise click.BadParameter('must be a JSON object, such as {"x": 2}', param_hint="--kwargs-json")
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not (is_pair and key):
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--kw")
        if key in keywords:
            raise click.BadParameter(f"{key!r} is given twice", param_hint="--kw")
        keywords[key] = value_of(value)
    return keywords


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"is not JSON: {error}", param_hint=option) from None


def _check_result_kept(app: Umbel, task: str) -> None:
    """Refuse to wait for what never comes."""
    if not app.settings.results.url:
        raise UmbelError('there is no result to wait for: [results] url is "disabled"')
    if task in app.tasks and app.tasks[task].options.ignore_result:
        raise UmbelError(f"task {task!r} stores no result (ignore_result), so there is none to wait for")
