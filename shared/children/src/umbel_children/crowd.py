"""Runs many jobs at once in one child, on whatever loop or hub a subclass has. What all such runners share is here.

One thread, the *hub*, reads the socket and claims jobs in the order in which they came. Jobs may end on any thread. What
the parent must know after the death of this process is in shared memory before anything else is done: that a job is
claimed, and its end.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import itertools
import os
import signal
import socket
import threading
import time
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, ClassVar, Final, NoReturn

from attrs import define

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled
from umbel.model import Ending
from umbel.ports.interruption import unwrapped
from umbel.ports.pool import Executor, ExecutorFactory, Upcall
from umbel_children import channel, errors
from umbel_children.cells import BEAT, CURRENT, RECALL, REQUEST, ROWS, STEP, Cell, fence
from umbel_children.runner import Nature, Runner, leave, refuse_fork, resident_bytes
from umbel_children.slot import wait_interruptibly

MEMORY_SECONDS: Final = 0.05
"""How often memory is looked at, at most."""
BEAT_SECONDS: Final = 0.1
"""How often the hub tells that it comes round, while jobs run."""

CANCELLED: Final = (Ending.CANCELLED.value, "cancelled at the edge of the task")
TIMED_OUT: Final = (Ending.TIMED_OUT.value, "the soft time limit passed at the edge of the task")
RETURNED: Final = (Ending.RETURNED.value, "")

End = tuple[tuple[Any, ...] | None, tuple[str, str] | None]
"""What the executor returned, or how else a job ended: one of them."""
_ASKED: Final[dict[int, type[BaseException]]] = {1: SoftTimeLimitExceeded, 2: TaskCancelled}


@define(eq=False)
class Entry:
    """One job in this child, from its claim to its end."""

    sequence: int
    payload: tuple[Any, ...]
    row: int
    """Its row in the table of ``Cell``."""
    since: float
    """The monotonic clock when it was claimed."""
    asked: int = 0
    """What was asked of it already: 1 to tell of its soft limit, 2 to cancel."""
    handle: Any = None
    """The runner's own: what runs it."""


def how_it_ended(error: BaseException) -> End:
    """The end of a job whose executor let ``error`` through."""
    error = unwrapped(error)
    if isinstance(error, TaskCancelled):
        return None, CANCELLED
    if isinstance(error, SoftTimeLimitExceeded):
        return None, TIMED_OUT
    return None, (Ending.LOST.value, traceback.format_exception_only(error)[-1].strip())


