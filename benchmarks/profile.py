"""Where the time of a task goes: CPU by process and by command of the server, then the functions of worker and child.

    python benchmarks/profile.py [--broker redis] [--tasks 20000] [--results on] [--top 25] [--lines] [--keep FOLDER]

Starts a server of its own (results are kept in Redis, whatever the broker), fills the queue and drains it twice: the first time
nobody looks but at the counters of the processes, the second time ``py-spy`` (from PyPI; without it there is no second time)
takes samples of the worker's I/O process and of one child. ``self`` is time in the function itself, ``with`` what it calls too.
On a machine that others use compare runs in turn, by their least figures; a sampled function shows what it costs there, with
cold caches, which is twice what a loop in isolation says.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import broker_usage
from broker_draining import spawn_worker  # lets the servers' modules be found, too
from broker_systems import environment, program
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer

PATIENCE: Final = 120.0
SENDING: Final = """
from program import noop
for at in range(0, {0}, 1000):
    noop.map_delay((i,) for i in range(at, min({0}, at + 1000)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks to drain (default: 20,000)")
    parser.add_argument("--results", choices=("on", "off"), default="on")
    parser.add_argument("--top", type=int, default=25, help="functions to show (default: 25)")
    parser.add_argument("--lines", action="store_true", help="tell lines apart, not only functions")
    parser.add_argument("--keep", type=Path, help="put the samples there, in py-spy's raw form")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(RedisServer(folder / "redis", "appendonly no"))
        rabbit = RabbitServer(folder / "rabbitmq", erl_args="") if options.broker == "rabbitmq" else None
        if rabbit is not None:
            stack.enter_context(rabbit)
        (folder / "program.py").write_text(program("umbel"))
        costs(Drain(folder, store, rabbit, options))
        if shutil.which("py-spy") is None:
            sys.exit("no functions: py-spy is not on the PATH (pip install py-spy)")
        options.tasks *= 2  # the first part of them passes before the samples begin
        samples(Drain(folder, store, rabbit, options), options)


class Drain:
    """A full queue, and a worker that empties it."""

    def __init__(
        self, folder: Path, store: RedisServer, rabbit: RabbitServer | None, options: argparse.Namespace
    ) -> None:
        self.folder, self.store, self.rabbit, self.tasks = folder, store, rabbit, options.tasks
        self.results = options.results == "on"
        self.ledger = folder / f"ledger-{options.tasks}"
        store.command("FLUSHALL")
        broker = store.url_of(0) if rabbit is None else rabbit.url
        self.env = environment("umbel", broker, store.url_of(1) if self.results else "", str(self.ledger))
        subprocess.run([sys.executable, "-c", SENDING.format(self.tasks)], cwd=folder, env=self.env, check=True)
        store.command("CONFIG", "RESETSTAT")
        self.log = folder / "worker.log"
        self.worker = spawn_worker("umbel", log=self.log, folder=folder, env=self.env)

    def wait_for(self, number: int) -> int:
        """Wait until so many have run, and their results are stored; how many have by then."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.worker.poll() is None:
            ran = self.ledger.stat().st_size // 8 if self.ledger.exists() else 0
            stored = int(self.store.command("DBSIZE", database=1)) if self.results else ran
            if (done := min(ran, stored)) >= number:
                return done
            time.sleep(0.01)
        sys.exit(f"the worker does not get on; the end of its log:\n{self.log.read_text()[-2000:]}")

    def server_cpu(self) -> float:
        """Of Redis, and of RabbitMQ where that is the broker."""
        used: Any = self.store.command("INFO", "cpu")
        rabbit = 0.0 if self.rabbit is None else broker_usage.cpu(self.rabbit.pid)
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"]) + rabbit

    def stop(self) -> None:
        self.worker.terminate()
        self.worker.wait(PATIENCE)


def costs(drain: Drain) -> None:
    """CPU by process, between the first tenth and the last task."""
    begun = drain.wait_for(drain.tasks // 10)
    started, before, server = time.perf_counter(), broker_usage.cpu_by_process(drain.worker.pid), drain.server_cpu()
    drain.wait_for(drain.tasks)
    seconds, after = time.perf_counter() - started, broker_usage.cpu_by_process(drain.worker.pid)
    server = drain.server_cpu() - server
    number = drain.tasks - begun
    used = {pid: 1e6 * (cpu - before.get(pid, 0.0)) / number for pid, cpu in after.items()}
    children = sorted((value for pid, value in used.items() if pid != drain.worker.pid and value > 1), reverse=True)
    print(f"{number / seconds:,.0f} tasks/s; CPU in µs a task:")
    print(f"{used[drain.worker.pid]:8.1f}  the worker's I/O process")
    print(f"{sum(children):8.1f}  its children ({' + '.join(f'{one:.1f}' for one in children)})")
    print(f"{1e6 * server / number:8.1f}  the server")
    print(f"{sum(used.values()) + 1e6 * server / number:8.1f}  together")
    told: Any = drain.store.command("INFO", "commandstats")
    if told:
        print("\ncommands of Redis, those that scripts call included: calls, µs a task")
    for name, found in sorted(told.items(), key=lambda one: -one[1]["usec"])[:12]:
        print(f"{found['calls']:10,}  {found['usec'] / drain.tasks:6.2f}  {name.removeprefix('cmdstat_')}")
    drain.stop()


def samples(drain: Drain, options: argparse.Namespace) -> None:
    """The functions of worker and child, while the second part of the queue is drained."""
    drain.wait_for(drain.tasks // 10)
    before = broker_usage.cpu_by_process(drain.worker.pid)
    drain.wait_for(drain.tasks // 5)
    used = {pid: cpu - before.get(pid, 0.0) for pid, cpu in broker_usage.cpu_by_process(drain.worker.pid).items()}
    used.pop(drain.worker.pid)
    child = max(used, key=lambda pid: used[pid])  # the fork server has had its work before
    recorders = []
    folder = drain.folder if options.keep is None else options.keep
    folder.mkdir(parents=True, exist_ok=True)
    for name, pid, rate in (("worker", drain.worker.pid, 500), ("child", child, 250)):
        command = ["py-spy", "record", "-d", "60", "-r", str(rate), "-f", "raw", "-o", str(folder / f"{name}.raw")]
        recorders.append(
            subprocess.Popen([*command, "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    drain.wait_for(drain.tasks)
    for recorder in recorders:
        recorder.send_signal(signal.SIGINT)  # it writes what it has
    for recorder in recorders:
        recorder.wait(PATIENCE)
    drain.stop()
    for name in ("worker", "child"):
        show(name, (folder / f"{name}.raw").read_text(), options)


def show(name: str, raw: str, options: argparse.Namespace) -> None:
    """A table of ``raw``, which has a stack and its number of samples a line."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, number = line.rpartition(" ")
        frames = [frame if options.lines else re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        if not stack or frames[-1].startswith("Condition.wait"):  # threads that have nothing to do
            continue
        own[frames[-1]] += int(number)
        for frame in set(frames):
            whole[frame] += int(number)
    total = sum(own.values())
    print(f"\n{name}: {total} samples\n{'self':>6} {'with':>6}")
    for frame, samples_of in own.most_common(options.top):
        print(f"{100 * samples_of / total:6.1f} {100 * whole[frame] / total:6.1f}  {frame}")


if __name__ == "__main__":
    main()
