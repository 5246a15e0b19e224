"""What the laws of the pool port work with: a worker's stand-in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from umbel.capabilities import PoolCapabilities
from umbel.errors import PublishRefused
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import ExecutorFactory, Pool, PoolContext
from umbel.testing.contracts.bench import Bench


class PoolBench(Bench):
    """Makes and starts pools, answers their upcalls, and opens the gates that jobs wait at."""

    def __init__(self, make: Callable[[], Pool], *, time_limit: float, patience: float, quiet: float) -> None:
        super().__init__(clock=None, time_limit=time_limit, patience=patience)
        self._make = make
        self.quiet = quiet
        self.started: list[str] = []
        """Gates at which jobs have begun to wait, in that order."""
        self.open: set[str] = set()
        self.all_open = False

    @property
    def capabilities(self) -> PoolCapabilities:
        return self._make().capabilities

    @property
    def slots(self) -> int:
        """How many slots laws ask for."""
        return 1 if self.capabilities.main_thread else 2

    def pool(self) -> Pool:
        return self._make()

    async def answer(self, verb: str, payload: Any) -> Any:
        """Upcalls of the kit's executor."""
        match verb:
            case "started":
                self.started.append(payload)
                return None
            case "open?":
                return self.all_open or payload in self.open
            case "double":
                return payload * 2
            case "refuse":
                raise PublishRefused(payload)
        raise AssertionError(verb)

    def context(self, concurrency: int | None = None, target: str = "make", **fields: Any) -> PoolContext:
        factory = ExecutorFactory(target=f"umbel.testing.executor:{target}", arguments={})
        return PoolContext(factory=factory, concurrency=concurrency or self.slots, upcall=self.answer, **fields)

    @asynccontextmanager
    async def rig(
        self, concurrency: int | None = None, *, make: Callable[[], Pool] | None = None, **fields: Any
    ) -> AsyncIterator[Rig]:
        """A started pool with a worker; stopped afterwards, when every gate is open and every job has ended once."""
        rig = Rig(self, (make or self._make)())
        self.all_open = False
        try:
            await rig.start(self.context(concurrency, **fields))
            yield rig
        finally:
            self.all_open = True
            await rig.stop(timeout=2.0)
        assert rig.twice == [], f"jobs ended twice: {rig.twice}"
        assert not rig.open_jobs, f"jobs that never ended: {rig.open_jobs}"


class Rig:
    """A pool, and what came of its jobs."""

    def __init__(self, bench: PoolBench, pool: Pool) -> None:
        self.bench = bench
        self.pool = pool
        self.ends: dict[int, Completion] = {}
        self.twice: list[Completion] = []
        self.submitted: list[int] = []
        self.over = False
        """Whether the iterator of completions has ended."""
        self._reader: asyncio.Task[None] | None = None

    async def start(self, context: PoolContext) -> None:
        self.read()
        if self.pool.capabilities.main_thread:
            self.bench.on_main(self.pool.run_main_thread)
        await self.bench.soon(self.pool.start(context), "the start of the pool")

    def read(self) -> None:
        self._reader = asyncio.ensure_future(self._read())
        self.bench.close_after(self._stop_reading)

    async def _read(self) -> None:
        async for batch in self.pool.completions():
            for completion in batch:
                if completion.job_id in self.ends:
                    self.twice.append(completion)
                self.ends.setdefault(completion.job_id, completion)
        self.over = True

    async def _stop_reading(self) -> None:
        assert self._reader is not None
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def stop(self, *, timeout: float) -> None:
        """Stop the pool and read what it still has to say."""
        await self.bench.soon(self.pool.stop(timeout=timeout), "the end of stop")
        await self.bench.until(lambda: self.over, "the end of the completions")

    @property
    def open_jobs(self) -> list[int]:
        return [job_id for job_id in self.submitted if job_id not in self.ends]

    def job(self, *payload: Any, **limits: Any) -> Job:
        self.submitted.append(len(self.submitted) + 1)
        return Job(id=self.submitted[-1], task=f"kit.{payload[0]}", payload=payload, **limits)

    def submit(self, *payload: Any, **limits: float) -> int:
        """Submit one job; its id."""
        job = self.job(*payload, **limits)
        self.pool.submit([job])
        return job.id

    async def begin(self, *payload: Any, **limits: float) -> int:
        """Submit a job that waits at a gate, the last of ``payload``, and wait until it does."""
        job_id = self.submit(*payload, **limits)
        await self.bench.until(lambda: payload[-1] in self.bench.started, f"the start of job {payload}")
        return job_id

    async def end(self, job_id: int) -> Completion:
        await self.bench.until(lambda: job_id in self.ends, f"the end of job {job_id}")
        return self.ends[job_id]

    async def run(self, *payload: Any, **limits: float) -> Completion:
        return await self.end(self.submit(*payload, **limits))

    async def value(self, *payload: Any) -> tuple[Any, ...]:
        """What the executor returned."""
        end = await self.run(*payload)
        if end.ending is not Ending.DONE or end.payload is None:
            pytest.fail(f"job {payload} ended so: {end}")
        return end.payload

    async def run_all(self, jobs: list[Job]) -> list[Completion]:
        """Submit as the pool asks, as a worker does; the ends."""
        backlog = deque(jobs)
        while backlog:
            await self.bench.until(lambda: self.pool.free > 0, f"a free slot for {len(backlog)} more jobs")
            self.pool.submit([backlog.popleft() for _ in range(min(self.pool.free, len(backlog)))])
        return [await self.end(job.id) for job in jobs]


class PoolLaws:
    """How the kit is fitted to a pool, and the fixture that the laws use."""

    patience: float = 20.0
    """Seconds within which what must happen does happen; the start of a pool is the longest."""
    quiet: float = 0.15
    """Seconds for which laws watch that nothing happens."""
    time_limit: float = 90.0
    """Seconds that one law may take."""

    many: int = 2000
    """Jobs in the law about thousands."""
    limit: float = 0.3
    """Seconds of the time limits that laws let pass."""
    chances: int = 100
    """How often a job is cancelled at a moment of chance."""

    @pytest.fixture
    def bench(self, make_pool: Callable[[], Pool]) -> PoolBench:
        return PoolBench(make_pool, time_limit=self.time_limit, patience=self.patience, quiet=self.quiet)
