"""Limits, cancelling, taking back, recycling, stopping: every way that a job or a child can end."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import prefork_harness
import pytest
import rigs
from prefork_harness import children_of, rig
from rigs import alive, eventually

from umbel.errors import UmbelError
from umbel.model import Ending

ONE_END = {Ending.DONE, Ending.RETURNED, Ending.CANCELLED}


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [("sleep", 20), ("spin", 20), ("ask", "sleep", 20)])
def test_the_soft_limit_is_raised_in_a_task_that_sleeps_computes_or_asks(body: tuple[object, ...]) -> None:
    async def main() -> None:
        async with rig(1) as r:
            before = r.pids
            end = await r.run(*body, soft_time_limit=0.1)
            assert (end.ending, end.payload) == (Ending.DONE, ("soft",))
            assert end.runtime >= 0.1
            assert await r.value("ask", "double", 4) == 8
            assert r.pids == before

    asyncio.run(main())


@pytest.mark.parametrize("body", [("sleep", 20), ("spin", 20), ("ask", "sleep", 20)])
def test_the_hard_limit_kills_the_child(body: tuple[object, ...]) -> None:
    async def main() -> None:
        async with rig(1) as r:
            before = r.pids
            end = await r.run(*body, time_limit=0.1)
            assert (end.ending, end.detail) == (Ending.TIMED_OUT, "hard time limit of 0.1 s")
            assert await r.value("pid") not in before

    asyncio.run(main())


def test_a_task_that_ignores_its_soft_limit_meets_the_hard_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(1) as r:
            end = await r.run("stubborn", str(tmp_path / "told"), 20, soft_time_limit=0.1, time_limit=0.4)
            assert end.ending is Ending.TIMED_OUT
            assert (tmp_path / "told").read_text() == "soft"

    asyncio.run(main())


def test_a_limit_never_hits_the_jobs_around_it() -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.warm("echo")
            for _ in range(5):
                quick = [r.job("echo", n) for n in range(20)]
                slow = r.job("sleep", 20, task="echo", time_limit=0.1)
                ends = await r.run_all([*quick[:10], slow, *quick[10:]])
                assert Counter(end.ending for end in ends) == {Ending.DONE: 20, Ending.TIMED_OUT: 1}

    asyncio.run(main())


# --- cancelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [("sleep", 20), ("spin", 20), ("ask", "sleep", 20)])
@pytest.mark.parametrize("force", [False, True])
def test_cancel_ends_a_running_job(body: tuple[object, ...], force: bool) -> None:
    async def main() -> None:
        async with rig(1) as r:
            before = r.pids
            job = r.submit(*body)
            await asyncio.sleep(0.1)
            assert await r.pool.cancel(job, force=force)
            end = await r.end(job)
            if force:
                assert end.ending is Ending.CANCELLED
                await eventually(lambda: r.pids and r.pids != before)
            else:
                assert end.payload == ("cancelled",)
            assert await r.value("ask", "double", 4) == 8
            assert (r.pids == before) is not force

    asyncio.run(main())


def test_an_interrupt_that_the_executor_lets_through_ends_the_job_and_not_the_child() -> None:
    async def main() -> None:
        async with rig(1, target="make_letting") as r:
            before = r.pids
            job = r.submit("sleep", 20)
            await asyncio.sleep(0.1)
            assert await r.pool.cancel(job, force=False)
            assert (await r.end(job)).ending is Ending.CANCELLED
            assert (await r.run("sleep", 20, soft_time_limit=0.1)).ending is Ending.TIMED_OUT
            assert await r.value("pid") == before[0]

    asyncio.run(main())


def test_cancel_before_the_start_returns_the_job() -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.warm("echo")
            running = r.job("sleep", 0.3, task="echo")
            behind = [r.job("echo", n) for n in range(3)]
            waiting = r.job("pid")
            r.pool.submit([running, *behind, waiting])
            assert await r.pool.cancel(behind[1].id, force=False)
            assert await r.pool.cancel(waiting.id, force=True)
            endings = [(await r.end(job.id)).ending for job in [running, *behind, waiting]]
            assert endings == [Ending.DONE, Ending.DONE, Ending.RETURNED, Ending.DONE, Ending.RETURNED]
            assert not await r.pool.cancel(running.id, force=True)
            assert not await r.pool.cancel(4711, force=False)

    asyncio.run(main())


@pytest.mark.parametrize(("force", "rounds"), [(False, 400), (True, 60)])
def test_cancelling_a_job_never_hits_the_next_on_the_same_child(force: bool, rounds: int) -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.warm("sleep", 0.0)
            rng = random.Random(17)
            for _ in range(rounds):
                a = r.job("sleep", rng.random() * 0.004)
                b = r.job("echo", "b", task="sleep")
                r.pool.submit([a, b])
                await asyncio.sleep(rng.random() * 0.003)
                await r.pool.cancel(a.id, force=force)
                end = await r.end(b.id)
                assert (end.ending, end.payload) == (Ending.DONE, ("ok", "b"))
                assert (await r.end(a.id)).ending in ONE_END

    asyncio.run(main())


# --- taking back --------------------------------------------------------------------------------


def test_recall_returns_exactly_what_has_not_started(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig() as r:
            await r.warm("touch", str(tmp_path / "warm"))
            rng = random.Random(4)
            for round_ in range(60):
                paths = [tmp_path / f"{round_}-{n}" for n in range(60)]
                jobs = [r.job("touch", str(path)) for path in paths]
                r.pool.submit(jobs)
                await asyncio.sleep(rng.random() * 0.002)
                await r.pool.recall()
                for job, path in zip(jobs, paths, strict=True):
                    end = await r.end(job.id)
                    assert end.ending in (Ending.DONE, Ending.RETURNED)
                    assert path.exists() is (end.ending is Ending.DONE)
                    assert not path.exists() or path.read_text() == "x"

    asyncio.run(main())


def test_jobs_behind_a_long_one_are_done_by_other_slots() -> None:
    async def main() -> None:
        async with rig() as r:
            await r.warm("echo")
            long = r.job("sleep", 2, task="echo")
            short = [r.job("pid", task="echo") for _ in range(60)]
            r.pool.submit([long, *short])
            ends = await asyncio.gather(*[r.end(job.id) for job in short])
            assert not r.ends[long.id].done()
            assert {end.ending for end in ends} == {Ending.DONE}
            assert (await r.end(long.id)).ending is Ending.DONE

    asyncio.run(main())


def test_what_finished_before_a_long_job_is_reported_while_it_runs() -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.warm("echo")
            short = [r.job("echo", n) for n in range(3)]
            long = r.job("spin", 1, task="echo")
            r.pool.submit([*short, long])
            for job in short:
                assert (await r.end(job.id)).ending is Ending.DONE
            assert not r.ends[long.id].done()

    asyncio.run(main())


def test_free_asks_for_one_long_job_a_slot_and_for_many_short_ones() -> None:
    async def main() -> None:
        async with rig() as r:
            assert r.pool.free == 2
            await r.warm("sleep", 0.1)
            assert r.pool.free == 2
            await r.run_all([r.job("echo", n) for n in range(3000)])
            assert r.pool.free > 20

    asyncio.run(main())


# --- recycling and resizing ---------------------------------------------------------------------


def test_a_child_retires_after_its_number_of_tasks() -> None:
    async def main() -> None:
        async with rig(max_tasks_per_child=7) as r:
            ends = await r.run_all([r.job("pid") for _ in range(300)])
            runs = Counter(end.payload for end in ends)
            assert max(runs.values()) == 7
            assert sum(runs.values()) == 300

    asyncio.run(main())


def test_a_child_retires_when_it_holds_too_much_memory() -> None:
    async def main() -> None:
        async with rig(1, max_memory_per_child=150 << 20) as r:
            pids = {await r.value("hog", 40 << 20) for _ in range(8)}
            assert 2 <= len(pids) <= 4

    asyncio.run(main())


def test_a_memory_limit_below_the_size_of_a_new_child_is_refused_at_the_start() -> None:
    async def main() -> None:
        async with rig(1, max_memory_per_child=1 << 20):
            pytest.fail("started")

    with pytest.raises(UmbelError, match="raise that setting"):
        asyncio.run(main())


def test_resize_lets_running_jobs_end() -> None:
    async def main() -> None:
        async with rig(3) as r:
            jobs = [r.submit("sleep", 0.3) for _ in range(3)]
            await asyncio.sleep(0.05)
            await r.pool.resize(1)
            for job in jobs:
                assert (await r.end(job)).payload == ("ok", "slept")
            await eventually(lambda: len(r.pids) == 1)
            await r.pool.resize(4)
            await eventually(lambda: len(r.pids) == 4 and r.pool.free >= 4)
            assert r.pool.stats()["max-concurrency"] == 4
            assert len(await r.run_all([r.job("echo", n) for n in range(200)])) == 200

    asyncio.run(main())


# --- chaos --------------------------------------------------------------------------------------


def test_every_job_ends_once_and_nothing_stalls_or_leaks_under_random_deaths() -> None:
    async def main() -> None:
        async with rig(4, max_tasks_per_child=7) as r:
            fds = len(os.listdir("/proc/self/fd"))
            rng = random.Random(3)
            jobs = []
            for n in range(3000):
                payload = rng.choice([("exit", 1), ("segfault",), ("kill", 9), ("memory_error",), ("system_exit", 2)])
                jobs.append(r.job(*(payload if rng.random() < 0.01 else ("echo", n)), task=rng.choice("ab")))
            ends = await r.run_all(jobs)
            assert r.longest_gap < 5
            counts = Counter(end.ending for end in ends)
            assert counts[Ending.LOST] >= 10
            assert counts[Ending.DONE] > 2500
            assert set(counts) <= {Ending.DONE, Ending.LOST, Ending.RETURNED}
            await eventually(lambda: len(r.pids) == 4 and r.pool.free >= 4)
            server = r.pool.stats()["fork-server"]
            await eventually(lambda: sorted(children_of(server)) == sorted(r.pids))
            await eventually(lambda: len(os.listdir("/proc/self/fd")) == fds)

    asyncio.run(main())


def test_a_child_that_does_not_take_up_its_work_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("umbel_children.pool.EXIT_SECONDS", 0.5)
        async with rig(1) as r:
            os.kill(r.pids[0], signal.SIGSTOP)
            job = r.submit("echo", 1, time_limit=1.0)
            assert (await r.end(job)).ending is Ending.DONE

    asyncio.run(main())


def test_a_dead_fork_server_is_replaced_with_its_children() -> None:
    async def main() -> None:
        async with rig() as r:
            await r.warm("echo")
            for _ in range(3):
                running = r.job("sleep", 20, task="echo")
                r.pool.submit([running, *(r.job("echo", n) for n in range(40))])
                await asyncio.sleep(0.02)
                before = r.pids
                os.kill(r.pool.stats()["fork-server"], signal.SIGKILL)
                end = await r.end(running.id)
                assert end.ending is Ending.LOST
                assert end.detail == "the fork server died: signal 9 (SIGKILL)"
                assert (await r.run("echo", 1)).ending in (Ending.DONE, Ending.RETURNED)
                await eventually(lambda: len(r.pids) == 2 and r.pool.free >= 2)
                assert not any(map(alive, before))
                assert set(before).isdisjoint(r.pids)

    asyncio.run(main())


def test_a_fork_server_that_does_not_kill_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbel_children.brood.EXIT_SECONDS", 0.3)

    async def main() -> None:
        async with rig(1) as r:
            before = [*r.pids, r.pool.stats()["fork-server"]]
            os.kill(before[-1], signal.SIGSTOP)
            assert (await r.run("sleep", 20, time_limit=0.1)).ending is Ending.TIMED_OUT
            assert await r.value("pid") not in before
            assert not any(map(alive, before))

    asyncio.run(main())


WORKER = """
import asyncio, sys
from prefork_harness import rig
async def main():
    async with rig(2) as r:
        r.submit("sleep", 60)
        r.submit("spin", 60)
        await asyncio.sleep(0.2)
        print(*r.pids, r.pool.stats()["fork-server"], flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def test_nothing_outlives_a_killed_worker() -> None:
    folders = os.pathsep.join(str(Path(module.__file__).parent) for module in (rigs, prefork_harness))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folders, os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen([sys.executable, "-c", WORKER], env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        worker.kill()
        deadline = time.monotonic() + 1
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, pids))


