"""Cancelling with real processes: durable, exact, and with states that tell the truth."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from cluster import FULL, Cluster, until

from umbel.errors import TaskRevoked


def test_what_is_revoked_while_no_worker_runs_never_runs(cluster: Cluster) -> None:
    """Of 1,000 waiting tasks 500 are revoked; a worker that has never heard of it runs exactly the others."""
    sent = [result.id for result in cluster.send_many("note", [(n,) for n in range(1000)])]
    cluster.app.control.revoke(*sent[::2])
    cluster.worker()
    cluster.wait_empty()
    assert sorted(line["id"] for line in cluster.ledger.starts()) == sorted(sent[1::2])
    records = cluster.app.gateway.get(sent)
    assert {records[task_id].state for task_id in sent[::2]} == {"REVOKED"}
    assert {records[task_id].state for task_id in sent[1::2]} == {"SUCCESS"}


def test_a_revocation_holds_in_every_later_worker(cluster: Cluster) -> None:
    """By name and by header: for tasks that are sent afterwards, and through any number of restarts."""
    app = cluster.app
    app.control.revoke(task="shop.note", headers={"tenant": "acme"})
    for _ in range(2):
        worker = cluster.worker()
        refused = cluster.send("note", 1, headers={"tenant": "acme"})
        done = cluster.send("note", 2, headers={"tenant": "other"})
        assert done.get(timeout=30) == 2
        with pytest.raises(TaskRevoked):
            refused.get(timeout=30)
        worker.end()
    app.control.restore(task="shop.note", headers={"tenant": "acme"})
    cluster.worker()
    assert cluster.send("note", 3, headers={"tenant": "acme"}).get(timeout=30) == 3


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
@pytest.mark.parametrize("task", ["polite", "polite_async"])
def test_a_running_task_is_asked_to_end_and_can_clean_up(cluster: Cluster, pool: str, task: str) -> None:
    """``TaskCancelled`` in a function, ``CancelledError`` in a coroutine, in every pool."""
    cluster.configure(worker__pool=pool, worker__concurrency=1 if pool == "solo" else 2)
    cluster.worker()
    result = cluster.send(task)
    cluster.ledger.wait_start(result.id)
    result.cancel()
    with pytest.raises(TaskRevoked, match="terminated"):
        result.get(timeout=30)
    assert len(cluster.ledger.lines("cancelled", id=result.id)) == 1
    cluster.wait_empty()
    assert cluster.send("note", 1).get(timeout=30) == 1


def test_a_task_that_does_not_answer_is_killed_and_its_neighbour_is_not(cluster: Cluster) -> None:
    worker = cluster.worker()
    gate = cluster.folder / "gate"
    stubborn, other = cluster.send("stubborn", str(gate)), cluster.send("stubborn", str(gate))
    pids = {one.id: cluster.ledger.wait_start(one.id)["pid"] for one in (stubborn, other)}
    stubborn.cancel(grace=0.3)
    with pytest.raises(TaskRevoked):
        stubborn.get(timeout=30)
    assert len(cluster.ledger.lines("heard", id=stubborn.id)) == 1
    until(lambda: pids[stubborn.id] not in worker.children and len(worker.children) == 2, "the child is replaced")
    assert pids[other.id] in worker.children
    gate.touch()
    assert other.get(timeout=30) == "opened"
    assert cluster.ledger.lines("heard", id=other.id) == []


def test_a_task_that_looks_for_it_stops_where_it_likes_and_has_succeeded(cluster: Cluster) -> None:
    """``cancel="flag"``: nothing is raised, and what it returns is its result. Asked for by a task of another child."""
    cluster.worker()
    watchful = cluster.send("watchful")
    cluster.ledger.wait_start(watchful.id)
    assert cluster.send("cancel_other", watchful.id).get(timeout=30) is True
    assert watchful.get(timeout=30) == "stopped"
    assert watchful.state == "SUCCESS"


def test_a_delayed_task_and_one_that_waits_for_a_retry_are_revoked_when_they_come(cluster: Cluster) -> None:
    cluster.worker()
    delayed = cluster.send("note", 1, countdown=5)
    flaky = cluster.send("flaky", 5, 3.0)
    cluster.ledger.wait_start(flaky.id)
    delayed.revoke()
    flaky.revoke()
    for result in (delayed, flaky):
        with pytest.raises(TaskRevoked):
            result.get(timeout=30)
    assert cluster.ledger.starts(delayed.id) == []
    assert len(cluster.ledger.starts(flaky.id)) <= 2


def test_a_finished_task_keeps_its_result(cluster: Cluster) -> None:
    cluster.worker()
    result = cluster.send("add", 1, 2)
    assert result.get(timeout=30) == 3
    result.cancel()
    time.sleep(0.2)
    assert result.state == "SUCCESS"


@pytest.mark.slow
def test_the_command_line_revokes_and_lists(cluster: Cluster) -> None:
    task = cluster.send("note", 1)
    assert "kept in the result store" in cluster.umbel("revoke", task.id).stdout
    assert task.id in cluster.umbel("revoked").stdout
    worker = cluster.worker()
    with pytest.raises(TaskRevoked):
        task.get(timeout=30)
    stubborn = cluster.send("stubborn", "none")
    cluster.ledger.wait_start(stubborn.id)
    cluster.umbel("revoke", "--header", f"root_id={stubborn.id}", "--terminate", "--grace", "0")
    with pytest.raises(TaskRevoked):
        stubborn.get(timeout=30)
    assert worker.running


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killing_one_job_never_hits_another(cluster: Cluster) -> None:
    """A and B follow each other in one child; A is killed at a random moment: B runs once, and always to its end."""
    rounds = 3_000 if FULL else 30
    chance = random.Random(os.environ.get("CHAOS_SEED") or 1)
    cluster.configure(worker__concurrency=1, worker__max_deliveries=10)
    cluster.worker()
    outcomes = {"SUCCESS": 0, "REVOKED": 0}
    for _ in range(rounds):
        first = cluster.send("whoami", chance.choice([0.003, 0.02, 0.5]))
        second = cluster.send("note", "b", 0.002)
        cluster.ledger.wait_start(first.id)
        time.sleep(chance.uniform(0, 0.006))
        first.cancel(grace=0)
        assert second.get(timeout=20) == "b"
        until(first.ready, "the first ends")
        outcomes[first.state] += 1
        assert len(cluster.ledger.starts(second.id)) == len(cluster.ledger.ends(second.id)) == 1
        Path(cluster.ledger.file).write_text("")  # small, as it is read again and again
    print(outcomes)
    assert outcomes["REVOKED"] > 0
