"""Locks: one holder at a time, in threads, event loops, worker's children; freed by release, or by the end of the lease."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, until

from umbel import Umbel
from umbel.claiming import LOCK
from umbel.errors import LockLost, LockTimeout, NotSupported, ResultStoreUnavailable
from umbel.ports.clock import VirtualClock
from umbel.testing.harness import in_memory

SHOP = """
import os, sys, time
from umbel import Umbel

app = Umbel("lockshop")

@app.task
def hold(name, seconds=0.0, lease=2.0):
    with app.lock(name, lease=lease) as lock:
        for n in range(2):
            with open("inside.log", "a") as log:
                log.write(f"{name} {n} {os.getpid()} {lock.fence}\\n")
            time.sleep(seconds)
        lock.check()
        return lock.fence

@app.task
async def hold_async(name, seconds=0.0):
    import asyncio
    async with app.lock(name, lease=2.0) as lock:
        await asyncio.sleep(seconds)
        return lock.fence
"""


@pytest.fixture(params=["sqlite", "redis"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Umbel]:
    url = f"sqlite:///{tmp_path}/results.db" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    with Umbel("locks", broker=f"sqlite:///{tmp_path}/broker.db", results=url) as app:
        yield app


def test_a_lock_is_held_by_one(app: Umbel) -> None:
    with app.lock("door", lease=5) as mine:
        assert mine.held
        assert not app.lock("door", lease=5).acquire(blocking=False)
        assert app.lock("window", lease=5).acquire(blocking=False)
        with (
            pytest.raises(LockTimeout, match=r"lock 'door' was not free within 0.05 s"),
            app.lock("door", timeout=0.05),
        ):
            pass
        with pytest.raises(RuntimeError, match="holds lock 'door' already"):
            mine.acquire()
    assert not mine.held
    with pytest.raises(LockLost, match="is not held"):
        mine.check()
    with pytest.raises(LockLost):
        mine.release()
    assert app.lock("door", lease=5).acquire(blocking=False)


def test_who_waits_gets_it_and_a_higher_number(app: Umbel) -> None:
    first = app.lock("door", lease=5)
    assert first.acquire()
    threading.Timer(0.2, first.release).start()
    fence = first.fence
    with app.lock("door", lease=5, timeout=5) as second:
        assert second.fence > fence


def test_threads_and_loops_exclude_each_other(app: Umbel) -> None:
    inside, most, counter = 0, 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)

    def leave() -> None:
        nonlocal inside, counter
        with guard:
            inside -= 1
            counter += 1

    def thread() -> None:
        for _ in range(3):
            with app.lock("door", lease=10):
                enter()
                time.sleep(0.005)
                leave()

    async def loop() -> None:
        async def one() -> None:
            async with app.lock("door", lease=10):
                enter()
                await asyncio.sleep(0.005)
                leave()

        await asyncio.gather(*(one() for _ in range(6)))

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for each in threads:
        each.start()
    asyncio.run(loop())
    for each in threads:
        each.join(30)
    assert (counter, most, inside) == (15, 1, 0)


def test_a_lock_is_renewed_as_long_as_it_is_held(app: Umbel) -> None:
    with app.lock("door", lease=2.0) as mine:
        fence = mine.fence
        for _ in range(10):
            time.sleep(0.4)
            assert not app.lock("door", lease=2.0).acquire(blocking=False)
        assert mine.fence == fence
    until(lambda: app.lock_keeper._thread is None, "the thread that renews ends")


def test_a_lost_lock_says_so(app: Umbel) -> None:
    lock = app.lock("door", lease=0.4)
    with pytest.raises(LockLost, match="was lost before it was released"), lock:  # noqa: PT012  # what is inside must not raise
        app.gateway.ask("release", (LOCK + "door", lock._hold.owner, None))  # type: ignore[union-attr]  # it is held
        assert app.lock("door", lease=30).acquire()
        until(lambda: not lock.held, "the holder hears of it")
    with pytest.raises(ZeroDivisionError), app.lock("window", lease=0.2) as other:  # noqa: PT012  # as above
        other._hold.taken = True  # type: ignore[union-attr]  # as above
        raise ZeroDivisionError


def test_a_store_that_is_down_loses_the_lock_when_its_lease_ends(app: Umbel, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = app.lock("door", lease=0.5)
    lock.acquire()

    def down(verb: str, payload: Any) -> Any:
        raise ResultStoreUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(app.gateway, "ask", down)
        assert lock.held
        until(lambda: not lock.held, "the lease ends", timeout=3)
    with pytest.raises(LockLost):
        lock.release()


def test_a_short_fault_of_the_store_loses_nothing(app: Umbel, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, faults, renewed = app.gateway.ask, [ResultStoreUnavailable("down"), ResultStoreUnavailable("down")], []

    def shaky(verb: str, payload: Any) -> Any:
        if verb == "renew" and faults:
            raise faults.pop()
        answer = ask(verb, payload)
        if verb == "renew":
            renewed.append(answer)
        return answer

    monkeypatch.setattr(app.gateway, "ask", shaky)
    with app.lock("door", lease=3.0) as lock:
        until(lambda: renewed, "it is renewed after both faults")
        assert lock.held
    assert faults == []


def test_a_renewal_that_was_under_way_at_the_release_leaves_nothing_behind(
    app: Umbel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, renewing, released = app.gateway.ask, threading.Event(), threading.Event()

    def slow(verb: str, payload: Any) -> Any:
        if verb == "renew":
            renewing.set()
            assert released.wait(5)
        return ask(verb, payload)

    monkeypatch.setattr(app.gateway, "ask", slow)
    lock = app.lock("door", lease=30)
    lock.acquire()
    lock._hold.renews = 0.0  # type: ignore[union-attr]  # it is held
    app.lock_keeper.add(lock._hold)  # type: ignore[arg-type]  # as above
    assert renewing.wait(5)
    lock.release()
    released.set()
    until(lambda: app.lock("door", lease=5).acquire(blocking=False), "it is free")


def test_locks_have_sensible_arguments(app: Umbel) -> None:
    for wrong in ({"name": ""}, {"name": "x", "lease": 0}):
        with pytest.raises(ValueError, match=r"a lock has a name|lease is"):
            app.lock(**wrong)
    assert app.lock("x").lease == 30.0


def test_a_store_without_claims_has_no_locks(tmp_path: Path) -> None:
    with (
        Umbel("locks", broker=f"sqlite:///{tmp_path}/b.db", results="disabled") as app,
        pytest.raises(NotSupported, match=r"\[results\] url"),
        app.lock("door"),
    ):
        pass


def test_a_forked_process_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    script = f"""
import os, sys
from umbel import Umbel
app = Umbel("locks", broker="sqlite:///{tmp_path}/b.db", results="sqlite:///{tmp_path}/r.db")
lock = app.lock("door", lease=5)
lock.acquire()
if (pid := os.fork()) == 0:
    ok = not lock.held and not app.lock("door", lease=5).acquire(blocking=False)
    os._exit(0 if ok else 1)
