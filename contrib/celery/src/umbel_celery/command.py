"""``umbel config import-celery``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from umbel_celery.migration import Migration, migrate


@click.command("import-celery")
@click.argument("module")
@click.option("--output", default="umbel.toml", show_default=True, help='File to write; "-" prints it.')
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def import_celery(module: str, output: str, force: bool) -> None:
    """Write umbel.toml from a Celery app or configuration module, and say what could not be carried over.

    MODULE is imported: "shop.celery", "shop.celery:app", or "celeryconfig". Celery must be installed for it; nothing is
    connected. The tasks themselves are code, with options of their own there.

    \b
    Examples:
      umbel config import-celery shop.celery
      umbel config import-celery celeryconfig --output=-
    """
    made = migrate(_settings(module))
    text = f"# From the Celery configuration {module}.\n" + toml(made.settings)
    if output == "-":
        click.echo(text)
    else:
        try:
            with Path(output).open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise click.ClickException(
                f"{output} is there already: give --force to overwrite it, or another --output"
            ) from None
        except OSError as exc:
            raise click.ClickException(f"{output} cannot be written: {exc}") from exc
    _tell(made, output)


def _tell(made: Migration, output: str) -> None:
    click.echo(f"{made.carried} settings carried over{'' if output == '-' else f' to {output}'}", err=True)
    if any("@" in str(table.get("url", "")) for table in made.settings.values() if isinstance(table, Mapping)):
        click.echo("a URL may hold a password: keep the file private, or move it to UMBEL_BROKER__URL", err=True)
    if made.left:
        click.echo("not carried over:", err=True)
    for name, reason in made.left:
        click.echo(f"  {name}: {reason}", err=True)


def _settings(reference: str) -> Mapping[str, Any]:
    """What the app or the module sets, under Celery's present names."""
    try:
        from celery import Celery  # type: ignore[import-untyped]  # it has no types
        from celery.app.defaults import DEFAULTS  # type: ignore[import-untyped]  # likewise
    except ImportError as exc:
        raise click.ClickException(f"Celery's configuration is read by Celery, which is not here: {exc}") from exc
    name, _, attribute = reference.partition(":")
    try:
        module = import_module(name)
        found = getattr(module, attribute) if attribute else _app_in(module, Celery)
    except Exception as exc:  # a module of the user's own may raise anything
        raise click.ClickException(f"{reference} cannot be imported: {type(exc).__name__}: {exc}") from exc
    if found is None:
        found = Celery("imported", set_as_current=False, loader="celery.loaders.app:AppLoader")
        found.config_from_object(module)
    if not isinstance(found, Celery):
        raise click.ClickException(f"{reference} is a {type(found).__name__}, no Celery app")
    try:
        _ = found.conf.timezone  # until something is asked for, what stands there is only a promise of settings
        return {key: found.conf[key] for key in DEFAULTS if found.conf.value_set_for(key)}
    except Exception as exc:  # Celery finds out only now that settings are wrong, each in its own way
        raise click.ClickException(f"Celery refuses the settings of {reference}: {exc}") from exc


def _app_in(module: Any, cls: type) -> Any:
    """The app of a module: ``app``, ``celery``, or the only one."""
    apps = {name: value for name, value in vars(module).items() if isinstance(value, cls)}
    for name in ("app", "celery"):
        if name in apps:
            return apps[name]
    if len({id(app) for app in apps.values()}) > 1:
        raise LookupError(f"it has several apps: name one, as in {module.__name__}:{next(iter(apps))}")
    return next(iter(apps.values()), None)


# --- TOML -----------------------------------------------------------------------------------------


def toml(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Tables of plain values as a TOML document. JSON's strings and numbers are TOML's too."""
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"\n[{'.'.join(map(_key, path))}]"] if path and values else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in values.items()]
    text = "".join(f"{line}\n" for line in lines)
    return text + "".join(toml(value, (*path, key)) for key, value in table.items() if isinstance(value, Mapping))


def _key(key: str) -> str:
    return (
        key if key and all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in key) else _value(key)
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
