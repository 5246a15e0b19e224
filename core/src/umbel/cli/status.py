"""``umbel status``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from umbel.cli.output import age, emit, table
from umbel.cli.parsing import duration
from umbel.cli.session import Command, Session, json_option, on_gateway, pass_session
from umbel.errors import NotSupported
from umbel.settings.sources import mask
from umbel.worker.control import ask

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.gateway import LocalGateway


@click.command("status", cls=Command)
@click.option(
    "--timeout", type=duration, default="1s", show_default=True, metavar="DURATION", help="Time to answer in."
)
@json_option
@pass_session
@click.pass_context
def command(ctx: click.Context, session: Session, *, timeout: float, as_json: bool) -> None:
    """Ask the running workers how they are.

    Exits with 1 if none answers. HELD: deliveries that the worker has and has not settled. POLLED: time since the
    broker last answered it. DONE: tasks that it has ended.

    \b
    Example:
      umbel -A tasks status
    """
    app = session.app()
    answers = ask_workers(app, "stats", timeout=timeout)
    if as_json:
        emit(answers)
    elif answers:
        headings = ("worker", "pid", "uptime", "pool", "concurrency", "held", "polled", "done")
        click.echo(table(headings, [_row(name, answers[name]) for name in sorted(answers)]))
    else:
        broker = mask(app.settings.broker.url)
        click.echo(f"no worker has answered on {broker} within {timeout:g} s; umbel worker starts one", err=True)
    ctx.exit(0 if answers else 1)


def ask_workers(app: Umbel, method: str, *, timeout: float) -> Mapping[str, Any]:
    """What all workers that listen answer, by name. Raises ``NotSupported``, ``BrokerUnavailable``."""

    async def work(gateway: LocalGateway) -> Mapping[str, Any]:
        if not gateway.transport.capabilities.broadcast:
            raise NotSupported(
                f"workers cannot be asked: the broker {mask(app.settings.broker.url)} has no broadcast ([broker] url)"
            )
        return await ask(gateway.transport, method, timeout=timeout)

    return on_gateway(app, work)


def _row(name: str, answer: Any) -> tuple[object, ...]:
    """A worker's line. Whoever speaks the protocol may answer, and need not say everything."""
    stats = answer if isinstance(answer, Mapping) else {}
    pool, total = (part if isinstance(part := stats.get(key), Mapping) else {} for key in ("pool", "total"))
    return (
        name,
        stats.get("pid"),
        age(stats.get("uptime")),
        str(pool.get("implementation", "-")).rpartition(":")[2],
        pool.get("max-concurrency"),
        stats.get("held"),
        age(stats.get("last_poll_age")),
        sum(number for number in total.values() if isinstance(number, int)),
    )
