"""Umbel against Huey on the embedded default: one SQLite file, results stored, on this machine, in turn.

    python benchmarks/embedded.py [--tasks 10000] [--rounds 3]

Each round measures one system, then the other, in fresh folders: enqueueing one by one and in bulk, draining a full queue with
two worker processes, and the round trip on an idle system. Every run checks that each task's result is there exactly once.
Huey takes a task off its queue before it runs it and does not acknowledge; Umbel acknowledges after the result is stored.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

PROGRAM = {
    "umbel": """
from umbel import Umbel
app = Umbel("bench", settings={"worker.concurrency": 2, "worker.log_level": "WARNING"})
@app.task
def noop(i: int) -> int:
    return i
""",
    "huey": """
from huey import SqliteHuey
huey = SqliteHuey("bench", filename="huey.sqlite3")
@huey.task()
def noop(i):
    return i
""",
}
WORKER = {
    "umbel": [sys.executable, "-m", "umbel", "-A", "program", "worker"],
    "huey": [sys.executable, "-m", "huey.bin.huey_consumer", "program.huey", "-k", "process", "-w", "2", "-q"],
}
COUNT = {
    "umbel": ("umbel.sqlite3", "SELECT COUNT(*) FROM umbel_results"),
    "huey": ("huey.sqlite3", "SELECT COUNT(*) FROM kv"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks to drain (default: 10,000)")
    parser.add_argument("--singles", type=int, default=2_000, help="tasks to send one by one (default: 2,000)")
    parser.add_argument("--trips", type=int, default=200, help="round trips (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each system (default: 3)")
    parser.add_argument("--one", choices=PROGRAM, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options)
        return
    figures: dict[str, list[dict[str, float]]] = {"umbel": [], "huey": []}
    for number in range(options.rounds):
        for system, rows in figures.items():
            print(f"round {number + 1} of {options.rounds}: {system}", file=sys.stderr)
            rows.append(run_apart(system, options))
    report(figures)


def run_apart(system: str, options: argparse.Namespace) -> dict[str, float]:
    """One system in a process and a folder of its own."""
    arguments = [f"--{name}={getattr(options, name)}" for name in ("tasks", "singles", "trips")]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(PROGRAM[system])
        command = [sys.executable, os.path.abspath(__file__), "--one", system, *arguments]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}


def measure(system: str, options: argparse.Namespace) -> None:
    """Runs in the folder; prints ``name value`` lines."""
    sys.path.insert(0, os.getcwd())
    program = __import__("program")
    noop = program.noop
    send: Callable[[int], object] = noop.delay if system == "umbel" else noop
    send(-1)  # connects, makes the tables

    started = time.perf_counter()
    for i in range(options.singles):
        send(i)
    print("enqueue_one_by_one", options.singles / (time.perf_counter() - started))

    rest = range(options.singles, options.tasks)
    started = time.perf_counter()
    if system == "umbel":
        noop.map_delay((i,) for i in rest)
    else:
        noop.map([(i,) for i in rest])
    print("enqueue_in_bulk", len(rest) / (time.perf_counter() - started))

    with worker(system) as process:
        print("drain_with_results", drained(system, options.tasks + 1, process))
        trips = []
        for i in range(options.trips):
            started = time.perf_counter()
            handle = send(i)
            value = handle.get(timeout=10) if system == "umbel" else handle.get(blocking=True, timeout=10)  # type: ignore[attr-defined]  # both have it
            trips.append(time.perf_counter() - started)
            assert value == i, (value, i)
        trips.sort()
        print("round_trip_p50_ms", 1000 * statistics.median(trips))
        print("round_trip_p99_ms", 1000 * trips[int(len(trips) * 0.99)])


@contextmanager
def worker(system: str) -> Iterator[subprocess.Popen[bytes]]:
    with open("worker.log", "wb") as log:
        process = subprocess.Popen(WORKER[system], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM if system == "umbel" else signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def drained(system: str, total: int, process: subprocess.Popen[bytes]) -> float:
    """Tasks a second between the first tenth and the last task, so that starting up does not count. Checks the count."""
    file, query = COUNT[system]
    deadline = time.monotonic() + 120
    begun: tuple[float, int] | None = None
    while time.monotonic() < deadline:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            try:
                (done,) = connection.execute(query).fetchone()
            except sqlite3.OperationalError:  # the table comes with the first result
                done = 0
        now = time.perf_counter()
        if begun is None and done > total / 10:
            begun = now, done
        if done == total:
            assert begun is not None, "all tasks were done between two looks; ask for more"
            return (total - begun[1]) / (now - begun[0])
        assert done < total, f"{done} results of {total} tasks"
        if process.poll() is not None:
            sys.exit(f"{system}: the worker has ended:\n{Path('worker.log').read_text()}")
        time.sleep(0.01)
    log = Path("worker.log").read_text()[-2000:]
    sys.exit(f"{system}: only {done} of {total} results came within two minutes; the end of its log:\n{log}")


def report(figures: dict[str, list[dict[str, float]]]) -> None:
    names = list(figures["umbel"][0])
    print(f"{'':24}{'Umbel':>12}{'Huey':>12}{'Umbel/Huey':>14}   (medians of {len(figures['umbel'])} rounds)")
    for name in names:
        ours, theirs = (statistics.median(row[name] for row in figures[system]) for system in ("umbel", "huey"))
        print(f"{name:24}{ours:12,.2f}{theirs:12,.2f}{ours / theirs:14.2f}")
    if shutil.which("nproc"):
        cores = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout.strip()
        print(f"{cores} cores, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}")


if __name__ == "__main__":
    main()
