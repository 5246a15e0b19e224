"""Leases: renewed while the worker lives, whatever the task does; refused to whoever comes late."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest
from cluster import Cluster, until


@pytest.mark.slow
def test_f01_f02_a_ten_second_task_under_a_two_second_lease_runs_once(cluster: Cluster) -> None:
    """F1, F2: sleeping, computing, and computing inside ``async def``, beside two idle workers that compete for them."""
    cluster.configure(broker__lease=2.0, worker__concurrency=3)
    cluster.worker()
    tasks = [cluster.send(task, *args) for task, args in (("note", (0, 10)), ("spin", (10,)), ("spin_async", (10,)))]
    for task in tasks:
        cluster.ledger.wait_start(task.id)
    cluster.worker()
    cluster.worker()
    for task in tasks:
        task.get(timeout=30)
    cluster.wait_empty()
    time.sleep(0.5)
    assert Counter(line["id"] for line in cluster.ledger.starts()) == {task.id: 1 for task in tasks}


def test_two_workers_under_load_both_work(cluster: Cluster) -> None:
    cluster.worker("--name", "one")
    cluster.worker("--name", "two")
    sent = cluster.send_many("note", [(n, 0.02) for n in range(200)])
    cluster.wait_empty()
    starts = cluster.ledger.starts()
    assert sorted(line["id"] for line in starts) == sorted(result.id for result in sent)
    share = Counter(line["worker"] for line in starts)
    assert share.keys() == {"one", "two"}
    assert min(share.values()) >= 40, share


@pytest.mark.parametrize("whole", [False, True], ids=["the worker", "the worker and its children"])
def test_f04_a_worker_that_was_frozen_past_its_lease_cannot_end_what_another_has_taken_over(
    cluster: Cluster, whole: bool
) -> None:
    """F4: another worker runs the task; the late end is refused; one result, nothing dead, nothing stuck."""
    cluster.configure(broker__lease=3.0, worker__concurrency=1)
    frozen = cluster.worker("--name", "frozen")
    gate = cluster.folder / "gate"
    task = cluster.send("gated", str(gate))
    cluster.ledger.wait_start(task.id)
    cluster.freeze(frozen, children=whole)

    healthy = cluster.worker("--name", "healthy")
    second = cluster.ledger.wait_start(task.id, number=2)
    assert second["worker"] == "healthy"
    frozen.tell_all(signal.SIGCONT)
    gate.touch()
    task.get(timeout=30)
    frozen.logged("does not count")
    cluster.wait_empty()
    assert cluster.dead() == []
    assert len(cluster.ledger.starts(task.id)) == 2

    assert [cluster.send("add", n, n).get(timeout=30) for n in range(5)] == [0, 2, 4, 6, 8]
    assert frozen.running
    assert healthy.running


def test_f04_a_late_end_neither_stores_its_result_nor_settles_the_delivery(cluster: Cluster) -> None:
    """F4: the frozen worker's child ended long ago, and its word arrives while the new holder still runs."""
    cluster.configure(broker__lease=3.0, worker__concurrency=1)
    frozen = cluster.worker("--name", "frozen")
    task = cluster.send("whoami", 2.0)
    cluster.ledger.wait_start(task.id)
    cluster.freeze(frozen, children=False)
    cluster.worker("--name", "healthy")
    second = cluster.ledger.wait_start(task.id, number=2)
    until(lambda: len(cluster.ledger.ends(task.id)) == 1, "the end in the frozen worker's child")
    frozen.tell(signal.SIGCONT)
    frozen.logged("does not count")
    assert task.get(timeout=30) == second["pid"]
    cluster.wait_empty()
    assert cluster.dead() == []


def held_back(cluster: Cluster) -> None:
    """Wait until a worker holds more than it has slots: for a moment only, because it hoards nothing behind long tasks."""
    end = time.monotonic() + 1
    while cluster.depth().leased < 10 and time.monotonic() < end:
        time.sleep(0.01)


def test_f13_a_worker_that_wakes_up_without_any_of_its_leases_goes_on_working(cluster: Cluster) -> None:
    """F13: redelivered messages that it held back, and lost while it was frozen, do not use up its room for ever."""
    cluster.configure(broker__lease=3.0, worker__max_deliveries=10)
    frozen = cluster.worker("--name", "frozen")
    first = cluster.worker("--name", "first")
    # Work that is known to be quick is held in numbers; what a killed worker held comes back as redelivered.
    cluster.send_many("quick", [()] * 600)
    cluster.wait_empty()
    cluster.freeze(frozen)
    gates = cluster.send_many("gated", [(str(cluster.folder / "gate"),)] * 2)
    held = cluster.send_many("note", [(n,) for n in range(30)])
    until(lambda: len(cluster.ledger.starts(task="shop.gated")) == 2, "both slots taken")
    held_back(cluster)
    first.kill_all()

    frozen.tell_all(signal.SIGCONT)
    until(lambda: len(cluster.ledger.starts(task="shop.gated")) == 4, "both slots taken again")
    held_back(cluster)
    cluster.freeze(frozen)
    healthy = cluster.worker("--name", "healthy")
    until(lambda: len(cluster.ledger.starts(task="shop.gated")) == 6, "both slots taken by the third")
    (cluster.folder / "gate").touch()
    cluster.wait_empty()
    assert healthy.end() == 0
    frozen.tell_all(signal.SIGCONT)
    again = cluster.send_many("note", [(n,) for n in range(20)])
    assert [result.get(timeout=20) for result in again] == list(range(20))
    assert [result.get(timeout=30) for result in held] == list(range(30))
    assert [result.get(timeout=30) for result in gates] == [None, None]
    assert cluster.dead() == []


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_a_busy_worker_has_not_started_is_done_by_an_idle_one(cluster: Cluster, pool: str) -> None:
    """Work goes to whoever is free: nobody hoards quick tasks behind long ones."""
    cluster.configure(worker__pool=pool, worker__concurrency=1 if pool == "solo" else 2)
    busy = cluster.worker("--name", "busy")
    cluster.send_many("quick", [()] * 600)  # it learns that work is quick, and holds much of it
    cluster.wait_empty()
    gate = cluster.folder / "gate"
    slots = 1 if pool == "solo" else 2
    long = cluster.send_many("gated", [(str(gate),)] * slots)
    for task in long:
        cluster.ledger.wait_start(task.id)
    quick = cluster.send_many("note", [(n,) for n in range(30)])
    cluster.worker("--name", "idle")
    assert [task.get(timeout=30) for task in quick] == list(range(30))
    assert {line["worker"] for task in quick for line in cluster.ledger.starts(task.id)} == {"idle"}
    assert {line["attempt"] for line in cluster.ledger.starts()} == {1}
    gate.touch()
    assert [task.get(timeout=30) for task in long] == [None] * slots
    assert busy.running
