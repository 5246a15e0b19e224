"""One event loop a process, on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest

from umbel.runtime import LoopThread

from .fakes import eventually


@pytest.fixture
def runtime() -> Iterator[LoopThread]:
    runtime = LoopThread("test-io")
    yield runtime
    runtime.stop()


async def ident() -> int:
    return threading.get_ident()


def in_child(check: Callable[[], bool]) -> bool:
    """Whether ``check()`` holds in a forked child; the child does nothing else and never returns from here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads, which are the point here
        pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # a child that waits for ever would keep its parent waiting
            os._exit(0 if check() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_thread_is_started_before_the_first_use(runtime: LoopThread) -> None:
    assert not runtime.running
    assert runtime.call(ident()) != threading.get_ident()
    assert runtime.running


def test_all_threads_share_one_loop(runtime: LoopThread) -> None:
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(runtime.call(ident()))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 16
    assert len(set(seen)) == 1


def test_what_the_coroutine_raises_is_raised_to_the_caller(runtime: LoopThread) -> None:
    async def fail() -> None:
        raise KeyError("k")

    with pytest.raises(KeyError):
        runtime.call(fail())


def test_a_synchronous_call_on_the_loops_own_thread_is_refused(runtime: LoopThread) -> None:
    async def inner() -> None: ...

    async def outer() -> None:
        assert runtime.on_loop()
        runtime.call(inner())

    with pytest.raises(RuntimeError, match="would wait for itself; await"):
        runtime.call(outer())
    assert not runtime.on_loop()


def test_a_timeout_cancels_what_was_called(runtime: LoopThread) -> None:
    cancelled = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        runtime.call(endless(), timeout=0.01)
    assert cancelled.wait(5)


def test_stopping_cancels_what_runs_and_ends_the_thread(runtime: LoopThread) -> None:
    started = threading.Event()

    async def endless() -> None:
        started.set()
        await asyncio.Event().wait()

    future = runtime.submit(endless())
    started.wait(5)
    runtime.stop()
    runtime.stop()
    assert not runtime.running
    assert not any(t.name == "test-io" for t in threading.enumerate())
    with pytest.raises(CancelledError):
        future.result(5)


def test_after_a_stop_the_next_use_starts_anew(runtime: LoopThread) -> None:
    first = runtime.loop
    runtime.stop()
    assert runtime.call(ident())
    assert runtime.loop is not first


def test_the_loop_cannot_stop_itself(runtime: LoopThread) -> None:
    async def stop() -> None:
        runtime.stop()

    runtime.call(stop())
    assert runtime.running


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_child_of_a_fork_gets_a_loop_of_its_own(runtime: LoopThread) -> None:
    parents = runtime.loop

    def check() -> bool:
        return not runtime.running and runtime.call(ident(), 5) > 0 and runtime.loop is not parents

    assert in_child(check)
    assert runtime.running
    assert runtime.loop is parents


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_while_another_thread_holds_the_lock_leaves_the_child_able_to_work(runtime: LoopThread) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime._lock:
            held.set()
            release.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    try:
        assert in_child(lambda: runtime.call(ident(), 5) > 0)
    finally:
        release.set()
        thread.join(60)


def test_a_loop_thread_is_a_daemon(runtime: LoopThread) -> None:
    runtime.call(ident())
    assert eventually(lambda: [t for t in threading.enumerate() if t.name == "test-io"])[0].daemon
