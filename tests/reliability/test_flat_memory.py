"""What has been done leaves nothing behind in the process that did it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import FULL, Cluster, InProcess
from shop import define

from umbel import Umbel

GROWTH = 8.0
"""MiB by which a worker may grow over the tasks after the first part of them."""


def rss(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture
def site(tmp_path: Path) -> Iterator[InProcess]:
    settings = {"worker": {"pool": "threads", "concurrency": 2}, "results": {"expires": 1}}
    app = define(
        Umbel("shop", broker=f"memory://{tmp_path}", results=f"sqlite:///{tmp_path}/r.sqlite3", settings=settings)
    )
    made = InProcess(tmp_path, app).start()
    yield made
    made.close()


def objects() -> int:
    time.sleep(0.1)
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.slow
def test_a_worker_keeps_no_object_of_a_task_that_has_ended(site: InProcess) -> None:
    """Counted, not weighed: no more objects at the end than at the beginning, but for what is bounded and not yet full.

    The last batch of each kind stays in hand until the next one comes: a thousand objects more or less, by how large it
    was. So the last ones are small, and the fewest at the end are compared with the most at the beginning.
    """

    def work() -> int:
        site.send_many("quick", [()] * 200)
        site.send_many("flaky", [(0,)] * 5)
        site.wait_empty()
        for task, *args in [("quick",), ("flaky", 0)] * 3:  # what stays in hand of a batch is now of one task
            site.send(task, *args)
            site.wait_empty()
        return objects()

    counts = [work() for _ in range(24)]
    print("objects after each 205 tasks:", *counts)
    before, after = max(counts[4:8]), min(counts[-4:])
    assert after - before < 1000, "a third of an object for each of the tasks between"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not FULL, reason="200,000 tasks: UMBEL_TEST_FULL=1")
def test_memory_is_flat_over_200_000_tasks(cluster: Cluster) -> None:
    cluster.configure(results__expires=60)
    worker = cluster.worker()
    seen = []
    for _ in range(20):
        cluster.send_many("quick", [()] * 10_000)
        cluster.wait_empty(timeout=600)
        seen.append((rss(worker.pid), max(map(rss, worker.children))))
    print("MiB of worker and largest child after each 10,000:", ", ".join(f"{a:.1f}/{b:.1f}" for a, b in seen))
    for column in zip(*seen, strict=True):
        assert column[-1] - column[3] < GROWTH
