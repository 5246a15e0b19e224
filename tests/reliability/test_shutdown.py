"""Law 6: a worker that is told to stop ends what it has started, gives back the rest uncounted, and exits with 0."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest
from cluster import FULL, Cluster, WorkerProcess, until

MARGIN = 2.0 if FULL else 8.0
"""Seconds beyond the grace period within which a worker must have ended; more on a machine that does other things too."""


ROUNDS = {"prefork": 200, "threads": 40, "asyncio": 40} if FULL else {"prefork": 3}


def told_to_stop(worker: WorkerProcess, chance: random.Random) -> None:
    """In one of the ways in which terminals, service managers and impatient people do it."""
    signum = chance.choice([signal.SIGTERM, signal.SIGINT])
    worker.tell_all(signum) if chance.random() < 0.5 else worker.tell(signum)
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 0.2))
        if worker.running:
            worker.tell(signum)


@pytest.mark.slow
@pytest.mark.timeout(3600 if FULL else 300)
@pytest.mark.parametrize("pool", ROUNDS)
def test_f19_a_worker_stopped_at_random_moments_under_load_loses_and_repeats_nothing(
    cluster: Cluster, pool: str
) -> None:
    """F19: exit status 0 within grace + 2 s; what had started ends and never runs again; the rest is not counted."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    grace = 5
    cluster.configure(worker__grace=grace, worker__pool=pool)
    sent = []
    for number in range(ROUNDS[pool]):
        calls = [(n, 0.01 if n % 2 else 0.0) for n in range(len(sent), len(sent) + 150)]
        sent += cluster.send_many("note", calls)
        worker = cluster.worker()
        time.sleep(chance.uniform(0.05, 0.8))
        began = time.monotonic()
        told_to_stop(worker, chance)
        assert worker.wait(grace + MARGIN) == 0
        print(f"round {number}: ended in {time.monotonic() - began:.2f} s, {len(cluster.ledger.ends())} done")
        assert cluster.depth().leased == 0
    cluster.worker()
    cluster.wait_empty()
    starts = cluster.ledger.starts()
    ends = Counter(line["id"] for line in cluster.ledger.ends())
    assert ends == {result.id: 1 for result in sent}, "lost, or run again after its end"
    assert {line["attempt"] for line in starts} == {1}
    print(
        f"{ROUNDS[pool]} rounds, {len(sent)} tasks, {len(starts) - len(sent)} interrupted by a second signal and run again"
    )
    assert [result.get(timeout=30) for result in sent] == list(range(len(sent)))
    assert cluster.dead() == []


def test_a_task_within_the_grace_period_ends_and_the_rest_goes_back(cluster: Cluster) -> None:
    cluster.configure(worker__concurrency=1)
    worker = cluster.worker()
    running = cluster.send("note", "running", 2)
    cluster.ledger.wait_start(running.id)
    waiting = cluster.send_many("note", [(n, 0) for n in range(5)])
    worker.tell(signal.SIGTERM)
    assert worker.wait(10 + MARGIN) == 0
    assert running.get(timeout=30) == "running"
    assert cluster.depth().ready == len(waiting)
    cluster.worker()
    assert [result.get(timeout=30) for result in waiting] == list(range(5))
    assert {line["attempt"] for line in cluster.ledger.starts()} == {1}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_task_longer_than_the_grace_period_goes_back_uncounted_and_the_next_worker_runs_it(
    cluster: Cluster, pool: str
) -> None:
    """F19: an interruption by a shutdown is not an attempt, be the bound on attempts 1."""
    cluster.configure(
        worker__grace=0.5, worker__pool=pool, worker__concurrency=1, worker__max_deliveries=1, broker__lease=60
    )
    worker = cluster.worker()
    task = cluster.send("gated", str(cluster.folder / "gate"), "opened")
    cluster.ledger.wait_start(task.id)
    assert worker.end(within=0.5 + MARGIN + (pool != "prefork")) == 0
    assert cluster.depth().ready == 1
    cluster.worker()
    assert cluster.ledger.wait_start(task.id, number=2)["attempt"] == 1
    (cluster.folder / "gate").touch()
    assert task.get(timeout=30) == "opened"
    assert cluster.dead() == []