# --- stopping -----------------------------------------------------------------------------------


def test_stop_waits_then_cancels_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        gc.collect()
        fds = len(os.listdir("/proc/self/fd"))
        async with rig() as r:
            await r.warm("echo")
            short = r.submit("sleep", 0.2)
            long = r.submit("spin", 60)
            await asyncio.sleep(0.05)
            waiting = [r.submit("echo", n) for n in range(5)]
            pids = [*r.pids, r.pool.stats()["fork-server"]]
            stopping = asyncio.create_task(r.pool.stop(timeout=0.6))
            await asyncio.sleep(0.05)
            late = r.submit("echo", 9)
            await stopping
            assert (await r.end(short)).ending is Ending.DONE
            assert (await r.end(long)).ending is Ending.CANCELLED
            for job in [*waiting, late]:
                assert (await r.end(job)).ending is Ending.RETURNED
            assert not any(map(alive, pids))
            assert set(children_of(os.getpid())).isdisjoint(pids)
        assert len(os.listdir("/proc/self/fd")) == fds

    asyncio.run(main())


def test_a_second_stop_shortens_the_wait() -> None:
    async def main() -> None:
        async with rig(1) as r:
            long = r.submit("sleep", 60)
            await asyncio.sleep(0.05)
            first = asyncio.create_task(r.pool.stop(timeout=50))
            await asyncio.sleep(0.05)
            await r.pool.stop(timeout=0.1)
            await first
            assert (await r.end(long)).ending is Ending.CANCELLED

    asyncio.run(main())


def test_stop_before_start_ends_the_completions() -> None:
    async def main() -> None:
        from umbel_prefork.pool import PreforkPool

        pool = PreforkPool()
        await pool.stop(timeout=0)
        assert [batch async for batch in pool.completions() if batch] == []

    asyncio.run(main())
