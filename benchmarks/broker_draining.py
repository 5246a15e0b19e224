"""A worker in a process of its own, and how fast it empties a full queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import broker_usage
from broker_systems import worker_command

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from servers.process import spawn  # found by the line above

PATIENCE: Final = 180.0
_LOG: Final = Path("worker.log")


class Meter(Protocol):
    """What has been done so far, and what it has cost the server."""

    def done(self) -> int: ...

    def server_cpu(self) -> float: ...


def spawn_worker(
    system: str, *, log: Path, folder: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start the worker of ``system``; the kernel kills it when this process ends, however that is."""
    return spawn(worker_command(system), log=log, folder=folder, env=env)


@contextmanager
def worker(system: str) -> Iterator[subprocess.Popen[bytes]]:
    """The worker of ``system``, in the present folder, with all that it starts gone at the end."""
    process = spawn_worker(system, log=_LOG, folder=Path.cwd())
    try:
        yield process
    except BaseException:
        print(f"the end of the worker's log:\n{_LOG.read_text()[-2000:]}", file=sys.stderr)
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


def drained(total: int, meter: Meter, process: subprocess.Popen[bytes], *, pause: float = 0.01) -> dict[str, float]:
    """Wait until ``total`` tasks have ended. Rate and CPU are of the time between the first tenth and the last task."""
    deadline = time.monotonic() + PATIENCE
    begun: tuple[float, int, float, float] | None = None
    while time.monotonic() < deadline:
        done = meter.done()
        if begun is None and done > total / 10:
            begun = time.perf_counter(), done, broker_usage.cpu(process.pid), meter.server_cpu()
        if done >= total:
            ended, used, server = time.perf_counter(), broker_usage.cpu(process.pid), meter.server_cpu()
            assert begun is not None, "all tasks were done between two looks; ask for more"
            assert done == total, f"{done} ends of {total} tasks"
            number = total - begun[1]
            return {
                "drain": number / (ended - begun[0]),
                "worker_cpu": 1e6 * (used - begun[2]) / number,
                "broker_cpu": 1e6 * (server - begun[3]) / number,
            }
        if process.poll() is not None:
            sys.exit("the worker has ended")
        time.sleep(pause)
    sys.exit(f"only {meter.done()} of {total} tasks ended in {PATIENCE:.0f} s")
