"""Where user code runs: threads of the worker's own process that share one executor and one queue of jobs."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar

from umbel.capabilities import PoolCapabilities
from umbel.errors import NotSupported, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import Executor, Pool, PoolContext


class {{ cookiecutter.__class }}(Pool):
    """Runs jobs and interrupts none: no limits, no cancelling of what runs. What it does not declare, the worker refuses."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "{{ cookiecutter.name }}"
    capabilities: PoolCapabilities = PoolCapabilities()

    _loop: asyncio.AbstractEventLoop
    _context: PoolContext

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        # Shared with the threads, under the lock.
        self._work = threading.Condition()
        self._queue: deque[Job] = deque()
        self._closing = False
        # The loop's own.
        self._threads: list[threading.Thread] = []
        self._open: set[int] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended: asyncio.Queue[Completion | None] = asyncio.Queue()
        self._stopping = self._stopped = False

    async def start(self, context: PoolContext) -> None:
        self._loop, self._context = asyncio.get_running_loop(), context
        made: asyncio.Future[Executor | BaseException] = self._loop.create_future()
        self._spawn(self._load, made)
        done, _ = await asyncio.wait([made], timeout=context.start_timeout)
        executor = made.result() if done else TimeoutError(f"not within {context.start_timeout:g} s")
        if isinstance(executor, BaseException):
            told = f"{type(executor).__name__}: {executor}"
            raise UmbelError(f"pool {self.name}: the application did not load: {told}") from executor
        self._threads = [self._spawn(self._live, executor) for _ in range(context.concurrency)]

    def submit(self, jobs: Sequence[Job]) -> None:
        self._open.update(job.id for job in jobs)
        self._idle.clear()
        with self._work:
            self._queue.extend(jobs)
            self._work.notify(len(jobs))
        if self._stopping:
            self._give_back(lambda job: True)

    @property
    def free(self) -> int:
        return len(self._threads) - len(self._open)

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        while (completion := await self._ended.get()) is not None:
            yield [completion]

    async def recall(self) -> None:
        self._give_back(lambda job: True)

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        return self._give_back(lambda job: job.id == job_id)

    async def resize(self, concurrency: int) -> None:
        raise NotSupported(f"pool {self.name} keeps its size: set [worker] concurrency, and start the worker again")

    async def stop(self, *, timeout: float) -> None:
        """See the port. A thread whose job does not end in time is abandoned; being a daemon, it ends with the process."""
        self._stopping = True
        self._give_back(lambda job: True)
        await asyncio.wait([asyncio.ensure_future(self._idle.wait())], timeout=timeout)
        abandoned = list(self._open)
        for job_id in abandoned:
            self._end(Completion(job_id=job_id, ending=Ending.CANCELLED, detail="abandoned by stop"))
        with self._work:
            self._closing = True
            self._work.notify_all()
        for thread in self._threads if not abandoned else ():
            thread.join()  # it has nothing to do but to return
        if not self._stopped:
            self._stopped = True
            self._ended.put_nowait(None)

    def stats(self) -> Mapping[str, Any]:
        return {"max-concurrency": len(self._threads), "processes": [os.getpid()]}

    def _give_back(self, chosen: Callable[[Job], bool]) -> bool:
        with self._work:
            returned = [job for job in self._queue if chosen(job)]
            self._queue = deque(job for job in self._queue if not chosen(job))
        for job in returned:
            self._end(Completion(job_id=job.id, ending=Ending.RETURNED))
        return bool(returned)

    def _end(self, completion: Completion) -> None:
        """Report the end of a job, unless it was reported: an abandoned thread may come back."""
        if completion.job_id in self._open:
            self._open.discard(completion.job_id)
            self._ended.put_nowait(completion)
            if not self._open:
                self._idle.set()

    # --- in the threads -------------------------------------------------------------------------

    def _spawn(self, target: Callable[..., None], argument: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=(argument,), name=f"umbel-{self.name}", daemon=True)
        thread.start()
        return thread

    def _load(self, made: asyncio.Future[Executor | BaseException]) -> None:
        result: Executor | BaseException
        try:
            result = self._context.factory.make(self._upcall)
        except BaseException as error:  # user code: it may even call sys.exit
            result = error
        self._on_loop(made.set_result, result)

    def _live(self, executor: Executor) -> None:
        while (job := self._take()) is not None:
            started = time.monotonic()
            payload, detail = None, ""
            try:
                payload = executor.execute(job.payload)
            except BaseException as error:  # what escapes the executor, SystemExit included, ends the job only
                detail = f"{type(error).__name__}: {error}"
            ending = Ending.LOST if payload is None else Ending.DONE
            runtime = time.monotonic() - started
            self._on_loop(
                self._end,
                Completion(job_id=job.id, ending=ending, payload=payload, detail=detail, runtime=runtime),
            )

    def _take(self) -> Job | None:
        with self._work:
            while not (self._queue or self._closing):
                self._work.wait()
            return None if self._closing else self._queue.popleft()

    def _upcall(self, verb: str, payload: Any) -> Any:
        async def answer() -> Any:
            return await self._context.upcall(verb, payload)

        if self._stopped:
            raise UmbelError(f"upcall {verb!r} has no answer: the worker has stopped, and this thread lives on")
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result()

    def _on_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            pass  # the loop is closed: this thread was abandoned, and its job reported
