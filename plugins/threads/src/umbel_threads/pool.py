"""The pool ``threads``: jobs run in threads of the worker's own process, with one executor between them."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar

from attrs import evolve

from umbel.capabilities import PoolCapabilities
from umbel.errors import SettingsError, SoftTimeLimitExceeded, TaskCancelled, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import Executor, Pool, PoolContext, Running
from umbel_children.loading import load
from umbel_children.run import Window
from umbel_children.slot import Run, Slot, wait_interruptibly

logger = logging.getLogger(__name__)

AT_HAND = 0.05
"""Seconds of work kept in reserve, so that no thread idles while the next job is on its way."""
MOST_AT_HAND = 16
"""Jobs in reserve for each thread, however short they are."""
CANCEL_GRACE = 1.0
"""Seconds that ``stop`` leaves to jobs that it has cancelled, before it abandons their threads."""


class ThreadsPool(Pool):
    """Threads that share one executor and one queue of jobs.

    A soft limit and a cancel raise in exactly the job they are meant for, at its next bytecode: a job inside a call
    into C (a sleep, a socket without a timeout, a long regular expression) is interrupted when that call returns, and
    one that waits for an upcall at once. Nothing can kill a thread, so there is no hard limit, and ``cancel`` with
    ``force`` does no more than without.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "threads"
    capabilities: PoolCapabilities = PoolCapabilities(soft_limit=True, cancel_running=True, resize=True)

    _loop: asyncio.AbstractEventLoop
    _context: PoolContext
    _executor: Executor

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        # Shared with the threads, under the lock.
        self._work = threading.Condition()
        self._queue: deque[Job] = deque()
        self._slots: set[Slot] = set()
        self._target = 0
        self._closing = False
        # Threads append, the loop drains; one wake-up is under way at most.
        self._reports: deque[Completion] = deque()
        self._reporting = False
        # The loop's own.
        self._open: set[int] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._ended: list[Completion] = []
        self._news = asyncio.Event()
        self._progress = asyncio.Event()
        self._mean_runtime = 1.0
        self._numbers = 0
        self._stopping: asyncio.Task[None] | None = None
        self._deadline = math.inf
        self._stopped = False

    async def start(self, context: PoolContext) -> None:
        """Make the executor on a thread of its own, then start the threads.

        Raises ``SettingsError`` for a concurrency below 1, ``UmbelError`` when the application cannot be imported or
        is not within ``start_timeout``.
        """
        _check(context.concurrency)
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._executor = await load(self.name, context, self._upcall, self._on_loop)
        await self.resize(context.concurrency)

    def submit(self, jobs: Sequence[Job]) -> None:
        self._open.update(job.id for job in jobs)
        with self._work:
            refused = self._stopping is not None
            if not refused:
                self._queue.extend(jobs)
                self._work.notify(len(jobs))
        if refused:
            self._give_back(jobs)

    @property
    def free(self) -> int:
        """Idle threads, and as many more as keep all threads busy for ``AT_HAND`` seconds: one at least."""
        reserve = math.ceil(self._target * AT_HAND / max(self._mean_runtime, 1e-6))
        return self._target + max(1, min(reserve, MOST_AT_HAND * self._target)) - len(self._open)

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
            taken = {slot.run.job.id: (slot, slot.run) for slot in self._slots if slot.run is not None}
        if waiting is not None:
            self._give_back([waiting])
            return True
        return job_id in taken and self._cancel(*taken[job_id])

    def limit(self, job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
        """See the port. A hard limit is not kept, so with one the answer is False."""
        with self._work:
            place = next((place for place, job in enumerate(self._queue) if job.id == job_id), None)
            if place is not None:
                self._queue[place] = evolve(self._queue[place], soft_time_limit=soft_time_limit)
                return time_limit is None
            taken = next(((s, s.run) for s in self._slots if s.run is not None and s.run.job.id == job_id), None)
        if taken is None or job_id not in self._open:
            return False
        slot, run = taken
        run.job = evolve(run.job, soft_time_limit=soft_time_limit)
        if (timer := self._timers.pop(job_id, None)) is not None:
            timer.cancel()
        self._arm_from_start(slot, run)
        return time_limit is None and run.window is not Window.CLOSED

    async def resize(self, concurrency: int) -> None:
        """See the port. Raises ``SettingsError`` for a concurrency below 1."""
        _check(concurrency)
        if self._stopping is not None:
            return
        with self._work:
            self._target = concurrency
            missing = [Slot() for _ in range(concurrency - len(self._slots))]
            self._slots.update(missing)
            self._work.notify_all()
        for slot in missing:
            self._numbers += 1
            name = f"umbel-threads-{self._numbers}"
            slot.thread = threading.Thread(target=self._live, args=(slot,), name=name, daemon=True)
            slot.thread.start()

    async def stop(self, *, timeout: float) -> None:
        """See the port. A thread that does not end is abandoned: its job is CANCELLED, and what it does later is lost.

        Jobs that still run when the time is up get ``TaskCancelled`` and ``CANCEL_GRACE`` seconds to answer it.
        """
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + timeout)
        self._progress.set()
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    def running(self) -> Mapping[int, Running]:
        with self._work:
            runs = [slot.run for slot in self._slots if slot.run is not None]
        return {run.job.id: Running(since=run.since, pid=os.getpid()) for run in runs if run.window is Window.OPEN}

    def stats(self) -> Mapping[str, Any]:
        with self._work:
            threads = sorted(slot.thread.name for slot in self._slots if slot.thread is not None)
            waiting = len(self._queue)
        return {
            "max-concurrency": self._target,
            "processes": [os.getpid()],
            "threads": threads,
            "running": len(self._open) - waiting,
            "waiting": waiting,
        }

    # --- on the loop ----------------------------------------------------------------------------

    async def _stop(self) -> None:
        await self.recall()
        await self._until_all_ended()
        for slot, run in self._running():
            self._cancel(slot, run)
        self._deadline = asyncio.get_running_loop().time() + CANCEL_GRACE
        await self._until_all_ended()
        self._drain()
        if self._open:
            logger.warning(
                "pool threads: %d jobs did not answer their cancellation; their threads are abandoned", len(self._open)
            )
        abandoned = set(self._open)
        for job_id in abandoned:
            self._end(Completion(job_id=job_id, ending=Ending.CANCELLED, detail="abandoned by stop"))
        with self._work:
            self._closing = True
            ending = [slot.thread for slot in self._slots if slot.run is None or slot.run.job.id not in abandoned]
            self._work.notify_all()
        for thread in ending:
            if thread is not None:
                thread.join()  # it has nothing to do but to return
        self._stopped = True
        self._news.set()

    async def _until_all_ended(self) -> None:
        while self._open and (left := self._deadline - self._loop.time()) > 0:
            self._progress.clear()
            try:
                async with asyncio.timeout(left):
                    await self._progress.wait()
            except TimeoutError:
                return

    def _running(self) -> list[tuple[Slot, Run]]:
        with self._work:
            return [(slot, slot.run) for slot in self._slots if slot.run is not None]

    def _cancel(self, slot: Slot, run: Run) -> bool:
        if run.cancelled:
            return run.window is not Window.CLOSED
        run.cancelled = True
        return slot.interrupt(run, TaskCancelled) is not Window.CLOSED

    def _arm(self, slot: Slot, run: Run, at: float) -> None:
        if run.job.id in self._open:
            self._timers[run.job.id] = self._loop.call_at(at, self._soft_limit, slot, run)

    def _arm_from_start(self, slot: Slot, run: Run) -> None:
        if run.job.soft_time_limit is not None and run.job.id not in self._timers:
            self._arm(slot, run, (run.since or self._loop.time()) + run.job.soft_time_limit)

    def _soft_limit(self, slot: Slot, run: Run) -> None:
        if slot.interrupt(run, SoftTimeLimitExceeded) is Window.AHEAD:
            self._arm(slot, run, self._loop.time() + 0.01)

    def _give_back(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._end(Completion(job_id=job.id, ending=Ending.RETURNED))

    def _drain(self) -> None:
        self._reporting = False  # before the first look: whoever reports from here on wakes the loop again
        while self._reports:
            completion = self._reports.popleft()
            if completion.ending is Ending.DONE:
                self._mean_runtime += (completion.runtime - self._mean_runtime) / 8
            self._end(completion)

    def _end(self, completion: Completion) -> None:
        """Report ``completion``, unless the job has ended already: an abandoned thread may come back."""
        if completion.job_id not in self._open:
            return
        self._open.discard(completion.job_id)
        if (timer := self._timers.pop(completion.job_id, None)) is not None:
            timer.cancel()
        self._ended.append(completion)
        self._news.set()
        self._progress.set()

    # --- in the threads -------------------------------------------------------------------------

    def _live(self, slot: Slot) -> None:
        while (run := self._take(slot)) is not None:
            if run.job.soft_time_limit is not None:
                self._on_loop(self._arm_from_start, slot, run)
            slot.work(run, self._executor)
            self._reports.append(run.completion())
            run.error = None  # its traceback holds the frame that holds the run
            if not self._reporting:
                self._reporting = True
                self._on_loop(self._drain)

    def _take(self, slot: Slot) -> Run | None:
        with self._work:
            slot.run = None
            while not (self._closing or len(self._slots) > self._target):
                if self._queue:
                    slot.run = Run(self._queue.popleft())
                    return slot.run
                self._work.wait()
            self._slots.discard(slot)
            return None

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
            raise UmbelError(f"upcall {verb!r} has no answer: the worker has stopped, this thread lives on") from None
        return wait_interruptibly(future)

    def _on_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            pass  # the loop is closed: this thread was abandoned, and its job reported


def _check(concurrency: int) -> None:
    if concurrency < 1:
        raise SettingsError([f"[worker] concurrency is {concurrency}: pool threads needs 1 thread at least"])
