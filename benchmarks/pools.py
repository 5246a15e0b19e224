"""What a job costs in each pool, without broker and store: jobs per second, and CPU of the worker and of its children.

    python benchmarks/pools.py [--jobs 50000] [--pools prefork asyncio threads …] [--rounds 3]

Two kinds of work: ``nothing``, which shows what the pool itself costs, and ``wait``, a sleep of 10 ms, which shows what
many slots are good for. Every pool has two processes where it has any; the slots are in the table. Each job must end once.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from umbel.errors import PluginNotFound
from umbel.model import Completion, Ending, Job
from umbel.plugins.kinds import POOL
from umbel.plugins.loader import load_driver
from umbel.ports.pool import ExecutorFactory, Pool, PoolContext

SLOTS: Final[Mapping[str, int]] = {
    "prefork": 2,
    "asyncio": 1000,
    "gevent": 1000,
    "eventlet": 1000,
    "threads": 20,
    "solo": 1,
}
MESSAGE: Final = (
    "default",
    {"lang": "py", "task": "shop.work", "id": "0" * 36, "retries": 0, "timelimit": [None, None], "argsrepr": "(1, 2)"},
    b"[[1, 2], {}, {}]",
    "application/json",
    "utf-8",
)
"""About as much as a message brings."""


class Executor:
    """What the children run."""

    def awaits(self, payload: tuple[Any, ...]) -> bool:
        return bool(payload[0] == "a_wait" or payload[0] == "a_nothing")

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        if payload[0] == "wait":
            time.sleep(payload[2])
        return ("done", payload[1][1]["id"])

    async def aexecute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        if payload[0] == "a_wait":
            await asyncio.sleep(payload[2])
        return ("done", payload[1][1]["id"])


def make(upcall: Any) -> Executor:
    """The executor factory."""
    return Executor()


def cpu(pids: Sequence[int]) -> float:
    """Seconds of CPU that these processes have had."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def answer(verb: str, payload: Any) -> Any:
    raise AssertionError(verb)


async def measure(pool: Pool, payload: tuple[Any, ...], jobs: int) -> tuple[float, float, float]:
    """Jobs per second; CPU in µs a job, of this process and of the children."""
    ended: set[int] = set()
    handed, begun = 0, False
    over = asyncio.Event()

    def feed() -> None:
        nonlocal handed
        room = min(pool.free, jobs - handed)
        if begun and room > 0:
            pool.submit([Job(id=handed + n, task="shop.work", payload=payload) for n in range(1, room + 1)])
            handed += room

    def note(batch: Sequence[Completion]) -> None:
        for end in batch:
            assert end.ending is Ending.DONE, end
            assert end.job_id not in ended, "ended twice"
            ended.add(end.job_id)

    async def read() -> None:
        async for batch in pool.completions():
            note(batch)
            feed()
            if len(ended) >= jobs:
                over.set()

    reading = asyncio.create_task(read())
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    factory = ExecutorFactory(target="pools:make", arguments={})
    await pool.start(PoolContext(factory=factory, concurrency=SLOTS[pool.name], upcall=answer))
    await asyncio.sleep(0.5)  # all children are ready
    children = [pid for pid in pool.stats()["processes"] if pid != os.getpid()]
    before, own, began = cpu(children), time.process_time(), time.perf_counter()
    begun = True
    feed()
    await over.wait()
    seconds, own, theirs = time.perf_counter() - began, time.process_time() - own, cpu(children) - before
    await pool.stop(timeout=5)
    await reading
    return jobs / seconds, own / jobs * 1e6, theirs / jobs * 1e6


def run(name: str, payload: tuple[Any, ...], jobs: int) -> tuple[float, float, float]:
    """One round, on a loop beside the main thread, which one pool wants for itself."""
    driver, _ = load_driver(POOL, name)
    options = driver.Options(processes=2) if "processes" in attrs.fields_dict(driver.Options) else None
    pool: Pool = driver(options=options)
    found: list[tuple[float, float, float]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(measure(pool, payload, jobs))))
    thread.start()
    if pool.capabilities.main_thread:
        pool.run_main_thread()
    thread.join()
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50_000, help="of nothing; of waits a tenth, and fewer in few slots")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pools", nargs="+", default=list(SLOTS), choices=list(SLOTS))
    chosen = parser.parse_args()
    print("| pool | slots | work | jobs/s | CPU of the worker, µs a job | of its children |\n|---|---|---|---|---|---|")
    for name in chosen.pools:
        try:
            load_driver(POOL, name)
        except PluginNotFound as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        prefix = "a_" if name == "asyncio" else ""
        for work, count in (("nothing", chosen.jobs), ("wait", min(chosen.jobs // 10, 100 * SLOTS[name]))):
            rounds = [run(name, (prefix + work, MESSAGE, 0.01), count) for _ in range(chosen.rounds)]
            rate, own, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"| {name} | {SLOTS[name]} | {work} | {rate:,.0f} | {own:.1f} | {theirs:.1f} |", flush=True)


if __name__ == "__main__":
    importlib.import_module("pools")  # the children's name for this file
    main()
