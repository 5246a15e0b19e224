"""The generated pages hold all that the code has: nothing is forgotten, nothing is told in other words."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import attrs
import click
import pytest

from umbel import capabilities, errors, hookspecs, model
from umbel.cli.group import root
from umbel.model import TaskOptions
from umbel.ports import clock, compressor, pool, result_store, scheduler, serializer, transport
from umbel.settings.schema import Settings
from umbel.settings.structure import json_schema, reference
from umbel.task import CallOptions

ROOT = Path(__file__).resolve().parents[2]
PORTS = (transport, result_store, serializer, compressor, pool, scheduler, clock)


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("umbel_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load_generator()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("generated")
    GENERATE.write(folder)
    return {path.stem: path.read_text() for path in folder.iterdir()}


def own_classes(module: ModuleType) -> list[type]:
    found = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [cls for cls in found if not cls.__name__.startswith("_")]


def flat(text: str) -> str:
    return " ".join(text.replace("\\|", "|").split())


def test_the_same_code_gives_the_same_pages(pages: dict[str, str], tmp_path: Path) -> None:
    GENERATE.write(tmp_path)
    assert {path.stem: path.read_text() for path in tmp_path.iterdir()} == pages


def test_a_page_that_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    GENERATE.write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (changed := tmp_path / "errors.md").write_text("old")
    GENERATE.write(tmp_path)
    assert {p for p, time in before.items() if p.stat().st_mtime_ns != time} == {changed}
    assert "SettingsError" in changed.read_text()


def test_every_setting_is_there(pages: dict[str, str]) -> None:
    text = pages["settings"]
    rows = reference(Settings)
    assert len(rows) > 50
    for key, _, default, help_ in rows:
        table, _, name = key.rpartition(".")
        section = text.partition(f"## `[{table}]`" if table else "## Above all tables")[2].partition("\n## ")[0]
        row = next((line for line in section.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert help_ in row.replace("\\|", "|"), key
        assert default in row, key
    for section in json_schema(Settings)["properties"]:
        assert section in text


def test_every_hook_is_there_with_its_signature(pages: dict[str, str]) -> None:
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("umbel_")}
    assert len(hooks) > 15
    for name, function in hooks.items():
        parameters = ", ".join(f"{p.name}: {p.annotation}" for p in inspect.signature(function).parameters.values())
        returns = inspect.signature(function).return_annotation
        assert f"def {name}({parameters}) -> {returns}\n" in pages["hooks"]
        assert flat(inspect.getdoc(function) or "") in flat(pages["hooks"])


def test_every_task_option_is_there(pages: dict[str, str]) -> None:
    options, _, call = pages["tasks"].partition("## Options of one call")
    for field in attrs.fields(TaskOptions):
        assert f"| `{field.name}` | " in options
        assert f"| `{field.default!r}` |" in next(x for x in options.splitlines() if x.startswith(f"| `{field.name}` "))
    for name in CallOptions.__annotations__:
        assert f"| `{name}` | " in call


def all_commands(command: click.Command, words: tuple[str, ...]) -> dict[tuple[str, ...], click.Command]:
    found = {words: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= all_commands(below, (*words, name))
    return found


def test_every_command_and_option_is_there(pages: dict[str, str]) -> None:
    known = all_commands(root, ("umbel",))
    assert len(known) > 15
    for words, command in known.items():
        section = pages["cli"].partition(f"# {' '.join(words)}\n")[2].partition("\n##")[0]
        assert f"Usage: {' '.join(words)}" in section
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert all(option in section for option in parameter.opts), (words, parameter.opts)


@pytest.mark.parametrize("module", PORTS, ids=lambda module: module.__name__)
def test_every_method_of_a_port_is_there(module: ModuleType, pages: dict[str, str]) -> None:
    text = flat(pages["ports"])
    for cls in own_classes(module):
        assert flat(inspect.getdoc(cls) or "") in text, cls
        for name, member in vars(cls).items():
            if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
                continue
            assert f"# {cls.__name__}.{name} " in text
            function = cast("Any", member.fget if isinstance(member, property) else member)
            assert flat(inspect.getdoc(function) or "") in text
            if inspect.isfunction(member):
                for parameter in list(inspect.signature(member).parameters.values())[1:]:
                    assert f"{parameter.name}: {parameter.annotation}".replace('"', "'") in text


@pytest.mark.parametrize(
    ("page", "module"),
    [("errors", errors), ("model", model), ("capabilities", capabilities)],
    ids=lambda x: str(x)[:20],
)
def test_every_class_is_there(page: str, module: ModuleType, pages: dict[str, str]) -> None:
    for cls in own_classes(module):
        if cls is not TaskOptions:
            assert cls.__name__ in pages[page]
            for field in attrs.fields(cls) if attrs.has(cls) else ():
                assert f"| `{field.name}` | " in pages[page]


def test_every_plugin_is_there(pages: dict[str, str]) -> None:
    folders = [path.name for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").is_file()]
    assert len(folders) >= 9
    for name in folders:
        assert f"\n## umbel-{name}\n" in pages["plugins"]
