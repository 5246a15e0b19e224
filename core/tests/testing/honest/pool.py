"""Honest pools: threads that play whatever their jobs ask for."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar

from attrs import define, evolve, field

from umbel.capabilities import PoolCapabilities
from umbel.errors import NotSupported, SoftTimeLimitExceeded, TaskCancelled, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import Executor, Pool, PoolContext, Running

POLL = 0.001


class Killed(BaseException):
    """Raised in what a pool has given up, which does not listen to anything else."""


@define(eq=False)
class Run:
    """One job while it runs. Whatever is to interrupt it is raised by its next upcall."""

    job: Job
    raising: list[type[BaseException]] = field(factory=list)
    killed: bool = False
    since: float = field(factory=time.monotonic)
    timers: list[asyncio.TimerHandle] = field(factory=list)


class ModestPool(Pool):
    """A thread for each job, and only what every pool must."""

    name: ClassVar[str] = "honest"
    capabilities = PoolCapabilities()

    loop: asyncio.AbstractEventLoop
    context: PoolContext
    executor: Executor

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        self.slots = 0
        self.pending: deque[Job] = deque()
        self.runs: dict[int, Run] = {}
        self.process = os.getpid()
        self.ended: list[Completion] = []
        self.news = asyncio.Event()
        self.local = threading.local()
        self.threads: list[threading.Thread] = []
        self.stopping = self.stopped = False
        self.deadline = float("inf")

    async def start(self, context: PoolContext) -> None:
        self.loop, self.context, self.slots = asyncio.get_running_loop(), context, context.concurrency
        try:
            self.executor = await asyncio.to_thread(context.factory.make, self.upcall)
        except BaseException as error:
            raise UmbelError(f"the application did not load: {error!r}") from error

    def submit(self, jobs: Sequence[Job]) -> None:
        self.pending.extend(jobs)
        self.hand_out()

    def room(self) -> int:
        return self.slots - len(self.runs)

    def hand_out(self) -> None:
        if self.stopping:
            self.return_all()
        while self.pending and self.room() > 0:
            run = Run(self.pending.popleft())
            self.runs[run.job.id] = run
            self.arm(run)
            self.launch(run)

    def launch(self, run: Run) -> None:
        self.threads.append(threading.Thread(target=self.work, args=(run,), daemon=True))
        self.threads[-1].start()

    def arm(self, run: Run) -> None:
        soft, hard = run.job.soft_time_limit, run.job.time_limit
        if soft is not None and self.capabilities.soft_limit:
            run.timers.append(self.loop.call_later(soft, self.soft_limit, run))
        if hard is not None and self.capabilities.hard_limit:
            run.timers.append(self.loop.call_later(hard, self.kill, run, Ending.TIMED_OUT))

    def soft_limit(self, run: Run) -> None:
        run.raising.append(SoftTimeLimitExceeded)

    def work(self, run: Run) -> None:
        self.local.run = run
        try:
            payload = self.executor.execute(run.job.payload)
            end = Completion(job_id=run.job.id, ending=Ending.DONE, payload=payload)
        except TaskCancelled:
            end = Completion(job_id=run.job.id, ending=Ending.CANCELLED)
        except BaseException as error:
            end = Completion(job_id=run.job.id, ending=Ending.LOST, detail=self.told(error))
        if not run.killed:
            self.loop.call_soon_threadsafe(self.finish, run, end)

    def told(self, error: BaseException) -> str:
        return repr(error)

    def upcall(self, verb: str, payload: Any) -> Any:
        run: Run = self.local.run
        if run.killed:
            raise Killed
        if run.raising:
            raise run.raising.pop(0)
        return self.answer(asyncio.run_coroutine_threadsafe(self.ask(verb, payload), self.loop).result)

    def answer(self, result: Callable[[], Any]) -> Any:
        return result()

    async def ask(self, verb: str, payload: Any) -> Any:
        return await self.context.upcall(verb, payload)

    def finish(self, run: Run, end: Completion) -> None:
        if self.runs.pop(run.job.id, None) is not None:
            self.disarm(run)
            self.report(end)
            self.hand_out()

    def disarm(self, run: Run) -> None:
        for timer in run.timers:
            timer.cancel()

    def kill(self, run: Run, ending: Ending) -> None:
        run.killed = True
        self.finish(run, Completion(job_id=run.job.id, ending=ending))

    def report(self, end: Completion) -> None:
        self.ended.append(end)
        self.news.set()

    @property
    def free(self) -> int:
        return 2 * self.slots - len(self.runs) - len(self.pending)

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        while self.ended or not self.stopped:
            await self.news.wait()
            self.news.clear()
            batch, self.ended = self.ended, []
            yield batch

    def running(self) -> Mapping[int, Running]:
        return {run.job.id: Running(since=run.since, pid=self.process) for run in self.runs.values()}

    def return_all(self) -> None:
        while self.pending:
            self.report(Completion(job_id=self.pending.popleft().id, ending=Ending.RETURNED))

    async def recall(self) -> None:
        self.return_all()

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        for job in self.pending:
            if job.id == job_id:
                self.pending.remove(job)
                self.report(Completion(job_id=job_id, ending=Ending.RETURNED))
                return True
        run = self.runs.get(job_id)
        if run is None or not self.capabilities.cancel_running:
            return False
        if force:
            self.kill(run, Ending.CANCELLED)
        else:
            run.raising.append(TaskCancelled)
        return True

    async def resize(self, concurrency: int) -> None:
        if not self.capabilities.resize:
            raise NotSupported("its slots are as many as it began with")
        self.slots = concurrency
        self.hand_out()

    async def stop(self, *, timeout: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + timeout)
        self.stopping = True
        self.return_all()
        while self.runs and time.monotonic() < self.deadline:  # noqa: ASYNC110  # small, not quick
            await asyncio.sleep(POLL)
        for run in list(self.runs.values()):
            self.kill(run, Ending.CANCELLED)
        while self.threads:  # a thread may wait for an answer of this loop: leave it running
            await asyncio.to_thread(self.threads.pop().join)
        self.stopped = True
        self.news.set()


class HonestPool(ModestPool):
    """Can everything that threads of one process can."""

    capabilities = PoolCapabilities(soft_limit=True, hard_limit=True, cancel_running=True, resize=True)


class HonestChildren(HonestPool):
    """Its threads play processes, so that the laws of isolation and of recycling have something to hold of."""

    capabilities = evolve(HonestPool.capabilities, isolated=True, recycle=True)

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        self.begun = 0
        self.process += 1

    def work(self, run: Run) -> None:
        if run.job.payload[0] in ("crash", "a_crash"):
            end = Completion(job_id=run.job.id, ending=Ending.LOST, detail="signal 6 (SIGABRT)")
            self.loop.call_soon_threadsafe(self.crashed, run, end)
        else:
            super().work(run)

    def crashed(self, run: Run, end: Completion) -> None:
        self.finish(run, end)

    def report(self, end: Completion) -> None:
        if end.payload is not None and isinstance(end.payload[0], int):  # it tells which process it ran in
            end = evolve(end, payload=(self.child(), *end.payload[1:]))
        super().report(end)

    def child(self) -> int:
        """The process that would run the next task."""
        self.begun += 1
        return self.process + (self.begun - 1) // (self.context.max_tasks_per_child or 1_000_000)


class HonestCrowd(HonestChildren):
    """Its threads play the jobs of one process: what ends the process ends them all."""

    crowded = False

    def kill(self, run: Run, ending: Ending) -> None:
        super().kill(run, ending)
        if self.crowded and not self.stopping:
            self.take_along(Ending.COLLATERAL)

    def crashed(self, run: Run, end: Completion) -> None:
        super().crashed(run, end)
        if self.crowded:
            self.take_along(Ending.COLLATERAL)

    def take_along(self, ending: Ending) -> None:
        for beside in list(self.runs.values()):
            super().kill(beside, ending)
