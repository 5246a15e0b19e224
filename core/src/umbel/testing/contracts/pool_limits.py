"""Laws of the pool port: the time limits of jobs."""

from __future__ import annotations

import asyncio

from umbel.model import Ending
from umbel.testing.contracts.bench import law
from umbel.testing.contracts.pool_bench import PoolBench, PoolLaws


class LimitLaws(PoolLaws):
    """What is over its time is told or ended; what is not is left alone."""

    @law
    async def test_the_soft_time_limit_is_raised_in_the_job(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            job_id = await rig.begin("soft", "gate", soft_time_limit=self.limit)
            if not bench.capabilities.soft_limit:
                await asyncio.sleep(self.limit + bench.quiet)
                bench.open.add("gate")
            end = await rig.end(job_id)
            told = "soft limit" if bench.capabilities.soft_limit else "waited"
            assert (end.ending, end.payload) == (Ending.DONE, (told, "gate"))
            assert await rig.value("echo", "next") == ("echo", "next")

    @law
    async def test_the_hard_time_limit_ends_a_job_that_does_not_listen(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            job_id = await rig.begin("stubborn", "gate", time_limit=self.limit)
            if bench.capabilities.hard_limit:
                assert (await rig.end(job_id)).ending is Ending.TIMED_OUT
            else:
                await asyncio.sleep(self.limit + bench.quiet)
                bench.open.add("gate")
                assert (await rig.end(job_id)).ending is Ending.DONE
            assert await rig.value("echo", "next") == ("echo", "next")

    @law
    async def test_a_job_that_runs_can_be_given_another_limit(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            job_id = await rig.begin("soft", "gate", soft_time_limit=1000.0)
            if not rig.pool.limit(job_id, time_limit=None, soft_time_limit=0.01):  # not every pool can
                bench.open.add("gate")
            assert (await rig.end(job_id)).ending is Ending.DONE
            assert not rig.pool.limit(job_id, time_limit=None, soft_time_limit=0.01)
            assert not rig.pool.limit(999_999, time_limit=None, soft_time_limit=0.01)

    @law
    async def test_limits_that_are_not_reached_harm_nobody(self, bench: PoolBench) -> None:
        async with bench.rig(1) as rig:
            assert (
                await rig.run("echo", 1, soft_time_limit=self.limit, time_limit=1.2 * self.limit)
            ).ending is Ending.DONE
            job_id = await rig.begin("wait", "gate")
            await asyncio.sleep(1.5 * self.limit)
            bench.open.add("gate")
            assert (await rig.end(job_id)).ending is Ending.DONE
