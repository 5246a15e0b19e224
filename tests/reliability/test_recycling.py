"""Children that are replaced all the time, and tasks that end in every bad way, by the thousand."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from cluster import FULL, Cluster, WorkerProcess, until
from shop import WAYS_TO_PERISH

TASKS = 50_000 if FULL else 600
CHILDREN = 8 if FULL else 4
SHARE = 0.01
"""Of the tasks, for each way to perish."""
STALL = 5.0
HANGS = 0.5
"""Hard time limit, in seconds, of those that hang."""


def zombies(root: int) -> list[int]:
    """Processes below ``root`` that are dead, and that nobody has waited for."""
    parent, dead = {}, []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, above = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # gone meanwhile
        parent[int(entry)] = int(above)
        if state == "Z":
            dead.append(int(entry))

    def below(pid: int) -> bool:
        while pid > 1:
            pid = parent.get(pid, 0)
            if pid == root:
                return True
        return False

    return [pid for pid in dead if below(pid)]


def descriptors(worker: WorkerProcess) -> int:
    """Files and sockets that the worker and its fork server have open, once every child is there."""
    children = set(worker.children)
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in worker.family if pid not in children)


@pytest.mark.slow
@pytest.mark.timeout(1800 if FULL else 240)
def test_every_task_ends_though_children_are_recycled_and_die_in_every_way(cluster: Cluster) -> None:
    """No stall over 5 s, every task ends as it must, no zombie, and as many file descriptors as before."""
    chance = random.Random(int(os.environ.get("CHAOS_SEED") or 7))
    cluster.configure(worker__concurrency=CHILDREN, worker__max_tasks_per_child=7, worker__max_deliveries=1)
    worker = cluster.worker()
    for way in WAYS_TO_PERISH:  # all that is opened on first use
        cluster.send("perish", way, time_limit=HANGS)
    cluster.wait_empty()
    until(lambda: len(worker.children) == CHILDREN, "every child")
    before = descriptors(worker)
    warm = len(cluster.ledger.starts())
    assert warm == len(WAYS_TO_PERISH)

    each = max(1, int(TASKS * SHARE))
    ways = {way: [] for way in WAYS_TO_PERISH}
    began = time.monotonic()
    calls = [("note", (n, 0.001)) for n in range(TASKS - each * len(ways))]
    calls += [("perish", (way,)) for way in ways for _ in range(each)]
    chance.shuffle(calls)
    messages = []
    for name, arguments in calls:
        limit = {"time_limit": HANGS} if name == "perish" and "hangs" in str(arguments[0]) else {}
        message = cluster.app.tasks[f"shop.{name}"].message(arguments, **limit)  # type: ignore[arg-type]  # of CallOptions
        messages.append(message)
        if name == "perish":
            ways[str(arguments[0])].append(message.id)
    for start in range(0, TASKS, 1000):
        cluster.publish(*messages[start : start + 1000])
    cluster.wait_empty(timeout=1500 if FULL else 200)
    took = time.monotonic() - began

    ids = [message.id for message in messages]
    records = {}
    for start in range(0, TASKS, 1000):
        records |= cluster.app.gateway.get(ids[start : start + 1000])
    assert records.keys() == set(ids)
    states = {way: dict(Counter(records[task_id].state for task_id in members)) for way, members in ways.items()}
    well = {"forks", "returns twice"}
    assert states == {way: {"SUCCESS" if way in well else "FAILURE": each} for way in ways} | {
        "closes everything": states["closes everything"]
    }
    perished = {task_id for members in ways.values() for task_id in members}
    assert {records[task_id].state for task_id in ids if task_id not in perished} == {"SUCCESS"}

    starts = cluster.ledger.starts()
    assert len({line["id"] for line in starts if line["id"] not in perished}) == TASKS - len(perished) + warm
    twice = [task_id for task_id, number in Counter(line["id"] for line in starts).items() if number > 1]
    assert twice == []
    moments = sorted(line["at"] for line in starts)
    stall = max(later - earlier for earlier, later in pairwise(moments[1:]))
    until(lambda: len(worker.children) == CHILDREN, "every child is replaced")
    until(lambda: zombies(worker.pid) == [], "no zombie")
    until(lambda: descriptors(worker) <= before, f"{before} descriptors, now {descriptors(worker)}")
    print(f"{TASKS} tasks in {took:.1f} s, {len(perished)} perished, longest stall {stall:.2f} s, descriptors {before}")
    print(states)
    assert stall < STALL
    assert worker.end() == 0