def test_a_second_signal_hurries(cluster: Cluster) -> None:
    cluster.configure(worker__grace=60, worker__concurrency=1)
    worker = cluster.worker()
    task = cluster.send("gated", str(cluster.folder / "gate"), 1)
    cluster.ledger.wait_start(task.id)
    worker.tell(signal.SIGTERM)
    worker.logged("SIGTERM: stopping")
    time.sleep(0.3)
    assert worker.running
    assert worker.end(within=MARGIN) == 0
    (cluster.folder / "gate").touch()
    cluster.worker()
    assert task.get(timeout=30) == 1
    assert [line["attempt"] for line in cluster.ledger.starts(task.id)] == [1, 1]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_the_worker_is_one_to_the_worker(cluster: Cluster, signum: int) -> None:
    """A terminal and a service manager signal the children too; what they run ends all the same."""
    worker = cluster.worker()
    tasks = [cluster.send("note", 1, 1.0), cluster.send("spin", 1.0)]
    for task in tasks:
        cluster.ledger.wait_start(task.id)
    assert len(worker.family) == 4
    worker.tell_all(signum)
    assert worker.wait(10 + MARGIN) == 0
    assert [task.get(timeout=30) for task in tasks] == [1, None]
    assert len(cluster.ledger.starts()) == 2
    assert cluster.stragglers() == []


@pytest.mark.slow
def test_f19_rolling_restarts_cost_no_attempt(cluster: Cluster) -> None:
    """F19: a task that crashed once, and was then interrupted by many restarts, is not taken for one that kills."""
    cluster.configure(worker__grace=0.1, worker__concurrency=1)
    worker = cluster.worker()
    flag = cluster.folder / "crashed"
    gate = cluster.folder / "gate"
    task = cluster.send("die_once", str(flag), str(gate))
    for restart in range(1, 5):
        cluster.ledger.wait_start(task.id, number=restart + 1)
        assert worker.end(within=MARGIN + 1) == 0
        assert cluster.dead() == []
        worker = cluster.worker()
    cluster.ledger.wait_start(task.id, number=6)
    gate.touch()
    assert task.get(timeout=30) is None
    assert cluster.dead() == []


def test_tasks_acknowledged_early_that_have_not_started_are_not_lost_at_a_shutdown(cluster: Cluster) -> None:
    """At most once allows a crash to lose them, a shutdown loses nothing: they are reserved, and go back."""
    cluster.configure(worker__concurrency=1)
    worker = cluster.worker()
    cluster.send_many("quick", [()] * 300)  # work that is known to be quick is reserved in numbers
    cluster.wait_empty()
    blocking = cluster.send("gated", str(cluster.folder / "gate"))
    cluster.ledger.wait_start(blocking.id)
    reserved = cluster.send_many("early", [(n,) for n in range(50)])
    time.sleep(0.3)
    worker.tell(signal.SIGTERM)
    worker.logged("stopping")
    (cluster.folder / "gate").touch()
    assert worker.wait(10 + MARGIN) == 0
    cluster.worker()
    assert [result.get(timeout=30) for result in reserved] == list(range(50))
    counts = Counter(line["id"] for line in cluster.ledger.starts(task="shop.early"))
    assert counts == {result.id: 1 for result in reserved}


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4])
def test_a_worker_told_to_stop_while_it_starts_ends_at_once(cluster: Cluster, delay: float) -> None:
    """Nothing runs, so nothing is waited for: not the grace period, and no child that was about to start."""
    cluster.configure(worker__grace=60)
    worker = cluster.worker(wait=False)
    until(lambda: "tasks " in worker.text, "the banner")
    time.sleep(delay)
    worker.tell(signal.SIGTERM)
    assert worker.wait(40) in (0, -signal.SIGTERM)
    assert cluster.stragglers() == []
