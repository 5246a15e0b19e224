"""What Umbel wants of a step: it starts, runs beside the worker, and leaves nothing behind."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from umbel.plugins.manager import PluginManager
from umbel.ports.step import Step
from {{ cookiecutter.__package }} import step
from {{ cookiecutter.__package }}.step import {{ cookiecutter.__class }}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "alive"
    monkeypatch.setenv(step.FILE, str(path))
    monkeypatch.setattr(step, "INTERVAL", 0.01)
    return path


def contributed() -> Step:
    plugins = PluginManager()
    plugins.load_hooks(["{{ cookiecutter.name }}"])
    (heartbeat,) = plugins.contributions("umbel_add_steps", worker=None)
    assert isinstance(heartbeat, Step)
    return heartbeat


def touched_within(path: Path, last_poll: float | None) -> bool:
    """Start the step beside a worker whose broker answered at ``last_poll``; whether the file is touched again."""
    worker: Any = SimpleNamespace(intake=SimpleNamespace(last_poll=last_poll))

    with asyncio.Runner() as runner:
        heartbeat = contributed()
        runner.run(heartbeat.start(worker))
        path.unlink()
        runner.run(asyncio.sleep(0.2))
        touched = path.exists()
        runner.run(heartbeat.stop(worker))
        assert not path.exists()
        assert not asyncio.all_tasks(runner.get_loop())
        return touched


def test_it_touches_the_file_while_the_broker_answers(path: Path) -> None:
    assert touched_within(path, time.monotonic())


@pytest.mark.parametrize("last_poll", [None, -1000.0])
def test_it_lets_the_file_age_when_the_broker_is_silent(path: Path, last_poll: float | None) -> None:
    assert not touched_within(path, last_poll and time.monotonic() + last_poll)


def test_the_plugin_is_made_without_arguments() -> None:
    assert {{ cookiecutter.__class }}().umbel_add_steps()
