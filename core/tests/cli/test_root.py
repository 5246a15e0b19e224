"""The root: teaching, laziness, finding commands and apps, errors and exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import click
import pytest

from umbel.cli.group import COMMANDS
from umbel.errors import UmbelError
from umbel.plugins import loader


def all_commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = import_module(f"umbel.cli.{name.replace('-', '_')}").command
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", each) for below, each in command.commands.items())


def install(folder: Path, name: str, target: str, source: str, command: str = "extra") -> None:
    """Write a distribution ``name`` that offers the command ``extra``, or another."""
    info = folder / f"{name.replace('-', '_')}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[umbel.commands]\n{command} = {target}\n")
    (folder / f"{target.partition(':')[0]}.py").write_text(dedent(source))
    loader.forget_installed()


# --- teaching ---


def test_bare_umbel_teaches(umbel: Any, empty: Path) -> None:
    result = umbel()
    assert result.exit_code == 0
    assert "umbel -A tasks worker" in result.stdout
    assert all(f"  {name}" in result.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("name", "command"), list(all_commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_help_shows_an_example(umbel: Any, empty: Path, name: str, command: click.Command) -> None:
    result = umbel(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert "    umbel " in result.stdout or "    UMBEL_" in result.stdout


def test_the_listed_help_is_each_commands_own() -> None:
    own = {name: (command.help or "").partition("\n")[0] for name, command in all_commands() if name in COMMANDS}
    assert own == COMMANDS


def test_version_is_the_kernels(umbel: Any) -> None:
    from importlib.metadata import version

    assert version("umbel-core") in umbel("--version").stdout


# --- laziness ---


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "bare"])
def test_help_imports_no_command_no_stevedore_no_asyncio(arguments: list[str], tmp_path: Path) -> None:
    install(tmp_path, "umbel-extra", "umbel_extra:command", "raise SystemError('imported')")
    script = f"""
    import sys
    from umbel.cli.group import COMMANDS, root
    root({arguments!r}, prog_name="umbel", standalone_mode=False)
    commands = {{f"umbel.cli.{{name.replace('-', '_')}}" for name in COMMANDS}}
    heavy = {{"stevedore", "asyncio", "cattrs", "umbel.app", "umbel_extra"}} | commands
    print("IMPORTED", sorted(heavy & set(sys.modules)))
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    assert "IMPORTED []" in done.stdout
    assert "extra" in done.stdout
    assert "From umbel-extra." in done.stdout


def test_a_command_imports_no_other(tmp_path: Path) -> None:
    script = "import sys; from umbel.cli.group import root\nroot(['worker', '--help'], standalone_mode=False)\n"
    script += "print('IMPORTED', [n for n in ('worker', 'call', 'shell') if f'umbel.cli.{n}' in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "IMPORTED ['worker']" in done.stdout


