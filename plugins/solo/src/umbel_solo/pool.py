"""The pool ``solo``: jobs run on the process's main thread, one at a time, while the I/O loop has another."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

from attrs import evolve

from umbel.capabilities import PoolCapabilities
from umbel.errors import NotSupported, SettingsError, SoftTimeLimitExceeded, TaskCancelled, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import Executor, Pool, PoolContext, Running
from umbel_children.loading import load
from umbel_children.run import Window
from umbel_solo.run import Run

logger = logging.getLogger(__name__)

INTERRUPT: int | None = getattr(signal, "SIGUSR1", None)
"""The signal that interrupts the main thread; None where the system has none, and nothing can be interrupted."""
AT_HAND = 0.05
"""Seconds of work kept in reserve, so that the main thread does not idle while the next job is on its way."""
MOST_AT_HAND = 16
"""Jobs in reserve, however short they are."""
CANCEL_GRACE = 1.0
"""Seconds that ``stop`` leaves to a job that it has cancelled, before it gives up on the main thread."""


class SoloPool(Pool):
    """One slot: the main thread, inside ``run_main_thread``, which may be entered before or after ``start``.

    A soft limit and a cancel reach exactly the job they are meant for, by ``SIGUSR1`` to the main thread; they
    interrupt sleeps, locks and most calls that wait. The application must leave ``SIGUSR1`` alone. Nothing can kill
    the main thread, so there is no hard limit, and ``cancel`` with ``force`` does no more than without.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "solo"
    capabilities: PoolCapabilities = PoolCapabilities(
        soft_limit=INTERRUPT is not None, cancel_running=INTERRUPT is not None, main_thread=True
    )

    _loop: asyncio.AbstractEventLoop
    _context: PoolContext

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        # Shared with the main thread, under the lock.
        self._work = threading.Condition()
        self._queue: deque[Job] = deque()
        self._run: Run | None = None
        self._main: int | None = None
        self._executor: Executor | None = None
        self._closing = False
        # The main thread appends, the loop drains; one wake-up is under way at most.
        self._reports: deque[Completion] = deque()
        self._reporting = False
        # The loop's own.
        self._open: set[int] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._ended: list[Completion] = []
        self._news = asyncio.Event()
        self._progress = asyncio.Event()
        self._left = asyncio.Event()
        self._mean_runtime = 1.0
        self._stopping: asyncio.Task[None] | None = None
        self._deadline = math.inf
        self._stopped = False

    async def start(self, context: PoolContext) -> None:
        """Make the executor on a thread of its own. Does not wait for the main thread: jobs do.

        Raises ``SettingsError`` for a concurrency other than 1, ``UmbelError`` when the application cannot be imported or
        is not within ``start_timeout``; ``run_main_thread`` returns then.
        """
        self._loop = asyncio.get_running_loop()
        self._context = context
        try:
            if context.concurrency != 1:
                raise SettingsError(
                    [
                        f"[worker] concurrency is {context.concurrency}, but pool solo runs one task at a time on the "
                        f"main thread: set it to 1, or choose another [worker] pool"
                    ]
                )
            executor = await load(self.name, context, self._upcall, self._on_loop)
        except BaseException:
            self._release()
            raise
        with self._work:
            self._executor = executor
            self._work.notify_all()

    def run_main_thread(self) -> None:
        """See the port. Returns when ``stop`` has ended or ``start`` has failed; ``SIGUSR1`` is the pool's meanwhile.

        Signal handlers run promptly, also between jobs; what they raise then passes through. What one raises inside a
        job ends that job as LOST. Raises ``RuntimeError`` on any other thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("pool solo: run_main_thread() must be called on the main thread")
        with self._interruptible():
            while (taken := self._take()) is not None:
                self._carry_out(*taken)

    def submit(self, jobs: Sequence[Job]) -> None:
        self._open.update(job.id for job in jobs)
        if self._stopping is not None:
            self._give_back(jobs)
            return
        with self._work:
            self._queue.extend(jobs)
            self._work.notify_all()

    @property
    def free(self) -> int:
        """The main thread if it idles, and as many more as keep it busy for ``AT_HAND`` seconds: one at least."""
        reserve = math.ceil(AT_HAND / max(self._mean_runtime, 1e-6))
        return 1 + min(reserve, MOST_AT_HAND) - len(self._open)

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._ended:
                batch, self._ended = self._ended, []
                yield batch
            if self._stopped and not self._ended:
                return

    async def recall(self) -> None:
        with self._work:
            waiting = list(self._queue)
            self._queue.clear()
        self._give_back(waiting)

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        """See the port. True: the job is given back, or ``TaskCancelled`` is on its way into it; it may yet end DONE."""
        with self._work:
            waiting = next((job for job in self._queue if job.id == job_id), None)
            if waiting is not None:
                self._queue.remove(waiting)
            run = self._run
        if waiting is not None:
            self._give_back([waiting])
            return True
        return run is not None and run.job.id == job_id and self._cancel(run)

    def limit(self, job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
        """See the port. A hard limit is not kept, so with one the answer is False."""
        with self._work:
            place = next((place for place, job in enumerate(self._queue) if job.id == job_id), None)
            if place is not None:
                self._queue[place] = evolve(self._queue[place], soft_time_limit=soft_time_limit)
                return time_limit is None
            run = self._run
        if run is None or run.job.id != job_id or job_id not in self._open:
            return False
        run.job = evolve(run.job, soft_time_limit=soft_time_limit)
        if (timer := self._timers.pop(job_id, None)) is not None:
            timer.cancel()
        self._arm_from_start(run)
        return time_limit is None and run.window is not Window.CLOSED

    async def resize(self, concurrency: int) -> None:
        """Raises ``NotSupported``, unless ``concurrency`` is 1."""
        if concurrency != 1:
            raise NotSupported(
                f"pool solo runs one task at a time, not {concurrency}; for more choose another [worker] pool"
            )

    async def stop(self, *, timeout: float) -> None:
        """See the port. A job that still runs when the time is up gets ``TaskCancelled`` and ``CANCEL_GRACE`` seconds.

        If it does not end even then it is reported CANCELLED, and ``run_main_thread`` returns when it does.
        """
        self._loop = asyncio.get_running_loop()
        self._deadline = min(self._deadline, self._loop.time() + timeout)
        self._progress.set()
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    def running(self) -> Mapping[int, Running]:
        run = self._run
        if run is None or run.window is not Window.OPEN:
            return {}
        return {run.job.id: Running(since=run.since, pid=os.getpid())}

    def stats(self) -> Mapping[str, Any]:
        with self._work:
            waiting = len(self._queue)
        return {
            "max-concurrency": 1,
            "processes": [os.getpid()],
            "running": len(self._open) - waiting,
            "waiting": waiting,
        }

    # --- on the loop ----------------------------------------------------------------------------

    async def _stop(self) -> None:
        await self.recall()
        await self._until_all_ended()
        if (run := self._run) is not None:
            self._cancel(run)
        self._deadline = self._loop.time() + CANCEL_GRACE
        await self._until_all_ended()
        self._drain()
        for job_id in list(self._open):
            self._end(Completion(job_id=job_id, ending=Ending.CANCELLED, detail="abandoned by stop"))
        if self._release():
            try:
                async with asyncio.timeout(CANCEL_GRACE):
                    await self._left.wait()
            except TimeoutError:
                logger.warning("pool solo: the main thread does not return from the application's code")
        self._stopped = True
        self._news.set()

    def _release(self) -> bool:
        """Tell the main thread to return from ``run_main_thread``; whether it is inside."""
        with self._work:
            self._closing = True
            self._work.notify_all()
            return self._main is not None

    async def _until_all_ended(self) -> None:
        while self._open and (left := self._deadline - self._loop.time()) > 0:
            self._progress.clear()
            try:
                async with asyncio.timeout(left):
                    await self._progress.wait()
            except TimeoutError:
                return

    def _cancel(self, run: Run) -> bool:
        if run.cancelled:
            return run.window is not Window.CLOSED
        if INTERRUPT is None:
            return False
        run.cancelled = True
        return self._aim(run, TaskCancelled) is not Window.CLOSED

    def _aim(self, run: Run, exception: type[BaseException]) -> Window:
        """Have the main thread raise ``exception`` in ``run`` if its window is open; return how the window was."""
        with self._work:  # who restores the signal's handler passes this lock first: no signal is sent after that
            window = run.window
            if window is Window.OPEN and self._main is not None and INTERRUPT is not None:
                run.aimed.append(exception)
                signal.pthread_kill(self._main, INTERRUPT)
        return window

    def _arm(self, run: Run, at: float) -> None:
        if run.job.id in self._open:
            self._timers[run.job.id] = self._loop.call_at(at, self._soft_limit, run)

    def _arm_from_start(self, run: Run) -> None:
        if run.job.soft_time_limit is not None and run.job.id not in self._timers:
            self._arm(run, (run.since or self._loop.time()) + run.job.soft_time_limit)

    def _soft_limit(self, run: Run) -> None:
        if self._aim(run, SoftTimeLimitExceeded) is Window.AHEAD:
            self._arm(run, self._loop.time() + 0.01)

    def _give_back(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._end(Completion(job_id=job.id, ending=Ending.RETURNED))

    def _drain(self) -> None:
        self._reporting = False  # before the first look: a report from here on wakes the loop again
        while self._reports:
            completion = self._reports.popleft()
            if completion.ending is Ending.DONE:
                self._mean_runtime += (completion.runtime - self._mean_runtime) / 8
            self._end(completion)

    def _end(self, completion: Completion) -> None:
        """Report ``completion``, unless the job has ended already: the main thread may come back after ``stop``."""
        if completion.job_id not in self._open:
            return
        self._open.discard(completion.job_id)
        if (timer := self._timers.pop(completion.job_id, None)) is not None:
            timer.cancel()
        self._ended.append(completion)
        self._news.set()
        self._progress.set()

    # --- on the main thread ---------------------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        previous = None if INTERRUPT is None else signal.signal(INTERRUPT, self._on_signal)
        with self._work:
            self._main = threading.get_ident()
        try:
            yield
        finally:
            with self._work:
                self._main = None
            if INTERRUPT is not None:
                # A signal sent before the lock was passed arrives during this call, while its handler still stands:
                # the default handler would end the process.
                time.sleep(0)
                signal.signal(INTERRUPT, signal.SIG_DFL if previous is None else previous)
            if self._closing:  # else there is no loop yet that could wait for it
                self._on_loop(self._left.set)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if (run := self._run) is not None:
            run.land(getattr(self._executor, "interrupt_thread", None))

    def _take(self) -> tuple[Run, Executor] | None:
        with self._work:
            self._run = None
            while not self._closing:
                if self._executor is not None and self._queue:
                    self._run = Run(self._queue.popleft())
                    return self._run, self._executor
                # No longer: a signal that comes in the moment in which a wait begins is only seen at its end (CPython).
                self._work.wait(1.0)
            return None

    def _carry_out(self, run: Run, executor: Executor) -> None:
        if run.job.soft_time_limit is not None:
            self._on_loop(self._arm_from_start, run)
        run.work(executor)
        self._reports.append(run.completion())
        run.error = None  # its traceback holds the frame that holds the run
        if not self._reporting:
            self._reporting = True
            self._on_loop(self._drain)

    def _upcall(self, verb: str, payload: Any) -> Any:
        async def answer() -> Any:
            return await self._context.upcall(verb, payload)

        call = answer()
        try:
            if self._stopped:
                raise RuntimeError
            future = asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError:
            call.close()
            raise UmbelError(f"upcall {verb!r} has no answer: the worker has stopped, this task lives on") from None
        try:
            return future.result()
        finally:
            future.cancel()  # of effect only if an interruption ended the wait

    def _on_loop(self, callback: Callable[..., object], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            pass  # the loop is closed: the job that came back so late has been reported
