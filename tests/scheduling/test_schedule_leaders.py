"""Several schedulers before one store: one leads, and each due slot is run once, whoever dies or is held up."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cluster import FULL, Cluster, WorkerProcess, until
from servers.proxy import Proxy

MakeProxy = Callable[[int], Proxy]

LEASE, PERIOD, LONG = (6.0, 20.0, 300.0) if FULL else (1.5, 2.5, 5.0)
SLACK = 0.0 if FULL else 5.0
"""Seconds by which a busy machine may be late with all that a short lease asks for."""
SKEWS = (0.0, 2.0, -2.0)
ENTRIES = 3


def leader(cluster: Cluster) -> str | None:
    found = cluster.app.schedules.leader()
    return None if found is None else str(found["owner"])


def of(owner: str, schedulers: list[WorkerProcess]) -> int:
    """Which of them that is."""
    return next(n for n, process in enumerate(schedulers) if owner.startswith(f"scheduler-{process.pid}@"))


def published(cluster: Cluster) -> list[dict[str, Any]]:
    """What schedulers have handed to the broker: by whom (``pid``), when (``at``), which runs (``ids``)."""
    file = cluster.folder / "published.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", ["redis", "sqlite"] if FULL else ["redis"])
def test_f07_f11_each_slot_runs_once_while_leaders_die_and_freeze(
    store: str, cluster: Cluster, scheduler: Callable[..., WorkerProcess], request: pytest.FixtureRequest
) -> None:
    entries = {f"tick-{n}": {"task": "shop.note", "every": 1.0, "catch_up": "all"} for n in range(ENTRIES)}
    url = request.getfixturevalue("redis_url") if store == "redis" else f"sqlite:///{cluster.folder}/all.sqlite3"
    cluster.configure(
        broker__url=url,
        results__url=url,
        scheduler__lease=LEASE,
        schedules=entries,
        worker__pool="threads",
        worker__concurrency=8,
    )
    cluster.worker()
    schedulers = [scheduler(skew=skew) for skew in SKEWS]
    takeovers, frozen, patience = [], None, 4 * LEASE + SLACK
    begun, turn = time.monotonic(), 0
    while time.monotonic() < begun + LONG:
        owner: str = until(lambda: leader(cluster), "somebody leads", timeout=patience) or ""
        struck, turn = of(owner, schedulers), turn + 1
        at = time.monotonic()
        if turn % 2:
            schedulers[struck].kill()
        else:
            frozen = schedulers[struck]
            cluster.freeze(frozen, children=False)
        until(lambda was=owner: leader(cluster) not in (None, was), "another leads", timeout=patience, every=0.05)  # type: ignore[misc]  # no lambda has a type
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
    # Redis tells leases by its own clock; a file has none but those of its users, which are wrong here.
    wrong = max(SKEWS) - min(SKEWS) if store == "sqlite" else 0.0
    assert max(takeovers) < 2 * LEASE + wrong + SLACK, takeovers
    sent = [task_id for line in published(cluster) for task_id in line["ids"]]
    print(f"{len(sent) - len(set(sent))} messages that were copies")
    print(f"{len(takeovers)} takeovers, {max(takeovers):.1f} s at most; {len(starts)} runs")


def test_a_leader_that_was_held_up_before_it_sends_sends_nothing(
    cluster: Cluster, scheduler: Callable[..., WorkerProcess], redis_url: str
) -> None:
    entries = {"tick": {"task": "shop.note", "every": 0.25, "catch_up": "all"}}
    cluster.configure(broker__url=redis_url, results__url=redis_url, scheduler__lease=1.5, schedules=entries)
    former = scheduler()
    until(lambda: published(cluster), "it leads and sends")
    heir = scheduler()
    (cluster.folder / f"stop-{former.pid}").touch()
    until(lambda: _stopped(former), "it has decided what to send, and is held up")
    stopped = time.time()
    until(lambda: [line for line in published(cluster) if line["pid"] == heir.pid][3:], "another leads and sends")
    former.tell(signal.SIGCONT)
    former.logged(f"scheduler-{heir.pid}@")
    assert [line for line in published(cluster) if line["pid"] == former.pid and line["at"] > stopped] == []
    sent = [task_id for line in published(cluster) for task_id in line["ids"]]
    assert len(sent) == len(set(sent)), "each run was sent once"
    for process in (former, heir):
        assert process.end() == 0


def _stopped(process: WorkerProcess) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"] if FULL else ["redis"])
def test_a_leader_that_cannot_reach_the_broker_lets_another_lead(
    broker: str,
    cluster: Cluster,
    scheduler: Callable[..., WorkerProcess],
    make_proxy: MakeProxy,
    request: pytest.FixtureRequest,
) -> None:
    url: str = request.getfixturevalue(f"{broker}_url")
    entries = {"tick": {"task": "shop.note", "every": 0.1, "catch_up": "all"}}
    cluster.configure(broker__url=url, scheduler__lease=1.5, schedules=entries)
    cluster.worker()
    proxy = make_proxy(urlsplit(url).port or 0)
    cut_off = scheduler("-o", f"broker.url={proxy.through(url)}")
    until(lambda: cluster.ledger.starts(), "it leads and sends")
    other = scheduler()
    both = [cut_off, other]
    assert of(leader(cluster) or "", both) == 0
    proxy.stall()
    until(lambda: (found := leader(cluster)) and of(found, both) == 1, "the other leads")
    cut_off.logged("the lead is given up, for nothing can be sent from here")
    before = len(cluster.ledger.starts())
    until(lambda: len(cluster.ledger.starts()) > before + 8, "it goes on")
    other.kill()
    proxy.heal()
    until(lambda: (found := leader(cluster)) and of(found, both) == 0, "who reaches the broker again leads")
    before = len(cluster.ledger.starts())
    until(lambda: len(cluster.ledger.starts()) > before + 4, "it goes on")
    assert cut_off.end() == 0
    cluster.wait_empty()
    (entry,) = cluster.app.schedules.list()
    starts = [line["id"] for line in cluster.ledger.starts()]
    assert len(starts) == len(set(starts)) == entry.total_runs
    assert entry.last_due is not None
    assert entry.total_runs == round((entry.last_due - entry.schedule["since"] // 0.1 * 0.1) / 0.1), "none is lost"


def test_a_scheduler_that_is_stopped_is_followed_at_once(
    cluster: Cluster, scheduler: Callable[..., WorkerProcess]
) -> None:
    cluster.configure(scheduler__lease=15.0)
    first = scheduler()
    until(lambda: leader(cluster), "it leads")
    second = scheduler()
    begun = time.monotonic()
    assert first.end() == 0
    until(lambda: of(leader(cluster) or "", [first, second]) == 1 if leader(cluster) else False, "the other leads")
    assert time.monotonic() - begun < 15.0
    assert "SIGTERM: stopping" in first.text
    assert second.end(signal.SIGINT) == 0
    told: dict[str, Any] = {"leader": leader(cluster)}
    assert told == {"leader": None}
