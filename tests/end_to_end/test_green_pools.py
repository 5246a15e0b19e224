"""Real workers whose children run greenlets: what blocks is cooperative, each task is met alone, nothing else is patched."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import FULL, Cluster, WorkerProcess

from umbel import Umbel
from umbel.errors import TaskRevoked, TimeLimitExceeded

TASKS = '''
import asyncio, os, socket, threading, time
from umbel import Umbel
from umbel.errors import SoftTimeLimitExceeded, TaskCancelled

PATCHED = [socket.socket.__module__.partition(".")[0], time.sleep.__module__.partition(".")[0]]

app = Umbel("green")

def note(line):
    with open("notes", "a") as notes:
        notes.write(line + "\\n")

@app.task
def patched():
    return PATCHED

@app.task
def nap(seconds):
    time.sleep(seconds)
    return os.getpid()

@app.task
async def anap(seconds):
    await asyncio.sleep(seconds)
    return os.getpid()

@app.task
def double(x):
    return 2 * x

@app.task
def ask(x):
    return double.delay(x).get(timeout=20)

@app.task
async def aask(x):
    return await (await double.adelay(x)).aget(timeout=20)

@app.task
def own_loop(seconds):
    return asyncio.run(asyncio.sleep(seconds, "own loop"))

@app.task
async def in_a_thread(seconds):
    return await asyncio.to_thread(lambda: (time.sleep(seconds), "thread")[1])

@app.task
async def block_a_coroutine(seconds):
    time.sleep(seconds)
    return "goes on"

@app.task
async def echo(port, seconds):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\\n")
    line = await reader.readline()
    writer.close()
    return line.decode()

@app.task
def serve(seconds):
    """A server in a greenlet, and its client in a coroutine, of one child."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    handle = echo.delay(port, seconds)
    connection, _ = server.accept()
    connection.sendall(connection.recv(100))
    connection.close()
    server.close()
    return handle.get(timeout=20)

@app.task(soft_time_limit=0.4)
def soft(seconds):
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "soft limit"
    return "slept"

@app.task(soft_time_limit=0.4)
async def asoft(seconds):
    try:
        await asyncio.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "soft limit"
    return "slept"

@app.task(soft_time_limit=0.4)
def spin(seconds):
    end = time.monotonic() + seconds
    try:
        while True:  # with a condition here, Python 3.13 may not catch what interrupts the loop (python/cpython#130279)
            if time.monotonic() > end:
                break
    except SoftTimeLimitExceeded:
        return "soft limit"
    return "spun"

@app.task(soft_time_limit=0.4)
async def aspin(seconds):
    end = time.monotonic() + seconds
    try:
        while True:
            if time.monotonic() > end:
                break
    except SoftTimeLimitExceeded:
        return "soft limit"
    return "spun"

@app.task(time_limit=0.5)
def deaf(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

@app.task
def wait(name):
    note(f"{name} waits")
    try:
        time.sleep(60)
    except TaskCancelled:
        note(f"{name} is cancelled")
        raise
'''

Pools = Callable[..., tuple[Umbel, WorkerProcess]]


@pytest.fixture(params=["gevent", "eventlet"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(cluster: Cluster, pool: str) -> Pools:
    """``start(concurrency=4)``: the app that sends, and a worker with children of that pool."""

    def start(*, concurrency: int, processes: int = 1) -> tuple[Umbel, WorkerProcess]:
        (cluster.folder / "green.py").write_text(TASKS)
        cluster.configure(
            app="green",
            worker__pool=pool,
            worker__concurrency=concurrency,
            worker__grace=0.5,
            worker__pool_options__processes=processes,
        )
        app = Umbel("sender")
        app.configure(file=cluster.folder / "umbel.toml")
        cluster._app = app  # closed with the cluster
        return app, cluster.worker()

    return start


def call(app: Umbel, name: str, *args: Any) -> Any:
    return app.send_task(f"green.{name}", args)


def test_blocking_calls_wait_side_by_side_and_tasks_ask_their_worker(start: Pools, pool: str) -> None:
    app, worker = start(concurrency=60)
    assert call(app, "patched").get(timeout=30) == [pool, pool]
    began = time.monotonic()
    handles = [call(app, "nap", 1.0) for _ in range(20)] + [call(app, "anap", 1.0) for _ in range(20)]
    assert {handle.get(timeout=20) for handle in handles} == {*worker.children}
    assert time.monotonic() - began < 20, "40 seconds of sleep, one after the other"
    assert [call(app, name, 4).get(timeout=20) for name in ("ask", "aask")] == [8, 8]
    for name, told in (("own_loop", "own loop"), ("in_a_thread", "thread"), ("block_a_coroutine", "goes on")):
        assert [handle.get(timeout=20) for handle in [call(app, name, 0.2) for _ in range(3)]] == [told] * 3
    assert call(app, "serve", 1).get(timeout=20) == "hello\n"


def test_limits_meet_the_task_that_they_are_for(start: Pools, cluster: Cluster) -> None:
    app, worker = start(concurrency=20)
    bystanders = [call(app, "nap", 1.5), call(app, "anap", 1.5)]
    for name in ("soft", "asoft", "spin", "aspin"):
        handles = [call(app, name, 20) for _ in range(1 if "spin" in name else 3)]
        assert {handle.get(timeout=30) for handle in handles} == {"soft limit"}
    (child,) = worker.children
    assert [handle.get(timeout=20) for handle in bystanders] == [child, child]
    beside, deaf = call(app, "nap", 2.0), call(app, "deaf", 60)
    with pytest.raises(TimeLimitExceeded):
        deaf.get(timeout=20)
    assert beside.get(timeout=20) != child, (
        "what does not listen is killed with its child, and what ran beside it again"
    )
    assert cluster.dead() == []


def test_exactly_the_cancelled_task_ends(start: Pools, cluster: Cluster) -> None:
    app, worker = start(concurrency=10)
    first, second = call(app, "wait", "first"), call(app, "wait", "second")
    notes = cluster.folder / "notes"
    while not notes.exists() or notes.read_text().count("waits") < 2:
        time.sleep(0.02)
    app.control.revoke(first.id, terminate=True)
    with pytest.raises(TaskRevoked):
        first.get(timeout=20)
    assert [line for line in notes.read_text().splitlines() if "cancelled" in line] == ["first is cancelled"]
    assert second.state != "REVOKED"
    assert worker.end() == 0


def test_a_thousand_sleeps_at_once_and_nobody_but_the_children_is_patched(start: Pools, pool: str) -> None:
    number, seconds = (2000, 3.0) if FULL else (1000, 1.0)
    app, worker = start(concurrency=number, processes=2)
    began = time.monotonic()
    nap = app.task(name="green.nap")(lambda seconds: None)
    handles = nap.map_delay([(seconds,)] * number)
    assert {handle.get(timeout=60) for handle in handles} == {*worker.children}
    print(f"{pool}: {number} sleeps of {seconds:g} s in {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < number * seconds / 10
    libraries = {"gevent": "gevent", "eventlet": "greenlet"}[pool]  # compiled ones, and so to be seen from outside
    assert libraries not in Path(f"/proc/{worker.pid}/maps").read_text(), "the worker's own process has imported it"
    for child in worker.children:
        assert libraries in Path(f"/proc/{child}/maps").read_text()
