"""The executor that the laws of the pool port have run. Children import it, so it is light."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any, NoReturn, cast

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled
from umbel.worker.own_loop import OwnLoop

LONGEST = 30.0
"""Seconds after which no job runs any more, whatever happens to its law."""


class KitExecutor:
    """Runs the method that the payload names. What interrupts a job passes through, unless the method catches it.

    Methods ``a_…`` are coroutines: awaited where the pool has a loop, else run on a loop of their own thread.
    """

    def __init__(self, upcall: Any) -> None:
        self.upcall = upcall

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        done = getattr(self, payload[0])(*payload[1:])
        if asyncio.iscoroutine(done):
            done = OwnLoop().run(done)
        return cast("tuple[Any, ...]", done)

    def awaits(self, payload: tuple[Any, ...]) -> bool:
        return str(payload[0]).startswith("a_")

    async def aexecute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        done: tuple[Any, ...] = await getattr(self, payload[0])(*payload[1:])
        return done

    def echo(self, value: Any = None) -> tuple[Any, ...]:
        return ("echo", value)

    def where(self) -> tuple[Any, ...]:
        """Process, thread, whether that is the main one, and whether an event loop runs there."""
        try:
            asyncio.get_running_loop()
            loop = True
        except RuntimeError:
            loop = False
        main = threading.current_thread() is threading.main_thread()
        return (os.getpid(), threading.get_ident(), main, loop)

    def count(self, number: int) -> tuple[Any, ...]:
        """Short work with many bytecodes for an interruption to land in."""
        total = 0
        for n in range(number):
            total += n
        return ("counted", total)

    def wait(self, gate: str) -> tuple[Any, ...]:
        """Say that it runs, and go on until the gate is open."""
        self.upcall("started", gate)
        end = time.monotonic() + LONGEST
        while not self.upcall("open?", gate) and time.monotonic() < end:
            time.sleep(0.002)
        return ("waited", gate)

    def soft(self, gate: str) -> tuple[Any, ...]:
        """As ``wait``, and tell of the soft time limit."""
        try:
            return self.wait(gate)
        except SoftTimeLimitExceeded:
            return ("soft limit", gate)

    def stubborn(self, gate: str) -> tuple[Any, ...]:
        """As ``wait``, whatever may interrupt it."""
        while True:
            try:
                return self.wait(gate)
            except (SoftTimeLimitExceeded, TaskCancelled):
                pass  # it will not listen

    def ask(self, verb: str, value: Any) -> tuple[Any, ...]:
        """An upcall, or its error."""
        try:
            return ("answer", self.upcall(verb, value))
        except Exception as error:
            return ("refused", type(error).__name__, str(error))

    async def a_echo(self, value: Any = None) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        return ("echo", value)

    async def a_ask(self, verb: str, value: Any) -> tuple[Any, ...]:
        ask = getattr(self.upcall, "awaitable", None)
        try:
            return ("answer", await ask(verb, value) if ask else self.upcall(verb, value))
        except Exception as error:
            return ("refused", type(error).__name__, str(error))

    async def a_wait(self, gate: str) -> tuple[Any, ...]:
        """As ``wait``."""
        await self.a_ask("started", gate)
        end = time.monotonic() + LONGEST
        while not (await self.a_ask("open?", gate))[1] and time.monotonic() < end:  # noqa: ASYNC110  # its gate is elsewhere
            await asyncio.sleep(0.002)
        return ("waited", gate)

    async def a_crash(self) -> NoReturn:
        self.crash()

    def exit(self, code: int) -> tuple[Any, ...]:
        raise SystemExit(code)

    def interrupt(self) -> tuple[Any, ...]:
        raise KeyboardInterrupt

    def crash(self) -> NoReturn:
        """Die as by a segmentation fault. Only where the pool is isolated."""
        os.abort()


def make(upcall: Any) -> KitExecutor:
    return KitExecutor(upcall)


def make_broken(upcall: Any) -> KitExecutor:
    raise RuntimeError("no such module of the application")


def make_exiting(upcall: Any) -> KitExecutor:
    raise SystemExit("bad application")