status = os.waitpid(pid, 0)[1]
lock.release()
sys.exit(status)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_sigkill_of_the_holder_frees_it_within_one_lease(app: Umbel, tmp_path: Path) -> None:
    settings = app.settings
    script = f"""
import time
from umbel import Umbel
app = Umbel("locks", broker={settings.broker.url!r}, results={settings.results.url!r})
with app.lock("door", lease=3.0) as lock:
    print(lock.fence, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        fence = int(holder.stdout.readline())
        time.sleep(3.2)  # renewed meanwhile
        assert not app.lock("door").acquire(blocking=False)
        holder.kill()
        begun = time.monotonic()
        with app.lock("door", timeout=30) as lock:
            assert time.monotonic() - begun < 3.0 + 10.0
            assert lock.fence > fence
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]  # it is a pipe


def _inside(cluster: Cluster) -> list[list[str]]:
    log = cluster.folder / "inside.log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_tasks_in_children_hold_locks_through_their_worker(cluster: Cluster) -> None:
    (cluster.folder / "lockshop.py").write_text(SHOP)
    cluster.configure(app="lockshop", worker__concurrency=3, broker__lease=2.0)
    worker = cluster.worker()
    hold = lambda *args: cluster.app.send_task("lockshop.hold", args)  # noqa: E731  # said once
    sent = [hold("door", 0.02) for _ in range(6)]
    fences = [result.get(timeout=30) for result in sent]
    assert len(set(fences)) == 6
    seen = _inside(cluster)
    assert len({pid for _, _, pid, _ in seen}) > 1, "only one child has worked"
    assert [n for _, n, _, _ in seen] == ["0", "1"] * 6, "one was inside beside another"
    assert cluster.app.send_task("lockshop.hold_async", ("door",)).get(timeout=30) > max(fences)

    # A child that is killed: its message comes again, and enters when the lease has ended.
    hold("gate", 30.0)
    until(lambda: [line for line in _inside(cluster) if line[0] == "gate"], "a child is inside")
    ((_, _, pid, fence),) = [line for line in _inside(cluster) if line[0] == "gate"]
    os.kill(int(pid), signal.SIGKILL)
    begun = time.monotonic()
    (_, second) = until(
        lambda: [x for x in _inside(cluster) if x[0] == "gate"][:2][1:] and _inside(cluster)[-2:], "again"
    )
    assert int(second[3]) > int(fence)
    assert time.monotonic() - begun < 2.0 + 15.0
    worker.kill_all()


def test_a_test_in_memory_may_let_any_time_pass() -> None:
    app = Umbel("shop")
    with in_memory(app, clock=VirtualClock(1_750_000_000.0)) as harness, app.lock("door") as lock:
        harness.clock.advance(86_400)
        assert not app.lock("door").acquire(blocking=False)
        assert lock.held


def test_a_lock_that_is_let_go_of_ends_by_its_lease(app: Umbel) -> None:
    lock = app.lock("door", lease=0.5)
    assert repr(lock) == "<lock 'door'>"
    assert lock.acquire()
    assert repr(lock) == "<lock 'door' held>"
    time.sleep(0.4)  # it is renewed
    del lock
    gc.collect()
    with app.lock("door", timeout=10):
        pass


def test_an_app_that_is_closed_renews_nothing(tmp_path: Path) -> None:
    app = Umbel("locks", broker="memory://", results=f"sqlite:///{tmp_path}/results.db")
    lock = app.lock("door", lease=0.3)
    assert lock.acquire()
    app.close()
    until(lambda: not lock.held, "its lease ends")
    assert app._gateway is None, "nothing has connected again"
