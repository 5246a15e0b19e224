"""``umbel revoked``."""

from __future__ import annotations

import click

from umbel.cli.output import emit, moment, shorten, table
from umbel.cli.session import Command, Session, json_option, pass_session


@click.command("revoked", cls=Command)
@json_option
@pass_session
def command(session: Session, *, as_json: bool) -> None:
    """List what is revoked, as the result store keeps it.

    \b
    Example:
      umbel -A tasks revoked
    """
    app = session.app()
    found = app.control.revoked()
    if as_json:
        emit([revocation.to_plain() for revocation in found])
    elif found:
        rows = [
            (
                shorten(each.describe(), 76),
                f"after {each.grace:g} s" if each.terminate else "no",
                moment(each.until, app.timezone),
            )
            for each in found
        ]
        click.echo(table(("revoked", "ended", "until"), rows))
    else:
        click.echo("nothing is revoked")
