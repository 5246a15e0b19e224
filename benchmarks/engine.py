"""The execution engine beside Celery's, both with prefork and two processes, on one Redis server, results stored.

    python benchmarks/engine.py [--rounds 3] [--only umbel celery] [--members 1000] [--trips 300] [--json FILE]

Every round takes each system in turn, in a folder and a database of its own: from the start of the worker to the first result,
what an idle worker has in memory, round trips on an idle system one after the other, and a fan-out to many members with its
fan-in: once gathered by the sender (group), once by a task that gets all their results (chord). A figure counts only if every
result is right. Medians over the rounds; each round's percentiles are of its own trips.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import broker_usage
from broker_systems import environment, program, worker_command

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from servers.process import spawn  # found by the line above
from servers.redis import RedisServer

SYSTEMS: Final = ("umbel", "celery")
SETTLING: Final = 3.0
"""Seconds after the first result, for what a worker still does when it starts."""
PATIENCE: Final = 120.0

COLLECT: Final = """
from {system} import chord, group
@app.task
def collect(numbers):
    return sum(numbers)
"""

ROWS: Final = {
    "ready": "start of the worker to the first result, ms",
    "memory": "memory of the idle worker, MiB (PSS)",
    "processes": "processes of the worker",
    "trip_p50": "round trip p50, ms",
    "trip_p99": "round trip p99, ms",
    "group_sent": "group: all members sent, ms",
    "group": "group: all results gathered, ms",
    "chord": "chord: result of its last task, ms",
    "memory_after": "memory of the worker after that, MiB (PSS)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each system (default: 3)")
    parser.add_argument(
        "--members", type=int, default=1_000, help="members of the group and the chord (default: 1,000)"
    )
    parser.add_argument("--trips", type=int, default=300, help="round trips (default: 300)")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="systems (default: both)")
    parser.add_argument("--json", type=Path, help="write every round's figures to this file too")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    figures: dict[str, list[dict[str, float]]] = {system: [] for system in options.only}
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis", "appendonly no") as server:
        for number in range(options.rounds):
            for system in options.only:
                print(f"round {number + 1}: {system}", file=sys.stderr, flush=True)
                figures[system].append(run_apart(system, options, server))
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def run_apart(system: str, options: argparse.Namespace, server: RedisServer) -> dict[str, float]:
    """One system in a process and a folder of its own, on an empty server."""
    server.command("FLUSHALL")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(program(system) + COLLECT.format(system=system))
        env = environment(system, server.url_of(0), server.url_of(1), str(folder / "ledger"))
        arguments = [f"--{option}={getattr(options, option)}" for option in ("members", "trips")]
        command = [sys.executable, os.path.abspath(__file__), "--one", system, *arguments]
        done = subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


# --- in a process of its own ---------------------------------------------------------------------


def measure(system: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs in the folder; the figures of one round."""
    sys.path.insert(0, os.getcwd())
    tasks: Any = __import__("program")
    figures: dict[str, float] = {}
    first = tasks.noop.delay(0)  # waits in the queue, so that no producer's start is in what follows
    with _worker(system) as process:
        started = time.perf_counter()
        assert first.get(timeout=PATIENCE) == 0
        figures["ready"] = 1000 * (time.perf_counter() - started)
        time.sleep(SETTLING)
        figures["memory"] = broker_usage.proportional_memory(process.pid)
        figures["processes"] = len(list(broker_usage.tree(process.pid)))
        trips = []
        for i in range(1, options.trips + 1):
            begun = time.perf_counter()
            assert tasks.noop.delay(i).get(timeout=PATIENCE) == i
            trips.append(1000 * (time.perf_counter() - begun))
        figures["trip_p50"] = statistics.median(trips)
        figures["trip_p99"] = sorted(trips)[int(len(trips) * 0.99)]
        numbers = range(options.members)
        begun = time.perf_counter()
        sent = tasks.group([tasks.noop.s(i) for i in numbers]).apply_async()
        figures["group_sent"] = 1000 * (time.perf_counter() - begun)
        assert sent.get(timeout=PATIENCE) == list(numbers)
        figures["group"] = 1000 * (time.perf_counter() - begun)
        begun = time.perf_counter()
        last = tasks.chord([tasks.noop.s(i) for i in numbers], tasks.collect.s()).apply_async()
        assert last.get(timeout=PATIENCE) == sum(numbers)
        figures["chord"] = 1000 * (time.perf_counter() - begun)
        figures["memory_after"] = broker_usage.proportional_memory(process.pid)
    return figures


@contextmanager
def _worker(system: str) -> Iterator[subprocess.Popen[bytes]]:
    process = spawn(worker_command(system), log=Path("worker.log"), folder=Path.cwd())
    try:
        yield process
    except BaseException:
        print(Path("worker.log").read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        family = list(broker_usage.tree(process.pid))
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in family[1:]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


# --- the table -----------------------------------------------------------------------------------


def report(figures: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        system: {row: statistics.median(one[row] for one in rounds) for row in ROWS}
        for system, rounds in figures.items()
    }
    print(f"{'':48}" + "".join(f"{system:>12}" for system in middle))
    for row, title in ROWS.items():
        print(f"{title:48}" + "".join(f"{found[row]:12,.1f}" for found in middle.values()))


if __name__ == "__main__":
    main()