def test_the_module_is_the_script(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "umbel.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("umbel, version")


# --- commands of others ---

EXTRA = """
import click

@click.command()
@click.pass_obj
def command(session):
    click.echo(f"extra of {session.app().name}")
"""


def test_a_distribution_adds_a_command(umbel: Any, doubles: ModuleType, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    install(tmp_path, "umbel-extra", "umbel_extra:command", EXTRA)
    assert umbel("-A", "tasks", "extra").stdout == "extra of tasks\n"


def test_a_broken_command_is_named_and_harms_no_other(umbel: Any, empty: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    install(tmp_path, "umbel-extra", "umbel_extra:command", "raise ValueError('oh no')")
    result = umbel("extra")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: command 'extra' (umbel-extra 2.0) is broken:")
    assert "oh no" in result.stderr
    assert umbel("config", "schema").exit_code == 0


def test_what_is_no_command_is_refused(umbel: Any, empty: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    install(tmp_path, "umbel-extra", "umbel_extra:command", "command = 3")
    assert "is not a click command" in umbel("extra").stderr


def test_two_commands_of_one_name_are_a_conflict(umbel: Any, empty: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    install(tmp_path, "umbel-extra", "umbel_extra:command", EXTRA)
    install(tmp_path, "umbel-more", "umbel_more:command", EXTRA)
    result = umbel("extra")
    assert result.exit_code == 1
    assert "umbel-extra 2.0" in result.stderr
    assert "umbel-more 2.0" in result.stderr


def test_the_apps_plugins_add_commands(umbel: Any, doubles: ModuleType) -> None:
    Path("adding.py").write_text(
        dedent("""
        import click
        from umbel import Umbel, hookimpl

        class Plugin:
            @hookimpl
            def umbel_add_commands(self, cli):
                cli.add_command(click.Command("added", callback=lambda: click.echo("it runs")))

        app = Umbel("adding", plugins=[Plugin()])
        """)
    )
    assert umbel("-A", "adding", "added").stdout == "it runs\n"


def test_an_unknown_command_has_its_nearest_spelling(umbel: Any, empty: Path) -> None:
    result = umbel("wrker")
    assert result.exit_code == 2
    assert "there is no command 'wrker'; did you mean 'worker'?" in result.stderr


# --- finding the app ---


@pytest.mark.parametrize("arguments", [["-A", "tasks", "config", "show"], ["config", "show", "-A", "tasks"]])
def test_options_stand_before_and_after_the_command(umbel: Any, doubles: ModuleType, arguments: list[str]) -> None:
    assert "command line --app" in umbel(*arguments).stdout


def test_the_settings_name_the_app(umbel: Any, doubles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("umbel.toml").write_text('app = "tasks"\n' + doubles.TOML)
    below = Path("below")
    below.mkdir()
    monkeypatch.chdir(below)
    assert umbel("call", "tasks.add", "1", "2", "--id", "x").stdout == "x\n"
    assert doubles.waiting("default") == ["x"]


def test_the_environment_names_the_app(umbel: Any, doubles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_APP", "tasks")
    result = umbel("call", "tasks.ad")
    assert result.exit_code == 1
    assert "did you mean 'tasks.add'?" in result.stderr


def test_a_script_can_be_the_app(umbel: Any, doubles: ModuleType) -> None:
    assert umbel("-A", "tasks.py:app", "call", "nope").exit_code == 1
    assert umbel("-A", "tasks.py:app", "call", "tasks.add", "1", "2", "--id", "x", "--unchecked").stdout == "x\n"


def test_the_named_file_is_read(umbel: Any, empty: Path) -> None:
    Path("other.toml").write_text('default_queue = "elsewhere"\n')
    assert '"elsewhere"' in umbel("config", "show", "--config", "other.toml").stdout
    result = umbel("config", "show", "--config", "missing.toml")
    assert result.exit_code == 2
    assert "missing.toml: there is no such file" in result.stderr


def test_any_setting_can_be_given(umbel: Any, empty: Path) -> None:
    result = umbel("-o", "worker.grace=2m", "config", "show", "-o", 'tasks."a.*".queue=mail')
    assert "worker.grace" in result.stdout
    assert "120.0" in result.stdout
    assert 'tasks."a.*".queue' in result.stdout


def test_a_setting_without_a_value_is_wrong_usage(umbel: Any, empty: Path) -> None:
    result = umbel("-o", "worker.grace", "config", "show")
    assert result.exit_code == 2
    assert "'worker.grace' is not KEY=VALUE" in result.stderr


# --- errors ---


def test_every_problem_of_the_settings_has_a_line(umbel: Any, empty: Path) -> None:
    result = umbel("-o", "brokr.url=x", "-o", "worker.concurrency=0", "queues")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Error: command line --") for line in lines)


def test_an_error_is_one_sentence(umbel: Any, empty: Path) -> None:
    result = umbel("-A", "nowhere", "queues")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no module 'nowhere'")
    assert "Traceback" not in result.stderr


def test_debugging_shows_tracebacks(umbel: Any, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_DEBUG", "1")
    with pytest.raises(UmbelError, match="nowhere"):
        umbel("-A", "nowhere", "queues")


def test_connections_are_closed(umbel: Any, doubles: ModuleType) -> None:
    umbel("queues")
    assert doubles.FakeTransport.closed == 1


def test_a_distribution_adds_to_a_group(umbel: Any, doubles: ModuleType, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    install(tmp_path, "umbel-extra", "umbel_extra:command", EXTRA, "config.extra")
    assert umbel("-A", "tasks", "config", "extra").stdout == "extra of tasks\n"
    assert "extra" in umbel("config", "--help").stdout
    assert "config.extra" not in umbel("--help").stdout
    assert umbel("config.extra").exit_code == 2
