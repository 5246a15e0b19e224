from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter

import pytest
from asyncio_harness import rig
from rigs import alive, eventually

from umbel.errors import SettingsError
from umbel.model import Ending
from umbel_asyncio.pool import AsyncioPool
from umbel_children.crowd_pool import CrowdOptions

# --- many at once -------------------------------------------------------------------------------


def test_a_thousand_coroutines_and_twenty_threads_run_at_once_in_two_processes() -> None:
    async def main() -> None:
        async with rig(1020, processes=2) as r:
            naps = [r.submit("nap", 1.0) for _ in range(1000)]
            blocks = [r.submit("block", 1.0) for _ in range(20)]
            await r.running(*naps, *blocks)
            ends = await r.all_ends([*naps, *blocks])
            assert {end.ending for end in ends} == {Ending.DONE}
            assert {end.payload[1] for end in ends if end.payload} == set(r.pids)

    asyncio.run(main())


def test_slots_are_shared_out_among_the_processes() -> None:
    pool = AsyncioPool(options=CrowdOptions(processes=3))
    assert list(pool.shares(8)) == [3, 3, 2]
    assert list(pool.shares(2)) == [1, 1]
    with pytest.raises(SettingsError, match=r"set processes = 7 in \[worker.pool_options\]"):
        pool.shares(100_000)


@pytest.mark.parametrize(("option", "value"), [("processes", 0), ("block_warning", 0.0), ("loop_stall_limit", 0.0)])
def test_options_that_make_no_sense_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        CrowdOptions(**{option: value})  # type: ignore[arg-type]  # one of the three


def test_a_pool_that_cannot_hold_its_slots_says_so_at_its_start() -> None:
    async def main() -> None:
        async with rig(100_000):
            pytest.fail("started")

    with pytest.raises(SettingsError, match="processes = 7"):
        asyncio.run(main())


def test_slots_change_while_jobs_run() -> None:
    async def main() -> None:
        async with rig(2) as r:
            before = r.pids
            jobs = [r.submit("nap", 60) for _ in range(5)]
            await eventually(lambda: len(r.pool.running()) == 2)
            await r.pool.resize(5)
            await r.running(*jobs)
            await r.pool.resize(1)
            waiting = r.submit("nap", 0)
            for job_id in jobs:
                assert await r.pool.cancel(job_id, force=False)
            assert {end.ending for end in await r.all_ends(jobs)} == {Ending.CANCELLED}
            assert (await r.end(waiting)).ending is Ending.DONE
            assert r.pids == before

    asyncio.run(main())


# --- upcalls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ask", "ask_and_block", "ask_in_a_thread"])
def test_upcalls_are_answered_on_the_loop_and_in_threads(how: str) -> None:
    async def main() -> None:
        async with rig(50) as r:
            jobs = [r.submit(how, n) for n in range(300)]
            assert [end.payload for end in await r.all_ends(jobs)] == [("ok", 2 * n) for n in range(300)]

    asyncio.run(main())


def test_the_error_of_an_upcall_is_raised_in_the_coroutine() -> None:
    async def main() -> None:
        async with rig(2) as r:
            assert await r.value("refused") == "PublishRefused: too large"

    asyncio.run(main())


# --- limits and cancelling ----------------------------------------------------------------------


def test_the_soft_limit_is_a_cancellation_to_what_cleans_up_and_a_soft_limit_to_the_task() -> None:
    async def main() -> None:
        async with rig(2) as r:
            end = await r.run("clean_up", soft_time_limit=0.1)
            assert end.payload == ("ok", ["part: CancelledError", "task: umbel.errors.SoftTimeLimitExceeded"])

    asyncio.run(main())


@pytest.mark.parametrize("payload", [("nap", 60), ("spin", 60), ("in_a_group",)], ids=lambda payload: payload[0])
def test_the_soft_limit_reaches_what_waits_and_what_computes_and_nothing_else(payload: tuple[object, ...]) -> None:
    async def main() -> None:
        async with rig(20) as r:
            beside = [r.submit("nap", 0.5) for _ in range(10)]
            end = await r.run(*payload, soft_time_limit=0.1)
            assert end.ending is Ending.DONE
            assert end.payload == ("soft",)
            assert {end.payload and end.payload[0] for end in await r.all_ends(beside)} == {"ok"}

    asyncio.run(main())


@pytest.mark.parametrize(
    "payload", [("nap", 60), ("spin", 60), ("in_a_group",), ("wait_for_an_answer",)], ids=lambda payload: payload[0]
)
def test_exactly_the_job_that_is_meant_is_cancelled(payload: tuple[object, ...]) -> None:
    async def main() -> None:
        async with rig(20) as r:
            beside = [r.submit("nap", 0.6) for _ in range(10)]
            await r.running(*beside)
            job_id = r.submit(*payload)
            await r.running(job_id)
            assert await r.pool.cancel(job_id, force=False)
            assert (await r.end(job_id)).ending is Ending.CANCELLED
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.DONE}

    asyncio.run(main())


