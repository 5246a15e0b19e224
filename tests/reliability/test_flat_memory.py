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
    """Counted, not weighed: as many objects after 2,400 tasks as after 800, but for what is bounded and not yet full."""

    def work(number: int) -> int:
        for start in range(0, number, 200):
            site.send_many("quick", [()] * 200)
            site.send_many("flaky", [(0,)] * 5)
            site.wait_empty()
            assert start >= 0
        return min(objects() for _ in range(10))  # a batch that has just been told of may still be in hand

    before = work(800)
    after = work(1600)
    print(f"{before} objects, then {after}")
    assert after - before < 400, "a quarter of an object for each task"


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
