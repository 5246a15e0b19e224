"""Laws of the pool port: many jobs in one child, and jobs that are coroutines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest

from umbel.model import Ending
from umbel.ports.pool import Pool
from umbel.testing.contracts.bench import law
from umbel.testing.contracts.pool_bench import PoolBench, PoolLaws, Rig


class CrowdLaws(PoolLaws):
    """What ends a child ends all that runs in it. That is told as it is: nobody is blamed for what another has done."""

    crowd: int = 12
    """Jobs in the laws about many in one child."""

    @pytest.fixture
    def make_crowd(self) -> Callable[[], Pool] | None:
        """A callable that makes a pool of one child, which runs as many jobs at once as it has slots. None: not tried."""
        return None

    async def _gather(self, rig: Rig, bench: PoolBench) -> list[int]:
        jobs = [rig.submit("wait", f"beside-{n}") for n in range(self.crowd - 1)]
        await bench.until(lambda: len(bench.started) >= len(jobs), f"{len(jobs)} jobs at once")
        return jobs

    async def _go_on(self, rig: Rig, bench: PoolBench) -> None:
        bench.all_open = True
        ends = await rig.run_all([rig.job("echo", n) for n in range(self.crowd)])
        assert {end.ending for end in ends} == {Ending.DONE}

    async def _alone_is_to_blame(
        self, rig: Rig, bench: PoolBench, culprit: int, beside: Sequence[int], ending: Ending
    ) -> None:
        assert (await rig.end(culprit)).ending is ending
        assert {(await rig.end(job_id)).ending for job_id in beside} == {Ending.COLLATERAL}
        await self._go_on(rig, bench)

    @law
    async def test_a_coroutine_ends_as_any_job(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            assert await rig.value("a_echo", "ü") == ("echo", "ü")
            assert await rig.value("a_ask", "double", 4) == ("answer", 8)
            assert await rig.value("a_ask", "refuse", "too large") == ("refused", "PublishRefused", "too large")

    @law
    async def test_many_jobs_run_at_once_in_one_child(
        self, bench: PoolBench, make_crowd: Callable[[], Pool] | None
    ) -> None:
        if make_crowd is None:
            return
        async with bench.rig(self.crowd, make=make_crowd) as rig:
            jobs = [*await self._gather(rig, bench), await rig.begin("a_wait", "coroutine")]
            running = rig.pool.running()
            assert set(running) == set(jobs)
            (process,) = {job.pid for job in running.values()}
            assert process != os.getpid()
            bench.all_open = True
            for job_id in jobs:
                assert (await rig.end(job_id)).ending is Ending.DONE

    @law
    async def test_what_runs_beside_a_job_over_its_hard_limit_is_collateral(
        self, bench: PoolBench, make_crowd: Callable[[], Pool] | None
    ) -> None:
        if make_crowd is None:
            return
        async with bench.rig(self.crowd, make=make_crowd) as rig:
            beside = await self._gather(rig, bench)
            culprit = await rig.begin("stubborn", "deaf", time_limit=self.limit)
            await self._alone_is_to_blame(rig, bench, culprit, beside, Ending.TIMED_OUT)

    @law
    async def test_what_runs_beside_a_job_that_is_cancelled_by_force_is_collateral(
        self, bench: PoolBench, make_crowd: Callable[[], Pool] | None
    ) -> None:
        if make_crowd is None:
            return
        async with bench.rig(self.crowd, make=make_crowd) as rig:
            beside = await self._gather(rig, bench)
            culprit = await rig.begin("stubborn", "deaf")
            assert await rig.pool.cancel(culprit, force=True)
            await self._alone_is_to_blame(rig, bench, culprit, beside, Ending.CANCELLED)

    @law
    async def test_a_cancellation_spares_what_runs_beside(
        self, bench: PoolBench, make_crowd: Callable[[], Pool] | None
    ) -> None:
        if make_crowd is None:
            return
        async with bench.rig(self.crowd, make=make_crowd) as rig:
            beside = await self._gather(rig, bench)
            culprit = await rig.begin("a_wait", "coroutine")
            for job_id in (culprit, beside.pop()):
                assert await rig.pool.cancel(job_id, force=False)
                assert (await rig.end(job_id)).ending is Ending.CANCELLED
            assert not set(beside) & set(rig.ends)
            bench.all_open = True
            assert {(await rig.end(job_id)).ending for job_id in beside} == {Ending.DONE}

    @law
    async def test_a_crash_of_many_is_told_of_all_that_ran_and_of_nothing_else(
        self, bench: PoolBench, make_crowd: Callable[[], Pool] | None
    ) -> None:
        if make_crowd is None:
            return
        async with bench.rig(self.crowd, make=make_crowd) as rig:
            over = await rig.run_all([rig.job("echo", n) for n in range(self.crowd)])
            beside = await self._gather(rig, bench)
            culprit = await rig.run("a_crash")
            assert culprit.ending is Ending.LOST
            assert culprit.detail, "the detail says how it died"
            assert {(await rig.end(job_id)).ending for job_id in beside} <= {Ending.LOST, Ending.COLLATERAL}
            assert {end.ending for end in over} == {Ending.DONE}
            await self._go_on(rig, bench)
