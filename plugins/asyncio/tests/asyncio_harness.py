"""A worker's stand-in for the tests: every job ends exactly once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from umbel.model import Completion, Job
from umbel.ports.pool import ExecutorFactory, PoolContext
from umbel_asyncio.pool import AsyncioPool
from umbel_children.crowd_pool import CrowdOptions

HERE = str(Path(__file__).parent)


class Rig:
    """A pool and what came of its jobs."""

    def __init__(self, pool: AsyncioPool) -> None:
        self.pool = pool
        self.ends: dict[int, asyncio.Future[Completion]] = {}
        self.last = 0

    async def read(self) -> None:
        async for batch in self.pool.completions():
            for completion in batch:
                self.ends[completion.job_id].set_result(completion)  # a second end raises InvalidStateError

    def job(self, *payload: Any, **limits: float) -> Job:
        self.last += 1
        self.ends[self.last] = asyncio.get_running_loop().create_future()
        return Job(id=self.last, task=str(payload[0]), payload=payload, **limits)

    def submit(self, *payload: Any, **limits: float) -> int:
        job = self.job(*payload, **limits)
        self.pool.submit([job])
        return job.id

    async def end(self, job_id: int, timeout: float = 20) -> Completion:
        return await asyncio.wait_for(asyncio.shield(self.ends[job_id]), timeout)

    async def run(self, *payload: Any, **limits: float) -> Completion:
        return await self.end(self.submit(*payload, **limits))

    async def value(self, *payload: Any) -> Any:
        end = await self.run(*payload)
        assert end.payload is not None, end
        return end.payload[1]

    async def running(self, *job_ids: int) -> None:
        """Wait until all of these run."""
        await eventually(lambda: set(job_ids) <= self.pool.running().keys())

    async def all_ends(self, job_ids: Sequence[int]) -> list[Completion]:
        return [await self.end(job_id) for job_id in job_ids]

    @property
    def pids(self) -> list[int]:
        return list(self.pool.stats()["processes"])


async def answer(verb: str, payload: Any) -> Any:
    from umbel.errors import PublishRefused

    match verb:
        case "double":
            return payload * 2
        case "refuse":
            raise PublishRefused(payload)
        case "never":
            await asyncio.sleep(60)
    raise AssertionError(verb)


@asynccontextmanager
async def rig(
    slots: int, *, processes: int = 1, block_warning: float | None = 1.0, **context: Any
) -> AsyncIterator[Rig]:
    """A started pool; stopped afterwards, and every job that was submitted has ended."""
    if HERE not in sys.path:
        sys.path.append(HERE)
    pool = AsyncioPool(options=CrowdOptions(processes=processes, block_warning=block_warning))
    rig = Rig(pool)
    reader = asyncio.create_task(rig.read())
    factory = ExecutorFactory(target="asyncio_executor:make", arguments={})
    try:
        await pool.start(PoolContext(factory=factory, concurrency=slots, upcall=answer, **context))
        await eventually(lambda: len(rig.pids) == min(processes, slots))
        yield rig
    finally:
        await pool.stop(timeout=2)
        await asyncio.wait_for(reader, 5)
    assert [job_id for job_id, end in rig.ends.items() if not end.done()] == []


async def eventually(condition: Callable[[], object], timeout: float = 10) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  # what is waited for is in other processes
            await asyncio.sleep(0.005)
