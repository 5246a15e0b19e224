"""ETA and countdown through the brokers: to the millisecond, in order, and never early."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from cluster import Cluster, until

CALLS = 40
GRAIN = 0.002
"""Seconds: due times are kept to the millisecond, and the clocks that measure are read a moment apart."""


@pytest.mark.parametrize("broker", ["sqlite", "redis", "rabbitmq"])
def test_delayed_calls_start_in_order_and_never_early(
    broker: str, cluster: Cluster, request: pytest.FixtureRequest
) -> None:
    url = {} if broker == "sqlite" else {"broker__url": request.getfixturevalue(f"{broker}_url")}
    cluster.configure(**url, worker__pool="threads")
    worker = cluster.worker("--concurrency", "1")
    dice = random.Random(3)
    delays = [round(0.5 + dice.random() * 1.5, 3) for _ in range(CALLS)]
    due: dict[str, float] = {}
    for delay in delays:
        before = time.time()
        due[cluster.send("note", delay, countdown=delay).id] = before + delay
    until(lambda: len(cluster.ledger.starts()) == CALLS, f"all {CALLS} have started")
    starts = [(line["id"], line["at"]) for line in cluster.ledger.starts()]
    early = {task: at - due[task] for task, at in starts if at < due[task] - GRAIN}
    assert not early
    order = [due[task] for task, _ in starts]
    disorder = [(one, other) for one, other in pairwise(order) if one > other + 0.3]
    assert not disorder, "what is due in the same moment may come in any order, and nothing else"
    worker.end()
