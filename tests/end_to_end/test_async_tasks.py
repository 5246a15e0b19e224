"""``async def`` tasks run in every pool, and in the pool ``asyncio`` by the thousand; one that computes costs no lease."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from cluster import FULL, Cluster, WorkerProcess, until

from umbel import Umbel
from umbel.errors import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLost

TASKS = '''
import asyncio, os, time
from umbel import Umbel
from umbel.errors import SoftTimeLimitExceeded


async def stamped(call_next, request):
    """Middleware that waits, before and after."""
    await asyncio.sleep(0)
    value = await call_next(request)
    return f"{request.headers['stamp']} {value}" if "stamp" in request.headers else value


app = Umbel("naps", middleware=[stamped])

def note(line):
    with open("notes", "a") as notes:
        notes.write(line + "\\n")

@app.task
async def nap(seconds):
    await asyncio.sleep(seconds)
    return os.getpid()

@app.task
def block(seconds):
    time.sleep(seconds)
    return os.getpid()

@app.task
async def spin(seconds):
    note("spin")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return "spun"

@app.task(soft_time_limit=0.4)
async def caught(seconds):
    try:
        await asyncio.sleep(seconds)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0.01)
        return "soft limit"
    return "slept"

@app.task(soft_time_limit=0.4)
async def uncaught(seconds):
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(seconds))

@app.task(bind=True, max_retries=2)
async def stubborn(self):
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return self.request.retries

@app.task
async def nested(x):
    return await (await nap.adelay(0)).aget(timeout=20)

@app.task
async def long(number):
    note(f"long {number}")
    await asyncio.sleep(0 if os.path.exists("go on") else 60)
    return number

@app.task
async def kill():
    note("kill")
    await asyncio.sleep(0.3)
    os.kill(os.getpid(), 9)

@app.task
async def over():
    while True:
        pass
'''


def started(cluster: Cluster, pool: str, concurrency: int, **settings: Any) -> tuple[Umbel, WorkerProcess]:
    (cluster.folder / "naps.py").write_text(TASKS)
    cluster.configure(app="naps", worker__pool=pool, worker__concurrency=concurrency, **settings)
    namespace: dict[str, Any] = {}
    exec(compile(TASKS, "naps.py", "exec"), namespace)
    app: Umbel = namespace["app"]
    app.configure(file=cluster.folder / "umbel.toml")
    return app, cluster.worker()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "asyncio"])
def test_coroutines_run_in_every_pool(cluster: Cluster, pool: str) -> None:
    app, _ = started(cluster, pool, 1 if pool == "solo" else 2)
    try:
        send = app.send_task
        assert send("naps.nap", [0.01]).get(timeout=20) > 0
        assert send("naps.caught", [60]).get(timeout=20) == "soft limit"
        with pytest.raises(SoftTimeLimitExceeded):
            send("naps.uncaught", [60]).get(timeout=20)
        assert send("naps.stubborn").get(timeout=20) == 2
        assert send("naps.nap", [0], headers={"stamp": "seen"}).get(timeout=20).startswith("seen ")
        if pool != "solo":
            assert send("naps.nested", [0]).get(timeout=20) > 0
    finally:
        app.close()


def test_a_fleet_of_coroutines_threads_and_processes(cluster: Cluster) -> None:
    """1,000 sleeps at once in one worker, 20 threads in a second, 2 processes in a third: of one app, on one broker."""
    number = 1000
    app, naps = started(cluster, "asyncio", number, worker__queues=["naps"])
    cluster.worker("--pool", "threads", "--concurrency", "20", "--queues", "threads")
    cluster.worker("--pool", "prefork", "--concurrency", "2", "--queues", "processes")
    try:
        began = time.monotonic()
        sent = [app.send_task("naps.nap", [1.0], queue="naps") for _ in range(number)]
        sent += [app.send_task("naps.block", [1.0], queue="threads") for _ in range(20)]
        sent += [app.send_task("naps.block", [1.0], queue="processes") for _ in range(2)]
        pids = [result.get(timeout=60) for result in sent]
        assert time.monotonic() - began < number * 1.0 / 10, "they have not run one after the other"
        assert set(pids[:number]) <= set(naps.family) - {naps.pid}
        assert set(pids[number:-2]) == {cluster.workers[1].pid}
        assert len(set(pids[-2:])) == 2
    finally:
        app.close()


def test_a_coroutine_that_computes_costs_no_lease_and_is_told(cluster: Cluster) -> None:
    seconds = 8.0 if FULL else 3.0
    app, worker = started(
        cluster, "asyncio", 20, broker__lease=seconds / 4, worker__pool_options__processes=1, worker__max_deliveries=2
    )
    try:
        results = [app.send_task("naps.nap", [seconds / 2]) for _ in range(5)]
        spin = app.send_task("naps.spin", [seconds])
        assert spin.get(timeout=30) == "spun"
        assert {result.get(timeout=20) > 0 for result in results} == {True}
        assert (cluster.folder / "notes").read_text().splitlines() == ["spin"]
        worker.logged("task naps.spin has kept child")
        worker.logged("in spin")
    finally:
        app.close()


def test_what_ran_beside_a_job_over_its_hard_limit_runs_again_uncounted(cluster: Cluster) -> None:
    app, worker = started(
        cluster, "asyncio", 20, worker__pool_options__processes=1, worker__max_deliveries=1, worker__prefetch=20
    )
    try:
        beside = [app.send_task("naps.long", [n]) for n in range(5)]
        notes = cluster.folder / "notes"
        until(lambda: notes.exists() and len(lines(notes)) >= 5, "five long tasks")
        (cluster.folder / "go on").touch()
        with pytest.raises(TimeLimitExceeded):
            app.send_task("naps.over", time_limit=1).get(timeout=30)
        assert [result.get(timeout=30) for result in beside] == list(range(5))
        assert len(lines(notes)) == 10
        assert cluster.dead() == []
        worker.logged("5 jobs that ran beside another")
    finally:
        app.close()


def test_what_always_runs_beside_a_task_that_kills_its_child_is_not_given_up(cluster: Cluster) -> None:
    """F16: nobody can tell whose crash it was, so all count it. On their last start they have each a child of their own."""
    app, _ = started(
        cluster, "asyncio", 20, worker__pool_options__processes=1, worker__max_deliveries=2, broker__lease=60
    )
    try:
        killer = app.send_task("naps.kill")
        beside = [app.send_task("naps.nap", [1.0]) for _ in range(3)]
        with pytest.raises(WorkerLost):
            killer.get(timeout=60)
        assert {result.get(timeout=60) > 0 for result in beside} == {True}
        assert (cluster.folder / "notes").read_text().splitlines() == ["kill", "kill"]
        assert [letter.id for letter in cluster.dead()] == [killer.id]
    finally:
        app.close()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
