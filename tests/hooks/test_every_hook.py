"""Every hook, end to end: a listener that implements all of them hears each at its moment, with what the hook promises."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from umbel import Umbel, hookimpl, hookspecs
from umbel.capabilities import SchedulerCapabilities
from umbel.cli.group import root
from umbel.model import Action, Lease, ScheduleEntry, Verdict
from umbel.ports.clock import VirtualClock
from umbel.ports.scheduler import Scheduler
from umbel.ports.step import Step
from umbel.ports.timetable import Timetable
from umbel.testing.harness import Harness, in_memory
from umbel.worker.logs import start_log


class NoTimes(Timetable):
    """Nothing is ever due."""

    def next_after(self, moment: float) -> float | None:
        return None


class NoEntries(Scheduler):
    """A store of no entries that nobody leads: what a factory needs to return."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    capabilities = SchedulerCapabilities()

    async def load(self, names: Sequence[str] | None = None, *, declared: bool = False) -> Sequence[ScheduleEntry]:
        return ()

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None: ...

    async def remove(self, names: Sequence[str]) -> int:
        return 0

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        return ()

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        return False

    async def lead(self, owner: str, *, lease: float) -> Lease:
        return Lease(name="leader", owner=owner, fence=1, until=0.0)

    async def leader(self) -> Lease | None:
        return None

    async def close(self) -> None: ...


class Beat(Step):
    name = "beat"
    requires = ("intake",)

    def __init__(self, heard: Heard) -> None:
        self.heard = heard

    async def start(self, worker: Any) -> None:
        self.heard.note("step started")

    async def stop(self, worker: Any) -> None:
        self.heard.note("step stopped")


