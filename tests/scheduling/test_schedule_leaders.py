"""Several schedulers before one store: one leads, and each due slot is run once, whoever dies or is held up."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from cluster import FULL, Cluster, WorkerProcess, until

LEASE, PERIOD, LONG = (6.0, 20.0, 300.0) if FULL else (1.5, 3.0, 9.0)
SKEWS = (0.0, 2.0, -2.0)
ENTRIES = 3


def leader(cluster: Cluster) -> str | None:
    found = cluster.app.schedules.leader()
    return None if found is None else str(found["owner"])


def of(owner: str, schedulers: list[WorkerProcess]) -> int:
    """Which of them that is."""
    return next(n for n, process in enumerate(schedulers) if owner.startswith(f"scheduler-{process.pid}@"))


@pytest.mark.timeout(600)
def test_each_slot_runs_once_while_leaders_die_and_freeze(
    cluster: Cluster, scheduler: Callable[..., WorkerProcess], redis_url: str
) -> None:
    entries = {f"tick-{n}": {"task": "shop.note", "every": 1.0, "catch_up": "all"} for n in range(ENTRIES)}
    cluster.configure(
        broker__url=redis_url,
        results__url=redis_url,
        scheduler__lease=LEASE,
        schedules=entries,
        worker__pool="threads",
        worker__concurrency=8,
    )
    cluster.worker()
    schedulers = [scheduler(skew=skew) for skew in SKEWS]
    takeovers, frozen = [], None
    begun, turn = time.monotonic(), 0
    while time.monotonic() < begun + LONG:
        owner: str = until(lambda: leader(cluster), "somebody leads", timeout=3 * LEASE) or ""
        struck, turn = of(owner, schedulers), turn + 1
        at = time.monotonic()
        if turn % 2:
            schedulers[struck].kill()
        else:
            frozen = schedulers[struck]
            frozen.tell(signal.SIGSTOP)
        until(lambda was=owner: leader(cluster) not in (None, was), "another leads", timeout=4 * LEASE, every=0.05)  # type: ignore[misc]  # no lambda has a type
        takeovers.append(time.monotonic() - at)
        time.sleep(max(0.0, PERIOD - (time.monotonic() - at)))
        if turn % 2:
            schedulers[struck] = scheduler(skew=SKEWS[struck])
        elif frozen is not None:
            frozen.tell(signal.SIGCONT)
    for process in schedulers:
        assert process.end() == 0
    assert leader(cluster) is None, "who ends gives the lead up"
    cluster.wait_empty()

    stored = {entry.name: entry for entry in cluster.app.schedules.list()}
    starts: Counter[tuple[str, str]] = Counter()
    for line in cluster.ledger.starts(task="shop.note"):
        starts[line["id"], line["task"]] += 1
    assert max(starts.values()) == 1, "a slot was run twice"
    assert len(starts) == sum(entry.total_runs for entry in stored.values()), "a slot was lost"
    for entry in stored.values():
        first = entry.schedule["since"] // 1 + 1
        assert entry.last_due is not None
        assert entry.total_runs == entry.last_due - first + 1, "a slot was passed over"
        assert entry.total_runs >= LONG - 3
    assert max(takeovers) < 2 * LEASE, takeovers
    print(f"{len(takeovers)} takeovers, {max(takeovers):.1f} s at most; {len(starts)} runs")


def test_a_scheduler_that_is_stopped_is_followed_at_once(
    cluster: Cluster, scheduler: Callable[..., WorkerProcess]
) -> None:
    cluster.configure(scheduler__lease=3.0)
    first = scheduler()
    until(lambda: leader(cluster), "it leads")
    second = scheduler()
    begun = time.monotonic()
    assert first.end() == 0
    until(lambda: of(leader(cluster) or "", [first, second]) == 1 if leader(cluster) else False, "the other leads")
    assert time.monotonic() - begun < 3.0
    assert "SIGTERM: stopping" in first.text
    assert second.end(signal.SIGINT) == 0
    told: dict[str, Any] = {"leader": leader(cluster)}
    assert told == {"leader": None}
