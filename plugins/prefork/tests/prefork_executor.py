"""Executors for the tests of the pool, imported by the fork server."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled


class Executor:
    """Runs the method that the payload names; what an interrupt becomes is its value."""

    def __init__(self, upcall: Any, **arguments: Any) -> None:
        self.upcall = upcall
        self.arguments = arguments
        self.hoard: list[bytearray] = []
        self.count = 0

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        self.count += 1
        try:
            return ("ok", getattr(self, payload[0])(*payload[1:]))
        except SoftTimeLimitExceeded:
            return ("soft",)
        except TaskCancelled:
            return ("cancelled",)
        except Exception as error:
            return ("error", type(error).__name__, str(error))

    def echo(self, value: Any = None) -> Any:
        return value

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def spin(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "spun"

    def touch(self, path: str, seconds: float = 0.0) -> None:
        with open(path, "a") as file:
            file.write("x")
        time.sleep(seconds)

    def stubborn(self, path: str, seconds: float) -> str:
        """Tell of the soft limit and go on until the hard one."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                time.sleep(left)
            except SoftTimeLimitExceeded:
                with open(path, "w") as file:
                    file.write("soft")
        return "survived"

    def exit(self, code: int) -> None:
        os._exit(code)

    def system_exit(self, code: int) -> None:
        sys.exit(code)

    def kill(self, signum: int) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(10)

    def segfault(self) -> None:
        ctypes.string_at(0)

    def memory_error(self) -> None:
        raise MemoryError

    def hog(self, size: int) -> int:
        self.hoard.append(bytearray(os.urandom(1) * size))
        return os.getpid()

    def ask(self, verb: str, value: Any) -> Any:
        return self.upcall(verb, value)

    def ask_in_threads(self, number: int) -> list[Any]:
        answers: list[Any] = [None] * number

        def ask(index: int) -> None:
            answers[index] = self.upcall("double", index)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(number)]
        for thread in threads:
            thread.start()
        answers.append(self.upcall("double", 1000))
        for thread in threads:
            thread.join()
        return answers

    def leave_thread(self, seconds: float) -> None:
        """Leave a thread behind that waits for an answer while other jobs run."""
        threading.Thread(target=self.upcall, args=("sleep", seconds), daemon=True).start()

    def ask_in_fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                self.upcall("double", 1)
            except BaseException:
                os._exit(7)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def fork_and_term(self) -> int:
        """Whether what a task forks can be stopped like any other process."""
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(tell, b"x")
            time.sleep(10)
            os._exit(0)
        os.read(ready, 1)
        os.close(ready)
        os.close(tell)
        os.kill(pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def fork_and_return(self) -> int:
        """As a careless task does it: two processes return."""
        return os.fork()

    def fork_and_exit(self) -> int:
        if (pid := os.fork()) == 0:
            sys.exit(3)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def start_program(self, path: str) -> None:
        import subprocess

        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(path, "w") as file:
            file.write(str(program.pid))
        program.wait()

    def argument(self, name: str) -> Any:
        return self.arguments[name]

    def preloaded(self) -> int:
        return PRELOADED

    def unplain(self) -> Any:
        return object()

    def random(self) -> float:
        import random

        return random.random()

    def log(self) -> None:
        import logging

        logging.getLogger("prefork-test").warning("from the child")


class Letting(Executor):
    """Lets interrupts through, as they pass when they come at the very edge of ``execute``."""

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        return ("ok", getattr(self, payload[0])(*payload[1:]))


PRELOADED = 0


def make(upcall: Any, **arguments: Any) -> Executor:
    return Executor(upcall, **arguments)


def preload(**arguments: Any) -> None:
    global PRELOADED
    PRELOADED = os.getpid()


make.preload = preload  # type: ignore[attr-defined]  # what a fork server looks for


def make_letting(upcall: Any) -> Letting:
    return Letting(upcall)


def make_broken(upcall: Any) -> Executor:
    raise RuntimeError("no database today")


def make_import_error(upcall: Any) -> Executor:
    raise AssertionError("preload fails before")


def _import_error() -> None:
    import no_such_module_of_the_application  # noqa: F401  # imported to fail


make_import_error.preload = _import_error  # type: ignore[attr-defined]  # what a fork server looks for


def make_dying(upcall: Any) -> Executor:
    os._exit(3)


def make_slow(upcall: Any) -> Executor:
    time.sleep(60)
    raise AssertionError("not reached")


def make_flaky(upcall: Any, marker: str) -> Executor:
    """Fails while the marker exists."""
    if os.path.exists(marker):
        raise RuntimeError("marker")
    return Executor(upcall)
