"""The laws of the pool port, on the main thread. The tests' coroutines run in a thread of their own, as a worker's do."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from umbel.errors import NotSupported, SettingsError, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import ExecutorFactory, PoolContext
from umbel_solo import pool as pool_module
from umbel_solo.pool import SoloPool


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = import_module("solo_executor")
    before = signal.getsignal(signal.SIGUSR1)
    yield module
    assert signal.getsignal(signal.SIGUSR1) == before, "the handler of SIGUSR1 was not restored"
    module.gates.clear()
    module.seen.clear()
    module.made.clear()
    del sys.modules["solo_executor"]


class Bench:
    """A pool, the completions it has reported, and ascending job ids."""

    def __init__(self) -> None:
        self.pool = SoloPool()
        self.ends: dict[int, Completion] = {}
        self._changed = asyncio.Event()
        self._next_id = 0

    def submit(self, *payloads: tuple[Any, ...], **limits: float) -> list[int]:
        jobs = []
        for payload in payloads:
            self._next_id += 1
            jobs.append(Job(id=self._next_id, task="t", payload=payload, **limits))
        self.pool.submit(jobs)
        return [job.id for job in jobs]

    async def collect(self) -> None:
        async for batch in self.pool.completions():
            for completion in batch:
                assert completion.job_id not in self.ends, "a job ended twice"
                self.ends[completion.job_id] = completion
            self._changed.set()

    async def end(self, job_id: int) -> Completion:
        while job_id not in self.ends:
            self._changed.clear()
            await self._changed.wait()
        return self.ends[job_id]


Test = Callable[[Bench], Coroutine[Any, Any, None]]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # the condition changes in another thread
        await asyncio.sleep(0.001)


async def no_upcall(verb: str, payload: Any) -> Any:
    raise AssertionError(f"unexpected upcall {verb}")


def context(concurrency: int = 1, upcall: Any = no_upcall, start_timeout: float = 10, **arguments: Any) -> PoolContext:
    factory = ExecutorFactory(target="solo_executor:make", arguments=arguments)
    return PoolContext(factory=factory, concurrency=concurrency, upcall=upcall, start_timeout=start_timeout)


def drive(bench: Bench, test: Test, given: PoolContext, on_main: Callable[[], None] | None = None) -> None:
    """Run ``test`` on a loop in another thread, and the pool here; raise what the test raised."""
    problems: list[BaseException] = []

    async def main() -> None:
        collecting = asyncio.ensure_future(bench.collect())
        try:
            async with asyncio.timeout(60):
                await bench.pool.start(given)
                await test(bench)
        finally:
            await bench.pool.stop(timeout=5)
            await asyncio.wait_for(collecting, 5)

    def io() -> None:
        try:
            asyncio.run(main())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=io, name="io")
    thread.start()
    try:
        (on_main or bench.pool.run_main_thread)()
    finally:
        thread.join(30)
    assert not thread.is_alive()
    if problems:
        raise problems[0]


def run(test: Test, upcall: Any = no_upcall) -> None:
    bench = Bench()
    drive(bench, test, context(upcall=upcall))
    assert bench.pool.stats()["running"] == bench.pool.stats()["waiting"] == 0


def test_jobs_run_on_the_main_thread_and_the_loop_does_not(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        assert threading.current_thread().name == "io"
        completion = await bench.end(*bench.submit(("where",)))
        assert completion.payload == ("MainThread", False, threading.main_thread().ident)
        assert tasks.made == ["umbel-solo-load"]

    run(test)


def test_every_job_ends_in_one_completion_in_order() -> None:
    async def test(bench: Bench) -> None:
        ids = bench.submit(*(("echo", n) for n in range(1000)))
        for n, job_id in enumerate(ids):
            completion = await bench.end(job_id)
            assert (completion.ending, completion.payload) == (Ending.DONE, ("echo", n))
        assert list(bench.ends) == ids

    run(test)


@pytest.mark.parametrize(
    ("payload", "detail"),
    [
        (("exit", 3), "SystemExit: 3"),
        (("interrupt",), "KeyboardInterrupt"),
        (("nothing",), "the executor returned None"),
        (("unprintable",), "solo_executor.Executor.unprintable.<locals>.Odd: <exception str() failed>"),
    ],
)
def test_what_escapes_the_executor_is_a_lost_job_and_the_pool_lives(payload: tuple[Any, ...], detail: str) -> None:
    async def test(bench: Bench) -> None:
        completion = await bench.end(*bench.submit(payload))
        assert (completion.ending, completion.payload, completion.detail) == (Ending.LOST, None, detail)
        assert (await bench.end(*bench.submit(("echo", 1)))).ending is Ending.DONE

    run(test)


def test_an_error_of_a_job_leaves_no_garbage_behind() -> None:
    async def test(bench: Bench) -> None:
        await bench.end(*bench.submit(("echo", 1)))
        gc.collect()
        gc.disable()
        others = sum(isinstance(o, SystemExit) for o in gc.get_objects())
        try:
            for _ in range(20):
                await bench.end(*bench.submit(("exit", 1)))
            await bench.end(*bench.submit(("echo", 1)))
            # other tests of this process may have left some of their own; a leak here would leave twenty
            assert sum(isinstance(o, SystemExit) for o in gc.get_objects()) - others < 5
        finally:
            gc.enable()

    run(test)


def test_upcalls_are_answered_on_the_loop_and_can_be_interrupted(tasks: ModuleType) -> None:
    cancelled = []

    async def upcall(verb: str, payload: Any) -> Any:
        assert threading.current_thread().name == "io"
        if verb == "refuse":
            raise ValueError(f"not {payload}")
        if verb == "wait":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(verb)
                raise
        return [verb, payload]

    async def test(bench: Bench) -> None:
        ids = bench.submit(("ask", "publish", {"n": 1}), ("ask", "refuse", "this"))
        assert (await bench.end(ids[0])).payload == ("answer", ["publish", {"n": 1}])
        assert (await bench.end(ids[1])).payload == ("refused", "not this")
        (job,) = bench.submit(("ask", "wait", None))
        await until(lambda: len(tasks.seen) == 3)
        await asyncio.sleep(0.01)
        assert await bench.pool.cancel(job, force=False)
        assert (await bench.end(job)).ending is Ending.CANCELLED
        await until(lambda: cancelled == ["wait"])

    run(test, upcall=upcall)


def test_the_soft_limit_interrupts_a_sleep() -> None:
    async def test(bench: Bench) -> None:
        completion = await bench.end(*bench.submit(("soft",), soft_time_limit=0.02))
        assert (completion.ending, completion.payload) == (Ending.DONE, ("soft",))
        assert 0.02 <= completion.runtime < 5
        completion = await bench.end(*bench.submit(("sleep", 10), soft_time_limit=0.02))
        assert (completion.ending, completion.detail) == (Ending.LOST, "umbel.errors.SoftTimeLimitExceeded")

    run(test)


def test_a_soft_limit_that_is_not_reached_harms_nobody() -> None:
    async def test(bench: Bench) -> None:
        quick, other = bench.submit(("echo", 1), soft_time_limit=0.03) + bench.submit(("spin", 0.1))
        assert (await bench.end(quick)).ending is Ending.DONE
        assert (await bench.end(other)).payload == ("spun",)
        assert not bench.pool._timers

    run(test)


def test_cancel_of_running_waiting_ended_and_unknown_jobs(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        sleeping, waiting = bench.submit(("sleep", 30), ("echo", 1))
        await until(lambda: bool(tasks.seen))
        assert await bench.pool.cancel(waiting, force=False)
        assert (await bench.end(waiting)).ending is Ending.RETURNED
        assert await bench.pool.cancel(sleeping, force=True)
        completion = await bench.end(sleeping)
        assert (completion.ending, completion.payload) == (Ending.CANCELLED, None)
        assert not await bench.pool.cancel(sleeping, force=False)
        assert not await bench.pool.cancel(999, force=False)
        assert (await bench.end(*bench.submit(("echo", 2)))).ending is Ending.DONE

    run(test)


def test_a_cancel_after_a_soft_limit_and_a_task_that_finishes_in_spite_of_its_cancel(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("soft_then_spin",), soft_time_limit=0.01)
        await until(lambda: "spin" in tasks.seen)
        assert await bench.pool.cancel(job, force=False)
        assert (await bench.end(job)).ending is Ending.CANCELLED
        tasks.seen.clear()
        (job,) = bench.submit(("stubborn",))
        await until(lambda: bool(tasks.seen))
        assert await bench.pool.cancel(job, force=False)
        assert (await bench.end(job)).payload == ("finished all the same",)

    run(test)


def test_an_interruption_never_hits_another_job() -> None:
    """Cancels and soft limits aimed at the very end of short jobs, where a late one would land in the next."""

    async def test(bench: Bench) -> None:
        chance = random.Random(7)
        cancelled = 0
        for turn in range(600):
            limited = {"soft_time_limit": 0.00005} if turn % 3 == 0 else {}
            (target,) = bench.submit(("count", chance.randrange(2000)), **limited)
            bystanders = bench.submit(*[("count", 300)] * 3)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            cancelled += await bench.pool.cancel(target, force=False)
            completion = await bench.end(target)
            if completion.ending is Ending.LOST:
                assert completion.detail == "umbel.errors.SoftTimeLimitExceeded"
            for job_id in bystanders:
                assert (await bench.end(job_id)).payload == ("counted", 44850)
        assert cancelled > 0

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        run(test)
    finally:
        sys.setswitchinterval(interval)


def test_a_signal_on_its_way_while_the_main_thread_leaves_does_not_end_the_process(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("count", 1000))
        await until(lambda: bench.pool._run is not None or job in bench.ends)
        stopping = asyncio.ensure_future(bench.pool.stop(timeout=5))
        await bench.pool.cancel(job, force=False)
        await stopping
        assert (await bench.end(job)).ending in (Ending.DONE, Ending.CANCELLED, Ending.RETURNED)

    for _ in range(50):
        run(test)


def test_a_stray_signal_harms_nobody(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("spin", 0.05))
        await until(lambda: bool(tasks.seen))
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0)
        assert (await bench.end(job)).payload == ("spun",)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (await bench.end(*bench.submit(("echo", 1)))).ending is Ending.DONE

    run(test)


def test_the_idle_main_thread_reacts_to_signals() -> None:
    bench, heard = Bench(), threading.Event()

    async def test(bench: Bench) -> None:
        await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)
        await until(heard.is_set)

    previous = signal.signal(signal.SIGUSR2, lambda signum, frame: heard.set())
    try:
        drive(bench, test, context())
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_recall_and_free(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        assert bench.pool.free == 2
        tasks.gates["g"] = threading.Event()
        held, *waiting = bench.submit(("hold", "g"), ("echo", 1), ("echo", 2))
        assert bench.pool.free == -1
        await until(lambda: tasks.seen == ["g"])
        await bench.pool.recall()
        assert [(await bench.end(job_id)).ending for job_id in waiting] == [Ending.RETURNED] * 2
        tasks.gates["g"].set()
        assert (await bench.end(held)).ending is Ending.DONE
        for job_id in bench.submit(*[("echo", 1)] * 100):
            await bench.end(job_id)
        assert 2 < bench.pool.free <= 1 + pool_module.MOST_AT_HAND

    run(test)


def test_stop_waits_returns_the_others_and_a_second_stop_shortens_the_wait(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        sleeping, waiting = bench.submit(("sleep", 60), ("echo", 1))
        await until(lambda: bool(tasks.seen))
        patient = asyncio.ensure_future(bench.pool.stop(timeout=600))
        assert (await bench.end(waiting)).ending is Ending.RETURNED
        assert (await bench.end(*bench.submit(("echo", 2)))).ending is Ending.RETURNED
        await asyncio.sleep(0.01)
        assert not patient.done()
        await bench.pool.stop(timeout=0.01)
        await patient
        assert (await bench.end(sleeping)).ending is Ending.CANCELLED
        assert bench.pool._main is None

    run(test)


def test_a_job_that_does_not_end_is_reported_and_the_main_thread_returns_when_it_does(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "CANCEL_GRACE", 0.02)
    tasks.gates["g"] = threading.Event()

    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("deaf", "g"))
        await until(lambda: bool(tasks.seen))
        await bench.pool.stop(timeout=0)
        assert (await bench.end(job)).ending is Ending.CANCELLED
        assert bench.pool._main is not None
        tasks.gates["g"].set()

    run(test)
    assert "the main thread does not return" in caplog.text


def test_run_main_thread_may_be_entered_after_start_and_before_it() -> None:
    started, entering = threading.Event(), threading.Event()

    async def late(bench: Bench) -> None:
        (job,) = bench.submit(("where",))
        started.set()
        assert (await bench.end(job)).payload[0] == "MainThread"

    bench = Bench()
    drive(bench, late, context(), on_main=lambda: started.wait(10) and bench.pool.run_main_thread())

    class Early(SoloPool):
        async def start(self, context: PoolContext) -> None:
            await until(lambda: self._main is not None)
            entering.set()
            await super().start(context)

    async def early(bench: Bench) -> None:
        assert entering.is_set()
        assert (await bench.end(*bench.submit(("where",)))).payload[0] == "MainThread"

    bench = Bench()
    bench.pool = Early()
    drive(bench, early, context())


def test_start_tells_why_it_failed_and_the_main_thread_returns(tasks: ModuleType) -> None:
    async def never(bench: Bench) -> None:
        raise AssertionError("started")

    with pytest.raises(UmbelError, match="did not load: SystemExit: bad app") as caught:
        drive(Bench(), never, context(fail="bad app"))
    assert isinstance(caught.value.__cause__, SystemExit)
    with pytest.raises(SettingsError, match=r"\[worker\] concurrency is 4, but pool solo"):
        drive(Bench(), never, context(4))
    tasks.gates["slow"] = threading.Event()
    with pytest.raises(UmbelError, match=r"did not load within 0\.01 s"):
        drive(Bench(), never, context(start_timeout=0.01, hold="slow"))
    tasks.gates["slow"].set()


def test_stop_before_start_releases_the_main_thread() -> None:
    pool = SoloPool()
    thread = threading.Thread(target=lambda: asyncio.run(pool.stop(timeout=1)))
    thread.start()
    pool.run_main_thread()
    thread.join(5)
    assert not thread.is_alive()


def test_only_the_main_thread_and_only_one_slot() -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            SoloPool().run_main_thread()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(5)
    assert "must be called on the main thread" in str(caught[0])

    async def resize() -> None:
        await SoloPool().resize(1)
        with pytest.raises(NotSupported, match="one task at a time, not 2"):
            await SoloPool().resize(2)

    asyncio.run(resize())


def test_capabilities() -> None:
    declared = SoloPool.capabilities
    assert (declared.main_thread, declared.soft_limit, declared.cancel_running) == (True, True, True)
    assert (declared.hard_limit, declared.isolated, declared.recycle, declared.resize) == (False,) * 4


def test_what_runs_is_told_with_its_start_and_what_waits_is_not(tasks: ModuleType) -> None:
    bench = Bench()

    async def test(bench: Bench) -> None:
        tasks.gates["g"] = threading.Event()
        before = time.monotonic()
        first, second = bench.submit(("hold", "g"), ("echo", 1))
        await until(lambda: bool(tasks.seen))
        ((job_id, told),) = bench.pool.running().items()
        assert (job_id, told.pid) == (first, os.getpid())
        assert before <= told.since <= time.monotonic()
        tasks.gates["g"].set()
        await bench.end(second)
        await until(lambda: bench.pool.running() == {})

    drive(bench, test, context())
