from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from prefork_harness import rig
from rigs import alive, eventually

from umbel.errors import UmbelError
from umbel.model import Ending


def test_a_job_runs_in_a_child_and_its_payload_comes_back() -> None:
    async def main() -> None:
        async with rig() as r:
            value = {"n": [1, 2.5, None, b"x", "ü", (1, 2)]}
            end = await r.run("echo", value)
            assert (end.ending, end.payload) == (Ending.DONE, ("ok", value))
            assert end.runtime > 0
            assert await r.value("pid") in r.pids
            assert os.getpid() not in r.pids

    asyncio.run(main())


def test_large_payloads_go_both_ways() -> None:
    async def main() -> None:
        async with rig() as r:
            blob = b"0123456789" * 500_000
            ends = await r.run_all([r.job("echo", blob) for _ in range(6)])
            assert all(end.payload == ("ok", blob) for end in ends)

    asyncio.run(main())


def test_arguments_path_and_preloaded_memory_reach_the_children() -> None:
    async def main() -> None:
        async with rig(arguments={"app": "shop", "n": [1]}) as r:
            assert await r.value("argument", "app") == "shop"
            preloaded = await r.value("preloaded")
            assert preloaded == r.pool.stats()["fork-server"]

    asyncio.run(main())


def test_children_do_not_share_their_random_numbers() -> None:
    async def main() -> None:
        async with rig(3, max_tasks_per_child=1) as r:
            ends = await r.run_all([r.job("random") for _ in range(6)])
            assert len({end.payload for end in ends}) == 6

    asyncio.run(main())


def test_two_slots_run_two_jobs_at_once() -> None:
    async def main() -> None:
        async with rig() as r:
            ends = await r.run_all([r.job("ask", "sleep", 0.1), r.job("pid"), r.job("pid"), r.job("pid")])
            assert [end.ending for end in ends] == [Ending.DONE] * 4
            assert len({end.payload for end in ends[1:]}) == 1

    asyncio.run(main())


def test_thousands_of_short_jobs_end_once_each() -> None:
    async def main() -> None:
        async with rig() as r:
            ends = await r.run_all([r.job("echo", n) for n in range(5000)])
            assert [end.payload for end in ends] == [("ok", n) for n in range(5000)]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("payload", "detail"),
    [
        (("exit", 1), "exit code 1"),
        (("system_exit", 3), "exit code 3"),
        (("kill", int(signal.SIGKILL)), "signal 9 (SIGKILL)"),
        (("segfault",), "signal 11 (SIGSEGV)"),
    ],
)
def test_a_death_is_lost_with_its_cause_and_the_child_replaced(payload: tuple[Any, ...], detail: str) -> None:
    async def main() -> None:
        async with rig(1) as r:
            before = r.pids
            end = await r.run(*payload)
            assert (end.ending, end.detail) == (Ending.LOST, detail)
            assert await r.value("pid") not in before
            assert not any(map(alive, before))

    asyncio.run(main())


def test_a_memory_error_hurts_nobody() -> None:
    async def main() -> None:
        async with rig(1) as r:
            before = r.pids
            assert (await r.run("memory_error")).payload == ("error", "MemoryError", "")
            assert await r.value("pid") == before[0]

    asyncio.run(main())


def test_jobs_around_a_crash_are_not_lost() -> None:
    async def main() -> None:
        async with rig(1) as r:
            for _ in range(20):
                await r.warm("echo")
                before = [r.job("echo", n) for n in range(5)]
                crash = r.job("exit", 1, task="echo")  # travels with the short ones
                behind = [r.job("echo", n) for n in range(5)]
                r.pool.submit([*before, crash, *behind])
                assert (await r.end(crash.id)).ending is Ending.LOST
                assert {(await r.end(job.id)).ending for job in before} == {Ending.DONE}
                # Given back, or run by the next child: whether its socket or its death is heard of first.
                assert {(await r.end(job.id)).ending for job in behind} <= {Ending.RETURNED, Ending.DONE}

    asyncio.run(main())


def test_a_value_that_is_not_plain_ends_its_job_only() -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.warm("echo")
            before = r.pids
            bad = r.job("echo", object(), task="echo")
            jobs = [r.job("echo", 1), bad, r.job("echo", 2), r.job("unplain", task="echo"), r.job("echo", 3)]
            ends = await r.run_all(jobs)
            assert [end.ending for end in ends] == [
                Ending.DONE,
                Ending.LOST,
                Ending.DONE,
                Ending.LOST,
                Ending.DONE,
            ]
            assert "plain data" in ends[1].detail
            assert "plain data" in ends[3].detail
            assert r.pids == before

    asyncio.run(main())


def test_upcalls_are_answered_from_any_thread() -> None:
    async def main() -> None:
        async with rig() as r:
            assert await r.value("ask", "double", 21) == 42
            ends = await r.run_all([r.job("ask_in_threads", 8) for _ in range(20)])
            assert all(end.payload == ("ok", [n * 2 for n in range(8)] + [2000]) for end in ends)

    asyncio.run(main())


def test_jobs_go_on_while_a_thread_that_was_left_behind_waits_for_its_answer() -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.value("leave_thread", 0.3)
            await r.value("leave_thread", 0.05)
            for n in range(200):
                assert await r.value("ask", "double", n) == 2 * n
            ends = await r.run_all([r.job("echo", n) for n in range(500)])
            assert len(ends) == 500

    asyncio.run(main())


