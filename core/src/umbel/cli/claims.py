"""``umbel claims``."""

from __future__ import annotations

import json
from typing import Final

import click

from umbel.claiming import LOCK, UNIQUE, claims, release
from umbel.cli.output import age, confirm, emit, table
from umbel.cli.session import Group, Session, json_option, pass_session
from umbel.errors import UmbelError
from umbel.model import Lease

_KINDS: Final = {"unique": UNIQUE, "lock": LOCK}


@click.group("claims", cls=Group)
def command() -> None:
    """List what is claimed, or free it: keys of unique tasks, and locks.

    \b
    Examples:
      umbel -A tasks claims list
      umbel -A tasks claims release lock report
    """


@command.command("list")
@click.argument("prefix", default="")
@json_option
@pass_session
def list_(session: Session, *, prefix: str, as_json: bool) -> None:
    """List what is claimed now, of names that begin with PREFIX.

    HOLDER: of a unique key, the id of its task; of a lock, the task or the process that has it. LEFT: the time after which
    it is free if nobody renews it.

    \b
    Examples:
      umbel -A tasks claims list
      umbel -A tasks claims list shop.tasks.refresh --json
    """
    app = session.app()
    now = app.clock.time()
    found = [
        (kind, lease.name.removeprefix(start), lease)
        for kind, start in _KINDS.items()
        for lease in claims(app.gateway, start + prefix)
    ]
    if as_json:
        emit(
            [
                {"kind": kind, "name": name, "owner": lease.owner, "fence": lease.fence, "until": lease.until}
                | {"state": _state(kind, lease), "holder": _holder(kind, lease)}
                for kind, name, lease in found
            ]
        )
        return
    rows = [
        (kind, name, _holder(kind, lease), _state(kind, lease), age(lease.until - now)) for kind, name, lease in found
    ]
    click.echo(table(("kind", "name", "holder", "state", "left"), rows))


@command.command("release")
@click.argument("kind", type=click.Choice(list(_KINDS)))
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def release_(session: Session, *, kind: str, name: str, yes: bool) -> None:
    """Free one key or lock, whoever has it.

    A task that waits or runs goes on; but nothing keeps others from doing the same beside it. One that runs takes its key
    again when it renews it, if that is still free.

    \b
    Example:
      umbel -A tasks claims release lock report --yes
    """
    app = session.app()
    found = next(
        (lease for lease in claims(app.gateway, _KINDS[kind] + name) if lease.name == _KINDS[kind] + name), None
    )
    if found is None:
        raise UmbelError(f"nobody has the {kind} {name!r}; umbel claims list shows what is claimed")
    confirm(f"Free the {kind} {name!r}, which {_holder(kind, found)} has?", yes=yes)
    if not release(app.gateway, found.name, found.owner):
        raise UmbelError(f"the {kind} {name!r} has passed to another meanwhile; try again")
    click.echo(f"freed the {kind} {name}")


def _state(kind: str, lease: Lease) -> str:
    """How far the task is that has a unique key."""
    return lease.value.partition(b" ")[0].decode(errors="replace") if kind == "unique" else "held"


def _holder(kind: str, lease: Lease) -> str:
    if kind == "unique":
        return lease.owner
    try:
        told = json.loads(lease.value)
        return str(told["task"] or f"{told['pid']}@{told['host']}")
    except (ValueError, KeyError, TypeError):  # a lock that another program has taken
        return lease.owner
