"""``umbel worker``."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin, get_type_hints

import attrs
import click

from umbel.cli import first_process
from umbel.cli.output import count, emit, pairs
from umbel.cli.session import Command, Session, json_option, pass_session
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
_COLLECT_AFTER: Final = 50_000
"""Containers made and not yet freed after which the cyclic collector of a worker's own process looks for cycles. A busy one has
up to 30,000 in flight, fourteen for each message, and all of them go by themselves: at Python's own 700 it walks through them,
and through every module, again and again, for a tenth of the worker's CPU (``benchmarks/README.md``)."""


def _worker_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each setting of ``[worker]`` that a word can give. Settings check the values, all at once."""
    types = get_type_hints(WorkerSettings, include_extras=True)
    described = {key: (kind, default, help) for key, kind, default, help in reference(WorkerSettings)}
    for name in reversed([field.name for field in attrs.fields(WorkerSettings)]):
        kind, default, help = described[name]
        if kind == "table":
            continue
        if default == "false":  # to be switched on by its name alone
            flag = f"--{name.replace('_', '-')}"
            function = click.option(flag, name, flag_value="true", default=None, help=help)(function)
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
@click.option(
    "--graph",
    type=click.Choice(["tree", "mermaid"]),
    is_flag=False,
    flag_value="tree",
    help="Print the worker's steps, whose they are and in which order they start, and run nothing.",
)
@json_option
@pass_session
@click.pass_context
def command(ctx: click.Context, session: Session, /, graph: str | None, as_json: bool, **options: str | None) -> None:
    """Run tasks until stopped.

    TERM or Ctrl-C stops the worker when what runs has ended, or --grace is over; a second one does not wait. What
    has not ended goes back to its queue.

    \b
    Examples:
      umbel -A tasks worker
      umbel -A tasks worker --queues default,mail --concurrency 4 --log-level debug
      umbel -A tasks worker --graph
    """
    if as_json and graph is None:
        raise click.UsageError("--json prints what --graph shows: give both")
    if graph is None and os.getpid() == 1:
        first_process.serve_below()  # before the application may start a thread
    session.overrides.update({f"worker.{name}": value for name, value in options.items() if value is not None})
    from umbel.cli.graph import document, mermaid, nodes, tree
    from umbel.worker.logs import start_log

    app = session.app(required=True)
    start_log(app)
    worker = app.worker()
    if graph is not None:
        steps = nodes(worker)
        if as_json:
            emit(document(worker, steps))
        else:
            click.echo(mermaid(steps) if graph == "mermaid" else tree(steps))
        return
    click.echo(_banner(worker), err=True)
    spare_the_collector(worker)
    ctx.exit(worker.run(last=True))


def spare_the_collector(worker: Worker) -> None:
    """Let the cyclic collector leave alone what is loaded, and look rarely, in a process where no task runs."""
    if worker.pool.capabilities.isolated:
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])


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
