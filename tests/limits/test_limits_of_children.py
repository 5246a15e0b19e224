"""``max_memory_per_child`` on a real worker; ``max_tasks_per_child`` is in tests/end_to_end."""

from __future__ import annotations

from cluster import Cluster

LEAKY = """
import os
import resource

from umbel import Umbel

app = Umbel("leaky")
kept = []


@app.task
def leak(megabytes):
    kept.append(b"x" * (megabytes << 20))
    return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


def test_a_child_that_has_grown_too_large_is_replaced_and_no_task_is_lost(cluster: Cluster) -> None:
    (cluster.folder / "leaky.py").write_text(LEAKY)
    cluster.configure(app="leaky", worker__concurrency=2, worker__max_memory_per_child="150MB")
    cluster.worker()
    sent = [cluster.app.send_task("leaky.leak", [40]) for _ in range(14)]
    told = [result.get(timeout=60) for result in sent]
    assert len({pid for pid, _ in told}) >= 4
    assert max(kilobytes for _, kilobytes in told) < 150_000 + 3 * 41_000
    cluster.wait_empty()
    assert cluster.dead() == []
