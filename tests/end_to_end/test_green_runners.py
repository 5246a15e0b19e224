"""The runners of greenlets, one child of each, with an executor of the tests."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from rigs import Rig, started

from umbel.model import Ending

EXECUTOR = Path(__file__).parents[1] / "support/green_executor.py"


async def answer(verb: str, payload: Any) -> Any:
    assert verb == "double"
    await asyncio.sleep(0.01)
    return 2 * payload


def rig(name: str, slots: int) -> AbstractAsyncContextManager[Rig]:
    """A started pool of one child."""
    cls = resolve_name(f"umbel_{name}.pool:{name.title()}Pool")
    pool = cls(options=cls.Options(processes=1))
    return started(pool, slots, executor=EXECUTOR, answer=answer, processes=1)


@pytest.fixture(params=["gevent", "eventlet"])
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_upcalls_from_real_threads_and_greenlets_of_the_tasks_own(library: str) -> None:
    async def main() -> None:
        async with rig(library, 50) as r:
            ends = await asyncio.gather(*[r.value("from_real_thread", library, n) for n in range(40)])
            assert ends == [2 * n for n in range(40)]
            assert await r.value("beside", library) == "8"

    asyncio.run(main())


def test_each_soft_limit_is_met_by_its_own_job_and_nothing_is_remembered_of_any(library: str) -> None:
    async def main() -> None:
        async with rig(library, 300) as r:
            soft = [r.submit("soft", n, soft_time_limit=0.2 + n / 500) for n in range(100)]
            others = [r.submit("nap", 0.5) for _ in range(100)] + [r.submit("own_loop", 0.3) for _ in range(20)]
            assert [end.payload for end in await r.all_ends(soft)] == [("ok", [n, "soft limit"]) for n in range(100)]
            assert {end.payload for end in await r.all_ends(others)} == {("ok", "slept"), ("ok", "own loop")}
            running, aside, calls = await r.value("kept")
            assert (running, calls) == (1, 0)
            assert aside <= 1, "put aside for greenlets that have ended"

    asyncio.run(main())


def test_a_crash_is_the_fault_of_the_job_that_ran_and_of_no_other(library: str) -> None:
    async def main() -> None:
        async with rig(library, 10) as r:
            beside = [r.submit("nap", 30) for _ in range(3)]
            await r.running(*beside)
            end = await r.run("crash")
            assert (end.ending, "SIGABRT" in end.detail) == (Ending.LOST, True)
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.COLLATERAL}
            assert await r.value("nap", 0) == "slept"

    asyncio.run(main())


def test_a_crash_on_the_last_start_harms_nobody_beside(library: str) -> None:
    async def main() -> None:
        async with rig(library, 10) as r:
            beside = r.submit("nap", 1.5)
            await r.running(beside)
            assert (await r.run("crash", alone=True)).ending is Ending.LOST
            assert (await r.end(beside)).ending is Ending.DONE

    asyncio.run(main())


@pytest.mark.parametrize("task", ["own_subprocess", "a_subprocess"])
def test_a_program_that_asyncio_starts_is_heard_and_waited_for(library: str, task: str) -> None:
    """On a loop of the task's own, and on the one that coroutines share; several at once, beside others."""

    async def main() -> None:
        async with rig(library, 20) as r:
            beside = r.submit("nap", 0.5)
            jobs = [r.submit(task) for _ in range(5)]
            assert [end.payload for end in await r.all_ends(jobs)] == [("ok", ["done", 3])] * 5
            assert (await r.end(beside)).payload == ("ok", "slept")

    asyncio.run(main())
