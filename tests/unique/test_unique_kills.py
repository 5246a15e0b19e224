"""Unique tasks where processes are killed: the key is free within one lease, and never more than one runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from cluster import FULL, Cluster, until

from umbel import AsyncResult

pytestmark = pytest.mark.slow

LEASE = 1.5
SENDER = """
import os, sys
from umbel import Umbel
from umbel.model import Message
app = Umbel("shop", broker=os.environ["BROKER"], results=os.environ["RESULTS"], settings={"broker.publish_timeout": 0.5})
point, ask = sys.argv[1], app.gateway.ask
def dying(verb, payload):
    answer = ask(verb, payload)
    if verb == "claim" and payload[3].decode() == point:
        print("dead", flush=True)
        os.kill(os.getpid(), 9)
    return answer
app.gateway.ask = dying
if point == "published":
    send = app.client.send
    def sent(messages, timeout=None):
        send(messages, timeout)
        print("dead", flush=True)
        os.kill(os.getpid(), 9)
    app.client.send = sent
app.send_task("shop.note", (1,), unique="until_done", unique_key="k")
"""


@pytest.fixture(params=["sqlite", "redis"])
def fleet(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Cluster]:
    settings = {"unique__lease": LEASE, "broker__lease": LEASE}
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        settings |= {"broker__url": url, "results__url": url}
    return cluster.configure(**settings)


def unique(fleet: Cluster, seconds: float = 0.0, task: str = "note") -> bool:
    return fleet.send(task, 1, seconds, unique="until_done", unique_key="k").sent


def test_f08_sigkill_of_a_worker_frees_the_keys_of_its_tasks_within_one_lease(fleet: Cluster) -> None:
    gate = fleet.folder / "gate"

    def send() -> AsyncResult[Any]:
        return fleet.send("gated", str(gate), unique="until_done", unique_key="k")

    worker = fleet.worker()
    first = send()
    fleet.ledger.wait_start(first.id)
    time.sleep(LEASE * 1.5)  # it is renewed
    assert not send().sent
    worker.kill_all()
    begun = time.monotonic()
    until(lambda: send().sent, "the key is free")
    assert time.monotonic() - begun < LEASE + 10.0
    # Of the two, the message that was handed out again gives way: the other holds the key until the gate is open.
    fleet.worker()
    until(lambda: first.ready(), "the first gives way")
    assert first.state == "REVOKED"
    gate.touch()
    fleet.wait_empty()
    assert len(fleet.ledger.starts()) == 2
    assert send().sent


@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_sigkill_of_a_worker_whose_task_comes_again_keeps_the_key(fleet: Cluster) -> None:
    workers = [fleet.worker(), fleet.worker()]
    first = fleet.send("note", 1, 2.0, unique="until_done", unique_key="k")
    started = fleet.ledger.wait_start(first.id)
    victim = next(worker for worker in workers if started["pid"] in worker.family)
    victim.kill_all()
    fleet.ledger.wait_start(first.id, number=2)
    assert not unique(fleet)
    assert first.get(timeout=30) == 1
    until(lambda: unique(fleet), "the key is free at its end")


@pytest.mark.parametrize("fleet", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("point", "runs"), [("sending", 0), ("published", 1), ("waits", 1)])
def test_a_sender_that_is_killed_at_any_step_leaves_no_key_behind(fleet: Cluster, point: str, runs: int) -> None:
    settings = fleet.app.settings
    env = {"BROKER": settings.broker.url, "RESULTS": str(settings.results.url)}
    killed = fleet.run("-c", SENDER, point, env=env)
    assert (killed.returncode, killed.stdout.strip()) == (-9, "dead"), killed.stderr
    assert not unique(fleet)
    fleet.worker()
    until(lambda: len(fleet.ledger.ends()) == runs and fleet.empty(), "what was sent has run")
    until(lambda: unique(fleet), "the key is free", timeout=0.5 + 5 + 15)
    until(lambda: len(fleet.ledger.ends()) == runs + 1, "it runs")


@pytest.mark.parametrize("fleet", ["redis"], indirect=True)
def test_however_often_workers_are_killed_no_two_of_a_key_run_at_once(fleet: Cluster, tmp_path: Path) -> None:
    """And every key whose call was accepted runs to its end."""
    rounds = 12 if FULL else 3
    workers = [fleet.worker(), fleet.worker()]
    calls = [
        fleet.send("note", n, 0.3, unique="until_done", unique_key=str(n % 5), on_conflict="return") for n in range(40)
    ]
    for _ in range(rounds):
        time.sleep(0.5)
        workers.pop(0).kill_all()
        workers.append(fleet.worker(wait=False))
        calls += [
            fleet.send("note", n, 0.3, unique="until_done", unique_key=str(n), on_conflict="return") for n in range(5)
        ]
    until(fleet.empty, "all is done", timeout=90)
    ended = {result.state for result in calls}
    assert ended <= {"SUCCESS", "REVOKED"}
    key_of = {result.id: n % 5 for n, result in enumerate(calls)}
    runs = [(key_of[end["id"]], fleet.ledger.starts(end["id"])[-1]["at"], end["at"]) for end in fleet.ledger.ends()]
    for (key, start, end), (other, begun, over) in combinations(runs, 2):
        assert key != other or end <= begun or over <= start, "two of one key ran at once"
    for key in range(5):
        succeeded = [r for n, r in enumerate(calls) if n % 5 == key and r.state == "SUCCESS"]
        assert succeeded, f"key {key} has never run"
