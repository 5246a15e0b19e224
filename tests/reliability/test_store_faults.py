"""A broker or a result store that does not answer for a while: work is kept, told later, and never done twice for it."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import Cluster


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """No other process can write to the file meanwhile."""
    connection = sqlite3.connect(file, isolation_level=None, timeout=10)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        connection.close()


def test_results_are_stored_after_the_store_was_locked_and_no_task_runs_twice(cluster: Cluster) -> None:
    """Law 5: a result that cannot be stored is kept; its task is not run again for that, be the lease short."""
    cluster.configure(broker__lease=3.0, results__options__busy_timeout=0.3)
    worker = cluster.worker()
    cluster.worker()
    cluster.send("add", 1, 1).get(timeout=30)
    with locked(cluster.folder / "results.sqlite3"):
        tasks = cluster.send_many("note", [(n, 0.01) for n in range(100)])
        time.sleep(5)
        assert cluster.depth().leased > 0
        worker.logged("result store unavailable")
    assert [task.get(timeout=30) for task in tasks] == list(range(100))
    cluster.wait_empty()
    assert Counter(line["id"] for line in cluster.ledger.starts(task="shop.note")) == {task.id: 1 for task in tasks}


def test_running_tasks_run_once_while_the_broker_is_locked(cluster: Cluster) -> None:
    """F13: sessions are thrown away and built anew; what runs meanwhile stays this worker's."""
    cluster.configure(broker__options__busy_timeout=0.3)
    worker = cluster.worker()
    other = cluster.worker()
    long = [cluster.send("note", n, 3.5) for n in range(2)]
    short = [cluster.send("note", n, 1.0) for n in range(2, 4)]
    for task in long + short:
        cluster.ledger.wait_start(task.id)
    with locked(cluster.folder / "broker.sqlite3"):
        time.sleep(2)
    assert [task.get(timeout=30) for task in long + short] == [0, 1, 2, 3]
    cluster.wait_empty()
    assert "locked by another process" in worker.text + other.text
    assert Counter(line["id"] for line in cluster.ledger.starts()) == {task.id: 1 for task in long + short}
    assert [cluster.send("add", n, n).get(timeout=30) for n in range(3)] == [0, 2, 4]
    assert worker.end() == other.end() == 0
    assert cluster.dead() == []


def test_a_broker_that_locks_again_and_again_loses_nothing(cluster: Cluster) -> None:
    """Short locks, each longer than the driver's patience, at whatever moment of a task's way they come."""
    cluster.configure(broker__options__busy_timeout=0.1)
    cluster.worker()
    cluster.worker()
    sent = cluster.send_many("note", [(n, 0.02) for n in range(300)])
    for _ in range(8):
        with locked(cluster.folder / "broker.sqlite3"):
            time.sleep(0.25)
        time.sleep(0.15)
    cluster.wait_empty(timeout=40)
    assert [task.get(timeout=30) for task in sent] == list(range(300))
    assert cluster.dead() == []
    repeated = [id for id, times in Counter(line["id"] for line in cluster.ledger.ends()).items() if times > 1]
    assert repeated == []
