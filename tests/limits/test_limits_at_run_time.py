"""``umbel limit``: what real workers do when their limits are changed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from cluster import Cluster, until

from umbel.errors import TimeLimitExceeded
from umbel.pidbox import ask


def limit(cluster: Cluster, *arguments: str, status: int = 0) -> str:
    """Say it until the worker, which listens from a moment after its start, has heard it."""
    done = until(
        lambda: (done := cluster.umbel("limit", *arguments)) and "no worker has answered" not in done.stderr and done,
        "an answer",
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_a_time_limit_ends_what_runs_already_and_a_longer_one_lets_it_run(cluster: Cluster) -> None:
    cluster.configure(worker__concurrency=2, tasks={"shop.note": {"time_limit": 5}})
    cluster.worker("--name", "one")
    shown = json.loads(limit(cluster, "shop.note", "--json"))
    assert shown["one"]["shop.note"]["time_limit"] == 5
    gateway: Any = cluster.app.gateway
    spared = cluster.send("note", "spared", 6)
    cluster.ledger.wait_start(spared.id)
    change = {"task": "shop.note", "changes": {"time_limit": 60}}
    answers = gateway.runtime.call(ask(gateway.transport, "limit", change, destination=["one"], timeout=4))
    assert answers["one"]["shop.note"]["time_limit"] == 60
    assert spared.get(timeout=20) == "spared"
    doomed = cluster.send("spin", 60)
    cluster.ledger.wait_start(doomed.id)
    limit(cluster, "shop.spin", "--time-limit", "500ms", "--worker", "one")
    with pytest.raises(TimeLimitExceeded):
        doomed.get(timeout=20)
    cluster.wait_empty()
    assert cluster.dead() == []


def test_a_rate_and_a_concurrency_are_changed_shown_and_taken_away(cluster: Cluster) -> None:
    cluster.configure(worker__concurrency=2)
    cluster.worker("--name", "one")
    assert "shop.rated" in limit(cluster)
    shown = limit(cluster, "shop.note", "--rate", "1/h", "--scope", "fleet", "--concurrency", "1")
    assert "1/h in the fleet" in shown
    first, second = cluster.send("note", 1), cluster.send("note", 2)
    until(lambda: first.ready() or second.ready(), "one of the two")
    time.sleep(0.5)
    assert len(cluster.ledger.starts()) == 1
    limit(cluster, "shop.note", "--rate", "off", "--concurrency", "off")
    third = cluster.send("note", 3)
    assert third.get(timeout=20) == 3
    assert "no task is named" in limit(cluster, "shop.nobody", "--rate", "1/s", status=1)
