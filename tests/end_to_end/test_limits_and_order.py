"""Time limits, rates, priorities and the renewal of children, on the default pool."""

from __future__ import annotations

import time

import pytest
from cluster import Cluster, descendants, until

from umbel.errors import TimeLimitExceeded


def test_a_hard_limit_kills_the_task_and_its_failure_is_stored(cluster: Cluster) -> None:
    """Of the task's settings, and of one call; the worker lives on, and the task is not run again."""
    cluster.configure(tasks={"shop.spin": {"time_limit": 0.5}})
    worker = cluster.worker()
    by_settings = cluster.send("spin", 60)
    by_call = cluster.send("note", 1, 60, time_limit=0.7)
    for result, seconds in ((by_settings, "0.5"), (by_call, "0.7")):
        with pytest.raises(TimeLimitExceeded, match=seconds):
            result.get(timeout=30)
        (start,) = cluster.ledger.starts(result.id)
        assert start["pid"] not in descendants(worker.pid)
    assert cluster.send("add", 1, 2).get(timeout=30) == 3
    cluster.wait_empty()
    assert cluster.dead() == []


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_pool_that_cannot_kill_refuses_a_hard_limit_at_its_start(cluster: Cluster, pool: str) -> None:
    cluster.configure(worker__pool=pool, worker__concurrency=1, tasks={"shop.spin": {"time_limit": 5}})
    done = cluster.umbel("worker")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "'shop.spin'" in line
    assert "time_limit" in line
    assert "prefork" in line


def test_a_rate_limit_spaces_starts(cluster: Cluster) -> None:
    """10/s: no second holds more than a burst of one second's worth and what is earned meanwhile."""
    cluster.worker("--concurrency", "1")
    sent = cluster.send_many("rated", [(n,) for n in range(35)])
    for result in sent:
        result.get(timeout=20)
    starts = sorted(line["at"] for line in cluster.ledger.starts(task="shop.rated"))
    assert len(starts) == 35
    assert starts[-1] - starts[0] >= 2.4
    most = max(sum(1 for at in starts if first <= at < first + 1) for first in starts)
    assert most <= 20 + 7  # noted where they happen, on a busy machine some time after they were allowed
    assert {line["attempt"] for line in cluster.ledger.starts()} == {1}


def test_what_a_rate_limit_holds_back_does_not_hold_back_others(cluster: Cluster) -> None:
    cluster.worker("--concurrency", "1")
    rated = cluster.send_many("rated", [(n,) for n in range(150)])
    other = cluster.send("add", 1, 1)
    assert other.get(timeout=30) == 2
    assert len(cluster.ledger.starts(task="shop.rated")) < 150
    assert not rated[-1].ready()


def test_higher_priorities_come_first_then_older_ones(cluster: Cluster) -> None:
    cluster.configure(worker__concurrency=1, worker__prefetch=1)
    sent = [(priority, cluster.send("note", priority, priority=priority)) for priority in (0, 5, 9, 0, 5, 9, 3)]
    cluster.worker()
    for _, result in sent:
        result.get(timeout=30)
    started = [line["id"] for line in cluster.ledger.starts()]
    assert started == [result.id for _, result in sorted(sent, key=lambda pair: -pair[0])]


@pytest.mark.slow
def test_children_are_replaced_after_their_tasks_and_none_is_lost(cluster: Cluster) -> None:
    cluster.configure(worker__max_tasks_per_child=25)
    cluster.worker()
    sent = cluster.send_many("note", [(n,) for n in range(1000)])
    assert [result.get(timeout=60) for result in sent] == list(range(1000))
    starts = cluster.ledger.starts()
    assert sorted(line["id"] for line in starts) == sorted(result.id for result in sent)
    by_child = [sum(1 for line in starts if line["pid"] == pid) for pid in {line["pid"] for line in starts}]
    assert max(by_child) <= 25
    assert len(by_child) >= 40
    assert {line["attempt"] for line in starts} == {1}


def test_five_thousand_in_one_call(cluster: Cluster) -> None:
    cluster.worker()
    sent = cluster.send_many("add", [(n, n) for n in range(5000)])
    assert len({result.id for result in sent}) == 5000
    assert [result.get(timeout=60) for result in sent] == [2 * n for n in range(5000)]
    assert len(cluster.ledger.starts()) == 5000


def test_a_waiting_queue_is_taken_up_at_the_start_and_each_worker_has_its_own_queues(cluster: Cluster) -> None:
    mail = cluster.send("note", "mail", queue="mail")
    plain = cluster.send("note", "plain")
    cluster.worker("--queues", "mail", "--name", "postman")
    assert mail.get(timeout=30) == "mail"
    assert not plain.ready()
    cluster.worker("--name", "clerk")
    assert plain.get(timeout=30) == "plain"
    assert [line["worker"] for line in cluster.ledger.starts()] == ["postman", "clerk"]


def test_a_delayed_task_survives_the_worker_that_waits_for_it(cluster: Cluster) -> None:
    """F2, law 4: what is due later is the broker's, held by nobody."""
    first = cluster.worker()
    began = time.time()
    sent = [cluster.send("note", n, countdown=3 + n / 10) for n in range(3)]
    until(lambda: cluster.depth().delayed == 3, "three delayed")
    assert cluster.depth().leased == 0
    first.kill_all()
    cluster.worker()
    assert [result.get(timeout=30) for result in sent] == [0, 1, 2]
    for n, result in enumerate(sent):
        assert cluster.ledger.starts(result.id)[0]["at"] >= began + 3 + n / 10