def test_a_task_may_catch_its_cancellation_and_another_cancellation_stays_what_it_is() -> None:
    async def main() -> None:
        async with rig(2) as r:
            job_id = r.submit("ignore_cancel")
            await r.running(job_id)
            await asyncio.sleep(0.05)
            assert await r.pool.cancel(job_id, force=False)
            assert (await r.end(job_id)).payload == ("ok", "caught True")
            assert await r.value("someone_elses_cancellation") == "CancelledError"

    asyncio.run(main())


def test_the_hard_limit_ends_a_coroutine_that_computes_and_tells_the_others_why() -> None:
    async def main() -> None:
        async with rig(20) as r:
            beside = [r.submit("nap", 60) for _ in range(5)]
            await r.running(*beside)
            end = await r.run("spin", 60, time_limit=0.3)
            assert (end.ending, end.detail) == (Ending.TIMED_OUT, "hard time limit of 0.3 s")
            for other in await r.all_ends(beside):
                assert (other.ending, other.detail) == (
                    Ending.COLLATERAL,
                    "another job ended its child: hard time limit of 0.3 s",
                )
            assert (await r.run("nap", 0)).ending is Ending.DONE

    asyncio.run(main())


# --- a blocked loop -----------------------------------------------------------------------------


def test_a_blocked_loop_is_logged_with_its_task_and_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with rig(5, block_warning=0.2) as r:
            nap = r.submit("nap", 0.1)
            await r.running(nap)
            assert await r.value("spin", 1.0) == "spun"
            await r.end(nap)
            nap = r.submit("nap", 0.2)
            await r.end(nap)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    first, second = [record.getMessage() for record in caplog.records if record.name == "umbel_children.crowd_pool"]
    assert "task spin has kept child" in first
    assert "1 more jobs wait" in first
    assert 'asyncio_executor.py", line' in first
    assert "in spin" in first
    assert "base_events" not in first
    assert "goes on, after" in second


def test_what_waits_in_a_blocked_child_runs_in_another() -> None:
    async def main() -> None:
        async with rig(20, processes=2) as r:
            await asyncio.gather(*[r.value("nap", 0) for _ in range(20)])
            spin = r.submit("spin", 2.0)
            await r.running(spin)
            jobs = [r.submit("nap", 0) for _ in range(10)]
            assert {end.ending for end in await r.all_ends(jobs)} == {Ending.DONE}
            assert spin in r.pool.running()
            assert r.pool.free > 0
            assert (await r.end(spin)).ending is Ending.DONE

    asyncio.run(main())


@pytest.mark.parametrize("limit", [{}, {"time_limit": 60}], ids=["no limit", "a later limit"])
def test_a_loop_that_is_blocked_for_too_long_ends_with_its_child_and_the_task_that_kept_it_is_to_blame(
    limit: dict[str, float],
) -> None:
    async def main() -> None:
        async with rig(20, block_warning=None, loop_stall_limit=0.5) as r:
            assert await r.value("spin", 0.1) == "spun"
            beside = [r.submit("nap", 60) for _ in range(3)]
            await r.running(*beside)
            end = await r.run("spin", 60, **limit)
            assert (end.ending, end.detail) == (
                Ending.TIMED_OUT,
                "its child's loop did not come round for 0.5 s (loop_stall_limit)",
            )
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.COLLATERAL}
            assert (await r.run("block", 1.0)).ending is Ending.DONE  # in a thread: the loop goes round

    asyncio.run(main())


def test_a_loop_that_nobody_is_known_to_keep_takes_all_that_runs_along() -> None:
    async def main() -> None:
        async with rig(20, loop_stall_limit=0.5) as r:
            beside = [r.submit("nap", 60) for _ in range(3)]
            await r.running(*beside)
            os.kill(r.pids[0], signal.SIGSTOP)
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.LOST}
            assert (await r.run("nap", 0)).ending is Ending.DONE

    asyncio.run(main())


# --- ends of children ---------------------------------------------------------------------------


def test_a_crash_is_blamed_on_the_job_whose_step_it_was() -> None:
    async def main() -> None:
        async with rig(20) as r:
            over = r.submit("nap", 0)
            beside = [r.submit("nap", 60) for _ in range(5)]
            await r.running(*beside)
            end = await r.run("exit", 7)
            assert (end.ending, end.detail) == (Ending.LOST, "exit code 7")
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.COLLATERAL}
            assert (await r.end(over)).ending is Ending.DONE

    asyncio.run(main())


@pytest.mark.parametrize("how", ["in no job's step", "beside a thread", "from outside"])
def test_where_nobody_can_tell_whose_crash_it_was_all_that_ran_is_lost(how: str) -> None:
    async def main() -> None:
        async with rig(20) as r:
            beside = [r.submit("nap", 60) for _ in range(5)]
            if how == "beside a thread":
                beside.append(r.submit("block", 60))
            await r.running(*beside)
            if how == "from outside":
                os.kill(r.pids[0], signal.SIGKILL)
            else:
                beside.append(r.submit("exit_later" if how == "in no job's step" else "exit", 7))
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.LOST}
            assert (await r.run("nap", 0)).ending is Ending.DONE

    asyncio.run(main())


