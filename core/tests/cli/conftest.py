"""A project in a directory of its own, and ``umbel`` called in this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from umbel.cli.group import root
from umbel.plugins import loader

Run = Callable[..., Result]

USERS_MODULES = ("tasks", "adding", "coded", "doubles", "umbel_extra", "umbel_more", "__umbel_main__")
"""What the tests write and import."""

TASKS = """
from umbel import Umbel

app = Umbel("tasks")

@app.task
def add(x, y):
    return x + y

@app.task(ignore_result=True)
def quiet():
    pass
"""


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a call of ``umbel`` leaves in the process is gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("UMBEL_APP", "UMBEL_CONFIG", "UMBEL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    modules, commands = set(sys.modules), dict(root.commands)
    loader.forget_installed()
    yield
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in USERS_MODULES:
            del sys.modules[name]
    root.commands = commands
    loader.forget_installed()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an empty one."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The working directory: one with tasks.py and an umbel.toml that names the doubles, which are returned."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tasks.py").write_text(TASKS)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("doubles")
    (folder / "umbel.toml").write_text(module.TOML)
    return module


@pytest.fixture
def umbel() -> Run:
    """``umbel("queues", "--json")``: call the command line; an unexpected exception fails the test."""

    def run(*arguments: str, **more: Any) -> Result:
        for name in (
            "tasks",
            "adding",
            "coded",
            "__umbel_main__",
        ):  # each call of `umbel` is a process of its own and reads its settings once
            sys.modules.pop(name, None)
        result = CliRunner().invoke(root, list(arguments), prog_name="umbel", **more)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
