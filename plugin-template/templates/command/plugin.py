"""``umbel {{ cookiecutter.name }}``."""

from __future__ import annotations

import click


@click.command("{{ cookiecutter.name }}")
@click.argument("name", default="world")
@click.option("--shout", is_flag=True, help="In capitals.")
def command(name: str, shout: bool) -> None:
    """Greet somebody.

    \b
    Example:
      umbel {{ cookiecutter.name }} Ada --shout
    """
    greeting = f"Hello, {name}!"
    click.echo(greeting.upper() if shout else greeting)
