"""``umbel purge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from umbel.cli.output import confirm, count
from umbel.cli.session import Command, Session, on_gateway, pass_session

if TYPE_CHECKING:
    from umbel.gateway import LocalGateway
    from umbel.ports.transport import QueueDepth


@click.command("purge", cls=Command)
@click.argument("queues", metavar="QUEUE...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def command(session: Session, *, queues: Sequence[str], yes: bool) -> None:
    """Delete the messages that wait in queues.

    Ready and delayed messages are deleted, for good; what a worker has already taken is not touched.

    \b
    Example:
      umbel -A tasks purge default mail
    """
    app = session.app()
    names = list(dict.fromkeys(queues))

    async def measure(gateway: LocalGateway) -> Mapping[str, QueueDepth]:
        return await gateway.transport.depth(names)

    async def purge(gateway: LocalGateway) -> Mapping[str, int]:
        return {name: await gateway.transport.purge(name) for name in names}

    if not yes:
        waiting = sum(depth.ready + depth.delayed for depth in on_gateway(app, measure).values())
        confirm(f"Delete {count(waiting, 'message')} of {', '.join(names)}?", yes=False)
    for name, number in on_gateway(app, purge).items():
        click.echo(f"{count(number, 'message')} of {name} deleted")
