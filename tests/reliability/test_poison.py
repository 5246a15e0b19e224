"""Tasks that kill their process: quarantined after a bounded number of starts, and nobody else suffers."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from cluster import Cluster, until

from umbel.errors import WorkerLost
from umbel.model import HEADER_DEAD_CAUSE, HEADER_DEAD_COUNT, HEADER_DEAD_QUEUE


@pytest.mark.slow
def test_f16_a_task_that_kills_its_child_starts_three_times_and_goes_to_the_dead_letters(cluster: Cluster) -> None:
    """F16: exit, SIGKILL and a segmentation fault, with growing pauses, while other tasks keep flowing."""
    cluster.worker()
    killers = {how: cluster.send("die", how) for how in ("exit", "kill", "segfault")}
    innocents = []
    while not all(len(cluster.ledger.starts(killer.id)) >= 3 for killer in killers.values()):
        innocents.append(cluster.send("note", len(innocents), 0.005))
        assert len(innocents) < 1000
        time.sleep(0.02)

    for killer in killers.values():
        with pytest.raises(WorkerLost):
            killer.get(timeout=30)
        assert killer.state == "FAILURE"
    cluster.wait_empty()

    for killer in killers.values():
        starts = [line["at"] for line in cluster.ledger.starts(killer.id)]
        first, second = (later - earlier for earlier, later in pairwise(starts))
        assert first >= 1
        assert second >= 2
    letters = {letter.id: letter.headers for letter in cluster.dead()}
    assert letters.keys() == {killer.id for killer in killers.values()}
    signs = {"exit": "exit code 7", "kill": "SIGKILL", "segfault": "SIGSEGV"}
    for how, killer in killers.items():
        headers = letters[killer.id]
        assert signs[how] in headers[HEADER_DEAD_CAUSE]
        assert headers[HEADER_DEAD_QUEUE] == "default"
        assert headers[HEADER_DEAD_COUNT] == 3
    assert [innocent.get(timeout=30) for innocent in innocents] == list(range(len(innocents)))


def restart_until_empty(cluster: Cluster) -> int:
    """Start the last worker again whenever it dies; how often it did until nothing was left to do."""
    deaths = 0
    end = time.monotonic() + 60
    while not cluster.empty():
        assert time.monotonic() < end, f"stuck: {cluster.depth()}"
        if not cluster.workers[-1].running:
            deaths += 1
            cluster.worker(wait=False)
        time.sleep(0.05)
    return deaths


@pytest.mark.slow
def test_f16_a_task_that_kills_its_whole_worker_starts_three_times_and_what_was_held_is_not_blamed(
    cluster: Cluster,
) -> None:
    """F16: the count survives the worker."""
    cluster.configure(broker__lease=1.0, worker__concurrency=1)
    cluster.worker()
    cluster.send_many("quick", [()] * 300)  # so that more is held
    cluster.wait_empty()
    killer = cluster.send("kill_worker")
    held = cluster.send_many("note", [(n,) for n in range(30)])
    assert restart_until_empty(cluster) == 3
    assert len(cluster.ledger.starts(killer.id)) == 3
    with pytest.raises(WorkerLost):
        killer.get(timeout=30)
    assert [letter.id for letter in cluster.dead()] == [killer.id]
    assert "lost" in cluster.dead()[0].headers[HEADER_DEAD_CAUSE]
    assert [result.get(timeout=30) for result in held] == list(range(30))


@pytest.mark.slow
def test_what_runs_beside_a_task_that_kills_its_worker_is_not_a_dead_letter(cluster: Cluster) -> None:
    """F16: a neighbour that is longer than the culprit's life gets a start without it before it is given up."""
    cluster.configure(broker__lease=1.0)
    cluster.worker()
    beside = cluster.send("note", "beside", 0.5)
    cluster.ledger.wait_start(beside.id)
    killer = cluster.send("kill_worker")
    restart_until_empty(cluster)
    assert [letter.id for letter in cluster.dead()] == [killer.id]
    assert beside.get(timeout=30) == "beside"


def test_a_lost_task_that_was_acknowledged_early_runs_once(cluster: Cluster) -> None:
    """At most once: a crash does not repeat it, and its failure is stored all the same."""
    cluster.worker()
    result = cluster.send("die_early")
    with pytest.raises(WorkerLost):
        result.get(timeout=30)
    cluster.wait_empty()
    time.sleep(0.2)
    assert len(cluster.ledger.starts(result.id)) == 1
    assert cluster.dead() == []


def test_a_task_that_crashes_once_is_done_the_second_time(cluster: Cluster) -> None:
    cluster.worker()
    result = cluster.send("die_once", str(cluster.folder / "flag"))
    result.get(timeout=30)
    assert [line["attempt"] for line in cluster.ledger.starts(result.id)] == [1, 2]


def test_a_task_that_exits_is_lost_and_its_worker_lives(cluster: Cluster) -> None:
    """``sys.exit`` ends the child; the worker replaces it."""
    cluster.configure(worker__max_deliveries=1)
    worker = cluster.worker()
    result = cluster.send("leave", 3)
    with pytest.raises(WorkerLost, match="exit code 3"):
        result.get(timeout=30)
    assert cluster.send("add", 1, 1).get(timeout=30) == 2
    assert worker.running
    until(lambda: [letter.id for letter in cluster.dead()] == [result.id], "the dead letter")
