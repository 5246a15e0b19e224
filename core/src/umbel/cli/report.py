"""``umbel report``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any, Final

import click

from umbel.cli.config import written
from umbel.cli.output import clean, emit, pairs, table
from umbel.cli.session import Command, Session, json_option, pass_session, sentences
from umbel.errors import UmbelError
from umbel.plugins.inventory import inventory
from umbel.plugins.kinds import COMPRESSOR, HOOK, POOL, RESULT_STORE, SERIALIZER, TRANSPORT, Kind
from umbel.settings.sources import masked

if TYPE_CHECKING:
    from umbel.settings.schema import Settings
    from umbel.settings.sources import Loaded

_LIBRARIES: Final = ("attrs", "cattrs", "click", "pluggy", "stevedore")


@click.command("report", cls=Command)
@json_option
@pass_session
def command(session: Session, *, as_json: bool) -> None:
    """Print what a bug report should contain.

    Versions, the settings that are not the default, and the plugins that they name. Passwords are hidden; look through
    it all the same before you publish it.

    \b
    Example:
      umbel -A tasks report > report.txt
    """
    system: dict[str, Any] = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "system": platform.platform(),
    }
    versions = dict(sorted(_versions()))
    settings: dict[str, Any] = {}
    plugins: list[dict[str, str]] = []
    problems: list[str] = []
    try:
        loaded = session.app().loaded
        settings, plugins = _given(loaded), list(_named(loaded.settings))
    except UmbelError as error:  # a report of settings that cannot be read is a report
        problems = sentences(error)
    if as_json:
        emit({**system, "distributions": versions, "settings": settings, "plugins": plugins, "problems": problems})
        return
    click.echo(pairs([*system.items(), *versions.items()]))
    if settings:
        rows = [(key, written(given["value"]), given["origin"]) for key, given in settings.items()]
        click.echo(f"\n{table(('setting', 'value', 'from'), rows)}")
    if plugins:
        headings = ("kind", "name", "distribution", "version")
        click.echo(f"\n{table(headings, [[plugin[h] for h in headings] for plugin in plugins])}")
    for problem in problems:
        click.echo(f"\nproblem: {clean(problem)}")


def _versions() -> Iterator[tuple[str, str]]:
    for distribution in distributions():
        name = distribution.name.lower().replace("_", "-")
        if name in _LIBRARIES or name == "umbel" or name.startswith("umbel-"):
            yield name, distribution.version


def _given(loaded: Loaded) -> dict[str, Any]:
    """The settings that somebody gave."""
    return {
        key: {"value": value, "origin": origin}
        for key, value in masked(loaded.settings).items()
        if (origin := loaded.provenance[key]) != "default"
    }


def _named(settings: Settings) -> Iterator[dict[str, str]]:
    """The plugins that the settings name, and which distribution offers each."""
    names: list[tuple[Kind[Any], str | None]] = [
        (TRANSPORT, TRANSPORT.plugin_name(settings.broker.url)),
        (RESULT_STORE, RESULT_STORE.plugin_name(settings.results.url) if settings.results.url else None),
        *(
            (SERIALIZER, name)
            for name in (settings.codec.serializer, settings.results.serializer, *settings.codec.accept)
        ),
        *((COMPRESSOR, name) for name in (settings.codec.compression, *settings.codec.accept_compression)),
        (POOL, settings.worker.pool),
        *((HOOK, name) for name in settings.plugins.hooks),
    ]
    installed = {(record.kind, record.name): record for record in inventory(load=False)}
    for kind, name in dict.fromkeys(names):
        if name is None:
            continue
        record = installed.get((kind.name, name))
        yield {
            "kind": kind.title,
            "name": name,
            "distribution": (record and record.distribution) or ("your own" if ":" in name else "not installed"),
            "version": (record and record.version) or "-",
        }
