"""The application of the reliability and end-to-end tests.

Each task writes to the ledger, an append-only file, when it starts and when it ends: what really happened, whatever the
broker and the result store believe.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from umbel import Umbel
from umbel.errors import Ignore, Reject, SoftTimeLimitExceeded, TaskCancelled
from umbel.task import current_request


def mark(what: str, value: object = None) -> None:
    """One line in the ledger, in one write: lines of several processes never mix."""
    request = current_request()
    assert request is not None
    line = json.dumps(
        {
            "what": what,
            "id": request.id,
            "task": request.task.name,
            "attempt": request.delivery_count,
            "retries": request.retries,
            "worker": request.hostname,
            "pid": os.getpid(),
            "at": time.time(),
            "value": value,
        },
        default=repr,
    )
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(ledger, line.encode() + b"\n")
    os.close(ledger)


class Unheard(BaseException):
    """An exception that `except Exception` does not see."""


def _leave() -> object:
    raise SystemExit(3)


def _run_out_of_memory() -> object:
    """Takes what its process may still have, which is little."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), before[1]))
    taken = []
    try:
        while True:
            taken.append(bytearray(1 << 20))
    finally:
        taken.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


def _recurse() -> object:
    return _recurse()


def _hang() -> object:
    while True:
        time.sleep(60)


def _hang_deaf() -> object:
    """Hears nothing: every signal that can be blocked is."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return _hang()


def _fork() -> object:
    """Leaves a process behind that the task has not waited for."""
    if os.fork() == 0:
        os._exit(0)
    return "forked"


def _fork_and_return() -> object:
    """The forked process returns from the task as well, as a careless one does."""
    return "the child" if os.fork() == 0 else "the parent"


def _close_everything() -> object:
    """Takes its own process's connection to the worker away."""
    os.closerange(3, 256)
    return "closed"


