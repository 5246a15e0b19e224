"""The root command. It knows the names of all commands and imports none before it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import IO, Any, Final

import click

from umbel.cli.session import Session, installed_commands, plugin_command, sentences, shared_options
from umbel.errors import SettingsError, UmbelError

COMMANDS: Final[Mapping[str, str]] = {
    "worker": "Run tasks until stopped.",
    "scheduler": "Send periodic tasks until stopped.",
    "schedule": "List, make and change periodic tasks.",
    "call": "Send a task.",
    "result": "Show what became of a task.",
    "status": "Ask the running workers how they are.",
    "queues": "Count the messages in every queue.",
    "revoke": "Let tasks not run: those of the ids, or of a name, or with a header.",
    "revoked": "List what is revoked, as the result store keeps it.",
    "limit": "Show or change the limits of tasks in the running workers.",
    "workflow": "List, show, cancel or retry workflows.",
    "purge": "Delete the messages that wait in queues.",
    "claims": "List what is claimed, or free it: keys of unique tasks, and locks.",
    "dead-letters": "List, show, replay or purge what could not be run.",
    "plugins": "List the installed plugins, or check them.",
    "config": "Show the settings, or check them.",
    "report": "Print what a bug report should contain.",
    "shell": "Open Python with the app and its tasks.",
}
"""Our own commands and the first line of their help; each is ``command`` in the module of its name."""

_TEACHING: Final = """\
Umbel runs Python functions as tasks, in other processes and on other machines.

Put this into tasks.py:

  from umbel import Umbel

  app = Umbel("tasks")

  @app.task
  def add(x, y):
      return x + y

Then, in the same folder:

  umbel -A tasks worker                       runs its tasks; leave it running
  umbel -A tasks call tasks.add 2 3 --wait    sends one, and prints its result
  umbel -A tasks queues                       counts what waits

Commands:
{commands}

umbel COMMAND --help explains a command and shows an example.
"""


class Failure(click.ClickException):
    """An error of ours as the command line tells it: a line for each problem, no traceback."""

    def __init__(self, error: UmbelError) -> None:
        super().__init__(str(error))
        self.lines = sentences(error)

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self.lines:
            click.echo(f"Error: {line}", file=file or sys.stderr)


class WrongSettings(Failure):
    """Settings that cannot be used are wrong usage."""

    exit_code = 2


class Root(click.Group):
    """Finds commands by name: our own, those of the entry points ``umbel.commands``, those that the app's plugins add."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lines())

    def _lines(self) -> dict[str, str]:
        """Names and first lines of help of all commands that can be known without importing anything."""
        lines = dict(COMMANDS)
        for name, distribution in installed_commands().items():
            lines.setdefault(name, f"From {distribution}.")
        return lines

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            command: click.Command = import_module(f"umbel.cli.{cmd_name.replace('-', '_')}").command
            return command
        if cmd_name in installed_commands():
            return plugin_command(cmd_name)
        if cmd_name not in self.commands and not cmd_name.startswith("-"):
            session = ctx.ensure_object(Session)
            if session.has_tasks:
                session.app().plugins.contributions("umbel_add_commands", cli=self)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            near = get_close_matches(name, {**self._lines(), **self.commands}, n=1)
            ctx.fail(f"there is no command {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._lines().items()))

    def invoke(self, ctx: click.Context) -> Any:
        here = os.getcwd()
        if sys.path[:1] != [here]:
            sys.path.insert(0, here)
        ctx.call_on_close(ctx.ensure_object(Session).close)
        try:
            return super().invoke(ctx)
        except UmbelError as error:
            if os.environ.get("UMBEL_DEBUG") == "1":
                raise
            raise (WrongSettings if isinstance(error, SettingsError) else Failure)(error) from error


@click.group(
    cls=Root,
    params=list(shared_options(hidden=False)),
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The options may stand after the command too. Exit status: 0 done, 1 failed, 2 wrong usage or settings, "
    "3 (result) no record. UMBEL_DEBUG=1 shows tracebacks.",
)
@click.version_option(package_name="umbel-core", prog_name="umbel")
@click.pass_context
def root(ctx: click.Context) -> None:
    """Umbel: a distributed task queue."""
    if ctx.invoked_subcommand is None:
        lines = root._lines()
        width = max(map(len, lines))
        click.echo(_TEACHING.format(commands="\n".join(f"  {name:{width}}  {line}" for name, line in lines.items())))
