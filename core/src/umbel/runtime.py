"""The I/O plane of a process: one event loop on one thread, made on first use, made anew after a fork."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread of its own. Thread-safe, fork-safe.

    After a fork the child has no thread and no loop of its parent's: the next call starts fresh ones.
    """

    def __init__(self, name: str = "umbel-io") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, started if need be."""
        if self._pid != os.getpid():
            # Only the forking thread lives on in a child, so the parent's lock may be held by nobody.
            self._lock, self._loop, self._thread, self._pid = threading.Lock(), None, None, os.getpid()
        if (loop := self._loop) is not None:
            return loop
        with self._lock:
            if self._loop is None:
                self._start()
            assert self._loop is not None
            return self._loop

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        started = threading.Event()

        def main() -> None:
            asyncio.set_event_loop(loop)
            loop.call_soon(started.set)
            try:
                loop.run_forever()
            finally:
                _finish(loop)

        self._thread = threading.Thread(target=main, name=self._name, daemon=True)
        self._thread.start()
        started.wait()
        self._loop = loop

    @property
    def running(self) -> bool:
        """Whether this process has a loop."""
        return self._loop is not None and self._pid == os.getpid()

    def on_loop(self) -> bool:
        """Whether the caller is on the loop's own thread."""
        return self.running and self._thread is not None and threading.get_ident() == self._thread.ident

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``coroutine`` on the loop; does not wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run ``coroutine`` on the loop and wait for its result; cancel it after ``timeout`` seconds.

        Raises ``TimeoutError``; ``RuntimeError`` on the loop's own thread, where waiting would never end.
        """
        if self.on_loop():
            coroutine.close()
            raise RuntimeError("a synchronous call on the I/O loop would wait for itself; await the async form instead")
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what runs on the loop and end its thread. Waits up to 5 s. Harmless when called twice."""
        if not self.running or self.on_loop():
            return
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            with contextlib.suppress(RuntimeError):  # closed already
                loop.call_soon_threadsafe(loop.stop)
            thread.join(5)


def _finish(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
