"""The laws of the pool port."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time

import attrs
import pytest

from umbel.capabilities import PoolCapabilities
from umbel.errors import NotSupported, UmbelError
from umbel.model import Ending
from umbel.ports.pool import Pool
from umbel.testing.contracts.bench import Belongings, law
from umbel.testing.contracts.pool_bench import PoolBench, Rig
from umbel.testing.contracts.pool_crowd import CrowdLaws
from umbel.testing.contracts.pool_limits import LimitLaws

VALUES = (None, True, -(2**62), 2.5, "ü名🌸", b"\x00\xff", [1, [2, {"key": [None]}]], {"": {"deep": b""}})


class PoolContract(LimitLaws, CrowdLaws):
    """Subclass it and give the fixture ``make_pool``: a callable that makes a pool that was not started.

    A pool whose children run many jobs each gives ``make_crowd`` too. Fit the kit to a slow pool with the class attributes of
    ``PoolLaws``.
    """

    @law
    async def test_a_driver_says_what_it_is(self, bench: PoolBench) -> None:
        pool = bench.pool()
        assert isinstance(pool, Pool)
        assert isinstance(pool.capabilities, PoolCapabilities)
        assert attrs.has(type(pool).Options)
        assert type(pool).api_version[0] == Pool.api_version[0]
        assert type(pool).name
        if not pool.capabilities.main_thread:
            with pytest.raises(TypeError):
                pool.run_main_thread()

    # --- running --------------------------------------------------------------------------------

    @law
    async def test_what_the_executor_returns_is_the_jobs_end(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            for value in VALUES:
                end = await rig.run("echo", value)
                assert (end.ending, end.payload) == (Ending.DONE, ("echo", value))
                assert end.runtime >= 0

    @law
    async def test_large_payloads_go_both_ways(self, bench: PoolBench) -> None:
        blob = os.urandom(1 << 16) * 80
        async with bench.rig() as rig:
            assert await rig.value("echo", blob) == ("echo", blob)

    @law
    async def test_each_of_thousands_of_jobs_ends_once(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            ends = await rig.run_all([rig.job("echo", n) for n in range(self.many)])
            assert [(end.ending, end.payload) for end in ends] == [(Ending.DONE, ("echo", n)) for n in range(self.many)]

    @law
    async def test_no_job_runs_on_the_event_loop(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            process, thread, main, loop = await rig.value("where")
            assert (process, thread) != (os.getpid(), threading.get_ident())
            assert not loop
            if bench.capabilities.main_thread:
                assert main

    @law
    async def test_as_many_jobs_run_at_once_as_there_are_slots(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            gates = [f"gate-{n}" for n in range(bench.slots + 2)]
            for gate in gates:
                rig.submit("wait", gate)
            await bench.until(lambda: len(bench.started) >= bench.slots, f"{bench.slots} jobs at once")
            await asyncio.sleep(bench.quiet)
            assert len(bench.started) == bench.slots
            bench.open.update(gates)
            for job_id in rig.submitted:
                assert (await rig.end(job_id)).ending is Ending.DONE

    @pytest.mark.parametrize("payload", [("exit", 3), ("interrupt",)], ids=lambda payload: payload[0])
    @law
    async def test_what_escapes_the_executor_ends_its_own_job_only(
        self, bench: PoolBench, payload: tuple[object, ...]
    ) -> None:
        async with bench.rig() as rig:
            end = await rig.run(*payload)
            assert end.ending is Ending.LOST
            assert end.detail, "the detail says what happened"
            assert await rig.value("echo", "next") == ("echo", "next")

    @law
    async def test_a_pool_wants_work_when_idle_and_less_the_more_it_has(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            await bench.until(lambda: rig.pool.free >= bench.slots, "an idle pool that wants a job for each slot")
            idle = rig.pool.free
            for number in range(idle + 20):
                rig.submit("wait", f"gate-{number % bench.slots}")
            assert rig.pool.free <= 0
            bench.open.update(f"gate-{number}" for number in range(bench.slots))
            for job_id in rig.submitted:
                await rig.end(job_id)
            await bench.until(lambda: rig.pool.free >= bench.slots, "a pool that wants work again")

    @law
    async def test_what_runs_is_told_and_nothing_else(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            assert rig.pool.running() == {}
            earliest = time.monotonic()
            busy = await self._fill(rig, bench)
            waiting = [rig.submit("echo", n) for n in range(3)]
            told = rig.pool.running()
            if type(rig.pool).running is not Pool.running:  # else it leaves that out
                assert set(told) == set(busy)
            assert all(earliest <= job.since <= time.monotonic() for job in told.values())
            if bench.capabilities.isolated:
                assert os.getpid() not in {job.pid for job in told.values()}
            bench.open.update(bench.started)
            for job_id in [*busy, *waiting]:
                assert (await rig.end(job_id)).ending is Ending.DONE
            await bench.until(lambda: rig.pool.running() == {}, "nothing told to run")

    # --- upcalls --------------------------------------------------------------------------------

    @law
    async def test_upcalls_are_answered(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            ends = await rig.run_all([rig.job("ask", "double", n) for n in range(100)])
            assert [end.payload for end in ends] == [("answer", 2 * n) for n in range(100)]

    @law
    async def test_the_error_of_an_upcall_is_raised_in_the_job(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            assert await rig.value("ask", "refuse", "too large") == ("refused", "PublishRefused", "too large")
            assert await rig.value("ask", "double", 4) == ("answer", 8)

    # --- taking back ----------------------------------------------------------------------------

    async def _fill(self, rig: Rig, bench: PoolBench) -> list[int]:
        return [await rig.begin("wait", f"busy-{n}") for n in range(bench.slots)]

    @law
    async def test_recall_gives_back_what_has_not_started(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            running = await self._fill(rig, bench)
            waiting = [rig.submit("echo", n) for n in range(5)]
            await rig.pool.recall()
            for job_id in waiting:
                assert (await rig.end(job_id)).ending is Ending.RETURNED
            assert not set(running) & set(rig.ends)
            bench.open.update(bench.started)
            for job_id in running:
                assert (await rig.end(job_id)).ending is Ending.DONE
            assert await rig.value("echo", "goes on") == ("echo", "goes on")

    @law
    async def test_a_job_that_has_not_started_is_cancelled_by_giving_it_back(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            running = await self._fill(rig, bench)
            first, second = rig.submit("echo", 1), rig.submit("echo", 2)
            assert await rig.pool.cancel(first, force=False)
            assert (await rig.end(first)).ending is Ending.RETURNED
            bench.open.update(bench.started)
            for job_id in [*running, second]:
                assert (await rig.end(job_id)).ending is Ending.DONE

    @law
    async def test_a_job_that_has_ended_or_never_was_cannot_be_cancelled(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            ended = rig.submit("echo", 1)
            await rig.end(ended)
            for force in (False, True):
                assert not await rig.pool.cancel(ended, force=force)
                assert not await rig.pool.cancel(999_999, force=force)
            assert await rig.value("echo", 2) == ("echo", 2)

    @law
    async def test_a_running_job_is_cancelled_and_no_other(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            running = await self._fill(rig, bench)
            going = await rig.pool.cancel(running[0], force=False)
            assert going == bench.capabilities.cancel_running
            if going:
                assert (await rig.end(running[0])).ending is Ending.CANCELLED
            await asyncio.sleep(bench.quiet)
            bench.open.update(bench.started)
            for job_id in running[int(going) :]:
                assert (await rig.end(job_id)).ending is Ending.DONE

    @law
    async def test_force_ends_a_job_that_does_not_listen(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            job_id = await rig.begin("stubborn", "deaf")
            await rig.pool.cancel(job_id, force=True)
            if bench.capabilities.hard_limit and bench.capabilities.cancel_running:
                assert (await rig.end(job_id)).ending is Ending.CANCELLED
            else:
                await asyncio.sleep(bench.quiet)
                bench.open.add("deaf")
                assert (await rig.end(job_id)).ending is Ending.DONE
            assert await rig.value("echo", "next") == ("echo", "next")

    @law
    async def test_a_cancellation_never_hits_the_next_job(self, bench: PoolBench) -> None:
        chance = random.Random(7)
        async with bench.rig(1) as rig:
            for _ in range(self.chances):
                target = rig.submit("count", chance.randrange(3000))
                bystanders = [rig.submit("count", 300) for _ in range(3)]
                for _ in range(chance.randrange(6)):
                    await asyncio.sleep(chance.choice((0, 0, 0.0003)))
                await rig.pool.cancel(target, force=False)
                assert (await rig.end(target)).ending in (Ending.DONE, Ending.CANCELLED, Ending.RETURNED)
                for job_id in bystanders:
                    end = await rig.end(job_id)
                    assert (end.ending, end.payload) == (Ending.DONE, ("counted", 44_850))

    # --- slots ----------------------------------------------------------------------------------

    @law
    async def test_slots_can_be_added_and_taken_away(self, bench: PoolBench) -> None:
        async with bench.rig(1) as rig:
            if not bench.capabilities.resize:
                with pytest.raises(NotSupported):
                    await rig.pool.resize(2)
                assert await rig.value("echo", 1) == ("echo", 1)
                return
            await rig.pool.resize(3)
            jobs = [rig.submit("wait", f"wide-{n}") for n in range(3)]
            await bench.until(lambda: len(bench.started) == 3, "three jobs at once")
            await rig.pool.resize(1)
            bench.open.update(bench.started)
            for job_id in jobs:
                assert (await rig.end(job_id)).ending is Ending.DONE
            bench.started.clear()
            jobs = [rig.submit("wait", f"narrow-{n}") for n in range(3)]
            await bench.until(lambda: bench.started, "a job in the one slot")
            await asyncio.sleep(bench.quiet)
            assert len(bench.started) == 1
            bench.open.update(f"narrow-{n}" for n in range(3))
            for job_id in jobs:
                assert (await rig.end(job_id)).ending is Ending.DONE

    @law
    async def test_a_crash_takes_only_its_own_job_along(self, bench: PoolBench) -> None:
        if not bench.capabilities.isolated:
            return  # a crash would end the tests
        async with bench.rig() as rig:
            bystander = await rig.begin("wait", "gate")
            end = await rig.run("crash")
            assert end.ending is Ending.LOST
            assert end.detail, "the detail says how it died"
            bench.open.add("gate")
            assert (await rig.end(bystander)).ending is Ending.DONE
            assert await rig.value("echo", "next") == ("echo", "next")

    @law
    async def test_children_are_replaced_after_a_number_of_tasks(self, bench: PoolBench) -> None:
        if not bench.capabilities.recycle:
            return  # the worker refuses the setting for such a pool
        async with bench.rig(1, max_tasks_per_child=2) as rig:
            ends = await rig.run_all([rig.job("where") for _ in range(6)])
            processes = [end.payload[0] for end in ends if end.payload]
            assert len(set(processes)) == 3
            assert max(map(processes.count, processes)) == 2

    # --- the beginning and the end --------------------------------------------------------------

    @pytest.mark.parametrize(
        ("target", "told"), [("make_broken", "no such module"), ("make_exiting", "bad application")]
    )
    @law
    async def test_an_application_that_does_not_load_says_why(self, bench: PoolBench, target: str, told: str) -> None:
        rig = Rig(bench, bench.pool())
        with pytest.raises(UmbelError, match=told):
            await rig.start(bench.context(target=target))
        await rig.stop(timeout=0)

    @law
    async def test_stop_lets_what_runs_end_and_gives_back_the_rest(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            running = await self._fill(rig, bench)
            waiting = [rig.submit("echo", n) for n in range(5)]
            stopping = asyncio.ensure_future(rig.stop(timeout=20))
            for job_id in waiting:
                assert (await rig.end(job_id)).ending is Ending.RETURNED
            late = rig.submit("echo", "late")
            assert (await rig.end(late)).ending is Ending.RETURNED
            assert not stopping.done()
            bench.open.update(bench.started)
            await stopping
            assert {rig.ends[job_id].ending for job_id in running} == {Ending.DONE}

    @law
    async def test_stop_ends_what_does_not_end_in_time(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            running = await self._fill(rig, bench)
            await rig.stop(timeout=0.05)
            assert {rig.ends[job_id].ending for job_id in running} == {Ending.CANCELLED}

    @law
    async def test_a_second_stop_shortens_the_wait(self, bench: PoolBench) -> None:
        async with bench.rig() as rig:
            running = await self._fill(rig, bench)
            patient = asyncio.ensure_future(rig.pool.stop(timeout=1000))
            await asyncio.sleep(0.05)
            assert not patient.done()
            await rig.stop(timeout=0.05)
            await bench.soon(patient, "the end of the first stop")
            assert {rig.ends[job_id].ending for job_id in running} == {Ending.CANCELLED}

    @law
    async def test_stop_before_start_ends_the_completions(self, bench: PoolBench) -> None:
        rig = Rig(bench, bench.pool())
        rig.read()
        await rig.stop(timeout=0)
        assert rig.ends == {}

    # --- leaks ----------------------------------------------------------------------------------

    async def _leaks(self, bench: PoolBench, kind: str) -> None:
        async def live(turn: int) -> None:
            async with bench.rig() as rig:
                await rig.run("ask", "double", 1)
                await rig.begin("wait", f"gate-{turn}")
                await rig.stop(timeout=0)

        await live(0)  # what a process makes once is no leak
        before = Belongings.now()
        for turn in range(1, 3):
            await live(turn)
        await bench.until(lambda: not before.left_over(kind), f"the end of all {kind}")

    @law
    async def test_no_task_is_left_behind(self, bench: PoolBench) -> None:
        await self._leaks(bench, "tasks")

    @law
    async def test_no_thread_is_left_behind(self, bench: PoolBench) -> None:
        await self._leaks(bench, "threads")

    @law
    async def test_no_file_or_socket_is_left_behind(self, bench: PoolBench) -> None:
        await self._leaks(bench, "files")

    @law
    async def test_no_process_is_left_behind(self, bench: PoolBench) -> None:
        await self._leaks(bench, "children")
