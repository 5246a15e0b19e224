"""A worker's stand-in for tests of pools: submits as ``free`` asks, and sees to it that every job ends exactly once."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from umbel.model import Completion, Job
from umbel.ports.pool import ExecutorFactory, Pool, PoolContext


class Rig:
    """A pool and what came of its jobs."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.ends: dict[int, asyncio.Future[Completion]] = {}
        self.backlog: deque[Job] = deque()
        self.last = 0
        self.latest_end = time.monotonic()
        self.longest_gap = 0.0

    async def read(self) -> None:
        async for batch in self.pool.completions():
            now = time.monotonic()
            self.longest_gap = max(self.longest_gap, now - self.latest_end)
            self.latest_end = now
            for completion in batch:
                self.ends[completion.job_id].set_result(completion)  # a second end raises InvalidStateError
            self.feed()

    def feed(self) -> None:
        if self.backlog and (room := min(self.pool.free, len(self.backlog))) > 0:
            self.pool.submit([self.backlog.popleft() for _ in range(room)])

    def job(self, *payload: Any, task: str | None = None, **options: Any) -> Job:
        self.last += 1
        self.ends[self.last] = asyncio.get_running_loop().create_future()
        return Job(id=self.last, task=task or str(payload[0]), payload=payload, **options)

    def submit(self, *payload: Any, **options: Any) -> int:
        """Submit one job, whether the pool asks for it or not; its id."""
        job = self.job(*payload, **options)
        self.pool.submit([job])
        return job.id

    async def end(self, job_id: int, timeout: float = 30) -> Completion:
        return await asyncio.wait_for(asyncio.shield(self.ends[job_id]), timeout)

    async def all_ends(self, job_ids: Sequence[int]) -> list[Completion]:
        return [await self.end(job_id) for job_id in job_ids]

    async def run(self, *payload: Any, **options: Any) -> Completion:
        return await self.end(self.submit(*payload, **options))

    async def value(self, *payload: Any, **options: Any) -> Any:
        """What the executor's method returned."""
        end = await self.run(*payload, **options)
        assert end.payload is not None, end
        assert end.payload[0] == "ok", end
        return end.payload[1]

    async def run_all(self, jobs: Sequence[Job], timeout: float = 60) -> list[Completion]:
        """Submit as the pool asks; their ends."""
        self.backlog.extend(jobs)
        self.latest_end = time.monotonic()
        self.longest_gap = 0.0
        self.feed()
        return await asyncio.wait_for(asyncio.gather(*[self.ends[job.id] for job in jobs]), timeout)

    async def warm(self, *payload: Any) -> None:
        """Let the pool learn how long such a task takes."""
        await self.run_all([self.job(*payload) for _ in range(30)])

    async def running(self, *job_ids: int) -> None:
        """Wait until all of these run."""
        await eventually(lambda: set(job_ids) <= self.pool.running().keys())

    @property
    def pids(self) -> list[int]:
        return list(self.pool.stats()["processes"])


@asynccontextmanager
async def started(
    pool: Pool,
    slots: int,
    *,
    executor: Path,
    make: str = "make",
    arguments: dict[str, Any] | None = None,
    answer: Callable[[str, Any], Awaitable[Any]],
    processes: int,
    **context: Any,
) -> AsyncIterator[Rig]:
    """A pool with ``processes`` children, ready; stopped afterwards, and every job that was submitted has ended.

    ``make``: the function of the file ``executor`` that makes one. ``answer``: to upcalls.
    """
    if str(executor.parent) not in sys.path:
        sys.path.append(str(executor.parent))
    rig = Rig(pool)
    reader = asyncio.create_task(rig.read())
    factory = ExecutorFactory(target=f"{executor.stem}:{make}", arguments=arguments or {})
    try:
        await pool.start(PoolContext(factory=factory, concurrency=slots, upcall=answer, **context))
        await eventually(lambda: len(rig.pids) == processes and pool.free >= slots)
        yield rig
    finally:
        await asyncio.wait_for(pool.stop(timeout=2), 30)
        await asyncio.wait_for(reader, 5)
    assert [job_id for job_id, end in rig.ends.items() if not end.done()] == []


async def eventually(condition: Callable[[], object], timeout: float = 30) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  # what is waited for is in other processes
            await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"
