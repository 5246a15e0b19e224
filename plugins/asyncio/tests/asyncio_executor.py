"""An executor for the tests of the pool, imported by the children."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled
from umbel.ports.interruption import unwrapped


class Executor:
    """Runs the method that the payload names: coroutines on the loop, others in threads."""

    def __init__(self, upcall: Any) -> None:
        self.upcall = upcall
        self.hoard: list[bytearray] = []

    def awaits(self, payload: tuple[Any, ...]) -> bool:
        return asyncio.iscoroutinefunction(getattr(self, payload[0]))

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        return ("ok", getattr(self, payload[0])(*payload[1:]))

    async def aexecute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        try:
            return ("ok", await getattr(self, payload[0])(*payload[1:]))
        except BaseException as error:
            if isinstance(unwrapped(error), SoftTimeLimitExceeded):
                return ("soft",)
            raise

    async def nap(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    async def spin(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "spun"

    def block(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    async def clean_up(self) -> list[str]:
        """What is met, and by whom, when the soft limit passes."""
        met = []

        async def part() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError as error:
                met.append(f"part: {type(error).__name__}")
                raise

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(part())
                await asyncio.sleep(60)
        except* SoftTimeLimitExceeded as group:
            error = group.exceptions[0]
            while isinstance(error, BaseExceptionGroup):  # of Python 3.11's TaskGroup
                error = error.exceptions[0]
            met.append(f"task: {type(error).__module__}.{type(error).__qualname__}")
        async with asyncio.timeout(5):  # it can await again, and is not cancelled any more
            await asyncio.sleep(0.01)
        return met

    async def in_a_group(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            await asyncio.sleep(60)

    async def ignore_cancel(self) -> str:
        try:
            await asyncio.sleep(60)
        except TaskCancelled as error:
            return f"caught {isinstance(error, asyncio.CancelledError)}"
        return "slept"

    async def someone_elses_cancellation(self) -> str:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        try:
            await future
        except asyncio.CancelledError as error:
            return type(error).__qualname__
        return "none"

    async def ask(self, number: int) -> int:
        answer: int = await self.upcall.awaitable("double", number)
        return answer

    async def ask_and_block(self, number: int) -> int:
        answer: int = self.upcall("double", number)
        return answer

    def ask_in_a_thread(self, number: int) -> int:
        answer: int = self.upcall("double", number)
        return answer

    def wait_for_an_answer(self) -> None:
        self.upcall("never", None)

    async def refused(self) -> str:
        try:
            await self.upcall.awaitable("refuse", "too large")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "answered"

    async def exit(self, code: int) -> None:
        os._exit(code)

    async def exit_later(self, code: int) -> None:
        """Die in a callback of the loop, in no job's step."""
        asyncio.get_running_loop().call_later(0.05, os._exit, code)
        await asyncio.sleep(60)

    async def system_exit(self) -> None:
        sys.exit(3)

    async def hog(self, size: int) -> int:
        self.hoard.append(bytearray(os.urandom(1) * size))
        return os.getpid()

    async def fork(self) -> int:
        return os.fork()

    async def unplain(self) -> Any:
        return object()


def make(upcall: Any) -> Executor:
    return Executor(upcall)
