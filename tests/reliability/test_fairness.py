"""Work goes to whoever is free: no slot idles while a task waits behind another one, in this worker or in the fleet."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from cluster import FULL, Cluster

LONG, SHORT = (30.0, 0.05) if FULL else (6.0, 0.005)
TASKS = 100
WORKERS, SLOTS = 2, 4
IDLE = 1.5 if FULL else 4.0
"""Seconds for which a slot may idle while a task waits elsewhere: a job is taken back after 0.25 s, and handed out again, on a
busy machine in its time. Behind the long task it would wait for longer."""


def idle_while_waiting(lines: Sequence[dict[str, Any]], sent: float, slots: int) -> float:
    """The longest time for which fewer tasks ran than there are slots, while one that was sent had not started."""
    starts = sorted(line["at"] for line in lines if line["what"] == "start")
    moments = sorted([(at, 1) for at in starts] + [(line["at"], -1) for line in lines if line["what"] == "end"])
    longest, running, waiting, since = 0.0, 0, len(starts), sent
    for at, change in moments:
        if waiting and running < slots:
            longest = max(longest, at - since)
        running += change
        waiting -= change > 0
        if not (waiting and running < slots) or running - change >= slots:
            since = at
    return longest


@pytest.mark.parametrize(
    ("lines", "longest"),
    [
        ([(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)], 0.0),
        ([(1.0, 2.0), (2.5, 3.0)], 0.5),
        ([(1.0, 9.0), (1.0, 2.0), (9.0, 9.5)], 7.0),
    ],
)
def test_the_measure(lines: list[tuple[float, float]], longest: float) -> None:
    slots = 2 if longest == 7.0 else 1
    plain = [{"what": what, "at": at} for begun, ended in lines for what, at in (("start", begun), ("end", ended))]
    assert idle_while_waiting(plain, 1.0, slots) == pytest.approx(longest)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known as quick"])
def test_a_long_task_holds_nothing_up(cluster: Cluster, known: bool) -> None:
    """One of a hundred tasks is long: two workers of four slots end about when it does; nothing waits behind it."""
    cluster.configure(worker__concurrency=SLOTS)
    for number in range(WORKERS):
        cluster.worker("--name", f"w{number}")
    if known:  # then a worker reserves many at a time
        cluster.send_many("note", [(n, 0.0) for n in range(600)])
        cluster.wait_empty()
    before = len(cluster.ledger.lines())
    seconds = [LONG, *[SHORT] * (TASKS - 1)]
    random.Random(3).shuffle(seconds)
    sent = time.time()
    results = cluster.send_many("note", [(n, each) for n, each in enumerate(seconds)])
    assert [result.get(timeout=LONG + 30) for result in results] == list(range(TASKS))
    took = time.time() - sent
    lines = cluster.ledger.lines()[before:]
    ends = {line["value"]: line["at"] for line in lines if line["what"] == "end"}
    idle = idle_while_waiting(lines, sent, WORKERS * SLOTS)
    optimum = max(LONG, sum(seconds) / (WORKERS * SLOTS))
    print(f"makespan {took:.2f} s, optimum {optimum:.2f} s, longest idle while something waited {idle:.2f} s")
    assert idle < IDLE
    quick = [ends[n] for n, each in enumerate(seconds) if each == SHORT]
    assert max(quick) < ends[seconds.index(LONG)], "something waited for the long task"
    if FULL:
        assert took <= 1.1 * optimum


@pytest.mark.slow
def test_what_is_reserved_behind_long_tasks_is_done_by_slots_that_become_free(cluster: Cluster) -> None:
    """In one worker: every slot but one is held for long, and nothing that was reserved behind them waits."""
    cluster.configure(worker__concurrency=3)
    cluster.worker()
    cluster.send_many("note", [(n, 0.0) for n in range(400)])
    cluster.wait_empty()
    gate = cluster.folder / "gate"
    mixed = [cluster.send("gated", str(gate)), *cluster.send_many("note", [(n, 0.001) for n in range(60)])]
    mixed += [cluster.send("gated", str(gate)), *cluster.send_many("note", [(n, 0.001) for n in range(60)])]
    quick = [result for number, result in enumerate(mixed) if number not in (0, 61)]
    assert [result.get(timeout=30) for result in quick] == [*range(60), *range(60)]
    gate.touch()
    assert [mixed[0].get(timeout=30), mixed[61].get(timeout=30)] == [None, None]