class Crowd(Runner):
    """The hub's side of many jobs. A subclass gives the loop: ``serve``, ``soon``, ``later``, ``launch``, ``interrupt``."""

    step_code: ClassVar[CodeType | None] = None
    """The code of the function between whose frame and the job's own code no frame lies while ``STEP`` tells of a job. A
    runner that keeps ``STEP`` names it; an interrupt by signal is raised only below such a frame."""

    works: ClassVar[tuple[str, ...]] = ("asyncio", "umbel_children")
    """Packages whose code an interrupt by signal spares."""

    def __init__(self, sock: socket.socket, cell: Cell, nature: Nature, slots: int) -> None:
        super().__init__(sock, cell, nature, slots)
        self._pid = os.getpid()
        self._hub = threading.get_ident()
        self._decoder = channel.Decoder()
        self._given: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._entries: dict[int, Entry] = {}
        self._free_rows: list[int] = []
        self._running = 0
        self._full = False
        self._measured = 0.0
        self._flushing = False
        self._beating = False
        self._pumping = False
        self._calls: dict[int, Callable[[bool, Any], None]] = {}
        self._numbers = itertools.count(1)

    # --- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def serve(self, executor: Executor) -> NoReturn:
        """Run the loop: call ``receive`` on the hub whenever ``sock`` is readable."""

    @abstractmethod
    def soon(self, callback: Callable[[], None]) -> None:
        """Call back on the hub when what is ready now has run. On the hub."""

    @abstractmethod
    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back on the hub after so long. On the hub."""

    @abstractmethod
    def launch(self, entry: Entry) -> None:
        """Run a job that was claimed: the executor, then ``end``, then on the hub ``left``.

        On the hub; must not run any of the job's code before it returns.
        """

    @abstractmethod
    def interrupt(self, entry: Entry, exception: type[BaseException]) -> None:
        """Raise ``exception`` in a job, where it waits next or at once. On the hub."""

    def uplink(self) -> Upcall:
        """What the executor calls to ask the parent."""
        return Uplink(self)

    # --- the way of a job -----------------------------------------------------------------------

    def run(self, factory: ExecutorFactory) -> NoReturn:
        """See ``Runner.run``. Ends with the parent."""
        signal.signal(signal.SIGUSR1, self._on_signal)
        faulthandler.register(signal.SIGUSR2, file=self._cell.file, all_threads=False)
        executor = self.make(factory, self.uplink())
        self._beat()
        self._send((channel.READY,))
        try:
            self.serve(executor)
        except SystemExit as ending:  # the hub itself was told to end, by code that is no job's
            leave(0 if self._twin else ending.code if isinstance(ending.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            leave(1)

    def receive(self) -> None:
        """Read what has come, and claim jobs. On the hub; never waits for more."""
        try:
            if self._twin:
                leave(0)
            try:
                self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # the hub has waited for an answer meanwhile, and taken all there was
            self._beat()
            self.claim()
        except Exception:  # nothing here is a job's doing: half a frame lost would be jobs lost
            traceback.print_exc()
            leave(1)

    def claim(self) -> None:
        """Launch as many jobs as there are slots."""
        words, jobs, begun = self._cell.words, self._cell.jobs, self._cell.begun
        while self._given and self._running < self._slots:
            sequence, payload = self._given.popleft()
            row = self._free_rows.pop() if self._free_rows else self._next_row()
            entry = Entry(sequence, payload, row, time.monotonic())
            begun[2 * row + 1] = entry.since
            jobs[2 * row] = sequence
            words[CURRENT] = sequence
            fence()
            self._entries[sequence] = entry
            self._running += 1
            if words[RECALL] >= sequence:
                self.end(entry, (None, RETURNED))
                self._forget(entry)
            else:
                self.launch(entry)
        if self._running and not self._beating:
            self._beating = True
            self.later(BEAT_SECONDS, self._go_on_beating)

    def _next_row(self) -> int:
        row: int = self._cell.words[ROWS]
        self._cell.words[ROWS] = row + 1
        return row

    def end(self, entry: Entry, end: End) -> None:
        """The job has ended. From any thread; on the hub ``left`` must follow."""
        if self._twin:
            leave(0)
        # Kept before its row is free: a job that died in between counts as running, and none is ever both.
        self._keep(entry.sequence, 0.0 if end[1] == RETURNED else time.monotonic() - entry.since, *end)
        self._cell.jobs[2 * entry.row] = 0

    def left(self, entry: Entry) -> None:
        """A job has ended: its slot is free. On the hub."""
        self._forget(entry)
        if self._nature.max_memory and not self._full and time.monotonic() >= self._measured + MEMORY_SECONDS:
            self._measured = time.monotonic()
            if resident_bytes() > self._nature.max_memory:
                self._full = True
                self._send((channel.FULL, ""))
        self.claim()

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.sequence]
        self._running -= 1
        self._free_rows.append(entry.row)
        if not self._flushing:
            self._flushing = True
            self.soon(self._flush_soon)

    # --- the socket -----------------------------------------------------------------------------

    def call(self, verb: str, payload: Any, answered: Callable[[bool, Any], None]) -> None:
        """Ask the parent; ``answered(good, value)`` comes on the hub. From any thread."""
        refuse_fork(self._pid, verb)
        number = next(self._numbers)
        self._calls[number] = answered
        try:
            self._send((channel.UPCALL, number, verb, payload))
        except BaseException:
            self._calls.pop(number, None)
            raise

    def pump(self, future: concurrent.futures.Future[Any]) -> None:
        """Read what comes until ``future`` is done, because the hub itself waits for it. Jobs wait until it goes on."""
        self._pumping = True
        try:
            while not future.done():
                self._read(0)
        finally:
            self._pumping = False
        self.soon(self.claim)

    def _read(self, flags: int) -> None:
        try:
            chunk = self._sock.recv(channel.CHUNK, flags)
        except ConnectionError:
            chunk = b""
        if not chunk:
            leave(0)
        for kind, *rest in self._decoder.feed(chunk):
            if kind == channel.JOBS:
                first, payloads = rest
                self._given.extend(enumerate(payloads, first))
            elif kind == channel.REPLY:
                number, good, value = rest
                if answered := self._calls.pop(number, None):
                    answered(good, value)
            elif kind == channel.INTERRUPT:
                sequence, cancel = rest
                self._ask(self._entries.get(sequence), 1 + cancel)
            elif kind == channel.SLOTS:
                (self._slots,) = rest

    def _ask(self, entry: Entry | None, want: int) -> None:
        if entry is not None and entry.asked < want:
            entry.asked = want
            self.interrupt(entry, _ASKED[want])

    def _flush_soon(self) -> None:
        self._flushing = False
        self._flush()

    # --- a hub that does not come round ---------------------------------------------------------

    def _beat(self) -> None:
        self._cell.times[BEAT] = time.monotonic()

    def _go_on_beating(self) -> None:
        self._beat()
        self._beating = self._running > 0
        if self._beating:
            self.later(BEAT_SECONDS, self._go_on_beating)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """The parent says: look at your cell. Runs between two bytecodes of the main thread."""
        self._flush_if_free()
        request = self._cell.words[REQUEST]
        sequence, want = request >> 1, 1 + (request & 1)
        entry = self._entries.get(sequence)
        if entry is None or entry.asked >= want or self._pumping or self._cell.words[STEP] != sequence:
            return
        if self._in_the_jobs_own_code(frame):
            entry.asked = want
            raise _ASKED[want]

    def _in_the_jobs_own_code(self, frame: FrameType | None) -> bool:
        """Whether an exception that is raised here meets the job alone, and not the works of a loop that it has called."""
        first = frame
        while frame is not None and frame.f_code is not self.step_code:
            module = str(frame.f_globals.get("__name__", ""))
            if module.partition(".")[0] in self.works:
                return False
            frame = frame.f_back
        return frame is not None and frame is not first


class Uplink:
    """The upcall of a crowd. Blocks its thread; on the hub the whole child, so code that can wait uses ``awaitable``."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd

    def __call__(self, verb: str, payload: Any) -> Any:
        """See ``umbel.ports.pool.Upcall``."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._crowd.call(verb, payload, lambda good, value: settle(future, good, value))
        if threading.get_ident() == self._crowd._hub:
            self._crowd.pump(future)
            return future.result()
        return wait_interruptibly(future)

    async def awaitable(self, verb: str, payload: Any) -> Any:
        """The same for code on any event loop, which goes on meanwhile."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def answered(good: bool, value: Any) -> None:
            if here:
                settle(future, good, value)
            else:
                loop.call_soon_threadsafe(settle, future, good, value)

        here = threading.get_ident() == self._crowd._hub
        self._crowd.call(verb, payload, answered)
        return await future


def settle(future: concurrent.futures.Future[Any] | asyncio.Future[Any], good: bool, value: Any) -> None:
    """Let ``future`` have the parent's answer, unless nobody waits for it any more."""
    if future.cancelled() or (
        isinstance(future, concurrent.futures.Future) and not future.set_running_or_notify_cancel()
    ):
        return
    if good:
        future.set_result(value)
    else:
        future.set_exception(errors.from_plain(value))
