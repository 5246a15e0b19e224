"""The execution engine beside those of Celery, Dramatiq and Taskiq, two processes each, on one Redis server, results stored.

    python benchmarks/engine.py [--rounds 3] [--only umbel celery] [--members 1000] [--trips 300] [--json FILE]

Every round takes each system in turn, in a folder and a database of its own: from the start of the worker to the first result,
what an idle worker has in memory, round trips on an idle system one after the other, and a fan-out to many members with its
fan-in: once gathered by the sender (group), once by a task that gets all their results (chord). A figure counts only if every
result is right. Medians over the rounds; each round's percentiles are of its own trips. Celery acknowledges before the task,
the others after it. Dramatiq's last task is told that all have ended, and gets no results; Taskiq has none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import broker_usage
from broker_draining import worker  # lets the servers' modules be found, too
from broker_systems import Sender, environment, program
from servers.redis import RedisServer

SYSTEMS: Final = ("umbel", "celery", "dramatiq", "taskiq")
SETTLING: Final = 3.0
"""Seconds after the first result, for what a worker still does when it starts."""
PATIENCE: Final = 120

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
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="systems (default: all)")
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
        (folder / "program.py").write_text(program(system, fan_in=True))
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
    sender = Sender(system, __import__("program"))
    figures: dict[str, float] = {}
    first = sender.send(0, patience=PATIENCE)  # waits in the queue, so that no producer's start is in what follows
    started = time.perf_counter()
    with worker(system) as process:
        assert first() == 0
        figures["ready"] = 1000 * (time.perf_counter() - started)
        time.sleep(SETTLING)
        figures["memory"] = broker_usage.proportional_memory(process.pid)
        figures["processes"] = len(list(broker_usage.tree(process.pid)))
        figures["trip_p50"], figures["trip_p99"] = sender.round_trips(range(1, options.trips + 1))
        numbers = range(options.members)
        begun = time.perf_counter()
        gather = sender.fan_out(numbers, patience=PATIENCE)
        figures["group_sent"] = 1000 * (time.perf_counter() - begun)
        assert gather() == list(numbers)
        figures["group"] = 1000 * (time.perf_counter() - begun)
        begun = time.perf_counter()
        last = sender.fan_in(numbers, patience=PATIENCE)
        figures["chord"] = 1000 * (time.perf_counter() - begun) if last is not None else math.nan
        assert last in (sum(numbers), None) or (system == "dramatiq" and last == -1), last
        figures["memory_after"] = broker_usage.proportional_memory(process.pid)
    sender.close()
    return figures


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
