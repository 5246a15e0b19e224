"""An executor of a few verbs, for a pool without children: tests share the registries below with it."""

from __future__ import annotations

import threading
import time
from typing import Any

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled

gates: dict[str, threading.Event] = {}
seen: list[Any] = []
made: list[str] = []


def make(upcall: Any, *, fail: str = "", hold: str = "") -> Executor:
    made.append(threading.current_thread().name)
    if hold:
        gates[hold].wait(10)
    if fail:
        raise SystemExit(fail)
    return Executor(upcall)


class Executor:
    def __init__(self, upcall: Any) -> None:
        self.upcall = upcall

    def execute(self, payload: tuple[Any, ...]) -> Any:
        return getattr(self, payload[0])(*payload[1:])

    def echo(self, value: Any) -> tuple[Any, ...]:
        return ("echo", value)

    def where(self) -> tuple[Any, ...]:
        thread = threading.current_thread()
        return (thread.name, thread.daemon, thread.ident)

    def hold(self, gate: str) -> tuple[Any, ...]:
        seen.append(gate)
        gates[gate].wait(10)
        return ("held",)

    def spin(self, seconds: float = 10) -> tuple[Any, ...]:
        until = time.monotonic() + seconds
        seen.append("spin")
        while time.monotonic() < until:
            time.sleep(0.0005)
        return ("spun",)

    def sleep(self, seconds: float) -> tuple[Any, ...]:
        seen.append("sleep")
        time.sleep(seconds)
        return ("slept",)

    def soft(self) -> tuple[Any, ...]:
        try:
            return self.sleep(10)
        except SoftTimeLimitExceeded:
            return ("soft",)

    def soft_then_spin(self) -> tuple[Any, ...]:
        self.soft()
        return self.spin()

    def stubborn(self) -> tuple[Any, ...]:
        try:
            return self.spin()
        except TaskCancelled:
            return ("finished all the same",)

    def exit(self, code: Any) -> tuple[Any, ...]:
        raise SystemExit(code)

    def interrupt(self) -> tuple[Any, ...]:
        raise KeyboardInterrupt

    def unprintable(self) -> tuple[Any, ...]:
        class Odd(BaseException):
            def __str__(self) -> str:
                raise ValueError("no text")

        raise Odd

    def nothing(self) -> None:
        return None

    def ask(self, verb: str, value: Any) -> tuple[Any, ...]:
        seen.append("ask")
        try:
            return ("answer", self.upcall(verb, value))
        except ValueError as error:
            return ("refused", str(error))

    def count(self, number: int) -> tuple[Any, ...]:
        """Very short work, with many bytecodes for an interruption to land in."""
        total = 0
        for n in range(number):
            total += n
        return ("counted", total)

    def deaf(self, gate: str) -> tuple[Any, ...]:
        seen.append(gate)
        while not gates[gate].is_set():
            try:
                gates[gate].wait(10)
            except TaskCancelled:
                seen.append("cancelled")
        return ("heard",)
