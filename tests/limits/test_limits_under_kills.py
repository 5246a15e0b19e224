"""Fleet-wide limits while workers are killed and started again, by a ledger that the tasks write themselves."""

from __future__ import annotations

import random
import time

import pytest
from cluster import FULL, Cluster, WorkerProcess, until


@pytest.mark.timeout(600 if FULL else 300)
@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_a_rate_of_the_fleet_is_kept_while_workers_are_killed(fleet: Cluster) -> None:
    """30/s: what a killed worker had taken is lost, and never counted twice."""
    limits = {"shop.note": {"rate_limit": "30/s", "rate_limit_scope": "fleet"}}
    fleet.configure(**fleet.where, tasks=limits, broker__lease=2.0)  # type: ignore[attr-defined]  # see conftest
    sent = fleet.send_many("note", [(n,) for n in range(900 if FULL else 120)])
    workers = [fleet.worker("--name", f"w{n}") for n in range(2)]
    for number in range(10 if FULL else 2):
        time.sleep(1.0)
        workers.pop(0).kill_all()
        workers.append(fleet.worker("--name", f"new{number}"))
    for result in sent:
        result.get(timeout=60)
    starts = sorted(line["at"] for line in fleet.ledger.starts())
    assert {line["id"] for line in fleet.ledger.starts()} == {result.id for result in sent}
    for seconds in (0.5, 1.0, 3.0):
        most = max(sum(1 for at in starts if first <= at < first + seconds) for first in starts)
        # As in the test of two workers: noted some time after they were allowed. Counted twice, it were twice as many.
        assert most <= 30 + 30 * (seconds + (0.0 if FULL else 0.75)) + 1, seconds


@pytest.mark.timeout(600 if FULL else 300)
@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_f09_a_limit_of_a_key_is_kept_while_workers_are_killed_and_no_slot_leaks(fleet: Cluster) -> None:
    limits = {"shop.note": {"concurrency_limit": 2, "concurrency_key": "{value}", "max_deliveries": 20}}
    fleet.configure(**fleet.where, tasks=limits, broker__lease=2.0, worker__concurrency=3)  # type: ignore[attr-defined]  # see conftest
    chance = random.Random(7)
    sent = fleet.send_many("note", [("ab"[n % 2], 0.2) for n in range(300 if FULL else 24)])
    workers: list[WorkerProcess] = [fleet.worker("--name", f"w{n}") for n in range(2)]
    killed: dict[str, float] = {}
    for number in range(15 if FULL else 2):
        time.sleep(chance.uniform(0.3, 1.2))
        worker = workers.pop(0)
        name = f"w{number}"
        killed[name] = time.time()
        worker.kill_all()
        workers.append(fleet.worker("--name", f"w{number + 2}"))
    for result in sent:
        result.get(timeout=60)
    changes: dict[str, list[tuple[float, int]]] = {"a": [], "b": []}
    ends = {(line["id"], line["pid"]): line["at"] for line in fleet.ledger.lines("end")}
    for start in fleet.ledger.starts():
        end = ends.get((start["id"], start["pid"])) or killed[start["worker"]]
        changes[start["value"]] += [(start["at"], 1), (end, -1)]
    for key, moments in changes.items():
        now = 0
        for _, change in sorted(moments):
            now += change
            assert now <= 2, key
    fleet.wait_empty()
    gateway = fleet.app.gateway
    until(lambda: not gateway.runtime.call(gateway.store.claims("limit:")), "every slot is free")  # type: ignore[attr-defined]  # a test's process has a gateway of its own
