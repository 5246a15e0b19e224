"""``umbel result``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from umbel.cli.output import clean, clean_lines, emit, emit_line, pairs, table
from umbel.cli.parsing import duration
from umbel.cli.session import Command, Session, json_option, pass_session
from umbel.errors import ResultTimeout
from umbel.model import FINAL_STATES

if TYPE_CHECKING:
    from umbel.app import Umbel

NO_RECORD: Final = 3
"""Exit status."""
_FAILED: Final = ("FAILURE", "REVOKED")
_LOOK: Final = 0.2
"""Seconds between two looks at a task that is followed."""


@click.command("result", cls=Command)
@click.argument("task_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Wait until the task has ended.")
@click.option("--follow", is_flag=True, help="Show every state, and the progress told, until the task has ended.")
@click.option("--timeout", type=duration, metavar="DURATION", help="Wait no longer than this.")
@json_option
@pass_session
@click.pass_context
def command(
    ctx: click.Context,
    session: Session,
    *,
    task_id: str,
    wait: bool,
    follow: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Show what became of a task.

    Exits with 1 if the task failed or was revoked, with 3 if nothing is stored of it: it waits, or has never been
    sent, or its result has expired, or it stores none. --json prints the result document as it is stored; with --follow,
    each in a line of its own.

    \b
    Examples:
      umbel -A tasks result 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e --wait --timeout 30s
      umbel -A tasks result 5c0e2f0a-6d1c-4f57-9f43-0d3b8f0a4f5e --follow
    """
    if timeout is not None and not (wait or follow):
        raise click.UsageError("--timeout is for --wait and --follow")
    app = session.app()
    if follow:
        ctx.exit(_status(_follow(app, task_id, timeout, as_json=as_json)))
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
    from umbel.result import decode  # brings asyncio, which `umbel --help` does without

    return decode(app, app.gateway.wait(task_id, timeout))


def _follow(app: Umbel, task_id: str, timeout: float | None, *, as_json: bool) -> Mapping[str, Any]:
    """Print each state that is seen, looking every ``_LOOK`` seconds; the final document. Raises ``ResultTimeout``."""
    handle = app.result(task_id)
    end = None if timeout is None else time.monotonic() + timeout
    shown: Mapping[str, Any] | None = {}
    while True:
        document = handle.record()
        if document != shown:
            shown = document
            told = {"task_id": task_id, "status": None} if document is None else document
            if as_json:
                emit_line(told)
            else:
                click.echo(_line(told, app))
        if document is not None and document.get("status") in FINAL_STATES:
            if not as_json and isinstance(traceback := document.get("traceback"), str):
                click.echo(clean_lines(traceback), err=True)
            return document
        if end is not None and time.monotonic() >= end:
            raise ResultTimeout(f"task {task_id} has not ended after {timeout:g} s")
        time.sleep(_LOOK)


def _line(document: Mapping[str, Any], app: Umbel) -> str:
    """A state in one line: when it was seen, its name, and what it says."""
    parts = [datetime.now(app.timezone).strftime("%H:%M:%S"), clean(document.get("status") or "(no record)")]
    if document.get("result") is not None:
        value = document["result"]
        failed = document.get("status") in (*_FAILED, "RETRY")
        parts.append(clean(_value(document) if failed or isinstance(value, str) else json.dumps(value, default=str)))
    if attempts := document.get("attempts"):
        parts.append(f"(attempt {len(attempts)})")
    return "  ".join(parts)


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
    text = pairs(rows)
    if isinstance(attempts := document.get("attempts"), Sequence) and attempts:
        columns = ("retries", "deliveries", "started", "ended", "worker", "error")
        text += "\n\n" + table(columns, [[_cell(each, name) for name in columns] for each in attempts])
    return text + (f"\n\n{clean_lines(traceback)}" if isinstance(traceback, str) else "")


def _cell(attempt: object, name: str) -> object:
    return attempt.get(name) if isinstance(attempt, Mapping) else None


_MORE: Final[Mapping[str, str]] = {
    "ended": "date_done",
    "task": "name",
    "worker": "worker",
    "queue": "queue",
    "retries": "retries",
}