WAYS_TO_PERISH: Mapping[str, Callable[[], object]] = {
    "raises": lambda: 1 // 0,
    "raises SystemExit": _leave,
    "runs out of memory": _run_out_of_memory,
    "recurses": _recurse,
    "returns what cannot be stored": object,
    "exits": lambda: os._exit(7),
    "kills itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "aborts": os.abort,
    "segfaults": lambda: ctypes.string_at(0),
    "hangs": _hang,
    "hangs deaf": _hang_deaf,
    "forks": _fork,
    "returns twice": _fork_and_return,
    "closes everything": _close_everything,
}
"""Every way in which a task can end badly; those that hang need a time limit."""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def define(app: Umbel) -> Umbel:
    """Give ``app`` the tasks of the shop."""

    def task(**options: Any) -> Any:
        return lambda function: app.task(name=f"shop.{function.__name__}", **options)(function)

    @task()
    def add(x: Any, y: Any) -> Any:
        mark("start")
        return x + y

    @task()
    def note(value: Any = None, seconds: float = 0.0) -> Any:
        mark("start", value)
        time.sleep(seconds)
        mark("end", value)
        return value

    @task()
    def quick() -> None:
        """So quick that a worker which has run many of it reserves many tasks."""

    @task()
    def whoami(seconds: float = 0.0) -> int:
        mark("start")
        time.sleep(seconds)
        mark("end")
        return os.getpid()

    @task()
    def spin(seconds: float) -> None:
        mark("start")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        mark("end")

    @task()
    async def spin_async(seconds: float) -> None:
        mark("start")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        mark("end")

    @task()
    def gated(gate: str, value: Any = None) -> Any:
        """Runs until the file ``gate`` is there."""
        mark("start", value)
        while not os.path.exists(gate):
            time.sleep(0.01)
        mark("end", value)
        return value

    # --- ends of every kind ---

    @task()
    def fail(text: str) -> None:
        mark("start")
        raise ValueError(text)

    @task()
    def raise_unheard(text: str) -> None:
        mark("start")
        raise Unheard(text)

    @task()
    def leave(code: int) -> None:
        mark("start")
        raise SystemExit(code)

    @task()
    def die(how: str) -> None:
        mark("start", how)
        if how == "exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.string_at(0)

    @task()
    def perish(how: str) -> object:
        """Ends in one of ``WAYS_TO_PERISH``."""
        mark("start", how)
        return WAYS_TO_PERISH[how]()

    @task()
    def perish_once(flag: str, how: str) -> object:
        """Perishes the first time, and leaves the file ``flag`` behind."""
        mark("start", how)
        if not os.path.exists(flag):
            Path(flag).touch()
            return WAYS_TO_PERISH[how]()
        mark("end", how)
        return how

    @task()
    def breed(broods: int, size: int, seconds: float) -> int:
        """A fork bomb that ends: each of ``broods`` processes has ``size`` of its own, and all live for ``seconds``."""
        mark("start")
        for _ in range(broods):
            if os.fork() == 0:
                for _ in range(size):
                    if os.fork() == 0:
                        break
                time.sleep(seconds)
                os._exit(0)
        mark("end")
        return broods * (size + 1)

    @task()
    def fork_with_a_lock() -> int:
        """Forks while another thread holds the lock of every log handler, and the forked process logs."""
        mark("start")
        held, over = threading.Event(), threading.Event()
        locks = [handler.lock for handler in logging.getLogger().handlers if handler.lock is not None]

        def hold() -> None:
            with ExitStack() as stack:
                for lock in locks:
                    stack.enter_context(lock)
                held.set()
                over.wait(0.05)

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(5)
        pid = os.fork()
        if pid == 0:
            logging.getLogger("shop").warning("a forked process logs, though the lock was held before its birth")
            os._exit(0)
        over.set()
        holder.join()
        _, status = os.waitpid(pid, 0)
        mark("end")
        return os.waitstatus_to_exitcode(status)

    @task()
    def kill_worker() -> None:
        """Kills the worker, and with it its fork server and every child."""
        mark("start")
        os.kill(parent_of(os.getppid()), signal.SIGKILL)
        time.sleep(60)

    @task()
    def leave_orphan(seconds: float) -> None:
        """Leaves a program behind that runs on for so long."""
        mark("start")
        subprocess.run(["sh", "-c", f"sleep {seconds} & :"], check=True)

    @task()
    def die_once(flag: str, gate: str | None = None) -> None:
        """Kills its child the first time; later runs until the file ``gate`` is there."""
        mark("start")
        if not os.path.exists(flag):
            Path(flag).touch()
            os._exit(1)
        while gate and not os.path.exists(gate):
            time.sleep(0.01)
        mark("end")

    @task(ack="early")
    def early(value: Any = None, seconds: float = 0.0) -> Any:
        mark("start", value)
        time.sleep(seconds)
        mark("end", value)
        return value

    @task(ack="early")
    def die_early() -> None:
        mark("start")
        os._exit(1)

    @task()
    def ignore() -> None:
        mark("start")
        raise Ignore

    @task()
    def reject(reason: str) -> None:
        mark("start")
        raise Reject(reason)

    @task()
    def requeue_until(gate: str) -> str:
        mark("start")
        if not os.path.exists(gate):
            raise Reject("not now", requeue=True)
        return "now"

    @task()
    def unspeakable() -> object:
        mark("start")
        return object()

    # --- cancelled while they run ---

    @task()
    def polite() -> None:
        mark("start")
        try:
            for _ in range(6000):
                time.sleep(0.01)
        except TaskCancelled:
            mark("cancelled")
            raise

    @task()
    async def polite_async() -> None:
        mark("start")
        try:
            for _ in range(6000):
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            mark("cancelled")
            raise

    @task()
    def stubborn(gate: str) -> str:
        """Nothing that is raised in it ends it."""
        mark("start")
        while not os.path.exists(gate):
            try:
                time.sleep(0.01)
            except TaskCancelled:
                mark("heard")
        mark("end")
        return "opened"

    @task(bind=True, cancel="flag")
    def watchful(self: Any) -> str:
        mark("start")
        while not self.request.cancelled():
            time.sleep(0.01)
        mark("end")
        return "stopped"

    @task()
    def cancel_other(task_id: str) -> bool:
        """Cancels another task, from a worker's child."""
        return app.result(task_id).cancel()

    # --- retries ---

    @task(bind=True, max_retries=5)
    def flaky(self: Any, failures: int, countdown: float = 0.05) -> int:
        mark("start")
        if self.request.retries < failures:
            raise self.retry(countdown=countdown)
        return int(self.request.retries)

    @task(autoretry_for=(ConnectionError,), retry_backoff=0.02, max_retries=2)
    def unreachable() -> None:
        mark("start")
        raise ConnectionError("nobody answers")

    # --- options ---

    @task(ignore_result=True)
    def silent() -> str:
        mark("start")
        return "unsaid"

    @task(track_started=True)
    def tracked(gate: str) -> str:
        mark("start")
        while not os.path.exists(gate):
            time.sleep(0.01)
        return "done"

    def nap(seconds: float) -> str:
        try:
            for _ in range(int(seconds / 0.01)):
                time.sleep(0.01)
        except SoftTimeLimitExceeded:
            return "interrupted"
        return "slept"

    @task(soft_time_limit=0.3)
    def soft(seconds: float) -> str:
        mark("start")
        return nap(seconds)

    @task()
    def unlimited(seconds: float) -> str:
        mark("start")
        return nap(seconds)

    @task(rate_limit="10/s")
    def rated(value: int) -> int:
        mark("start", value)
        return value

    @task(bind=True)
    def progress(self: Any, gate: str) -> str:
        mark("start")
        self.update_state("PROGRESS", {"done": 3, "of": 10})
        while not os.path.exists(gate):
            time.sleep(0.01)
        return "all"

    @task(bind=True)
    def tell_headers(self: Any) -> Any:
        return dict(self.request.headers)

    @task(typed=True)
    def next_day(day: datetime) -> datetime:
        return day.replace(day=day.day + 1)

    # --- tasks that send tasks ---

    @task()
    def send_notes(number: int) -> list[str]:
        mark("start")
        return [note.delay(n).id for n in range(number)]

    @task()
    def ask_for_sum(x: int, y: int) -> Any:
        mark("start")
        return add.delay(x, y).get(timeout=20)

    @task()
    async def async_sum(x: int, y: int) -> Any:
        mark("start")
        await asyncio.sleep(0.01)
        return await (await add.adelay(x, y)).aget(timeout=20)

    @task()
    async def async_sleep(seconds: float, value: Any = None) -> Any:
        mark("start")
        await asyncio.sleep(seconds)
        mark("end")
        return value

    if "NEWCOMER" in os.environ:  # a task that only the newer of two releases knows

        @task()
        def newcomer() -> str:
            mark("start")
            return "known here"

    @task()
    def errback(task_id: str) -> None:
        mark("errback", task_id)

    return app


class SteppedClock:
    """The machine's clock, stepped by as many seconds as a file says, read at most ten times a second."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        self._step, self._read = 0.0, float("-inf")

    def time(self) -> float:
        if (now := time.monotonic()) - self._read > 0.1:
            self._step, self._read = float(self._file.read_text() or 0), now
        return time.time() + self._step


app = define(Umbel("shop", clock=SteppedClock(os.environ["SHOP_CLOCK"]) if "SHOP_CLOCK" in os.environ else None))
