"""One worker on RabbitMQ beside what the server itself can deliver: the same messages from the same queue, in turn, in one run.

    python benchmarks/rabbitmq.py [--messages 40000] [--rounds 2] [--pools prefork:2 solo:1] [--queues quorum classic]

Starts a server of its own. The limits come first, by a bare socket that reads frames and nothing in them, acknowledges many at
once, and shares the two or more cores with the server alone: messages of 200 bytes, persistent and not, published under
confirms, one by one and many at once, and a full queue consumed. Then a queue full of Umbel's messages of an empty task is
drained, by the bare socket and by one worker with each of the pools; results off, acknowledged after the task. Every message
is counted: the socket counts bodies, the task marks its number in memory that all processes share, and each number must be
marked once. Rates and CPU of a worker are of the time between the first tenth and the last task.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import broker_usage
from broker_draining import drained, worker  # lets the servers' modules be found, too
from raw_amqp import RawClient
from servers.rabbitmq import RabbitServer

SIZE: Final = 200
PREFETCHES: Final = (500, 2000)
SINGLES: Final = 500
ARGUMENTS: Final[Mapping[str, Mapping[str, str]]] = {"quorum": {"x-queue-type": "quorum"}, "classic": {}}
PROGRAM: Final = """
import mmap, os
from umbel import Umbel
marks = mmap.mmap(os.open(os.environ["BENCH_MARKS"], os.O_RDWR), 0)
pool, _, slots = os.environ["BENCH_POOL"].partition(":")
app = Umbel("bench", broker=os.environ["BENCH_BROKER"], results="disabled", settings={
    "worker.pool": pool, "worker.concurrency": int(slots or 1), "worker.log_level": "WARNING",
    "queues.default.type": os.environ["BENCH_QUEUE"],
})
@app.task
def mark(i: int) -> None:
    marks[i] += 1
