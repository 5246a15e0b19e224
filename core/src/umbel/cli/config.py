"""``umbel config``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from umbel.cli.output import count, emit, table
from umbel.cli.session import Group, Session, json_option, pass_session, sentences
from umbel.errors import SettingsError, UmbelError
from umbel.settings.sources import mask, masked
from umbel.settings.structure import json_schema

if TYPE_CHECKING:
    from umbel.app import Umbel


@click.group("config", cls=Group)
def command() -> None:
    """Show the settings, or check them.

    Later wins: defaults, umbel.toml, UMBEL_… variables, the application's code, the command line.

    \b
    Examples:
      umbel config show
      UMBEL_BROKER__URL=memory:// umbel config check
    """


@command.command("show")
@json_option
@pass_session
def show(session: Session, *, as_json: bool) -> None:
    """Show every setting and where it came from. Passwords are hidden.

    \b
    Example:
      umbel -A tasks config show
    """
    app = session.app()
    loaded = app.loaded
    values, origins = masked(loaded.settings), dict(loaded.provenance)
    if loaded.settings.scheduler.url is None:
        values["scheduler.url"], origins["scheduler.url"] = _found_scheduler(app)
    if as_json:
        settings = {key: {"value": value, "origin": origins[key]} for key, value in values.items()}
        emit({"file": loaded.file, "settings": settings})
        return
    click.echo(table(("setting", "value", "from"), [(k, written(v), origins[k]) for k, v in values.items()]))


@command.command("check")
@pass_session
@click.pass_context
def check(ctx: click.Context, session: Session) -> None:
    """Check the settings: that each is right, and that every plugin and module they name can be used.

    Nothing is connected. All problems are shown at once; exits with 1 if there is any.

    \b
    Example:
      umbel -A tasks config check
    """
    if problems := list(dict.fromkeys(_problems(session))):
        for problem in problems:
            click.echo(f"Error: {problem}", err=True)
        ctx.exit(1)
    loaded = session.app().loaded
    given = sum(origin != "default" for origin in loaded.provenance.values())
    click.echo(f"the settings are right: {count(given, 'value')} given, {loaded.file or 'no file'}")


@command.command("schema")
def schema() -> None:
    """Print the JSON Schema of umbel.toml, for editors.

    \b
    Example:
      umbel config schema > umbel.schema.json
    """
    emit(json_schema())


def _found_scheduler(app: Umbel) -> tuple[str | None, str]:
    """Where schedules are kept that the settings give no place of their own, and which setting says so."""
    try:
        address = app.schedules.address()
    except SettingsError:
        return None, "default: neither [results] url nor [broker] url has a store for schedules"
    return mask(address.url), f"default: as {address.origin}"


def written(value: Any) -> str:
    """A setting's value much as a file has it."""
    return "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _problems(session: Session) -> Iterator[str]:
    try:
        app = session.app()
        _ = app.settings, app.plugins
    except UmbelError as error:
        yield from sentences(error)
        return
    for use in _uses(app):
        try:
            use()
        except UmbelError as error:
            yield from sentences(error)


def _uses(app: Umbel) -> Iterator[Callable[[], object]]:
    """Whatever the settings name, each to be made or imported; no I/O."""
    settings, plugins = app.settings, app.plugins
    yield app.load_tasks
    yield app.make_transport
    if settings.results.url:
        yield app.make_result_store
        yield lambda: app.codec.serializer(settings.results.serializer)
    if settings.schedules or settings.scheduler.url:
        yield app.schedules.make_store
        yield app.schedules.declared
    yield lambda: app.codec.serializer(settings.codec.serializer)
    for name in settings.codec.accept:
        yield lambda name=name: app.codec.serializer(name)  # type: ignore[misc]  # the default binds the loop's variable
    for name in filter(None, (settings.codec.compression, *settings.codec.accept_compression)):
        yield lambda name=name: app.codec.compressor(name)  # type: ignore[misc]  # the default binds the loop's variable
    yield lambda: plugins.make_pool(settings.worker.pool, settings.worker.pool_options)
