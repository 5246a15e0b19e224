"""``umbel revoke``."""

from __future__ import annotations

from collections.abc import Sequence

import click

from umbel.cli.output import clean, emit
from umbel.cli.parsing import duration
from umbel.cli.session import Command, Session, json_option, pass_session
from umbel.revocation import GRACE


@click.command("revoke", cls=Command)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--task", metavar="NAME", help="Every call of this task, instead of ids.")
@click.option(
    "--header",
    "headers",
    metavar="NAME=VALUE",
    multiple=True,
    help="Every task with this header or stamp (root_id and group too); all of them where there are several.",
)
@click.option("--terminate", is_flag=True, help="End those that run, too.")
@click.option(
    "--grace",
    type=duration,
    default=f"{GRACE:g}s",
    show_default=True,
    metavar="DURATION",
    help="With --terminate: time to end in before the process is killed; 0: kill at once.",
)
@click.option("--expires", type=duration, metavar="DURATION", help="How long it holds; else 30d by id, 1d otherwise.")
@click.option("--undo", is_flag=True, help="Take it back: named as it was revoked, or some of the ids.")
@json_option
@pass_session
def command(
    session: Session,
    *,
    ids: Sequence[str],
    task: str | None,
    headers: Sequence[str],
    terminate: bool,
    grace: float,
    expires: float | None,
    undo: bool,
    as_json: bool,
) -> None:
    """Let tasks not run: those of the ids, or of a name, or with a header.

    What has not started is not started, and is REVOKED when a worker comes to it. What runs is left alone, unless
    --terminate is given. It is kept in the result store, where that can, for workers that do not run now.

    \b
    Example:
      umbel -A tasks revoke 0b1f5c7e-6d0a-4a51-9a3c-3b7f2a9f6f10 --terminate
      umbel -A tasks revoke --task tasks.report --header tenant=acme
    """
    wanted = dict(_pair(text) for text in headers)
    control = session.app().control
    try:
        if undo:
            kept = control.restore(*ids, task=task, headers=wanted)
        else:
            kept = control.revoke(*ids, task=task, headers=wanted, terminate=terminate, grace=grace, expires=expires)
    except ValueError as error:
        raise click.UsageError(f"{error}; give IDs, or --task, --header or both") from None
    if as_json:
        emit({"ids": ids, "task": task, "headers": wanted, "terminate": terminate, "undo": undo, "kept": kept})
        return
    what = ", ".join(ids) or " with ".join([*([f"task {task}"] if task else []), *headers])
    if undo:
        click.echo(
            f"{clean(what)}: " + ("may run again" if kept else "was not kept as revoked; running workers are told")
        )
    else:
        where = "kept in the result store" if kept else "told to the workers that run now, and not kept"
        click.echo(f"{clean(what)}: revoked, {where}")


def _pair(text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not (is_pair and name):
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--header")
    return name, value
