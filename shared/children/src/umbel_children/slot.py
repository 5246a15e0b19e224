"""One thread's work, and how it is interrupted exactly.

CPython lets one thread raise an exception in another, but delivers it some bytecodes later, or when a call into C
returns. An interruption meant for one job must not land in the next, so each job has a window. Only while it is open
does anybody interrupt; whoever closes it waits for an interrupter that is under way, then withdraws what was not
delivered. No lock guards this: an interruption may land between any two bytecodes of the window's own code, also just
after a lock was taken, and would leave it locked.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

from attrs import define

from umbel.errors import TaskCancelled
from umbel.ports.pool import Executor
from umbel_children.run import Execution, Window

# A prototype of our own: setting argtypes on the function that ctypes.pythonapi shares would change it for everybody.
_raise_in_thread = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)
_NOTHING: ctypes.py_object[type[BaseException]] = ctypes.py_object()
"""A null pointer: withdraws what is pending."""


_here = threading.local()


def wait_interruptibly(future: concurrent.futures.Future[Any]) -> Any:
    """The result of an upcall; where a slot's thread waits for it, an interruption ends the wait."""
    slot: Slot | None = getattr(_here, "slot", None)
    if slot is None:  # a thread that the application made itself
        return future.result()
    slot.upcall = future
    try:
        return future.result()
    finally:
        slot.upcall = None


@define(eq=False)
class Run(Execution):
    """One job that another thread may interrupt."""

    interrupted: bool = False


class Slot:
    """One thread and the job it has."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.run: Run | None = None
        """What it took last; set under the pool's lock."""
        self.upcall: concurrent.futures.Future[Any] | None = None
        """What the running job waits for."""
        self._ident = 0
        self._interrupting = False
        self._waits_itself: Callable[[int, type[BaseException]], bool] | None = None
        """The executor's own way to interrupt, for a thread that waits on an event loop of its own."""

    def work(self, run: Run, executor: Executor) -> None:
        """Run one job to its end, on this slot's thread. Raises nothing, whatever the job does.

        A job is interrupted twice at most, by its soft limit and by a cancel, and either may land while the window is
        being closed: hence three layers, the last of which nothing can reach.
        """
        self._ident = threading.get_ident()
        _here.slot = self
        self._waits_itself = getattr(executor, "interrupt_thread", None)
        self.upcall = None
        run.since = started = time.monotonic()
        try:
            try:
                try:
                    run.window = Window.OPEN
                    if run.cancelled:
                        raise TaskCancelled
                    run.begun = True
                    run.payload = executor.execute(run.job.payload)
                finally:
                    self._close(run)
            except BaseException as error:
                self._close(run)
                run.error = error
        except BaseException as error:
            self._close(run)
            run.error = error
        run.runtime = time.monotonic() - started

    def _close(self, run: Run) -> None:
        run.window = Window.CLOSED
        while self._interrupting:
            time.sleep(0)
        if run.interrupted:
            _raise_in_thread(self._ident, _NOTHING)

    def interrupt(self, run: Run, exception: type[BaseException]) -> Window:
        """Raise ``exception`` in ``run`` if its window is open; return how the window was. On the I/O loop only."""
        self._interrupting = True
        try:
            window = run.window
            if window is Window.OPEN and not (self._waits_itself and self._waits_itself(self._ident, exception)):
                run.interrupted = True
                _raise_in_thread(self._ident, exception)
                if (upcall := self.upcall) is not None:
                    upcall.cancel()
            return window
        finally:
            self._interrupting = False
