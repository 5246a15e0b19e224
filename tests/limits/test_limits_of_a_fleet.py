"""Limits of a whole fleet: real workers, and a ledger of what ran when."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
from cluster import FULL, Cluster, until

LATE = 0.25 if FULL else 0.75


def limited(fleet: Cluster, task: str, options: dict[str, Any], **settings: Any) -> None:
    fleet.configure(**fleet.where, tasks={f"shop.{task}": options}, **settings)  # type: ignore[attr-defined]  # see conftest


def most_in(starts: Sequence[float], seconds: float) -> int:
    """The most starts in any time so long."""
    return max(sum(1 for at in starts if first <= at < first + seconds) for first in starts)


def most_at_once(fleet: Cluster, value: Any = None) -> int:
    """The most tasks that ran at the same time, by the ledger."""
    changes = sorted(
        (line["at"], 1 if line["what"] == "start" else -1)
        for line in fleet.ledger.lines()
        if value is None or line["value"] == value
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def test_two_workers_together_start_no_more_than_the_rate_of_the_fleet(fleet: Cluster) -> None:
    """20/s: in no time more than one second's worth and what is earned meanwhile; and no less than that either."""
    limited(fleet, "note", {"rate_limit": "20/s", "rate_limit_scope": "fleet"})
    for name in ("one", "two"):
        fleet.worker("--name", name)
    sent = fleet.send_many("note", [(n,) for n in range(90)])
    assert [result.get(timeout=30) for result in sent] == list(range(90))
    starts = sorted(line["at"] for line in fleet.ledger.starts())
    assert len(starts) == 90
    for seconds in (0.5, 1.0, 2.0, 3.0):
        # Starts are noted where they happen, on a busy machine some time after they were allowed.
        assert most_in(starts, seconds) <= 20 + 20 * (seconds + LATE) + 1, seconds
    assert {line["worker"] for line in fleet.ledger.starts()} == {"one", "two"}
    assert {line["attempt"] for line in fleet.ledger.starts()} == {1}
    assert starts[-1] - starts[0] < 20


def test_two_workers_together_run_no_more_of_a_key_than_its_limit(fleet: Cluster) -> None:
    limited(fleet, "note", {"concurrency_limit": 3, "concurrency_key": "{value}"}, worker__concurrency=4)
    for name in ("one", "two"):
        fleet.worker("--name", name)
    crowd = fleet.send_many("note", [("a", 0.1) for _ in range(30)])
    few = fleet.send_many("note", [("b", 0.1) for _ in range(3)])
    assert [result.get(timeout=30) for result in few] == ["b"] * 3
    assert not all(result.ready() for result in crowd)
    assert [result.get(timeout=30) for result in crowd] == ["a"] * 30
    assert most_at_once(fleet, "a") == 3
    assert {line["attempt"] for line in fleet.ledger.starts()} == {1}
    fleet.wait_empty()


@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_slots_of_a_worker_that_is_killed_are_free_within_its_lease(fleet: Cluster) -> None:
    limited(fleet, "gated", {"concurrency_limit": 1, "concurrency_key": "{value}"}, broker__lease=2.0)
    doomed = fleet.worker("--name", "doomed")
    gate = fleet.folder / "gate"
    first = fleet.send("gated", str(gate), "a")
    fleet.ledger.wait_start(first.id)
    second = fleet.send("gated", str(gate), "a")
    other = fleet.worker("--name", "other")
    time.sleep(1)
    assert fleet.ledger.starts(second.id) == []
    killed = time.time()
    doomed.kill_all()
    until(lambda: len(fleet.ledger.starts()) == 2, "the slot is free")
    assert (
        fleet.ledger.starts()[-1]["at"] <= killed + 2.0 + 10.0
    )  # the lease, and twice the longest time between two looks
    gate.touch()
    assert [first.get(timeout=20), second.get(timeout=20)] == ["a", "a"]
    fleet.wait_empty()
    assert other.end() == 0


@pytest.mark.parametrize("fleet", ["sqlite"], indirect=True)
def test_a_worker_that_is_stopped_gives_its_slots_up(fleet: Cluster) -> None:
    """TERM: what runs ends, what waits for a slot goes back, and the next worker need not wait for any lease."""
    limited(fleet, "note", {"concurrency_limit": 1}, broker__lease=60.0)
    first = fleet.worker("--name", "first")
    sent = fleet.send_many("note", [(n, 0.3) for n in range(4)])
    until(fleet.ledger.starts, "a start")
    assert first.end() == 0
    assert not fleet.depth().leased
    fleet.worker("--name", "second")
    assert [result.get(timeout=20) for result in sent] == list(range(4))
    assert most_at_once(fleet) == 1


@pytest.mark.parametrize("fleet", ["sqlite"], indirect=True)
def test_a_worker_that_was_frozen_past_its_lease_ends_what_ran_under_a_slot_that_has_passed_on(fleet: Cluster) -> None:
    """Frozen with its children. The bound: they are one too many from waking up until the renewal, a third of a lease."""
    limited(fleet, "note", {"concurrency_limit": 1}, broker__lease=3.0, worker__concurrency=1)
    frozen = fleet.worker("--name", "frozen")
    first = fleet.send("note", 1, 60)
    fleet.ledger.wait_start(first.id)
    fleet.freeze(frozen)
    second = fleet.send("note", 2, 6)
    fleet.worker("--name", "healthy")
    until(lambda: len(fleet.ledger.starts()) == 2, "the slot passes on")
    frozen.tell_all(signal.SIGCONT)
    frozen.logged("its slot has passed to another")
    del first, second
