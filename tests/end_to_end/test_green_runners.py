"""The runners of greenlets, one child of each, with an executor of the tests."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from umbel.model import Completion, Ending, Job
from umbel.ports.pool import ExecutorFactory, Pool, PoolContext

SUPPORT = str(Path(__file__).parents[1] / "support")


async def answer(verb: str, payload: Any) -> Any:
    assert verb == "double"
    await asyncio.sleep(0.01)
    return 2 * payload


class Rig:
    """A pool and what came of its jobs."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.ends: dict[int, asyncio.Future[Completion]] = {}

    async def read(self) -> None:
        async for batch in self.pool.completions():
            for completion in batch:
                self.ends[completion.job_id].set_result(completion)  # a second end raises InvalidStateError

    def submit(self, *payload: Any, **limits: float) -> asyncio.Future[Completion]:
        number = len(self.ends) + 1
        self.ends[number] = asyncio.get_running_loop().create_future()
        self.pool.submit([Job(id=number, task=str(payload[0]), payload=payload, **limits)])
        return self.ends[number]

    async def value(self, *payload: Any) -> Any:
        end = await asyncio.wait_for(self.submit(*payload), 20)
        assert end.payload is not None, end
        return end.payload[0]


@asynccontextmanager
async def started(name: str, slots: int) -> AsyncIterator[Rig]:
    cls = resolve_name(f"umbel_{name}.pool:{name.title()}Pool")
    rig = Rig(cls(options=cls.Options(processes=1)))
    reader = asyncio.create_task(rig.read())
    factory = ExecutorFactory(target="green_executor:make", arguments={})
    try:
        await rig.pool.start(PoolContext(factory=factory, concurrency=slots, upcall=answer))
        yield rig
    finally:
        await rig.pool.stop(timeout=2)
        await asyncio.wait_for(reader, 5)


@pytest.fixture(params=["gevent", "eventlet"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [*sys.path, SUPPORT])
    return str(request.param)


def test_upcalls_from_real_threads_and_greenlets_of_the_tasks_own(library: str) -> None:
    async def main() -> None:
        async with started(library, 50) as rig:
            ends = await asyncio.gather(*[rig.value("from_real_thread", library, n) for n in range(40)])
            assert ends == [2 * n for n in range(40)]
            assert await rig.value("beside", library) == "8"

    asyncio.run(main())


def test_each_soft_limit_is_met_by_its_own_job_and_nothing_is_remembered_of_any(library: str) -> None:
    async def main() -> None:
        async with started(library, 300) as rig:
            soft = [rig.submit("soft", n, soft_time_limit=0.2 + n / 500) for n in range(100)]
            others = [rig.submit("nap", 0.5) for _ in range(100)] + [rig.submit("own_loop", 0.3) for _ in range(20)]
            for n, end in enumerate(soft):
                assert (await asyncio.wait_for(end, 20)).payload == ([n, "soft limit"],)
            assert {(await asyncio.wait_for(end, 20)).payload for end in others} == {("slept",), ("own loop",)}
            running, aside, calls = await rig.value("kept")
            assert (running, calls) == (1, 0)
            assert aside <= 1, "put aside for greenlets that have ended"

    asyncio.run(main())


def test_a_crash_is_the_fault_of_the_job_that_ran_and_of_no_other(library: str) -> None:
    async def main() -> None:
        async with started(library, 10) as rig:
            beside = [rig.submit("nap", 30) for _ in range(3)]
            while len(rig.pool.running()) < 3:  # noqa: ASYNC110  # a child sets no event here
                await asyncio.sleep(0.01)
            end = await asyncio.wait_for(rig.submit("crash"), 20)
            assert (end.ending, "SIGABRT" in end.detail) == (Ending.LOST, True)
            assert {(await asyncio.wait_for(one, 20)).ending for one in beside} == {Ending.COLLATERAL}
            assert await rig.value("nap", 0) == "slept"

    asyncio.run(main())
