"""SIGKILL at random moments under load: whatever is killed, every task that was sent ends, and nothing else does."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from cluster import FULL, Cluster, WorkerProcess, send

TASKS = 5_000 if FULL else 3_500
SENT_AT_ONCE = 500

Kill = Callable[[WorkerProcess, random.Random], None]


def a_child(worker: WorkerProcess, chance: random.Random) -> None:
    if children := worker.children:
        send([chance.choice(children)], signal.SIGKILL)


def the_worker(worker: WorkerProcess, chance: random.Random) -> None:
    worker.kill()


def the_whole_group(worker: WorkerProcess, chance: random.Random) -> None:
    worker.kill_all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "pause", "most"),
    [(a_child, (0.02, 0.3), 40), (the_worker, (0.2, 1.0), 8), (the_whole_group, (0.2, 1.0), 8)],
)
def test_f03_f05_no_task_is_lost_when_processes_are_killed_at_random(
    cluster: Cluster, kill: Kill, pause: tuple[float, float], most: int
) -> None:
    """F3, F5, F16: sent = finished; the queue drains to nothing; no innocent task is in the dead letters.

    ``max_deliveries`` is raised because random kills may strike one task three times: that law has a test of its own.
    """
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 32))
    print(f"CHAOS_SEED={seed}")
    chance = random.Random(seed)
    cluster.configure(broker__lease=1.0, worker__max_deliveries=6)
    workers = [cluster.worker(wait=False), cluster.worker(wait=False)]
    calls = [(n, 0.04 if n % 25 == 0 else 0.004) for n in range(TASKS)]
    sent: list[str] = []
    for start in range(0, TASKS, SENT_AT_ONCE):
        sent += [result.id for result in cluster.send_many("note", calls[start : start + SENT_AT_ONCE])]
    for worker in workers:
        worker.wait_ready()

    killed = 0
    end = time.monotonic() + 100
    while not cluster.empty():
        assert time.monotonic() < end, f"stuck: {cluster.depth()} after {killed} kills"
        time.sleep(chance.uniform(*pause))
        if killed < most:
            which = chance.randrange(2)
            kill(workers[which], chance)
            killed += 1
            if not workers[which].running:
                workers[which] = cluster.worker()

    finished = {line["id"] for line in cluster.ledger.ends()}
    print(f"{killed} kills, {len(cluster.ledger.starts())} starts, {len(cluster.ledger.ends())} ends")
    assert killed >= 3
    assert finished == set(sent)
    assert cluster.dead() == []
    records = cluster.app.gateway.get(sent)
    assert {record.state for record in records.values()} == {"SUCCESS"}
    assert records.keys() == set(sent)
    assert all(worker.end() == 0 for worker in workers)
