"""Many jobs in one child, each in a greenlet: what pools of green threads share, whichever hub they have.

The child's modules are patched at its birth, before the application is imported. What this module needs as it was is taken
here, at the import of the fork server, where nothing is patched yet.

Coroutines run on one event loop, in a greenlet of its own, over the patched selectors. asyncio believes that a thread runs one
loop at a time, and of which job code runs there is one word of shared memory: both are put aside when a greenlet is
switched away from, and put back when it goes on.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from _thread import allocate_lock, get_ident
from abc import abstractmethod
from asyncio.events import _get_running_loop, _set_running_loop
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, Final, NoReturn, Protocol

import greenlet  # type: ignore[import-untyped]  # it has no types
from attrs import define

from umbel.ports.interruption import Interruptible
from umbel.ports.pool import Executor, ExecutorFactory, Upcall
from umbel_children import errors
from umbel_children.cells import STEP, Cell
from umbel_children.crowd import Crowd, End, Entry, Uplink, how_it_ended
from umbel_children.runner import Nature, leave

RealSocket: Final = socket.socket


class Waiter(Protocol):
    """A value that one greenlet waits for."""

    def set(self, value: Any) -> None:
        """Let the greenlet go on. On the hub."""

    def get(self) -> Any:
        """Wait; other greenlets run meanwhile."""


@define(eq=False)
class GreenJob:
    """What runs a job."""

    greenlet: Any = None
    wanted: type[BaseException] | None = None
    """The exception that is to be raised in it, until it is raised."""


class Greenlets(Crowd):
    """See ``Crowd``. The hub is whatever greenlet of the main thread calls back; none of it blocks."""

    preloads: ClassVar[bool] = False
    works: ClassVar[tuple[str, ...]] = (*Crowd.works, "greenlet")

    def __init__(self, sock: socket.socket, cell: Cell, nature: Nature, slots: int) -> None:
        super().__init__(RealSocket(fileno=sock.detach()), cell, nature, slots)
        self._sock.setblocking(True)
        self._writing = allocate_lock()  # never held while greenlets are switched, and taken by real threads too
        self._thread = get_ident()
        self._aside: dict[object, tuple[asyncio.AbstractEventLoop | None, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def spawn(self, function: Callable[..., None], *arguments: Any) -> Any:
        """A greenlet that begins when the hub comes round."""

    @abstractmethod
    def watch(self, fileno: int, callback: Callable[[], None]) -> None:
        """Call back on the hub whenever the file is readable, for ever."""

    @abstractmethod
    def waiter(self) -> Waiter:
        """A new one."""

    @abstractmethod
    def sleep_for_ever(self) -> NoReturn:
        """Let the other greenlets run."""

    # --- the child ------------------------------------------------------------------------------

    def run(self, factory: ExecutorFactory) -> NoReturn:
        """See ``Runner.run``."""
        greenlet.settrace(self._on_switch)
        self.watch(self._sock.fileno(), self.receive)
        super().run(factory)

    def uplink(self) -> Upcall:
        return GreenUplink(self)

    def serve(self, executor: Executor) -> NoReturn:
        self._executor = executor
        self._awaits: Callable[[tuple[Any, ...]], bool] = getattr(executor, "awaits", _never)
        self.sleep_for_ever()

    def launch(self, entry: Entry) -> None:
        if self._awaits(entry.payload):
            entry.handle = Interruptible()
            self._on_loop(self._begin_coroutine, entry)
        else:
            job = entry.handle = GreenJob()
            job.greenlet = self.spawn(self._run_job, entry, job)

    def interrupt(self, entry: Entry, exception: type[BaseException]) -> None:
        if isinstance(entry.handle, Interruptible):
            # Twice round the loop: a task that is cancelled before its first step would never tell of its end.
            self._on_loop(self._call_soon, entry.handle.interrupt, exception)
        else:
            entry.handle.wanted = exception
            self.soon(lambda: self._throw(entry, entry.handle))

    # --- jobs in greenlets ----------------------------------------------------------------------

    def _run_job(self, entry: Entry, job: GreenJob) -> None:
        end: End
        try:
            self._cell.words[STEP] = entry.sequence
            if job.wanted is not None:  # asked for before it began
                raise job.wanted
            end = self._executor.execute(entry.payload), None
        except BaseException as error:  # SystemExit too: it would end the hub, and with it every other job
            end = how_it_ended(error)
        # From here on nothing switches greenlets, so nothing is thrown in; by signal nothing is raised in this very frame.
        self._cell.words[STEP] = 0
        self.end(entry, end)
        self.left(entry)

    def _throw(self, entry: Entry, job: GreenJob) -> None:
        """Raise what is wanted where the job waits. On the hub: the job has not begun, waits, or has ended."""
        waits = job.greenlet.gr_frame is not None
        if waits and job.wanted is not None and self._entries.get(entry.sequence) is entry:
            exception, job.wanted = job.wanted, None
            greenlet.greenlet.throw(job.greenlet, exception)

    def _in_the_jobs_own_code(self, frame: FrameType | None) -> bool:
        """As in ``Crowd``; a job is below a frame of a greenlet, or of a coroutine."""
        first = frame
        while frame is not None and frame.f_code not in _STEPS:
            if str(frame.f_globals.get("__name__", "")).partition(".")[0] in self.works:
                return False
            frame = frame.f_back
        return frame is not None and frame is not first

    def _on_switch(self, event: str, switch: tuple[object, object]) -> None:
        """Called at every switch of greenlets in this thread."""
        origin, target = switch
        words = self._cell.words
        loop, step = _get_running_loop(), words[STEP]
        if loop is not None or step:
            self._aside[origin] = loop, step
        loop_then, step_then = self._aside.pop(target, _NOTHING)
        if loop is not loop_then:
            _set_running_loop(loop_then)
        if step != step_then:
            words[STEP] = step_then

    # --- jobs on the event loop -----------------------------------------------------------------

    def _on_loop(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """Call back on the event loop, from any greenlet."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self.spawn(self._run_loop, self._loop)
        self._loop.call_soon_threadsafe(callback, *arguments)

    def _call_soon(self, callback: Callable[..., Any], *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon(callback, *arguments)

    def _run_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        sys.stderr.write("a task has stopped the event loop of its child, which ends\n")
        leave(1)

    def _begin_coroutine(self, entry: Entry) -> None:
        assert self._loop is not None
        entry.handle.task = self._loop.create_task(self._run_coroutine(entry))

    async def _run_coroutine(self, entry: Entry) -> None:
        end: End
        try:
            coroutine = self._executor.aexecute(entry.payload)  # type: ignore[attr-defined]  # it says that it awaits
            end = await entry.handle.steps(coroutine, self._cell.words, STEP, entry.sequence), None
        except BaseException as error:  # SystemExit too: it would end the loop, and with it every other job
            end = how_it_ended(error)
        self.end(entry, end)
        self.left(entry)


class GreenUplink(Uplink):
    """The upcall of greenlets: blocks the one that asks, and of a real thread the thread."""

    _crowd: Greenlets

    def __call__(self, verb: str, payload: Any) -> Any:
        """See ``umbel.ports.pool.Upcall``."""
        crowd = self._crowd
        waiter = crowd.waiter() if get_ident() == crowd._thread else ThreadWaiter()
        crowd.call(verb, payload, lambda good, value: waiter.set((good, value)))
        good, value = waiter.get()
        if good:
            return value
        raise errors.from_plain(value)


class ThreadWaiter:
    """A value that a real thread waits for, on a real lock."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()
        self._value: Any = None

    def set(self, value: Any) -> None:
        self._value = value
        self._lock.release()

    def get(self) -> Any:
        self._lock.acquire()
        return self._value


_STEPS: Final = (Greenlets._run_job.__code__, Interruptible.steps.__code__)
_NOTHING: Final[tuple[asyncio.AbstractEventLoop | None, int]] = (None, 0)


def _never(payload: tuple[Any, ...]) -> bool:
    return False