@pytest.mark.parametrize(
    ("verb", "type_name", "text"),
    [
        ("refuse", "PublishRefused", "too large"),
        ("value error", "ValueError", "too large"),
        ("attributes", "TaskFailed", "shop.Broken: too large"),
        ("foreign", "UmbelError", "asyncio.queues.QueueEmpty: too large"),
        ("unplain", "ValueError", "unmarshallable object"),
    ],
)
def test_the_error_of_an_upcall_is_raised_in_the_task(verb: str, type_name: str, text: str) -> None:
    async def main() -> None:
        async with rig(1) as r:
            assert (await r.run("ask", verb, "too large")).payload == ("error", type_name, text)

    asyncio.run(main())


def test_an_upcall_from_a_forked_process_is_refused_and_harms_nobody() -> None:
    async def main() -> None:
        async with rig(1) as r:
            assert await r.value("ask_in_fork") == 7
            assert await r.value("ask", "double", 2) == 4
            assert await r.value("fork_and_term") == -signal.SIGTERM

    asyncio.run(main())


def test_a_process_that_a_task_forks_and_lets_return_does_not_go_on_as_the_child() -> None:
    async def main() -> None:
        async with rig(1) as r:
            await r.warm("echo")
            before = r.pids
            for _ in range(5):
                jobs = [r.job("echo", 1), r.job("fork_and_return", task="echo"), r.job("echo", 2)]
                ends = await r.run_all(jobs)
                assert [end.ending for end in ends] == [Ending.DONE] * 3
                twin = ends[1].payload[1] if ends[1].payload else 0
                await eventually(lambda twin=twin: not alive(twin))
            assert await r.value("fork_and_exit") == 3
            assert r.pids == before

    asyncio.run(main())


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("make_import_error", "no_such_module_of_the_application"),
        ("no_such_function", "no_such_function"),
        ("make_broken", "no database today"),
        ("make_dying", "exit code 3"),
    ],
)
def test_what_cannot_start_says_why(target: str, text: str) -> None:
    async def main() -> None:
        async with rig(target=target):
            pytest.fail("started")

    with pytest.raises(UmbelError, match=text):
        asyncio.run(main())


def test_a_child_that_does_not_become_ready_is_killed() -> None:
    async def main() -> None:
        async with rig(target="make_slow", start_timeout=2):
            pytest.fail("started")

    with pytest.raises(UmbelError, match=r"within 2 s"):
        asyncio.run(main())


def test_children_that_cannot_start_are_tried_again_with_growing_gaps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marker = tmp_path / "marker"

    async def main() -> None:
        async with rig(1, target="make_flaky", arguments={"marker": str(marker)}) as r:
            marker.touch()
            assert (await r.run("exit", 1)).ending is Ending.LOST
            job = r.submit("echo", 1)
            await asyncio.sleep(0.5)
            assert r.pool.free <= 0
            marker.unlink()
            assert (await r.end(job)).ending is Ending.DONE

    asyncio.run(main())
    failures = [record for record in caplog.records if "could not start" in record.message]
    assert 2 <= len(failures) <= 5
    assert "RuntimeError: marker" in failures[0].getMessage()


def test_stop_signals_to_the_children_do_nothing() -> None:
    async def main() -> None:
        async with rig() as r:
            jobs = [r.submit("sleep", 0.3) for _ in range(2)]
            await asyncio.sleep(0.05)
            before = r.pids
            for signum in (signal.SIGTERM, signal.SIGINT):
                for pid in [*before, r.pool.stats()["fork-server"]]:
                    os.killpg(pid, signum)
            for job in jobs:
                assert (await r.end(job)).payload == ("ok", "slept")
            assert r.pids == before

    asyncio.run(main())


def test_a_held_logging_lock_in_the_worker_does_not_hang_the_children() -> None:
    import logging
    import threading

    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        handler = logging.NullHandler()
        logging.getLogger().addHandler(handler)
        handler.createLock()
        lock = logging._lock  # type: ignore[attr-defined]  # the lock that logging keeps to itself is the point
        with lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)

    async def main() -> None:
        async with rig(2, max_tasks_per_child=3) as r:
            ends = await r.run_all([r.job("log") for _ in range(12)])
            assert {end.payload for end in ends} == {("ok", None)}

    thread.start()
    try:
        assert held.wait(5)
        asyncio.run(main())
    finally:
        release.set()
        thread.join(30)


def test_a_program_that_a_killed_task_started_does_not_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"

    async def main() -> None:
        async with rig(1) as r:
            job = r.submit("start_program", str(path))
            await eventually(lambda: path.exists() and path.read_text())
            assert await r.pool.cancel(job, force=True)
            assert (await r.end(job)).ending is Ending.CANCELLED
            await eventually(lambda: not alive(int(path.read_text())))

    asyncio.run(main())


def test_what_runs_is_told_with_its_start_and_its_child() -> None:
    async def main() -> None:
        async with rig(1) as r:
            before = time.monotonic()
            first, second = r.submit("sleep", 0.2), r.submit("sleep", 0.0)
            await eventually(lambda: r.pool.running())
            (told,) = r.pool.running().items()
            assert told[0] == first
            assert before <= told[1].since <= time.monotonic()
            assert told[1].pid in r.pids
            await r.end(second)
            assert r.pool.running() == {}

    asyncio.run(main())
