"""A worker's stand-in for the tests: submits as ``free`` asks and checks that every job ends exactly once."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from umbel.model import Completion, Job
from umbel.ports.pool import ExecutorFactory, PoolContext
from umbel_prefork.pool import PreforkPool

HERE = str(Path(__file__).parent)


class Rig:
    """A pool and what came of its jobs."""

    def __init__(self, pool: PreforkPool) -> None:
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

    def job(self, *payload: Any, task: str | None = None, **limits: float) -> Job:
        self.last += 1
        self.ends[self.last] = asyncio.get_running_loop().create_future()
        return Job(id=self.last, task=task or str(payload[0]), payload=payload, **limits)

    def submit(self, *payload: Any, **options: Any) -> int:
        """Submit one job, whether the pool asks for it or not; its id."""
        job = self.job(*payload, **options)
        self.pool.submit([job])
        return job.id

    async def end(self, job_id: int, timeout: float = 20) -> Completion:
        return await asyncio.wait_for(asyncio.shield(self.ends[job_id]), timeout)

    async def run(self, *payload: Any, **options: Any) -> Completion:
        return await self.end(self.submit(*payload, **options))

    async def value(self, *payload: Any) -> Any:
        """What the executor method returned."""
        end = await self.run(*payload)
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

    @property
    def pids(self) -> list[int]:
        return list(self.pool.stats()["processes"])


async def answer(verb: str, payload: Any) -> Any:
    """The upcalls that the tests make."""
    from umbel.errors import PublishRefused, TaskFailed

    match verb:
        case "double":
            return payload * 2
        case "sleep":
            await asyncio.sleep(payload)
            return "slept"
        case "refuse":
            raise PublishRefused(payload)
        case "value error":
            raise ValueError(payload)
        case "attributes":
            raise TaskFailed("shop.Broken", payload, "Traceback …")
        case "foreign":
            raise asyncio.QueueEmpty(payload)
        case "unplain":
            return object()
    raise AssertionError(verb)


@asynccontextmanager
async def rig(
    concurrency: int = 2, *, target: str = "make", arguments: dict[str, Any] | None = None, **context: Any
) -> AsyncIterator[Rig]:
    """A started pool; stopped afterwards, and every job that was submitted has ended."""
    if HERE not in sys.path:
        sys.path.append(HERE)
    pool = PreforkPool()
    rig = Rig(pool)
    reader = asyncio.create_task(rig.read())
    factory = ExecutorFactory(target=f"prefork_executor:{target}", arguments=arguments or {})
    try:
        await pool.start(PoolContext(factory=factory, concurrency=concurrency, upcall=answer, **context))
        await eventually(lambda: len(rig.pids) == concurrency and pool.free >= concurrency)
        yield rig
    finally:
        await pool.stop(timeout=2)
        await asyncio.wait_for(reader, 5)
    assert [job_id for job_id, end in rig.ends.items() if not end.done()] == []


async def eventually(condition: Callable[[], object], timeout: float = 10) -> None:
    """Wait until ``condition()`` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def children_of(pid: int) -> list[int]:
    """Processes, zombies included, whose parent is ``pid``."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found
