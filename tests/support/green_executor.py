"""What children of greenlets run in the tests of their runners."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import Any

from umbel.errors import SoftTimeLimitExceeded


class GreenExecutor:
    """Runs the method that the payload names."""

    def __init__(self, upcall: Any) -> None:
        self.upcall = upcall

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        return "ok", getattr(self, payload[0])(*payload[1:])

    def awaits(self, payload: tuple[Any, ...]) -> bool:
        return asyncio.iscoroutinefunction(getattr(self, payload[0]))

    async def aexecute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        return "ok", await getattr(self, payload[0])(*payload[1:])

    def nap(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def soft(self, number: int) -> list[Any]:
        try:
            time.sleep(30)
        except SoftTimeLimitExceeded:
            return [number, "soft limit"]
        return [number, "slept"]

    def own_subprocess(self) -> list[Any]:
        return asyncio.run(self.a_subprocess())

    async def a_subprocess(self) -> list[Any]:
        """What a program has written, and its exit status, by way of the event loop."""
        program = await asyncio.create_subprocess_exec(
            "sh", "-c", "sleep 0.2; echo done; exit 3", stdout=asyncio.subprocess.PIPE
        )
        written, _ = await asyncio.wait_for(program.communicate(), 10)
        return [written.decode().strip(), program.returncode]

    def own_loop(self, seconds: float) -> str:
        return asyncio.run(asyncio.sleep(seconds, "own loop"))

    def from_real_thread(self, library: str, number: int) -> Any:
        """An upcall from a thread of the operating system, of which the library has a pool."""
        if library == "gevent":
            import gevent

            return gevent.get_hub().threadpool.apply(self.upcall, ("double", number))
        from eventlet import tpool

        return tpool.execute(self.upcall, "double", number)

    def beside(self, library: str) -> str:
        """A greenlet of the task's own that fails harms nobody; one that the task waits for is its own affair."""
        if library == "gevent":
            import gevent

            gevent.spawn(self.fail)
            return str(gevent.spawn(self.upcall, "double", 4).get())
        from eventlet import greenthread

        greenthread.spawn(self.fail)
        return str(greenthread.spawn(self.upcall, "double", 4).wait())

    def fail(self) -> None:
        raise ValueError("a greenlet beside")

    def crash(self) -> None:
        os.abort()

    def kept(self) -> list[int]:
        """What the runner of this child remembers of jobs, switches and upcalls; this job is one of the first."""
        from umbel_children.greenlets import Greenlets

        (runner,) = [one for one in gc.get_objects() if isinstance(one, Greenlets)]
        return [len(runner._entries), len(runner._aside), len(runner._calls)]


def make(upcall: Any) -> GreenExecutor:
    return GreenExecutor(upcall)
