"""``umbel worker``: options, logging, errors. Workers that run are tested beside the real plugins."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs
import pytest

from umbel.capabilities import PoolCapabilities
from umbel.cli import worker
from umbel.settings.schema import WorkerSettings


def test_every_setting_of_the_worker_is_an_option() -> None:
    options = {option for parameter in worker.command.params for option in parameter.opts}
    settings = {f"--{field.name.replace('_', '-')}" for field in attrs.fields(WorkerSettings)}
    assert settings - options == {"--pool-options"}


@pytest.mark.parametrize("isolated", [True, False])
def test_the_collector_is_spared_only_where_no_task_runs(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(gc, "freeze", lambda: said.append("freeze"))
    monkeypatch.setattr(gc, "set_threshold", lambda *thresholds: said.append(thresholds))
    pool = SimpleNamespace(capabilities=PoolCapabilities(isolated=isolated))
    worker.spare_the_collector(SimpleNamespace(pool=pool))  # type: ignore[arg-type]  # what it looks at
    assert said == (["freeze", (50_000, *gc.get_threshold()[1:])] if isolated else [])


class Stopped(Exception):
    """The worker would start now."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a worker would run with."""
    from umbel.app import Umbel

    seen: dict[str, Any] = {}

    def make(app: Umbel) -> None:
        seen["settings"], seen["loaded"] = app.settings, app.loaded
        raise Stopped

    monkeypatch.setattr(Umbel, "worker", make)
    return seen


def test_options_become_settings(umbel: Any, doubles: ModuleType, started: dict[str, Any]) -> None:
    options = ["-Q", "a,b", "-c", "3", "--grace", "2m", "-l", "debug", "-n", "w1", "--max-memory-per-child", "64MiB"]
    with pytest.raises(Stopped):
        umbel("-A", "tasks", "worker", *options, "--pool", "threads", "--broker", "doubles:SilentTransport")
    chosen = started["settings"].worker
    assert chosen.queues == ("a", "b")
    assert (chosen.concurrency, chosen.grace, chosen.log_level, chosen.name) == (3, 120.0, "DEBUG", "w1")
    assert (chosen.max_memory_per_child, chosen.pool, chosen.prefetch) == (64 * 2**20, "threads", None)
    assert started["settings"].broker.url == "doubles:SilentTransport"
    assert started["loaded"].provenance["worker.concurrency"] == "command line --concurrency"
    assert started["loaded"].provenance["worker.prefetch"] == "default"


def test_a_worker_needs_an_app(umbel: Any, empty: Path) -> None:
    result = umbel("worker")
    assert result.exit_code == 2
    assert "give -A MODULE, or set app in umbel.toml" in result.stderr


def test_wrong_settings_are_all_named(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "worker", "-c", "many", "--grace", "soon")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Error: command line --concurrency:")
    assert lines[1].startswith("Error: command line --grace:")


def test_an_unknown_pool_is_one_sentence(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "worker", "-P", "nopool")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no pool 'nopool' is installed")


@contextmanager
def root_logger(*handlers: logging.Handler) -> Iterator[logging.Logger]:
    """The root logger with these handlers and no other, pytest's included."""
    before, level = logging.root.handlers, logging.root.level
    logging.root.handlers, logging.root.level = list(handlers), logging.WARNING
    try:
        yield logging.root
    finally:
        logging.root.handlers = before
        logging.root.setLevel(level)


def test_the_log_is_shown_once(umbel: Any, doubles: ModuleType, started: dict[str, Any]) -> None:
    with root_logger() as root:
        for level, expected in (("error", logging.ERROR), ("debug", logging.ERROR)):
            with pytest.raises(Stopped):
                umbel("-A", "tasks", "worker", "-l", level)
            assert len(root.handlers) == 1
            assert root.level == expected


def test_the_applications_own_logging_is_left_alone(umbel: Any, doubles: ModuleType, started: dict[str, Any]) -> None:
    own = logging.NullHandler()
    with root_logger(own) as root:
        with pytest.raises(Stopped):
            umbel("-A", "tasks", "worker", "-l", "debug")
        assert root.handlers == [own]
        assert root.level == logging.WARNING
