"""``umbel result``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from umbel.cli.output import clean, clean_lines, emit, pairs
from umbel.cli.parsing import duration
from umbel.cli.session import Command, Session, json_option, pass_session
from umbel.errors import DecodeError

if TYPE_CHECKING:
    from umbel.app import Umbel

NO_RECORD: Final = 3
"""Exit status."""
_FAILED: Final = ("FAILURE", "REVOKED")


@click.command("result", cls=Command)
@click.argument("task_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Wait until the task has ended.")
@click.option("--timeout", type=duration, metavar="DURATION", help="Wait no longer than this.")
@json_option
@pass_session
@click.pass_context
def command(
    ctx: click.Context, session: Session, *, task_id: str, wait: bool, timeout: float | None, as_json: bool
) -> None:
    """Show what became of a task.

    Exits with 1 if the task failed or was revoked, with 3 if nothing is stored of it: it waits, or has never been
    sent, or its result has expired, or it stores none. --json prints the result document as it is stored.

    \b
    Example:
      umbel -A tasks result 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e --wait --timeout 30s
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is for --wait")
    app = session.app()
    document = final_document(app, task_id, timeout) if wait else app.result(task_id).record()
    if document is None:
        if as_json:
            emit({"task_id": task_id, "status": None})
        else:
            click.echo(f"nothing is stored of task {task_id}", err=True)
        ctx.exit(NO_RECORD)
    if as_json:
        emit(document)
    else:
        click.echo(_text(document))
    ctx.exit(_status(document))


def final_document(app: Umbel, task_id: str, timeout: float | None) -> Mapping[str, Any]:
    """The result document of a task, once it has ended. Raises ``ResultTimeout``, ``DecodeError``."""
    record = app.gateway.wait(task_id, timeout)
    document = app.result_codec.decode(record.document, record.content_type)
    if not isinstance(document, Mapping):
        raise DecodeError(f"the record of task {task_id} is not a result document")
    return document


def conclude(document: Mapping[str, Any], *, as_json: bool) -> int:
    """Print what a task has come to; return the exit status."""
    if as_json:
        emit(document)
    elif not _status(document):
        value = document.get("result")
        click.echo(value if isinstance(value, str) else repr(value))
    else:
        if isinstance(traceback := document.get("traceback"), str):
            click.echo(clean_lines(traceback), err=True)
        click.echo(f"Error: task {document.get('task_id')} failed: {clean(_value(document))}", err=True)
    return _status(document)


def _status(document: Mapping[str, Any]) -> int:
    return int(document.get("status") in _FAILED)


def _value(document: Mapping[str, Any]) -> str:
    """The value, or the exception in one line."""
    value = document.get("result")
    if isinstance(value, Mapping) and "exc_type" in value and document.get("status") in (*_FAILED, "RETRY"):
        message = value.get("exc_message")
        parts = message if isinstance(message, list | tuple) else () if message is None else (message,)
        return ": ".join(filter(None, (str(value["exc_type"]), ", ".join(map(str, parts)))))
    return value if isinstance(value, str) else repr(value)


def _text(document: Mapping[str, Any]) -> str:
    rows = [("state", document.get("status")), ("value", _value(document))]
    rows += [(name, document[key]) for name, key in _MORE.items() if document.get(key)]
    traceback = document.get("traceback")
    return pairs(rows) + (f"\n\n{clean_lines(traceback)}" if isinstance(traceback, str) else "")


_MORE: Final[Mapping[str, str]] = {
    "ended": "date_done",
    "task": "name",
    "worker": "worker",
    "queue": "queue",
    "retries": "retries",
}
