"""``umbel worker``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin, get_type_hints

import attrs
import click

from umbel.cli.output import count, pairs
from umbel.cli.session import Command, Session, pass_session
from umbel.settings.schema import WorkerSettings
from umbel.settings.sources import mask
from umbel.settings.structure import reference

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

_LETTERS: Final[Mapping[str, str]] = {
    "queues": "-Q",
    "pool": "-P",
    "concurrency": "-c",
    "name": "-n",
    "log_level": "-l",
}
_NAMES_SHOWN: Final = 5


def _worker_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each setting of ``[worker]`` that a word can give. Settings check the values, all at once."""
    types = get_type_hints(WorkerSettings, include_extras=True)
    described = {key: (kind, default, help) for key, kind, default, help in reference(WorkerSettings)}
    for name in reversed([field.name for field in attrs.fields(WorkerSettings)]):
        kind, default, help = described[name]
        if kind == "table":
            continue
        words = get_args(types[name]) if get_origin(types[name]) is Literal else ()
        function = click.option(
            *filter(None, [_LETTERS.get(name)]),
            f"--{name.replace('_', '-')}",
            name,
            metavar=None if words else "A,B" if kind.startswith("list") else kind.upper(),
            type=click.Choice(words, case_sensitive=False) if words else str,
            help=help if default in ("not set", "[]") else f"{help}  [default: {default.strip(chr(34))}]",
        )(function)
    return function


@click.command("worker", cls=Command)
@_worker_options
@pass_session
@click.pass_context
def command(ctx: click.Context, session: Session, /, **options: str | None) -> None:
    """Run tasks until stopped.

    TERM or Ctrl-C stops the worker when what runs has ended, or --grace is over; a second one does not wait. What
    has not ended goes back to its queue.

    \b
    Examples:
      umbel -A tasks worker
      umbel -A tasks worker --queues default,mail --concurrency 4 --log-level debug
    """
    session.overrides.update({f"worker.{name}": value for name, value in options.items() if value is not None})
    from umbel.worker.logs import log_to_stderr

    app = session.app(required=True)
    log_to_stderr(app.settings.worker.log_level)
    worker = app.worker()
    click.echo(_banner(worker), err=True)
    ctx.exit(worker.run())


def _banner(worker: Worker) -> str:
    settings = worker.settings
    names = sorted(worker.app.tasks)
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    rows = [
        ("app", worker.app.reference),
        ("broker", mask(settings.broker.url)),
        ("results", mask(settings.results.url or "disabled")),
        ("pool", f"{settings.worker.pool}, {count(worker.concurrency, 'slot')}"),
        ("queues", ", ".join(worker.queues)),
        ("tasks", f"{count(len(names), 'task')}: {shown}" if names else "none; is their module in imports?"),
    ]
    return f"umbel worker {worker.name}\n" + "\n".join(f"  {line}" for line in pairs(rows).splitlines())
