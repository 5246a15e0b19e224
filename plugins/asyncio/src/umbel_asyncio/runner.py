"""Runs the jobs of a child on an event loop: those that can be awaited as asyncio tasks, the others each in a thread."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

from umbel.errors import TaskCancelled
from umbel.model import Job
from umbel.ports.interruption import Interruptible
from umbel.ports.pool import Executor
from umbel_children.cells import STEP, THREADS, Cell
from umbel_children.crowd import Crowd, End, Entry, how_it_ended
from umbel_children.run import Window
from umbel_children.runner import Nature
from umbel_children.slot import Run, Slot

AGAIN: Final = 0.01
"""Seconds after which a thread that has not quite begun its job is asked again."""


class LoopRunner(Crowd):
    """See ``Crowd``. The hub is the main thread with its event loop."""

    step_code = Interruptible.steps.__code__

    def __init__(self, sock: socket.socket, cell: Cell, nature: Nature, slots: int) -> None:
        super().__init__(sock, cell, nature, slots)
        self._loop = asyncio.new_event_loop()

    def serve(self, executor: Executor) -> NoReturn:
        asyncio.set_event_loop(self._loop)
        self._executor = executor
        # An executor that knows no coroutines has all its jobs run in threads.
        self._awaits: Callable[[tuple[Any, ...]], bool] = getattr(executor, "awaits", _never)
        self._idle: list[Thread] = []
        self._loop.add_reader(self._sock, self.receive)
        self._loop.run_forever()
        raise SystemExit("a task has stopped the event loop of its child")

    def _forked(self) -> None:
        super()._forked()
        self._loop.stop()  # what other tasks go on with in the process that forked is not to be done twice

    def soon(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._loop.call_later(seconds, callback)

    def launch(self, entry: Entry) -> None:
        if self._awaits(entry.payload):
            coroutine = self._executor.aexecute(entry.payload)  # type: ignore[attr-defined]  # it says that it awaits
            entry.handle = now = Interruptible()
            now.task = self._loop.create_task(self._run(entry, now, coroutine))
        else:
            self._cell.words[THREADS] += 1
            entry.handle = self._idle.pop() if self._idle else Thread(self)
            entry.handle.start(entry)

    def interrupt(self, entry: Entry, exception: type[BaseException]) -> None:
        if isinstance(entry.handle, Thread):
            entry.handle.interrupt(entry, exception)
        else:
            entry.handle.interrupt(exception)

    # --- coroutines -----------------------------------------------------------------------------

    async def _run(self, entry: Entry, now: Interruptible, coroutine: Coroutine[Any, Any, tuple[Any, ...]]) -> None:
        end: End
        try:
            end = await now.steps(coroutine, self._cell.words, STEP, entry.sequence), None
        except BaseException as error:  # SystemExit too: it would end the loop, and with it every other job
            end = how_it_ended(error)
        self.end(entry, end)
        self.left(entry)

    # --- threads --------------------------------------------------------------------------------

    def thread_has_ended(self, thread: Thread, entry: Entry) -> None:
        """A job has ended in a thread. On the hub."""
        self._cell.words[THREADS] -= 1
        self._idle.append(thread)
        self.left(entry)

    def from_thread(self, thread: Thread, entry: Entry) -> None:
        """As ``thread_has_ended``, from that thread."""
        self._loop.call_soon_threadsafe(self.thread_has_ended, thread, entry)

    def ask_again(self, thread: Thread, entry: Entry, exception: type[BaseException]) -> None:
        """Interrupt later what has not quite begun."""
        self._loop.call_later(AGAIN, thread.interrupt, entry, exception)


class Thread:
    """A thread of a child, and the job that it runs. Lives as long as the child; on the hub but for ``_work``."""

    def __init__(self, runner: LoopRunner) -> None:
        self._runner = runner
        self._slot = Slot()
        self._entry: Entry | None = None
        self._todo: queue.SimpleQueue[tuple[Entry, Run]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="umbel-asyncio-sync", daemon=True).start()

    def start(self, entry: Entry) -> None:
        """Run a job; the thread is idle."""
        self._entry = entry
        self._run = Run(Job(id=entry.sequence, task="", payload=entry.payload))
        self._todo.put((entry, self._run))

    def interrupt(self, entry: Entry, exception: type[BaseException]) -> None:
        """Raise ``exception`` in the job, if it is still this thread's."""
        if self._entry is not entry:
            return
        if exception is TaskCancelled:
            self._run.cancelled = True
        if self._slot.interrupt(self._run, exception) is Window.AHEAD and exception is not TaskCancelled:
            self._runner.ask_again(self, entry, exception)

    def _work(self) -> None:
        runner = self._runner
        while True:
            entry, run = self._todo.get()
            self._slot.work(run, runner._executor)
            lost = run.error if run.payload is None else None
            end = (run.payload, None) if lost is None else how_it_ended(lost)
            run.error = None  # its traceback holds the frame that holds the run
            runner.end(entry, end)
            runner.from_thread(self, entry)


def _never(payload: tuple[Any, ...]) -> bool:
    return False
