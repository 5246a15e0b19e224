"""The application of the reliability and end-to-end tests.

Each task writes to the ledger, an append-only file, when it starts and when it ends: what really happened, whatever the
broker and the result store believe.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from umbel import Umbel
from umbel.errors import Ignore, Reject, SoftTimeLimitExceeded
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
    def kill_worker() -> None:
        """Kills the worker, and with it its fork server and every child."""
        mark("start")
        os.kill(parent_of(os.getppid()), signal.SIGKILL)
        time.sleep(60)

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


app = define(Umbel("shop"))
