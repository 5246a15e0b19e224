"""``umbel queues``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from umbel.cli.output import age, emit, table
from umbel.cli.session import Command, Session, json_option, on_gateway, pass_session
from umbel.model import DEAD_SUFFIX, dead_letter_queue

if TYPE_CHECKING:
    from umbel.gateway import LocalGateway
    from umbel.ports.transport import QueueDepth
    from umbel.settings.schema import Settings


@click.command("queues", cls=Command)
@click.argument("names", metavar="[QUEUE]...", nargs=-1)
@json_option
@pass_session
def command(session: Session, *, names: Sequence[str], as_json: bool) -> None:
    """Count the messages in every queue.

    READY: can be run now. DELAYED: wait for their time. LEASED: a worker has them. OLDEST: age of the oldest that is
    ready. Queues whose names end in .dead hold dead letters.

    \b
    Examples:
      umbel -A tasks queues
      umbel --broker sqlite:///umbel.sqlite3 queues mail --json
    """
    app = session.app()

    async def work(gateway: LocalGateway) -> Mapping[str, QueueDepth]:
        return await depths(gateway, app.settings, names)

    found = sorted(on_gateway(app, work).items())
    now = app.clock.time()
    if as_json:
        emit(
            [
                {
                    "queue": name,
                    "ready": depth.ready,
                    "delayed": depth.delayed,
                    "leased": depth.leased,
                    "oldest": depth.oldest,
                    "oldest_age": None if depth.oldest is None else max(0.0, round(now - depth.oldest, 3)),
                    "dead_letters": name.endswith(DEAD_SUFFIX),
                }
                for name, depth in found
            ]
        )
        return
    rows = [
        (
            name,
            depth.ready,
            depth.delayed,
            depth.leased,
            age(None if depth.oldest is None else now - depth.oldest),
            "dead letters" if name.endswith(DEAD_SUFFIX) else "",
        )
        for name, depth in found
    ]
    click.echo(table(("queue", "ready", "delayed", "leased", "oldest", ""), rows))


async def depths(gateway: LocalGateway, settings: Settings, names: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
    """Depths of the named queues; of all, if none is named: those that the broker lists and those that the settings name."""
    transport = gateway.transport
    if names:
        return await transport.depth(list(names))
    listed = dict(await transport.depth())
    known = dict.fromkeys([settings.default_queue, *settings.worker.queues, *settings.queues])
    known |= dict.fromkeys(task.queue for task in settings.tasks.values() if task.queue)
    if unlisted := [name for name in known if name not in listed]:
        listed.update(await transport.depth(unlisted))
    dead = [letters for name in known if (letters := dead_letter_queue(name)) not in listed]
    if dead:  # a broker that lists nothing has them all the same
        listed |= {name: depth for name, depth in (await transport.depth(dead)).items() if depth.ready or depth.leased}
    return listed
