"""Tasks and middleware that are ``async def``: on the running loop, and on a loop of a thread's own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from umbel import Umbel
from umbel.app import Middleware
from umbel.errors import NotSupported, Reject, SoftTimeLimitExceeded, TaskCancelled
from umbel.model import Outcome, Verdict
from umbel.ports.interruption import Interruptible, unwrapped
from umbel.ports.pool import AsyncExecutor
from umbel.task import Request, Task, current_request
from umbel.worker.execution import TaskExecutor
from umbel.worker.outcomes import Records
from umbel.worker.own_loop import OwnLoop

from .conftest import MakeApp
from .fakes import close_runner, eventually

Next = Callable[[Request], Any]


class Runs:
    """Runs messages of an app, awaited or in this thread."""

    def __init__(self, app: Umbel) -> None:
        self.app = app
        self.executor: AsyncExecutor = TaskExecutor(app, "w@here")

    def __call__(self, task: Task[..., Any], *args: Any, how: str) -> Outcome:
        message = self.app.client.message(task.name, args, {}, task.options)
        payload = ("run", message.to_plain(), "default", 1, "")
        if how == "awaited":
            assert self.executor.awaits(payload)
            plain = asyncio.run(self.executor.aexecute(payload))
        else:
            plain = self.executor.execute(payload)
        return Records(self.app, "w@here").from_plain(plain, message)

    def awaits(self, task: Task[..., Any]) -> bool:
        message = self.app.client.message(task.name, (), {}, task.options)
        return self.executor.awaits(("run", message.to_plain(), "default", 1, ""))


@pytest.fixture
def make_runs(make_app: MakeApp) -> Iterator[Callable[..., Runs]]:
    made: list[Runs] = []

    def make(define: Callable[[Umbel], None], middleware: list[Middleware] | None = None) -> Runs:
        app = make_app(middleware=middleware or [])
        define(app)
        made.append(Runs(app))
        return made[-1]

    yield make
    for runs in made:
        close_runner(runs.executor)


def define(app: Umbel) -> None:
    @app.task(name="shop.work")
    async def work(what: Any) -> Any:
        await asyncio.sleep(0)
        assert current_request() is not None
        match what:
            case "fails":
                raise ValueError("no")
            case "rejects":
                raise Reject("never")
            case "is cancelled":
                raise TaskCancelled
            case "cancels itself":
                raise asyncio.CancelledError
            case "groups":
                raise BaseExceptionGroup("", [ValueError("one"), KeyError("two")])
        return what

    @app.task(name="shop.plain")
    def plain(what: Any = None) -> Any:
        return what


@pytest.mark.parametrize("how", ["awaited", "in a thread"])
@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        ("value", Verdict.SUCCESS),
        ("fails", Verdict.FAILURE),
        ("rejects", Verdict.REJECTED),
        ("is cancelled", Verdict.CANCELLED),
        ("cancels itself", Verdict.FAILURE),
        ("groups", Verdict.FAILURE),
    ],
)
def test_a_coroutine_ends_alike_wherever_it_runs(
    make_runs: Callable[..., Runs], what: str, verdict: Verdict, how: str
) -> None:
    runs = make_runs(define)
    outcome = runs(runs.app.tasks["shop.work"], what, how=how)
    assert outcome.verdict is verdict
    if what == "fails":
        assert outcome.traceback is not None
        places = [line for line in outcome.traceback.splitlines() if line.startswith("  File")]
        assert [place.rpartition(" in ")[2] for place in places] == ["work"], "the task's own frames and no others"


def test_only_what_is_async_is_awaited(make_runs: Callable[..., Runs]) -> None:
    runs = make_runs(define)
    assert runs.awaits(runs.app.tasks["shop.work"])
    assert not runs.awaits(runs.app.tasks["shop.plain"])
    assert not runs.executor.awaits(("lost", (), "", 1, ""))


# --- middleware ---------------------------------------------------------------------------------


class Trace:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def sync(self, call_next: Next, request: Request) -> Any:
        self.seen.append("sync in")
        try:
            return call_next(request)
        finally:
            self.seen.append("sync out")

    async def outer(self, call_next: Callable[[Request], Awaitable[Any]], request: Request) -> Any:
        self.seen.append("outer in")
        value = await call_next(request)
        await asyncio.sleep(0)
        self.seen.append("outer out")
        return value

    async def __call__(self, call_next: Callable[[Request], Awaitable[Any]], request: Request) -> Any:
        self.seen.append("inner in")
        value = await call_next(request)
        self.seen.append("inner out")
        return value


@pytest.mark.parametrize("how", ["awaited", "in a thread"])
def test_async_middleware_waits_for_a_coroutine(make_runs: Callable[..., Runs], how: str) -> None:
    trace = Trace()
    runs = make_runs(define, [trace.outer, trace])
    assert runs(runs.app.tasks["shop.work"], "value", how=how).verdict is Verdict.SUCCESS
    assert trace.seen == ["outer in", "inner in", "inner out", "outer out"]


def test_async_middleware_wraps_plain_functions_too(make_runs: Callable[..., Runs]) -> None:
    trace = Trace()
    runs = make_runs(define, [trace.outer, trace])
    assert runs(runs.app.tasks["shop.plain"], 1, how="in a thread").verdict is Verdict.SUCCESS
    assert trace.seen == ["outer in", "inner in", "inner out", "outer out"]


def test_middleware_that_is_not_async_has_coroutines_run_in_threads_and_waits_for_them(
    make_runs: Callable[..., Runs],
) -> None:
    trace = Trace()
    runs = make_runs(define, [trace.sync, trace.outer])
    assert not runs.awaits(runs.app.tasks["shop.work"])
    assert runs(runs.app.tasks["shop.work"], "value", how="in a thread").verdict is Verdict.SUCCESS
    assert trace.seen == ["sync in", "outer in", "outer out", "sync out"]


def test_middleware_that_cannot_wait_for_what_it_wraps_is_refused(make_runs: Callable[..., Runs]) -> None:
    trace = Trace()
    with pytest.raises(NotSupported, match=r"Trace\.sync is inside of Trace\.outer, which is async def"):
        make_runs(define, [trace.outer, trace.sync])


# --- a thread's own loop ------------------------------------------------------------------------


@pytest.mark.parametrize("exception", [SoftTimeLimitExceeded, TaskCancelled])
def test_a_coroutine_that_waits_on_its_threads_own_loop_is_interrupted_there(exception: type[BaseException]) -> None:
    own = OwnLoop()
    waits = threading.Event()
    met: list[BaseException] = []

    async def wait() -> str:
        asyncio.get_running_loop().call_soon(waits.set)
        try:
            await asyncio.sleep(60)
        except exception as error:
            met.append(error)
            await asyncio.sleep(0.01)  # it goes on as if it had never been cancelled
            return "caught"
        return "slept"

    def interrupt() -> None:
        assert waits.wait(10)
        eventually(lambda: own.interrupt(exception))

    other = threading.Thread(target=interrupt)
    other.start()
    try:
        began = time.monotonic()
        assert own.run(wait()) == "caught"
        assert time.monotonic() - began < 30
    finally:
        other.join(30)
    assert isinstance(met[0], asyncio.CancelledError)
    assert not own.interrupt(exception), "nothing waits there"
    assert own.run(asyncio.sleep(0, "next")) == "next"
    own.close()


def test_a_task_that_waits_on_its_threads_own_loop_is_interrupted_by_its_executor(
    make_runs: Callable[..., Runs],
) -> None:
    waits = threading.Event()

    def define(app: Umbel) -> None:
        @app.task(name="shop.wait")
        async def wait() -> str:
            asyncio.get_running_loop().call_soon(waits.set)
            try:
                await asyncio.sleep(60)
            except SoftTimeLimitExceeded:
                return "caught"
            return "slept"

    runs = make_runs(define)
    thread = threading.get_ident()

    def interrupt() -> None:
        assert waits.wait(10)
        eventually(lambda: runs.executor.interrupt_thread(thread, SoftTimeLimitExceeded))

    other = threading.Thread(target=interrupt)
    other.start()
    assert runs(runs.app.tasks["shop.wait"], how="in a thread").verdict is Verdict.SUCCESS
    other.join(30)
    assert not runs.executor.interrupt_thread(thread, SoftTimeLimitExceeded)


def test_code_that_runs_is_not_interrupted_by_the_loop() -> None:
    own = OwnLoop()

    async def look() -> bool:
        return own.interrupt(TaskCancelled)

    assert own.run(look()) is False
    own.close()


def test_an_interruption_comes_out_of_the_groups_that_wrap_it() -> None:
    async def main() -> BaseException:
        now = Interruptible()

        async def work() -> None:
            async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
                outer.create_task(asyncio.sleep(60))
                inner.create_task(asyncio.sleep(60))
                asyncio.get_running_loop().call_soon(now.interrupt, SoftTimeLimitExceeded)
                await asyncio.sleep(60)

        async def run() -> BaseException:
            try:
                await now.steps(work(), [0], 0, 1)
            except BaseException as error:
                return error
            raise AssertionError

        now.task = asyncio.create_task(run())
        return await now.task

    error = asyncio.run(main())
    assert isinstance(unwrapped(error), SoftTimeLimitExceeded)
    other = BaseExceptionGroup("", [ValueError("its own")])
    assert unwrapped(other) is other
