"""``umbel scheduler``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from umbel.cli import first_process
from umbel.cli.output import age, emit, moment, pairs
from umbel.cli.session import Command, Session, json_option, pass_session
from umbel.settings.sources import mask

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.scheduling.process import SchedulerProcess


@click.command("scheduler", cls=Command)
@click.option("--status", is_flag=True, help="Tell who leads and what is due, and run nothing.")
@click.option(
    "-l",
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
    help="Least level that is logged; else [worker] log_level.",
)
@json_option
@pass_session
@click.pass_context
def command(ctx: click.Context, session: Session, *, status: bool, log_level: str | None, as_json: bool) -> None:
    """Send periodic tasks until stopped.

    Any number may run; one leads, and another takes its place within two leases when it is gone. TERM or Ctrl-C stops
    it and gives the lead up at once.

    \b
    Examples:
      umbel -A tasks scheduler
      umbel -A tasks scheduler --status --json
    """
    if as_json and not status:
        raise click.UsageError("--json prints what --status tells: give both")
    if not status and os.getpid() == 1:
        first_process.serve_below()  # before the application may start a thread
    if log_level is not None:
        session.overrides["worker.log_level"] = log_level
    app = session.app(required=not status)
    if status:
        _tell(app, as_json=as_json)
        return
    from umbel.scheduling.process import SchedulerProcess
    from umbel.worker.logs import start_log

    start_log(app)
    process = SchedulerProcess(app)
    click.echo(_banner(process), err=True)
    ctx.exit(process.run())


def _banner(process: SchedulerProcess) -> str:
    app, address = process.app, process.service.address
    rows = [
        ("app", app.reference),
        ("broker", mask(app.settings.broker.url)),
        ("schedules", f"{mask(address.url)} (from {address.origin})"),
        ("declared", f"{len(app.schedules.declared())} entries"),
    ]
    return f"umbel scheduler {process.service.owner}\n" + "\n".join(f"  {line}" for line in pairs(rows).splitlines())


def _tell(app: Umbel, *, as_json: bool) -> None:
    leader: Mapping[str, Any] | None = app.schedules.leader()
    entries, now = app.schedules.list(), app.clock.time()
    waiting = [entry for entry in entries if entry.enabled and entry.next_due is not None]
    first = min(waiting, key=lambda entry: entry.next_due or 0.0, default=None)
    address = app.schedules.address()
    overdue = max((now - (entry.next_due or now) for entry in waiting), default=0.0)
    if as_json:
        emit(
            {
                "store": {"url": mask(address.url), "from": address.origin},
                "leader": leader,
                "entries": len(entries),
                "waiting": len(waiting),
                "next": None if first is None else {"name": first.name, "due": first.next_due},
                "overdue": round(max(0.0, overdue), 3),
            }
        )
        return
    rows = [
        ("schedules", f"{mask(address.url)} (from {address.origin})"),
        ("leader", "none" if leader is None else leader["owner"]),
        ("entries", f"{len(entries)}, of which {len(waiting)} wait for their time"),
        ("next", "-" if first is None else f"{first.name} at {moment(first.next_due, app.timezone)}"),
        ("overdue", age(overdue) if overdue > 0 else "-"),
    ]
    click.echo(pairs(rows))
