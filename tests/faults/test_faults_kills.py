"""Workers that are killed, and workers that sleep longer than the broker believes in them."""

from __future__ import annotations

import signal
import time

import pytest
from cluster import send, until
from fleet import FULL, Fleet, ready

TASKS, SECONDS = (20_000, 0.001) if FULL else (4_000, 0.004)
KILLS = 40 if FULL else 6
EVERY = 0.5
DRAINED = 240.0
"""Seconds in which all is done after the last kill."""


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_nothing_is_lost_when_a_worker_is_killed_every_half_second(fleet: Fleet) -> None:
    """The older of two workers, by turns alone and with all its processes; another takes its place at once.

    A worker that is not ready yet is left to become so: a fleet of which none ever runs does nothing, whatever it is.
    """
    fleet.configure(worker__max_deliveries=20, **fleet.broker.patient)
    sent = [task.id for task in fleet.send_many("note", [(n, SECONDS) for n in range(TASKS)])]
    workers = [fleet.worker(wait=False) for _ in range(2)]
    killed, last = 0, time.monotonic()
    while killed < KILLS:
        time.sleep(EVERY)
        if victim := next(filter(ready, workers), None):
            victim.kill_all() if killed % 2 else victim.kill()
            workers.remove(victim)
            workers.append(fleet.worker(wait=False))
            killed, last = killed + 1, time.monotonic()
        if not fleet.broker.left():
            break
        assert time.monotonic() - last < 60, "no worker becomes ready"
    assert killed >= 5, "all was done before enough was killed"
    fleet.wait_done(timeout=DRAINED)
    drained = time.monotonic() - last
    again = fleet.check_ledger(sent)
    print(f"{fleet.broker.name}: {killed} kills, {again} tasks started again, done {drained:.1f} s after the last kill")
    for worker in workers:
        assert worker.wait_ready().end() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_that_sleeps_past_its_lease_cannot_change_what_another_has_done(fleet: Fleet) -> None:
    """Its child ends the task meanwhile. The task runs elsewhere, and has ended there when the sleeper wakes up."""
    fleet.configure(worker__concurrency=1, **{**fleet.broker.patient, **SHORT[fleet.broker.name]})
    sleeper = fleet.worker("--name", "sleeper")
    task = fleet.cluster.send("whoami", 2.0)
    fleet.cluster.ledger.wait_start(task.id)
    send([sleeper.pid], signal.SIGSTOP)
    fleet.worker("--name", "other")
    second = fleet.cluster.ledger.wait_start(task.id, number=2)
    assert second["worker"] == "other"
    assert task.get(timeout=20) == second["pid"]
    sleeper.tell(signal.SIGCONT)
    sleeper.logged("does not count")
    assert task.get(timeout=30) == second["pid"]
    fleet.wait_done(timeout=60)
    assert len(fleet.cluster.ledger.starts(task.id)) == 2
    assert fleet.cluster.dead() == []

    until(lambda: fleet.broker.consumers() == 2, "both workers consume")
    rest = fleet.send_many("note", [(n, 0.05) for n in range(40)])
    assert [one.get(timeout=30) for one in rest] == list(range(40))
    assert {line["worker"] for one in rest for line in fleet.cluster.ledger.starts(one.id)} == {"sleeper", "other"}


SHORT = {"redis": {"broker__lease": 2.0}, "rabbitmq": {"broker__options__heartbeat": 1.0}}
