"""``umbel plugins``."""

from __future__ import annotations

import attrs
import click

from umbel.cli.output import clean, count, emit, table
from umbel.cli.session import Group, Session, json_option, pass_session
from umbel.plugins.inventory import check, inventory


@click.group("plugins", cls=Group, invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, *, as_json: bool) -> None:
    """List the installed plugins, or check them.

    Every plugin is imported to see whether it works; one that fails harms no other.

    \b
    Examples:
      umbel plugins
      umbel plugins check redis
      umbel plugins why broker.url
    """
    if ctx.invoked_subcommand is not None:
        return
    records = inventory(load=True)
    if as_json:
        emit([attrs.asdict(record) for record in records])
        return
    headings = ("kind", "name", "distribution", "version", "api", "state")
    rows = [
        (
            record.kind.replace("_", " "),
            record.name,
            record.distribution,
            record.version,
            record.api_version and ".".join(map(str, record.api_version)),
            record.state,
        )
        for record in records
    ]
    click.echo(table(headings, rows) if rows else 'no plugin is installed: pip install "umbel"')
    for record in records:
        if record.reason:
            click.echo(f"\n{clean(record.reason)}")


@command.command("check")
@click.argument("name", required=False)
@json_option
@click.pass_context
def check_(ctx: click.Context, *, name: str | None, as_json: bool) -> None:
    """Check the plugins of one name, or all.

    What is declared is compared with what the port wants; nothing is connected. Exits with 1 if there is an error; a
    warning is none.

    \b
    Example:
      umbel plugins check redis
    """
    names = [name] if name else sorted({record.name for record in inventory(load=False)})
    findings = [finding for each in names for finding in check(each)]
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        emit([attrs.asdict(finding) for finding in findings])
    elif findings:
        rows = [(f.level, f.kind.replace("_", " "), f.name, f.distribution, f.check, f.message) for f in findings]
        click.echo(table(("level", "kind", "name", "distribution", "check", "what"), rows))
    else:
        click.echo(f"nothing is wrong with {name}" if name else f"nothing is wrong with {count(len(names), 'plugin')}")
    ctx.exit(1 if errors else 0)


@command.command("why")
@click.argument("key")
@json_option
@pass_session
@click.pass_context
def why(ctx: click.Context, session: Session, *, key: str, as_json: bool) -> None:
    """Tell why a component is what it is.

    KEY is a setting that names a plugin. Shown are its value and where it was given, the hook that was asked, the plugin
    that answered, and the distribution and the class that came of it. Nothing is connected. Exits with 1 if a plugin
    that is named cannot be used.

    \b
    Examples:
      umbel plugins why broker.url
      umbel plugins why codec.accept --json
    """
    from umbel.cli.why import answer, show  # brings cattrs, which a list of plugins does without

    found = answer(session.app(), key)
    if as_json:
        emit(attrs.asdict(found))
    else:
        click.echo(show(found))
    ctx.exit(1 if any(component.reason for component in found.components) else 0)
