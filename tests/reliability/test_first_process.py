"""A worker as the first process of a container: whatever loses its parent there is collected, signals and ends pass through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cluster import Cluster, WorkerProcess, parents, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PID namespaces and subreapers are Linux's")

SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER: orphans below this process become its children, as they do below the first one."""


def states(parent: int) -> dict[int, str]:
    """State by process, of the children of ``parent``, zombies included."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, above = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(above) == parent:
                found[int(entry)] = state
    return found


def below(body: str, folder: Path) -> subprocess.Popen[str]:
    """A process that serves another below it, which runs ``body``; waits until that says so."""
    script = folder / "below.py"
    script.write_text(
        f"import ctypes, os, signal, subprocess, sys, time\n"
        f"ctypes.CDLL(None).prctl({SUBREAPER}, 1)\n"
        "from umbel.cli.first_process import serve_below\n"
        "serve_below()\n" + textwrap.dedent(body)
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(3)", 3), ("sys.exit()", 0), ("os.kill(os.getpid(), 9)", 128 + 9)]
)
def test_the_end_of_the_worker_is_the_end_of_the_first_process(tmp_path: Path, end: str, status: int) -> None:
    process = below(f"print('here', flush=True)\n{end}", tmp_path)
    assert process.wait(40) == status
    process.stdout.close()  # type: ignore[union-attr]  # a pipe, as it was asked for


def test_orphans_are_collected_and_signals_come_once(tmp_path: Path) -> None:
    """Ctrl-C in a terminal goes to the whole group: to the first process, and from there, once, to the worker."""
    process = below(
        """
        heard = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, _: heard.append(number))
        for _ in range(20):
            subprocess.run(["sh", "-c", "sleep 0.05 & :"])
        print("here", flush=True)
        while signal.SIGTERM not in heard:
            time.sleep(0.01)
        time.sleep(0.2)
        print(*map(int, heard), flush=True)
        """,
        tmp_path,
    )
    until(lambda: len(states(process.pid)) == 1, "no orphan and no zombie is left")
    os.killpg(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout is not None
    with process.stdout:
        told = [int(word) for word in process.stdout.readline().split()]
    assert sorted(told) == sorted([signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
    assert process.wait(40) == 0


def first_process(worker: WorkerProcess) -> int:
    """The first process of the namespace that ``unshare`` has made, as it is numbered outside."""
    (first,) = [pid for pid, parent in parents().items() if parent == worker.pid]
    return first


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def contained(cluster: Cluster) -> WorkerProcess:
    """A worker that is process 1 of a PID namespace of its own."""
    able = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    if not able:
        pytest.skip("this machine does not let us make a PID namespace")
    cluster.configure(worker__concurrency=1, worker__grace=15)
    command = [*UNSHARE, sys.executable, "-m", "umbel", "worker"]
    worker = WorkerProcess(command, folder=cluster.folder, env=cluster.env, log=cluster.folder / "worker-1.log")
    cluster.workers.append(worker)
    return worker.wait_ready()


def test_a_worker_that_is_process_1_leaves_no_zombie_and_stops_as_ever(
    cluster: Cluster, contained: WorkerProcess
) -> None:
    first = first_process(contained)
    (worker,) = states(first)
    orphans = [cluster.send("leave_orphan", 0.3) for _ in range(5)]
    assert [task.get(timeout=20) for task in orphans] == [None] * 5
    until(lambda: states(first).keys() == {worker}, "nothing but the worker is left below process 1")
    running = cluster.send("note", "running", 1.0)
    cluster.ledger.wait_start(running.id)
    os.kill(first, signal.SIGTERM)
    assert contained.wait(40) == 0
    assert running.get(timeout=30) == "running"
    assert cluster.empty()


def test_a_worker_that_is_process_1_and_is_killed_ends_the_container(
    cluster: Cluster, contained: WorkerProcess
) -> None:
    first = first_process(contained)
    (worker,) = states(first)
    os.kill(worker, signal.SIGKILL)
    assert contained.wait(40) == 128 + signal.SIGKILL
    until(lambda: not cluster.stragglers(), "nothing of it is left")
