"""Umbel beside Celery, Dramatiq and Taskiq on one Redis or RabbitMQ server, in turn, in one run.

    python benchmarks/brokers.py --broker redis [--tasks 20000] [--rounds 2] [--only umbel celery] [--json FILE]

Needs ``dramatiq[redis,rabbitmq] taskiq taskiq-redis taskiq-aio-pika celery`` and the server's program; starts a server of its
own in a temporary folder. Every round takes each system in turn, with results off and on (in Redis, for both brokers): sends
one by one and in bulk, drains the full queue with two worker processes, then looks at the idle worker and at round trips. A
figure counts only with its delivery check: the ledger that the tasks write holds each number once, and as many results are
stored as tasks were sent. CPU and rates are taken between the first tenth and the last task, so that starting up is not in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import broker_limits
import broker_usage
import redis
from broker_draining import drained, worker  # lets the servers' modules be found, too
from broker_systems import ONLY_ON, WORKERS, Sender, environment, program
from servers.process import Server
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer

IDLE_SECONDS: Final = 3.0

ROWS: Final = {
    "enqueue_one_by_one": "enqueue one by one, tasks/s",
    "enqueue_in_bulk": "enqueue in bulk, tasks/s",
    "drain": "drain, tasks/s",
    "worker_cpu": "CPU of the worker, ms per 1,000 tasks",
    "broker_cpu": "CPU of the server, ms per 1,000 tasks",
    "round_trip_p50": "round trip p50, ms",
    "round_trip_p99": "round trip p99, ms",
    "idle": "idle: commands (Redis) or packets (RabbitMQ) per s",
    "memory": "memory of the worker, MiB (PSS)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks to drain (default: 20,000)")
    parser.add_argument("--singles", type=int, default=1_000, help="of these sent one by one (default: 1,000)")
    parser.add_argument("--trips", type=int, default=200, help="round trips (default: 200)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each system (default: 2)")
    parser.add_argument("--only", nargs="+", choices=WORKERS, default=list(WORKERS), help="systems (default: all)")
    parser.add_argument("--results", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--json", type=Path, help="write every round's figures to this file too")
    parser.add_argument("--one", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    systems = [name for name in options.only if ONLY_ON.get(name, options.broker) == options.broker]
    figures: dict[str, dict[str, list[dict[str, float]]]] = {
        results: {system: [] for system in systems} for results in options.results
    }
    limits: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(RedisServer(folder / "redis", "appendonly no"))
        server: Server = store
        if options.broker == "rabbitmq":
            server = stack.enter_context(RabbitServer(folder / "rabbitmq", erl_args=""))
        for number in range(options.rounds):
            for results in options.results:
                for system in systems:
                    print(f"round {number + 1}: {system}, results {results}", file=sys.stderr, flush=True)
                    figures[results][system].append(run_apart(system, results, options, server, store))
            for name, client in broker_limits.CLIENTS[options.broker].items():
                before = server_cpu(server)
                found = client(broker_url(server), options.tasks)
                found["server_cpu"] = 1e6 * (server_cpu(server) - before) / options.tasks
                limits.setdefault(name, []).append(found)
    report(figures, limits, options)
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "limits": limits}, indent=1))


def broker_url(server: Server) -> str:
    return server.url if isinstance(server, (RedisServer, RabbitServer)) else ""


def server_cpu(server: Server) -> float:
    """CPU seconds: Redis says it itself, to the microsecond."""
    if isinstance(server, RedisServer):
        used = server.command("INFO", "cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])
    return broker_usage.cpu(server.pid)


def run_apart(
    system: str, results: str, options: argparse.Namespace, server: Server, store: RedisServer
) -> dict[str, float]:
    """One system in a process, a folder and an empty database or virtual host of its own."""
    store.command("FLUSHALL")
    arguments = [f"--{name}={getattr(options, name)}" for name in ("tasks", "singles", "trips", "broker")]
    vhost = server.vhost() if isinstance(server, RabbitServer) else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(program(system))
        env = environment(
            system, vhost or store.url_of(0), store.url_of(1) if results == "on" else "", str(folder / "ledger")
        )
        env["BENCH_STORE"] = store.url_of(1)
        env["BENCH_SERVER"] = str(server.pid)
        command = [sys.executable, os.path.abspath(__file__), "--one", system, *arguments]
        done = subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True)
    if isinstance(server, RabbitServer):
        server.delete_vhost(vhost)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


# --- in a process of its own ---------------------------------------------------------------------


class Meter:
    """What has been done so far, and what it has cost."""

    def __init__(self, with_results: bool) -> None:
        self._ledger = Path(os.environ["BENCH_LEDGER"])
        self._with_results = with_results
        self._store = redis.Redis.from_url(os.environ["BENCH_STORE"])
        self._server = int(os.environ["BENCH_SERVER"])
        self._broker_is_redis = os.environ["BENCH_BROKER"].startswith("redis")

    def done(self) -> int:
        """Tasks that have run, and whose results are stored where they are kept."""
        ran = self._ledger.stat().st_size // 8
        return min(ran, self.stored()) if self._with_results and ran else ran

    def stored(self) -> int:
        return int(self._store.dbsize())

    def numbers(self) -> list[int]:
        return [int(line) for line in self._ledger.read_bytes().split()]

    def server_cpu(self) -> float:
        if self._broker_is_redis:
            used = self._store.info("cpu")
            return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])
        return broker_usage.cpu(self._server)

    def commands(self) -> int:
        """Commands that the broker has got (scripts' own included); packets, where it is RabbitMQ."""
        if self._broker_is_redis:
            return int(self._store.info("stats")["total_commands_processed"])
        return _packets(self._server)


def _packets(pid: int) -> int:
    """Segments that the server's established connections have received and sent, as the kernel counts them."""
    listed = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    total = 0
    for head, facts in zip(listed[::2], listed[1::2], strict=False):
        if f"pid={pid}," in head:
            words = dict(word.split(":", 1) for word in facts.split() if ":" in word)
            total += int(words.get("data_segs_in", 0)) + int(words.get("data_segs_out", 0))
    return total


def measure(system: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs in the folder; the figures of one round."""
    sys.path.insert(0, os.getcwd())
    with_results = bool(os.environ["BENCH_RESULTS"])
    sender, meter = Sender(system, __import__("program")), Meter(with_results)
    figures: dict[str, float] = {}
    sender.one_by_one([0])  # connects, declares
    figures["enqueue_one_by_one"] = options.singles / _seconds(lambda: sender.one_by_one(range(1, options.singles + 1)))
    rest = range(options.singles + 1, options.tasks)
    figures["enqueue_in_bulk"] = len(rest) / _seconds(lambda: sender.in_bulk(rest))
    with worker(system) as process:
        figures |= drained(options.tasks, meter, process)
        if sorted(meter.numbers()) != list(range(options.tasks)):
            sys.exit(f"{system}: the ledger does not hold each task once: {len(meter.numbers())} of {options.tasks}")
        figures["memory"] = broker_usage.proportional_memory(process.pid)
        time.sleep(0.5)  # what a worker still does after the last task is not idling
        before = meter.commands()
        time.sleep(IDLE_SECONDS)
        figures["idle"] = (meter.commands() - before - meter._broker_is_redis) / IDLE_SECONDS
        if with_results:
            trips = range(options.tasks, options.tasks + options.trips)
            figures["round_trip_p50"], figures["round_trip_p99"] = sender.round_trips(trips)
    sender.close()
    return figures


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- the table -----------------------------------------------------------------------------------


def report(
    figures: dict[str, dict[str, list[dict[str, float]]]],
    limits: dict[str, list[dict[str, float]]],
    options: argparse.Namespace,
) -> None:
    for results, systems in figures.items():
        print(f"\n{options.broker}, results {results}; {options.tasks} tasks, medians of {options.rounds} rounds")
        middle = {name: _medians(rounds) for name, rounds in systems.items()}
        print(_line("", list(middle)))
        for row, title in ROWS.items():
            if any(row in columns for columns in middle.values()):
                print(_line(title, [columns.get(row, float("nan")) for columns in middle.values()]))
        celery = [columns["drain"] for name, columns in middle.items() if name.startswith("celery")]
        if celery and "umbel" in middle:
            print(f"drain, Umbel to Celery's best: {middle['umbel']['drain'] / max(celery):.1f}")
    print("\nraw limits, messages/s and server CPU in ms per 1,000")
    for name, rounds in limits.items():
        found = _medians(rounds)
        print(
            f"{name:24}publish {found['publish']:9,.0f}  consume {found['consume']:9,.0f}  server {found['server_cpu']:7,.1f}"
        )


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _line(title: str, cells: Sequence[str] | Sequence[float]) -> str:
    shown = [cell if isinstance(cell, str) else f"{cell:,.1f}" if cell < 1000 else f"{cell:,.0f}" for cell in cells]
    return f"{title:52}" + "".join(f"{cell:>14}" for cell in shown)


if __name__ == "__main__":
    main()
