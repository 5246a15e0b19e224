"""What one call of ``umbel`` works with: the app, as the options that every command takes name and configure it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from attrs import define, field

from umbel.errors import PluginBroken, SettingsError, UmbelError

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.gateway import LocalGateway

T = TypeVar("T")


@define
class Session:
    """The options of one call, and the app made of them. Third-party commands find it in ``click.Context.obj``."""

    reference: str | None = None
    """The app that ``-A`` names."""
    file: str | None = None
    overrides: dict[str, str] = field(factory=dict)
    """Settings of the command line, by dotted key."""
    _app: Umbel | None = field(default=None, init=False)

    def app(self, *, required: bool = False) -> Umbel:
        """The app that ``-A`` names, else the settings; without either a bare one, unless it is ``required``.

        Imports the application, but nothing is connected. Raises ``UmbelError``, ``click.UsageError``.
        """
        if self._app is None:
            # Here and not above: `umbel --help` is to cost no import of asyncio.
            from umbel.app import Umbel
            from umbel.finding import find_app

            self._enter_project()
            reference = self.reference or self._named_by_settings()
            if reference is None and required:
                raise click.UsageError("this command needs your tasks: give -A MODULE, or set app in umbel.toml")
            app = Umbel("cli") if reference is None else find_app(reference)
            if self.file or self.overrides or self.reference:
                app.configure(file=self.file, command_line=self._command_line())
            self._app = app
        return self._app

    @property
    def has_tasks(self) -> bool:
        """Whether ``app`` is the user's, whose tasks are known."""
        return self.app().reference is not None

    def close(self) -> None:
        """Close the app's connections."""
        if self._app is not None:
            self._app.close()

    def _named_by_settings(self) -> str | None:
        from umbel.settings.sources import load

        loaded = load(file=self.file, command_line=self.overrides)
        return loaded.settings.app

    def _enter_project(self) -> None:
        """Work in the folder of a settings file that was found above this one, so that what it names relative to itself
        (modules, an SQLite file) is the same from every folder of the project."""
        from umbel.settings.sources import load

        if self.file is None and "UMBEL_CONFIG" not in os.environ and (found := load(command_line=self.overrides).file):
            os.chdir(found.parent)
            if sys.path[0] != str(found.parent):
                sys.path.insert(1, str(found.parent))

    def _command_line(self) -> dict[str, str]:
        if self.reference is None or self.reference.partition(":")[0].endswith(".py"):  # a script is no setting
            return self.overrides
        return {**self.overrides, "app": self.reference}


pass_session = click.make_pass_decorator(Session, ensure=True)


def on_gateway(app: Umbel, work: Callable[[LocalGateway], Coroutine[Any, Any, T]]) -> T:
    """Run ``work`` with the app's connections, on its I/O loop, and wait. Raises what ``work`` raises."""
    gateway = cast("LocalGateway", app.gateway)  # the command line never runs in a worker's child

    async def run() -> T:
        return await work(gateway)

    return gateway.runtime.call(run())


def sentences(error: UmbelError) -> list[str]:
    """What is wrong: a sentence for each problem."""
    return list(error.problems) if isinstance(error, SettingsError) else [str(error) or type(error).__name__]


# --- options that every command takes -------------------------------------------------------------


def shared_options(*, hidden: bool) -> list[click.Option]:
    """The options that may stand before a command and after it."""

    def option(*names: str, help: str, metavar: str, callback: Callable[..., None], **more: Any) -> click.Option:
        return click.Option(
            names, help=help, metavar=metavar, callback=callback, expose_value=False, hidden=hidden, **more
        )

    return [
        option(
            "-A",
            "--app",
            metavar="MODULE[:ATTR]",
            callback=_set_app,
            help="The application; else the setting app, or UMBEL_APP.",
        ),
        option("--config", metavar="FILE", callback=_set_file, help="Settings file; else umbel.toml here or above."),
        option("--broker", metavar="URL", callback=_set_url, help="Address of the broker."),
        option("--results", metavar="URL", callback=_set_url, help="Address of the result store."),
        option(
            "-o",
            "--set",
            metavar="KEY=VALUE",
            callback=_set_values,
            multiple=True,
            help="Any setting, such as codec.compression=gzip; as often as you like.",
        ),
    ]


def _set_app(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    session = ctx.ensure_object(Session)
    session.reference = value or session.reference


def _set_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    session = ctx.ensure_object(Session)
    session.file = value or session.file


def _set_url(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Session).overrides[f"{param.name}.url"] = value


def _set_values(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> None:
    for text in values:
        key, is_pair, value = text.partition("=")
        if not (is_pair and key.strip()):
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", ctx, param)
        ctx.ensure_object(Session).overrides[key.strip()] = value.strip()


class _WithSharedOptions(click.Command):
    def __init__(self, *arguments: Any, **more: Any) -> None:
        more.setdefault(
            "epilog", "-A, --config, --broker, --results and -o may stand here as well as before the command."
        )
        super().__init__(*arguments, **more)
        self.params = [*self.params, *shared_options(hidden=True)]


class Command(_WithSharedOptions):
    """A command after which the options of ``umbel`` itself may stand too."""


class Group(_WithSharedOptions, click.Group):
    """A command with commands of its own, likewise; entry points of ``umbel.commands`` named ``GROUP.NAME`` add to them."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *installed_commands(f"{self.name}.")})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        return plugin_command(f"{self.name}.{cmd_name}") if cmd_name in installed_commands(f"{self.name}.") else None


def installed_commands(group: str = "") -> dict[str, str]:
    """Commands of the entry points ``umbel.commands`` and their distributions; ``group``: of that group (``config.``) only."""
    from umbel.plugins.kinds import COMMAND
    from umbel.plugins.loader import installed

    names = {point.name: point.dist.name if point.dist else "?" for point in installed(COMMAND)}
    short = {name.removeprefix(group): distribution for name, distribution in names.items() if name.startswith(group)}
    return {name: distribution for name, distribution in short.items() if "." not in name}


def plugin_command(name: str) -> click.Command:
    """Import a command that a distribution offers. Raises ``PluginError``."""
    from umbel.plugins.loader import load_command

    command, source = load_command(name)
    if not isinstance(command, click.Command):
        raise source.refuse(PluginBroken, f"is broken: {source.target} is not a click command")
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
