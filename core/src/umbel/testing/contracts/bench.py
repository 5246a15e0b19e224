"""How a law is carried out: on an event loop in a thread of its own, within a time, and with everything closed after."""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Final, TypeVar, cast

import pytest
from attrs import frozen

from umbel.ports.clock import Clock, VirtualClock

T = TypeVar("T")

AMPLE: Final = 2
"""How many times as long a lease is within which a law has something to do: the machine may be busy."""
_LAST_CALL: Final = 10.0
"""Seconds that a law gets to end after its time limit, and the main thread to come back after the law."""


def law(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine that takes the fixture ``bench``."""

    @functools.wraps(test)
    def carry_out(self: object, **fixtures: Any) -> None:
        bench: Bench = fixtures["bench"]
        bench.carry_out(functools.partial(test, self, **fixtures))

    return carry_out


class Bench:
    """What a law works with: drivers that are closed after it, and the drivers' time."""

    def __init__(self, *, clock: Clock | None, time_limit: float, patience: float) -> None:
        self.clock = clock
        self.time_limit = time_limit
        self.patience = patience
        self._closers: list[Callable[[], Awaitable[object]]] = []
        self._for_main: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    # --- carrying out ---------------------------------------------------------------------------

    def carry_out(self, coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a law to its end; raise what it raised. Fails if it is not over within the time limit."""
        problems: list[BaseException] = []

        def live() -> None:
            try:
                asyncio.run(self._within_time(coroutine))
            except BaseException as problem:
                problems.append(problem)
            finally:
                self._for_main.put(None)

        thread = threading.Thread(target=live, name="umbel-law", daemon=True)
        thread.start()
        self._serve(time.monotonic() + self.time_limit + _LAST_CALL)
        thread.join(_LAST_CALL)
        if problems:
            raise problems[0]

    async def _within_time(self, coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
        limit = asyncio.timeout(self.time_limit)
        try:
            async with limit:
                try:
                    await coroutine()
                except BaseException:
                    await asyncio.gather(*self._closing(), return_exceptions=True)  # the law's own error is the news
                    raise
                for closed in self._closing():
                    await closed
        except TimeoutError:
            if limit.expired():
                pytest.fail(f"not over after {self.time_limit:g} s")
            raise

    def _closing(self) -> list[Awaitable[object]]:
        closers, self._closers = self._closers, []
        return [close() for close in reversed(closers)]

    def _serve(self, deadline: float) -> None:
        """Do on the main thread what laws ask for, until the law is over."""
        while True:
            try:
                work = self._for_main.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"not over after {self.time_limit:g} s, and deaf: the event loop is blocked")
            if work is None:
                return
            self._do_on_main(work, deadline)

    def _do_on_main(self, work: Callable[[], None], deadline: float) -> None:
        main = threading.get_ident()
        alarm = threading.Timer(max(0.0, deadline - time.monotonic()), lambda: signal.pthread_kill(main, signal.SIGINT))
        alarm.daemon = True
        alarm.start()
        try:
            work()
        except KeyboardInterrupt:
            if alarm.is_alive():
                raise
            pytest.fail(f"the main thread has not come back after {self.time_limit:g} s")
        finally:
            alarm.cancel()

    def on_main(self, work: Callable[[], None]) -> None:
        """Have the main thread do ``work`` while the law goes on."""
        self._for_main.put(work)

    def close_after(self, close: Callable[[], Awaitable[object]]) -> None:
        """Await ``close()`` when the law is over."""
        self._closers.append(close)

    # --- time -----------------------------------------------------------------------------------

    def now(self) -> float:
        """The drivers' time."""
        return time.time() if self.clock is None else self.clock.time()

    async def elapse(self, seconds: float) -> None:
        """Let ``seconds`` of the drivers' time pass: at once by a virtual clock, by sleeping otherwise."""
        if isinstance(self.clock, VirtualClock):
            self.clock.advance(seconds)
            await asyncio.sleep(0.001)
        else:
            await asyncio.sleep(seconds)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for ``condition()`` to hold."""
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"after {self.patience:g} s still not: {what}")
            await asyncio.sleep(0.002)

    async def soon(self, awaitable: Awaitable[T], what: str) -> T:
        """What ``awaitable`` gives, if it does so in time."""
        limit = asyncio.timeout(self.patience)
        try:
            async with limit:
                return await awaitable
        except TimeoutError:
            if limit.expired():
                pytest.fail(f"after {self.patience:g} s still not: {what}")
            raise


def closing(stream: AsyncIterator[T]) -> AbstractAsyncContextManager[AsyncIterator[T]]:
    """``aclosing`` for an iterator of a port, which has ``aclose`` as every async generator has."""
    return aclosing(cast("Any", stream))


async def interrupt(awaitable: Coroutine[Any, Any, T], turn: int) -> T | None:
    """Start a call and cancel it, a little later with each ``turn``; what it gave if it was quicker, None otherwise."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(turn):
        await asyncio.sleep(0)
    if turn >= 8:  # beyond the first few steps of its own, a call mostly waits for a thread or a peer
        await asyncio.sleep((turn - 7) * 0.0004)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


TURNS: Final = range(24)
"""Moments at which laws about cancellation strike."""


# --- leaks ----------------------------------------------------------------------------------------


@frozen
class Belongings:
    """What this process and this event loop hold."""

    tasks: frozenset[asyncio.Task[Any]]
    threads: frozenset[threading.Thread]
    files: frozenset[tuple[int, str]]
    children: frozenset[int]

    @classmethod
    def now(cls) -> Belongings:
        # The loop's own threads (asyncio.to_thread) live as long as the loop.
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return cls(frozenset(asyncio.all_tasks()), frozenset(threads), frozenset(_files()), frozenset(_children()))

    def left_over(self, kind: str) -> list[Any]:
        """What of one kind is there now and was not before."""
        return list(getattr(Belongings.now(), kind) - getattr(self, kind))


def _files() -> list[tuple[int, str]]:
    """Open descriptors and what they are; empty where the system does not tell."""
    folder = next((path for path in ("/proc/self/fd", "/dev/fd") if os.path.isdir(path)), None)
    found = []
    for name in os.listdir(folder) if folder else ():
        try:
            found.append((int(name), os.readlink(f"{folder}/{name}")))
        except OSError:
            pass  # the descriptor of this very listing
    return found


def _children() -> list[int]:
    """Child processes, zombies included; empty where the system does not tell."""
    found: list[int] = []
    folder = f"/proc/{os.getpid()}/task"
    for task in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            with open(f"{folder}/{task}/children") as file:
                found += [int(pid) for pid in file.read().split()]
        except OSError:
            pass  # that thread has just ended
    return found
