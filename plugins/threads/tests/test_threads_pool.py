"""The laws of the pool port, with threads."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from umbel.errors import SettingsError, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import ExecutorFactory, PoolContext
from umbel_threads import pool as pool_module
from umbel_threads.pool import ThreadsPool


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = import_module("threads_executor")
    yield module
    for gate in module.gates.values():
        gate.set()
    module.gates.clear()
    module.seen.clear()
    module.made.clear()
    del sys.modules["threads_executor"]


class Bench:
    """A started pool, the completions it has reported, and ascending job ids."""

    def __init__(self, pool: ThreadsPool) -> None:
        self.pool = pool
        self.ends: dict[int, Completion] = {}
        self.batches = 0
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
            self.batches += 1
            for completion in batch:
                assert completion.job_id not in self.ends, "a job ended twice"
                self.ends[completion.job_id] = completion
            self._changed.set()

    async def end(self, job_id: int) -> Completion:
        while job_id not in self.ends:
            self._changed.clear()
            await self._changed.wait()
        return self.ends[job_id]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # the condition changes in another thread
        await asyncio.sleep(0.001)


async def no_upcall(verb: str, payload: Any) -> Any:
    raise AssertionError(f"unexpected upcall {verb}")


def context(concurrency: int, upcall: Any = no_upcall, start_timeout: float = 10, **arguments: Any) -> PoolContext:
    factory = ExecutorFactory(target="threads_executor:make", arguments=arguments)
    return PoolContext(factory=factory, concurrency=concurrency, upcall=upcall, start_timeout=start_timeout)


@asynccontextmanager
async def running(concurrency: int, upcall: Any = no_upcall) -> AsyncIterator[Bench]:
    bench = Bench(ThreadsPool())
    collecting = asyncio.ensure_future(bench.collect())
    await bench.pool.start(context(concurrency, upcall))
    try:
        yield bench
    finally:
        await bench.pool.stop(timeout=5)
        await asyncio.wait_for(collecting, 5)


def run(test: Callable[[Bench], Coroutine[Any, Any, None]], concurrency: int = 2, upcall: Any = no_upcall) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), running(concurrency, upcall) as bench:
            await test(bench)
        assert bench.pool.stats()["running"] == bench.pool.stats()["waiting"] == 0
        assert not [t for t in threading.enumerate() if t.name.startswith("umbel-threads") and t.is_alive()]

    asyncio.run(main())


def test_jobs_run_in_named_daemons_with_one_executor(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        tasks.gates["g"] = threading.Event()
        bench.submit(("hold", "g"), ("hold", "g"), ("where",))
        await until(lambda: len(tasks.seen) == 2)
        assert len(tasks.seen) == 2
        tasks.gates["g"].set()
        name, daemon, ident = (await bench.end(3)).payload
        assert name.startswith("umbel-threads-")
        assert daemon
        assert ident != threading.get_ident()
        assert tasks.made == ["umbel-threads-load"]

    run(test)


def test_every_job_ends_in_one_completion_and_completions_come_in_batches(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        ids = bench.submit(*(("echo", n) for n in range(2000)))
        for n, job_id in enumerate(ids):
            completion = await bench.end(job_id)
            assert (completion.ending, completion.payload) == (Ending.DONE, ("echo", n))
        assert bench.batches < 2000

    run(test, concurrency=4)


@pytest.mark.parametrize(
    ("payload", "detail"),
    [
        (("exit", 3), "SystemExit: 3"),
        (("interrupt",), "KeyboardInterrupt"),
        (("nothing",), "the executor returned None"),
        (("unprintable",), "threads_executor.Executor.unprintable.<locals>.Odd: <exception str() failed>"),
    ],
)
def test_what_escapes_the_executor_is_a_lost_job_and_the_pool_lives(
    tasks: ModuleType, payload: tuple[Any, ...], detail: str
) -> None:
    async def test(bench: Bench) -> None:
        (lost,) = bench.submit(payload)
        completion = await bench.end(lost)
        assert (completion.ending, completion.payload, completion.detail) == (Ending.LOST, None, detail)
        (after,) = bench.submit(("echo", 1))
        assert (await bench.end(after)).ending is Ending.DONE

    run(test, concurrency=1)


def test_an_error_of_a_job_leaves_no_garbage_behind(tasks: ModuleType) -> None:
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

    run(test, concurrency=1)


def test_upcalls_are_answered_on_the_loop(tasks: ModuleType) -> None:
    async def upcall(verb: str, payload: Any) -> Any:
        assert threading.current_thread() is threading.main_thread()
        if verb == "refuse":
            raise ValueError(f"not {payload}")
        await asyncio.sleep(0)
        return [verb, payload]

    async def test(bench: Bench) -> None:
        ids = bench.submit(("ask", "publish", {"n": 1}), ("ask", "refuse", "this"))
        assert (await bench.end(ids[0])).payload == ("answer", ["publish", {"n": 1}])
        assert (await bench.end(ids[1])).payload == ("refused", "not this")

    run(test, upcall=upcall)


def test_the_soft_limit_is_raised_in_the_task(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (soft,) = bench.submit(("soft",), soft_time_limit=0.02)
        (other,) = bench.submit(("spin", 0.1))
        completion = await bench.end(soft)
        assert (completion.ending, completion.payload) == (Ending.DONE, ("soft",))
        assert completion.runtime >= 0.02
        assert (await bench.end(other)).payload == ("spun",)
        (escaped,) = bench.submit(("spin",), soft_time_limit=0.02)
        completion = await bench.end(escaped)
        assert (completion.ending, completion.detail) == (Ending.LOST, "umbel.errors.SoftTimeLimitExceeded")

    run(test)


def test_a_soft_limit_that_is_not_reached_harms_nobody(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (quick,) = bench.submit(("echo", 1), soft_time_limit=0.03)
        (next_one,) = bench.submit(("spin", 0.1))
        assert (await bench.end(quick)).ending is Ending.DONE
        assert (await bench.end(next_one)).payload == ("spun",)
        assert not bench.pool._timers

    run(test, concurrency=1)


def test_cancel_of_running_waiting_ended_and_unknown_jobs(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        running, waiting = bench.submit(("spin",), ("echo", 1))
        await until(lambda: bool(tasks.seen))
        assert await bench.pool.cancel(waiting, force=False)
        assert (await bench.end(waiting)).ending is Ending.RETURNED
        assert await bench.pool.cancel(running, force=True)
        completion = await bench.end(running)
        assert (completion.ending, completion.payload) == (Ending.CANCELLED, None)
        assert not await bench.pool.cancel(running, force=False)
        assert not await bench.pool.cancel(999, force=False)
        assert (await bench.end(*bench.submit(("echo", 2)))).ending is Ending.DONE

    run(test, concurrency=1)


def test_a_cancel_after_a_soft_limit_that_was_caught(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("soft_then_spin",), soft_time_limit=0.01)
        await until(lambda: len(tasks.seen) == 2)
        assert await bench.pool.cancel(job, force=False)
        assert (await bench.end(job)).ending is Ending.CANCELLED

    run(test)


def test_a_task_that_finishes_in_spite_of_its_cancel_is_done(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("stubborn",))
        await until(lambda: bool(tasks.seen))
        assert await bench.pool.cancel(job, force=False)
        completion = await bench.end(job)
        assert (completion.ending, completion.payload) == (Ending.DONE, ("finished all the same",))

    run(test)


def test_a_cancel_reaches_a_task_that_waits_for_an_upcall(tasks: ModuleType) -> None:
    cancelled = []

    async def upcall(verb: str, payload: Any) -> Any:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(verb)
            raise

    async def test(bench: Bench) -> None:
        (job,) = bench.submit(("ask", "wait", None))
        await until(lambda: any(slot.upcall for slot in bench.pool._slots))
        await asyncio.sleep(0.01)
        assert await bench.pool.cancel(job, force=False)
        assert (await bench.end(job)).ending is Ending.CANCELLED
        await until(lambda: cancelled == ["wait"])

    run(test, upcall=upcall)


def test_an_interruption_never_hits_another_job(tasks: ModuleType) -> None:
    """Cancels and soft limits aimed at the very end of short jobs, where a late one would land in the next."""

    async def test(bench: Bench) -> None:
        chance = random.Random(7)
        cancelled = 0
        for turn in range(1500):
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
        run(test, concurrency=2)
    finally:
        sys.setswitchinterval(interval)


def test_recall_gives_back_what_has_not_started(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        tasks.gates["g"] = threading.Event()
        held, *waiting = bench.submit(("hold", "g"), ("echo", 1), ("echo", 2))
        await until(lambda: tasks.seen == ["g"])
        await bench.pool.recall()
        assert [(await bench.end(job_id)).ending for job_id in waiting] == [Ending.RETURNED] * 2
        tasks.gates["g"].set()
        assert (await bench.end(held)).ending is Ending.DONE

    run(test, concurrency=1)


def test_free_asks_for_idle_threads_and_a_reserve_that_follows_the_runtime(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        tasks.gates["g"] = threading.Event()
        assert bench.pool.free == 4
        bench.submit(*[("hold", "g")] * 3)
        assert bench.pool.free == 1
        bench.submit(*[("hold", "g")] * 3)
        assert bench.pool.free == -2
        tasks.gates["g"].set()
        await bench.end(6)
        for job_id in bench.submit(*[("echo", 1)] * 100):
            await bench.end(job_id)
        assert 4 < bench.pool.free <= 3 + 3 * pool_module.MOST_AT_HAND

    run(test, concurrency=3)


def test_resize_grows_at_once_and_shrinks_after_the_running_jobs(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        tasks.gates["g"] = threading.Event()
        await bench.pool.resize(3)
        held = bench.submit(*[("hold", "g")] * 4)
        await until(lambda: len(tasks.seen) == 3)
        assert bench.pool.stats()["max-concurrency"] == 3
        await bench.pool.resize(1)
        assert len(bench.pool.stats()["threads"]) == 3
        tasks.gates["g"].set()
        for job_id in held:
            assert (await bench.end(job_id)).ending is Ending.DONE
        await until(lambda: len(bench.pool.stats()["threads"]) == 1)
        with pytest.raises(SettingsError, match=r"\[worker\] concurrency is 0"):
            await bench.pool.resize(0)

    run(test, concurrency=1)


def test_stop_waits_for_running_jobs_and_returns_the_others(tasks: ModuleType) -> None:
    async def main() -> None:
        tasks.gates["g"] = threading.Event()
        async with asyncio.timeout(20), running(1) as bench:
            held, waiting = bench.submit(("hold", "g"), ("echo", 1))
            await until(lambda: tasks.seen == ["g"])
            stopping = asyncio.ensure_future(bench.pool.stop(timeout=10))
            assert (await bench.end(waiting)).ending is Ending.RETURNED
            (late,) = bench.submit(("echo", 2))
            assert (await bench.end(late)).ending is Ending.RETURNED
            assert not stopping.done()
            tasks.gates["g"].set()
            await stopping
            assert (await bench.end(held)).ending is Ending.DONE

    asyncio.run(main())


def test_a_second_stop_shortens_the_wait_and_cancels_what_runs(tasks: ModuleType) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), running(2) as bench:
            jobs = bench.submit(("spin", 60), ("stubborn",))
            await until(lambda: len(tasks.seen) == 2)
            patient = asyncio.ensure_future(bench.pool.stop(timeout=600))
            await asyncio.sleep(0.01)
            await bench.pool.stop(timeout=0.01)
            await patient
            assert [(await bench.end(job)).ending for job in jobs] == [Ending.CANCELLED, Ending.DONE]
            assert not [t for t in threading.enumerate() if t.name.startswith("umbel-threads")]

    asyncio.run(main())


def test_a_thread_that_does_not_end_is_abandoned_and_its_late_end_is_not_reported(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "CANCEL_GRACE", 0.02)

    async def main() -> None:
        tasks.gates["g"] = threading.Event()
        async with asyncio.timeout(20), running(2) as bench:
            (stuck,) = bench.submit(("hold", "g"))
            await until(lambda: tasks.seen == ["g"])
            await bench.pool.stop(timeout=0)
            assert (await bench.end(stuck)).ending is Ending.CANCELLED
            (thread,) = [t for t in threading.enumerate() if t.name.startswith("umbel-threads")]
            tasks.gates["g"].set()
            thread.join(5)
            assert not thread.is_alive()
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert "1 jobs did not answer" in caplog.text


def test_an_abandoned_thread_outlives_the_loop_without_harm(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CANCEL_GRACE", 0.01)
    tasks.gates["g"] = threading.Event()

    async def main() -> None:
        async with asyncio.timeout(20), running(1) as bench:
            bench.submit(("hold", "g"))
            await until(lambda: tasks.seen == ["g"])
            await bench.pool.stop(timeout=0)

    asyncio.run(main())
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("umbel-threads")]
    tasks.gates["g"].set()
    thread.join(5)
    assert not thread.is_alive()


def test_start_tells_why_the_application_did_not_load(tasks: ModuleType) -> None:
    async def start(given: PoolContext) -> None:
        pool = ThreadsPool()
        try:
            await pool.start(given)
        finally:
            await pool.stop(timeout=1)

    with pytest.raises(UmbelError, match="did not load: SystemExit: bad app") as caught:
        asyncio.run(start(context(1, fail="bad app")))
    assert isinstance(caught.value.__cause__, SystemExit)
    tasks.gates["never"] = threading.Event()
    with pytest.raises(UmbelError, match=r"did not load within 0\.01 s"):
        asyncio.run(start(context(1, start_timeout=0.01, hold="never")))
    with pytest.raises(SettingsError, match=r"\[worker\] concurrency is 0"):
        asyncio.run(start(context(0)))


def test_capabilities_promise_no_hard_limit() -> None:
    declared = ThreadsPool.capabilities
    assert (declared.soft_limit, declared.cancel_running, declared.resize) == (True, True, True)
    assert (declared.hard_limit, declared.isolated, declared.recycle, declared.main_thread) == (False,) * 4


def test_what_runs_is_told_with_its_start_and_what_waits_is_not(tasks: ModuleType) -> None:
    async def test(bench: Bench) -> None:
        tasks.gates["g"] = threading.Event()
        before = time.monotonic()
        first, second, third = bench.submit(("hold", "g"), ("hold", "g"), ("hold", "g"))
        await until(lambda: len(tasks.seen) == 2)
        told = bench.pool.running()
        assert told.keys() == {first, second}
        assert all(before <= one.since <= time.monotonic() and one.pid == os.getpid() for one in told.values())
        tasks.gates["g"].set()
        await bench.end(third)
        await until(lambda: bench.pool.running() == {})  # the second may end after the third

    run(test)