def test_what_escapes_a_coroutine_ends_its_own_job_only() -> None:
    async def main() -> None:
        async with rig(5) as r:
            before = r.pids
            beside = r.submit("nap", 0.3)
            end = await r.run("system_exit")
            assert (end.ending, end.detail) == (Ending.LOST, "SystemExit: 3")
            end = await r.run("unplain")
            assert end.ending is Ending.LOST
            assert "plain data" in end.detail
            assert (await r.end(beside)).ending is Ending.DONE
            assert r.pids == before

    asyncio.run(main())


def test_a_process_that_a_coroutine_forks_does_not_go_on_as_the_child() -> None:
    async def main() -> None:
        async with rig(5) as r:
            beside = r.submit("nap", 0.5)
            await r.running(beside)
            twin = await r.value("fork")
            assert (await r.end(beside)).ending is Ending.DONE
            await eventually(lambda: not alive(twin))
            assert Counter([await r.value("nap", 0) for _ in range(5)]) == {r.pids[0]: 5}

    asyncio.run(main())


# --- jobs on their last start -------------------------------------------------------------------


def test_a_job_on_its_last_start_has_a_child_of_its_own_and_neither_is_blamed_for_the_other() -> None:
    async def main() -> None:
        async with rig(5) as r:
            (child,) = r.pids
            beside = [r.submit("nap", 60) for _ in range(5)]  # no slot is free
            await r.running(*beside)
            end = await r.run("exit", 7, alone=True)
            assert (end.ending, end.detail) == (Ending.LOST, "exit code 7")
            assert not any(r.ends[job_id].done() for job_id in beside)

            lonely = [r.submit("nap", 1.0, alone=True) for _ in range(2)]
            await r.running(*lonely)
            assert len({r.pool.running()[job_id].pid for job_id in lonely} | {child}) == 3
            os.kill(child, signal.SIGKILL)
            assert {end.ending for end in await r.all_ends(beside)} == {Ending.LOST}
            assert {end.ending for end in await r.all_ends(lonely)} == {Ending.DONE}
            await eventually(lambda: len(r.pids) == 1)  # nothing is left of them
            assert await r.value("nap", 0) == r.pids[0]

    asyncio.run(main())


def test_where_each_child_runs_one_job_at_a_time_every_job_is_alone() -> None:
    async def main() -> None:
        async with rig(2, processes=2) as r:
            before = r.pids
            assert await r.value("nap", 0, alone=True) in before
            assert r.pids == before

    asyncio.run(main())


def test_what_waits_for_a_child_of_its_own_is_recalled_cancelled_and_limited_as_all_that_waits() -> None:
    async def main() -> None:
        async with rig(5) as r:
            recalled = r.submit("nap", 60, alone=True)
            assert r.pool.free == 4
            await r.pool.recall()
            assert (await r.end(recalled)).ending is Ending.RETURNED
            cancelled = r.submit("nap", 60, alone=True)
            assert await r.pool.cancel(cancelled, force=False)
            assert (await r.end(cancelled)).ending is Ending.RETURNED
            limited = r.submit("nap", 60, alone=True)
            assert r.pool.limit(limited, time_limit=0.2, soft_time_limit=None)
            assert (await r.end(limited)).ending is Ending.TIMED_OUT
            running = r.submit("nap", 60, alone=True)
            await r.running(running)
            assert await r.pool.cancel(running, force=True)
            assert (await r.end(running)).ending is Ending.CANCELLED
            await eventually(lambda: len(r.pids) == 1)
            last = r.submit("nap", 60, alone=True)
            await r.running(last)
        assert (await r.ends[last]).ending is Ending.CANCELLED

    asyncio.run(main())


# --- recycling ----------------------------------------------------------------------------------


def test_a_child_that_has_begun_all_it_may_is_replaced_while_its_last_jobs_go_on() -> None:
    async def main() -> None:
        async with rig(4, max_tasks_per_child=4) as r:
            long = [r.submit("nap", 1.0) for _ in range(4)]
            await r.running(*long)
            short = [r.submit("nap", 0) for _ in range(4)]
            pids = {end.payload[1] for end in await r.all_ends(short) if end.payload}
            assert not any(r.ends[job_id].done() for job_id in long)
            old = {end.payload[1] for end in await r.all_ends(long) if end.payload}
            assert len(pids) == len(old) == 1
            assert pids != old
            await eventually(lambda: not any(map(alive, old)))

    asyncio.run(main())


def test_a_child_that_has_grown_too_large_is_replaced() -> None:
    async def main() -> None:
        async with rig(4, max_memory_per_child=150 << 20) as r:
            before = await r.value("hog", 100 << 20)
            long = r.submit("nap", 0.5)
            await r.value("hog", 100 << 20)
            await eventually(lambda: r.pids and before not in r.pids)
            assert (await r.end(long)).ending is Ending.DONE
            assert await r.value("nap", 0) != before

    asyncio.run(main())
