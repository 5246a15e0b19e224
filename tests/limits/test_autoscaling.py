"""A real worker follows its load."""

from __future__ import annotations

import pytest
from cluster import Cluster, until


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_grows_under_load_and_shrinks_afterwards_and_nothing_is_lost(cluster: Cluster, pool: str) -> None:
    cluster.configure(
        worker__pool=pool,
        worker__concurrency=1,
        worker__autoscale_min=1,
        worker__autoscale_max=4,
        worker__autoscale_idle=1.5,
    )
    worker = cluster.worker()
    sent = cluster.send_many("note", [(n, 0.3) for n in range(32)])
    worker.logged("slots: 2 instead of 1")
    worker.logged("slots: 4 instead of 2")
    assert [result.get(timeout=30) for result in sent] == list(range(32))
    worker.logged("slots: 1 instead of 4", timeout=30)
    if pool == "prefork":
        until(lambda: len(worker.children) == 1, "the other children have left")
    changes = sorted((line["at"], 1 if line["what"] == "start" else -1) for line in cluster.ledger.lines())
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    assert most == 4
    assert {line["attempt"] for line in cluster.ledger.starts()} == {1}
    assert cluster.send("add", 1, 2).get(timeout=20) == 3
    assert worker.end() == 0


def test_a_pool_of_one_size_refuses_at_its_start(cluster: Cluster) -> None:
    cluster.configure(worker__pool="solo", worker__concurrency=1, worker__autoscale_max=4)
    done = cluster.umbel("worker")
    assert done.returncode == 1
    assert "[worker] autoscale_max needs a pool whose size can change, and 'solo' is none" in done.stderr
