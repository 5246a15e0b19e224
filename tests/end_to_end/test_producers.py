"""Senders of every kind: many threads, forks in between, event loops, scripts that end at once."""

from __future__ import annotations

import json

import pytest
from cluster import Cluster

THREADS_AND_FORKS = """
import json, os, sys, threading
from shop import app

add = app.tasks["shop.add"]
assert add.delay(0, 0).get(timeout=60) == 0  # from here on nothing is imported any more, which a fork might interrupt
wrong = []

def ask(base, times):
    for n in range(times):
        if (got := add.delay(base, n).get(timeout=60)) != base + n:
            wrong.append((base, n, got))

threads = [threading.Thread(target=ask, args=(1000 * t, 5)) for t in range(64)]
for thread in threads:
    thread.start()
children = []
for child in range(8):
    pid = os.fork()
    if pid == 0:  # with 64 threads at any point of sending and waiting, none of which lives on here
        wrong.clear()
        ask(1_000_000 * (child + 1), 3)
        inner = [threading.Thread(target=ask, args=(10_000_000 * (child + 1) + 1000 * t, 2)) for t in range(4)]
        for thread in inner:
            thread.start()
        for thread in inner:
            thread.join()
        os._exit(1 if wrong else 0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
for thread in threads:
    thread.join()
print(json.dumps({"wrong": wrong, "codes": codes}))
"""

LOOPS = """
import asyncio, json
from shop import app

add = app.tasks["shop.add"]

async def one(n):
    return await (await add.adelay(n, 1))

async def main():
    answers = await asyncio.gather(*map(one, range(200)))
    mixed = add.delay(1, 2)  # the synchronous form works inside a running loop too
    return answers, await mixed, await (await add.aapply_async((3, 4), countdown=0.1)).aget(timeout=10)

print(json.dumps([asyncio.run(main()), asyncio.run(main())]))
"""

SEND_AND_LEAVE = """
from shop import app
for n in range(20):
    app.tasks["shop.note"].delay(n)
"""


@pytest.mark.slow
def test_sixty_four_threads_get_each_its_own_values_with_forks_in_between(cluster: Cluster) -> None:
    cluster.worker()
    done = cluster.run("-c", THREADS_AND_FORKS, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"wrong": [], "codes": [0] * 8}
    assert len(cluster.ledger.starts()) == 1 + 64 * 5 + 8 * (3 + 4 * 2)
    cluster.wait_empty()


def test_a_script_with_event_loops_sends_and_awaits(cluster: Cluster) -> None:
    cluster.worker()
    done = cluster.run("-c", LOOPS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[[n + 1 for n in range(200)], 3, 7]] * 2


def test_what_a_script_has_sent_is_there_when_it_ends(cluster: Cluster) -> None:
    """A publish returns when the broker has accepted it: nothing is left to a thread that dies with the process."""
    done = cluster.run("-W", "error", "-c", SEND_AND_LEAVE)
    assert done.returncode == 0
    assert done.stderr == ""
    assert cluster.depth().ready == 20
    assert cluster.stragglers() == []


def test_a_script_can_be_its_own_worker(cluster: Cluster) -> None:
    """A whole application in one file, with no settings file: the program of the tutorial."""
    script = cluster.folder / "alone.py"
    script.write_text(
        "from umbel import Umbel\napp = Umbel('alone')\n@app.task\ndef double(n: int) -> int:\n    return 2 * n\n"
    )
    worker = cluster.worker("-A", "alone")
    called = cluster.umbel("-A", "alone", "call", "alone.double", "21", "--wait", "--timeout", "20")
    assert called.stdout.strip() == "42", called.stderr
    assert worker.end() == 0