"""
SENDING: Final = """
from program import mark
for at in range(0, {0}, 1000):
    mark.map_delay((i,) for i in range(at, at + 1000))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=40_000, help="messages a run, by thousands (default: 40,000)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds (default: 2)")
    parser.add_argument("--queues", nargs="+", choices=ARGUMENTS, default=list(ARGUMENTS))
    parser.add_argument(
        "--pools", nargs="*", default=["prefork:2", "prefork:1", "threads:1", "solo:1"], help="pools, and their slots"
    )
    parser.add_argument("--no-limits", action="store_true", help="leave out messages of 200 bytes")
    parser.add_argument("--json", type=Path, help="write every round's figures to this file too")
    parser.add_argument("--drain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.messages -= options.messages % 1000
    if options.drain:
        print(json.dumps(drain_by_worker(options.messages)))
        return
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, RabbitServer(Path(folder) / "rabbitmq", erl_args="") as server:
        for number in range(options.rounds):
            for queue in options.queues:
                for row, measure in rows(queue, options, server).items():
                    print(f"round {number + 1}: {row}", file=sys.stderr, flush=True)
                    figures.setdefault(row, []).append(measure())
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def rows(queue: str, options: argparse.Namespace, server: RabbitServer) -> dict[str, Callable[[], dict[str, float]]]:
    """What is measured on queues of one type, by its title."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    if not options.no_limits:
        for persistent in (True, False):
            kind = f"{queue}, {'persistent' if persistent else 'transient'}"
            found[f"{kind}: published one by one"] = partial(singly, queue, persistent, server)
            found[f"{kind}: published"] = partial(published, queue, persistent, options, server)
            for prefetch in PREFETCHES:
                found[f"{kind}: consumed, prefetch {prefetch}"] = partial(
                    consumed, queue, persistent, prefetch, options, server
                )
    found[f"{queue}: tasks, bare socket"] = partial(drained_by, "", queue, options, server)
    for pool in options.pools:
        found[f"{queue}: tasks, worker with {pool}"] = partial(drained_by, pool, queue, options, server)
    return found


# --- the server alone ----------------------------------------------------------------------------


def singly(queue: str, persistent: bool, server: RabbitServer) -> dict[str, float]:
    with RawClient(server.url) as client:
        client.declare("limit", ARGUMENTS[queue])
        client.confirm()
        before = broker_usage.cpu(server.pid)
        taken = client.publish_singly("limit", SINGLES, size=SIZE, persistent=persistent)
        used = broker_usage.cpu(server.pid) - before
        client.delete("limit")
    return {"rate": SINGLES / sum(taken), "server": 1e6 * used / SINGLES, "p50": 1000 * statistics.median(taken)}


def published(queue: str, persistent: bool, options: argparse.Namespace, server: RabbitServer) -> dict[str, float]:
    with RawClient(server.url) as client:
        client.declare("limit", ARGUMENTS[queue])
        client.confirm()
        before = broker_usage.cpu(server.pid)
        seconds = client.publish("limit", options.messages, size=SIZE, persistent=persistent)
        used = broker_usage.cpu(server.pid) - before
        client.delete("limit")
    return {"rate": options.messages / seconds, "server": 1e6 * used / options.messages}


def consumed(
    queue: str, persistent: bool, prefetch: int, options: argparse.Namespace, server: RabbitServer
) -> dict[str, float]:
    with RawClient(server.url) as client:
        client.declare("limit", ARGUMENTS[queue])
        client.confirm()
        client.publish("limit", options.messages, size=SIZE, persistent=persistent)
        time.sleep(0.5)
        figures = _consumed(client, "limit", prefetch, options.messages, server)
        client.delete("limit")
    return figures


def _consumed(client: RawClient, queue: str, prefetch: int, number: int, server: RabbitServer) -> dict[str, float]:
    before, own = broker_usage.cpu(server.pid), time.process_time()
    seconds = client.consume(queue, number, prefetch=prefetch)
    used, own = broker_usage.cpu(server.pid) - before, time.process_time() - own
    return {"rate": number / seconds, "server": 1e6 * used / number, "client": 1e6 * own / number}


# --- tasks ---------------------------------------------------------------------------------------


def drained_by(pool: str, queue: str, options: argparse.Namespace, server: RabbitServer) -> dict[str, float]:
    """A queue full of tasks, drained by one worker with ``pool``, or by a bare socket."""
    vhost = server.vhost()
    with ExitStack() as stack:
        stack.callback(server.delete_vhost, vhost)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "program.py").write_text(PROGRAM)
        (folder / "marks").write_bytes(bytes(options.messages))
        env = {
            **os.environ,
            "BENCH_MARKS": str(folder / "marks"),
            "BENCH_BROKER": vhost,
            "BENCH_POOL": pool or "solo:1",
            "BENCH_QUEUE": queue,
            "BENCH_SERVER": str(server.pid),
        }
        subprocess.run([sys.executable, "-c", SENDING.format(options.messages)], cwd=folder, env=env, check=True)
        time.sleep(0.5)
        if not pool:
            with RawClient(vhost) as client:
                return _consumed(client, "default", PREFETCHES[-1], options.messages, server)
        command = [sys.executable, os.path.abspath(__file__), "--drain", "--messages", str(options.messages)]
        done = subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


class Marks:
    """What the tasks have marked, and what the server has used."""

    def __init__(self, path: str, server: int) -> None:
        with open(path, "r+b") as file:
            self._marks = mmap.mmap(file.fileno(), 0)
        self._server = server

    def done(self) -> int:
        return len(self._marks) - self._marks[:].count(0)

    def once(self) -> bool:
        return self._marks[:].count(1) == len(self._marks)

    def server_cpu(self) -> float:
        return broker_usage.cpu(self._server)


def drain_by_worker(number: int) -> dict[str, float]:
    """In a process and a folder of its own."""
    marks = Marks(os.environ["BENCH_MARKS"], int(os.environ["BENCH_SERVER"]))
    with worker("umbel") as process:
        found = drained(number, marks, process)
    if not marks.once():
        sys.exit("a task has run more than once")
    return {"rate": found["drain"], "server": found["broker_cpu"], "client": found["worker_cpu"]}


# --- the table -----------------------------------------------------------------------------------


def report(figures: dict[str, list[dict[str, float]]]) -> None:
    print("| | messages/s | server, µs CPU a message | client or worker, µs CPU | p50, ms |\n|---|---|---|---|---|")
    for row, rounds in figures.items():
        cells = [_median(rounds, name) for name in ("rate", "server", "client", "p50")]
        shown = ["" if cell is None else f"{cell:,.0f}" if cell >= 100 else f"{cell:.1f}" for cell in cells]
        print(f"| {row} | {' | '.join(shown)} |")


def _median(rounds: list[dict[str, Any]], name: str) -> float | None:
    return statistics.median(one[name] for one in rounds) if name in rounds[0] else None


if __name__ == "__main__":
    main()