class Heard:
    """Implements every hook with all of its arguments, and keeps what it hears in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.given: dict[str, dict[str, Any]] = {}
        self.threads: dict[str, str] = {}

    def note(self, hook: str, **given: Any) -> None:
        self.names.append(hook)
        self.given[hook] = given
        self.threads[hook] = threading.current_thread().name

    @hookimpl(wrapper=True)
    def umbel_make_transport(self, url: str, options: Any, clock: Any) -> Iterator[None]:
        made = yield
        self.note("umbel_make_transport", url=url, options=options, clock=clock, made=made)
        return made

    @hookimpl(wrapper=True)
    def umbel_make_result_store(self, url: str, options: Any, clock: Any) -> Iterator[None]:
        made = yield
        self.note("umbel_make_result_store", url=url, options=options, clock=clock, made=made)
        return made

    @hookimpl
    def umbel_make_scheduler(self, url: str, options: Any, clock: Any) -> Scheduler | None:
        self.note("umbel_make_scheduler", url=url, options=options, clock=clock)
        return NoEntries(url, clock=clock) if url.startswith("none://") else None

    @hookimpl
    def umbel_make_timetable(self, schedule: Any) -> Timetable | None:
        self.note("umbel_make_timetable", schedule=schedule)
        return NoTimes() if "none" in schedule else None

    @hookimpl
    def umbel_make_serializer(self, name: str, options: Any) -> None:
        self.note("umbel_make_serializer", name=name, options=options)

    @hookimpl
    def umbel_make_compressor(self, name: str, options: Any) -> None:
        self.note("umbel_make_compressor", name=name, options=options)

    @hookimpl(wrapper=True)
    def umbel_make_pool(self, name: str, options: Any) -> Iterator[None]:
        made = yield
        self.note("umbel_make_pool", name=name, options=options, made=made)
        return made

    @hookimpl
    def umbel_configure(self, app: Any) -> None:
        self.note("umbel_configure", app=app)

    @hookimpl
    def umbel_add_middleware(self, app: Any) -> list[Any]:
        self.note("umbel_add_middleware", app=app)
        return [self.middleware]

    def middleware(self, call_next: Any, request: Any) -> Any:
        self.note("middleware", request=request)
        return call_next(request) + 1

    @hookimpl
    def umbel_add_steps(self, worker: Any) -> list[Step]:
        self.note("umbel_add_steps", worker=worker)
        return [Beat(self)]

    @hookimpl
    def umbel_add_log_handlers(self, app: Any) -> list[logging.Handler]:
        self.note("umbel_add_log_handlers", app=app)
        return [logging.NullHandler()]

    @hookimpl
    def umbel_add_commands(self, cli: Any) -> None:
        self.note("umbel_add_commands", cli=cli)
        cli.command("greet")(lambda: print("hello from a plugin"))

    @hookimpl
    def umbel_before_publish(self, messages: Any) -> None:
        self.note("umbel_before_publish", messages=messages)

    @hookimpl
    def umbel_after_publish(self, messages: Any) -> None:
        self.note("umbel_after_publish", messages=messages)

    @hookimpl
    def umbel_worker_ready(self, worker: Any) -> None:
        self.note("umbel_worker_ready", worker=worker)

    @hookimpl
    def umbel_worker_stopping(self, worker: Any) -> None:
        self.note("umbel_worker_stopping", worker=worker)

    @hookimpl
    def umbel_worker_stopped(self, worker: Any) -> None:
        self.note("umbel_worker_stopped", worker=worker)

    @hookimpl
    def umbel_task_received(self, delivery: Any) -> None:
        self.note("umbel_task_received", delivery=delivery)

    @hookimpl
    def umbel_task_started(self, delivery: Any, started: float, pid: Any) -> None:
        self.note("umbel_task_started", delivery=delivery, started=started, pid=pid)

    @hookimpl
    def umbel_task_settled(self, settlement: Any, outcome: Any) -> None:
        self.note("umbel_task_settled", settlement=settlement, outcome=outcome)

    @hookimpl
    def umbel_child_started(self, app: Any) -> None:
        self.note("umbel_child_started", app=app)

    @hookimpl
    def umbel_before_task(self, request: Any) -> None:
        self.note("umbel_before_task", request=request)

    @hookimpl
    def umbel_after_task(self, request: Any, outcome: Any) -> None:
        self.note("umbel_after_task", request=request, outcome=outcome)


@pytest.fixture(scope="module")
def story() -> tuple[Heard, Harness, str]:
    """One task from sending to settlement, on a worker from start to stop: what was heard of it."""
    heard = Heard()
    app = Umbel(
        "shop", broker="memory://x", results="memory://y", plugins=[heard], settings={"codec.compression": "zlib"}
    )
    add = app.task(name="shop.add")(lambda x, y: x + y)
    with in_memory(app, clock=VirtualClock()) as harness, harness.worker():
        heard.note("begin")
        handle = add.delay(2, 3)
        harness.run_until_idle()
        assert handle.get(10) == 6  # the middleware has added one
        heard.note("end")
    return heard, harness, handle.id


def test_every_hook_is_implemented_here_with_every_argument() -> None:
    for name, spec in vars(hookspecs).items():
        if name.startswith("umbel_"):
            arguments = spec.__code__.co_varnames[: spec.__code__.co_argcount]
            implementation = getattr(Heard, name)
            assert hasattr(implementation, "umbel_impl")
            assert implementation.__code__.co_varnames[1 : implementation.__code__.co_argcount] == arguments


def test_factories_are_asked_with_what_the_settings_say(story: tuple[Heard, Harness, str]) -> None:
    heard, harness, _ = story
    for hook, url in (("umbel_make_transport", "memory://x"), ("umbel_make_result_store", "memory://y")):
        given = heard.given[hook]
        assert (given["url"], given["options"], given["clock"]) == (url, {}, harness.clock)
        assert given["made"].clock is harness.clock
    assert heard.given["umbel_make_pool"]["name"] == "prefork"
    assert heard.given["umbel_make_pool"]["made"].name == "threads"
    assert heard.given["umbel_make_serializer"] == {"name": "json", "options": {}}
    assert heard.given["umbel_make_compressor"] == {"name": "zlib", "options": {}}


def test_a_scheduler_is_the_first_one_that_is_made() -> None:
    heard, clock = Heard(), VirtualClock()
    app = Umbel("shop", plugins=[heard])
    made = app.plugins.make_scheduler("none://x", {"a": 1}, clock)
    assert heard.given["umbel_make_scheduler"] == {"url": "none://x", "options": {"a": 1}, "clock": clock}
    assert isinstance(made, NoEntries)
    assert asyncio.run(made.load()) == ()


def test_a_timetable_is_the_first_one_that_is_made() -> None:
    heard = Heard()
    app = Umbel("shop", plugins=[heard])
    assert isinstance(app.plugins.make_timetable({"none": 1}), NoTimes)
    assert app.plugins.make_timetable({"moon": "full"}) is None
    assert heard.given["umbel_make_timetable"] == {"schedule": {"moon": "full"}}


def test_the_worker_tells_its_life_on_the_io_loop(story: tuple[Heard, Harness, str]) -> None:
    heard, harness, _ = story
    life = [n for n in heard.names if n.startswith(("umbel_worker", "step", "umbel_add_steps", "umbel_configure"))]
    assert life == [
        "umbel_configure", "umbel_add_steps", "step started", "umbel_worker_ready",
        "umbel_worker_stopping", "step stopped", "umbel_worker_stopped",
    ]  # fmt: skip
    assert heard.given["umbel_configure"]["app"] is harness.app
    for hook in ("umbel_add_steps", "umbel_worker_ready", "umbel_worker_stopping", "umbel_worker_stopped"):
        assert heard.given[hook]["worker"].app is harness.app
        assert heard.threads[hook] == "umbel-io"


def test_a_task_is_told_of_at_each_stage_and_on_the_promised_thread(story: tuple[Heard, Harness, str]) -> None:
    heard, _, task_id = story
    way = heard.names[heard.names.index("begin") + 1 : heard.names.index("end")]
    sent, received = way.index("umbel_after_publish"), way.index("umbel_task_received")
    assert way.index("umbel_before_publish") < min(sent, received)
    elsewhere = ("umbel_after_publish", "umbel_make", "umbel_task_started")  # on other threads: before or after
    assert [name for name in way[received:] if not name.startswith(elsewhere)] == [
        "umbel_task_received", "umbel_before_task", "middleware", "umbel_after_task", "umbel_task_settled",
    ]  # fmt: skip
    given, threads = heard.given, heard.threads
    for hook in ("umbel_before_publish", "umbel_after_publish"):
        assert [message.id for message in given[hook]["messages"]] == [task_id]
        assert threads[hook] == threading.main_thread().name
    assert given["umbel_task_received"]["delivery"].message.id == task_id
    assert given["umbel_task_settled"]["settlement"].action is Action.ACK
    assert way.index("umbel_task_received") < way.index("umbel_task_started") < way.index("umbel_task_settled")
    assert given["umbel_task_started"]["delivery"] is given["umbel_task_received"]["delivery"]
    for hook in ("umbel_after_task", "umbel_task_settled"):
        assert (given[hook]["outcome"].verdict, given[hook]["outcome"].task_id) == (Verdict.SUCCESS, task_id)
    for hook in ("umbel_task_received", "umbel_task_started", "umbel_task_settled"):
        assert threads[hook] == "umbel-io"
    for hook in ("umbel_before_task", "middleware", "umbel_after_task"):
        assert given[hook]["request"].id == task_id
        assert threads[hook].startswith("umbel-threads-")


def test_a_child_has_started_before_its_first_task(story: tuple[Heard, Harness, str]) -> None:
    heard, harness, _ = story
    assert heard.names.index("umbel_child_started") < heard.names.index("umbel_before_task")
    assert heard.given["umbel_child_started"]["app"] is harness.app
    assert heard.given["umbel_add_middleware"]["app"] is harness.app


def test_plugins_say_where_the_log_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.root.level
    heard = Heard()
    app = Umbel("shop", plugins=[heard], settings={"worker.log_level": "ERROR"})
    try:
        monkeypatch.setattr(logging.root, "handlers", [])
        start_log(app)
        (handler,) = logging.root.handlers
        assert (type(handler), logging.root.level) == (logging.NullHandler, logging.ERROR)
        assert heard.given["umbel_add_log_handlers"] == {"app": app}
        start_log(app)
        assert logging.root.handlers == [handler], "a log that is arranged for is left alone"
    finally:
        logging.root.setLevel(before)


def test_an_apps_plugin_adds_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(root, "commands", dict(root.commands))
    module, heard = ModuleType("greeting"), Heard()
    module.app = Umbel("greeting", plugins=[heard])  # type: ignore[attr-defined]  # what `umbel -A greeting` looks for
    monkeypatch.setitem(sys.modules, "greeting", module)
    result = CliRunner().invoke(root, ["-A", "greeting", "greet"], prog_name="umbel")
    assert (result.exit_code, result.stdout) == (0, "hello from a plugin\n")
    assert heard.given["umbel_add_commands"] == {"cli": root}
