"""``umbel limit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from umbel.cli.output import clean, emit, table
from umbel.cli.parsing import duration
from umbel.cli.session import Command, Session, json_option, on_gateway, pass_session
from umbel.errors import NotSupported
from umbel.pidbox import ask
from umbel.settings.sources import mask
from umbel.settings.units import parse_rate

if TYPE_CHECKING:
    from umbel.gateway import LocalGateway

_OFF = "off"


def _rate(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    if text is not None and text != _OFF:
        try:
            parse_rate(text)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} {error}, or off") from None
    return text


def _seconds(_: click.Context, __: click.Parameter, text: str | None) -> float | str | None:
    return text if text is None or text == _OFF else duration(text)


def _number(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == _OFF:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} must be a whole number from 1, or off")
    return int(text)


@click.command("limit", cls=Command)
@click.argument("task", required=False)
@click.option("--rate", callback=_rate, metavar="RATE", help="Most starts in a time, such as 100/m.")
@click.option("--scope", type=click.Choice(["worker", "fleet"]), help="Whose starts the rate counts.")
@click.option(
    "--concurrency", callback=_number, metavar="NUMBER", help="Most calls at once in the fleet, for each key."
)
@click.option("--time-limit", callback=_seconds, metavar="DURATION", help="Time after which a call is killed.")
@click.option(
    "--soft-time-limit",
    callback=_seconds,
    metavar="DURATION",
    help="Time after which SoftTimeLimitExceeded is raised in it.",
)
@click.option("--worker", "workers", metavar="NAME", multiple=True, help="This worker only; as often as you like.")
@click.option(
    "--timeout", type=duration, default="1s", show_default=True, metavar="DURATION", help="Time to answer in."
)
@json_option
@pass_session
@click.pass_context
def command(
    ctx: click.Context,
    session: Session,
    /,
    *,
    task: str | None,
    scope: str | None,
    workers: Sequence[str],
    timeout: float,
    as_json: bool,
    **limits: Any,
) -> None:
    """Show or change the limits of tasks in the running workers.

    Without an option it shows the limits of TASK, or of all tasks that have any. "off" takes a limit away. A change holds
    until the worker ends: put it into the settings ([tasks]) to keep it. Exits with 1 if no worker answers, or one refuses.

    \b
    Example:
      umbel -A tasks limit tasks.report --rate 10/m --concurrency 3 --time-limit off
    """
    names = {"rate": "rate_limit", "concurrency": "concurrency_limit"}
    changes = {names.get(n, n): None if v == _OFF else v for n, v in limits.items() if v is not None}
    if scope is not None:
        changes["rate_limit_scope"] = scope
    if changes and task is None:
        raise click.UsageError("to change a limit, name the TASK")
    app = session.app()

    async def work(gateway: LocalGateway) -> Mapping[str, Any]:
        if not gateway.transport.capabilities.broadcast:
            raise NotSupported(
                f"workers cannot be told: the broker {mask(app.settings.broker.url)} has no broadcast ([broker] url)"
            )
        arguments = {"task": task, "changes": changes}
        return await ask(gateway.transport, "limit", arguments, destination=workers or None, timeout=timeout)

    answers = on_gateway(app, work)
    if as_json:
        emit(answers)
    else:
        _print(answers)
        if not answers:
            broker = mask(app.settings.broker.url)
            click.echo(f"no worker has answered on {broker} within {timeout:g} s; umbel worker starts one", err=True)
    ctx.exit(0 if answers and not any(map(_refused, answers.values())) else 1)


def _refused(answer: Any) -> bool:
    return not isinstance(answer, Mapping) or "error" in answer


def _print(answers: Mapping[str, Any]) -> None:
    rows = []
    for worker in sorted(answers):
        if _refused(answer := answers[worker]):
            click.echo(
                f"{clean(worker)}: {clean(answer.get('error') if isinstance(answer, Mapping) else answer)}", err=True
            )
            continue
        for task, limits in answer.items():
            rate, scope = limits.get("rate_limit"), limits.get("rate_limit_scope")
            number, key = limits.get("concurrency_limit"), limits.get("concurrency_key")
            rows.append(
                (
                    worker,
                    task,
                    f"{rate} in the fleet" if rate and scope == "fleet" else rate,
                    f"{number} for each {key}" if number and key else number,
                    _time(limits.get("time_limit")),
                    _time(limits.get("soft_time_limit")),
                )
            )
    if rows:
        click.echo(table(("worker", "task", "rate", "at once", "time", "soft time"), rows))
    elif answers and not any(map(_refused, answers.values())):
        click.echo("no task has a limit")


def _time(seconds: Any) -> str | None:
    return f"{seconds:g}s" if isinstance(seconds, int | float) else None
