"""Runs the jobs of a child one after the other, and asks its parent for everything else.

The main thread runs the jobs. Any thread may make an upcall; the socket is read by one of the waiting threads at a
time, the *leader*, for all of them, so a child needs no thread of its own.

SIGUSR1 says "look at your cell". Its handler runs between two bytecodes of the main thread and may raise there, so it
does only while ``_gate`` lets it: never outside a job, and never where an exception would tear a frame or lose a lock.
"""

from __future__ import annotations

import itertools
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

from umbel.errors import SoftTimeLimitExceeded, TaskCancelled
from umbel.model import Ending
from umbel.ports.pool import ExecutorFactory
from umbel_children import channel, errors
from umbel_children.cells import CURRENT, DONE, RECALL, REQUEST, STARTED, Cell, fence
from umbel_children.runner import Nature, Runner, leave, refuse_fork, resident_bytes

UNSENT_SECONDS: Final = 0.005
UNSENT_JOBS: Final = 256
"""Ends of jobs wait for each other while more jobs are at hand, up to this much work and this many. Each batch costs its
worker three round trips to broker and store, 0.4 ms of CPU in all, and their server's scripts 20 µs a job in batches of 32
against 15 in those of 64. An empty task is over in 40 µs: its ends travel 125 at a time."""
MEMORY_SECONDS: Final = 0.01
"""How often memory is looked at, at most."""

CANCELLED: Final = (Ending.CANCELLED.value, "cancelled at the edge of the task")
TIMED_OUT: Final = (Ending.TIMED_OUT.value, "the soft time limit passed at the edge of the task")
RETURNED: Final = (Ending.RETURNED.value, "")

SHUT, OPEN, WAITING = 0, 1, 2
"""The gate: an interrupt may not come; may come; may come, and then shuts the gate for the cleaning up."""

Box = queue.SimpleQueue[Any]


class OneByOne(Runner):
    """The state of this process as a child. ``run`` never returns."""

    def __init__(self, sock: socket.socket, cell: Cell, nature: Nature, slots: int) -> None:
        super().__init__(sock, cell, nature, slots)
        self._pid = os.getpid()
        self._main = threading.get_ident()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._max_tasks = nature.max_tasks or 0
        self._max_memory = nature.max_memory or 0
        self._decoder = channel.Decoder()
        self._jobs: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._results: list[tuple[Any, ...]] = []
        self._gate = SHUT
        self._running = 0
        self._answered = 0
        self._waits_itself: Callable[[int, type[BaseException]], bool] | None = None
        self._roles = threading.Lock()
        self._leader: Box | None = None
        self._waiting: dict[int, Box] = {}
        self._calls = itertools.count(1)
        self._idle: Box = queue.SimpleQueue()

    def run(self, factory: ExecutorFactory) -> NoReturn:
        """Make the executor, say so, run jobs until the parent closes the socket or it is time to retire."""
        signal.signal(signal.SIGUSR1, self._on_signal)
        executor = self.make(factory, self.upcall)
        self._waits_itself = getattr(executor, "interrupt_thread", None)
        self._send((channel.READY,))
        self._work(executor.execute)

    def upcall(self, verb: str, payload: Any) -> Any:
        """Ask the parent and wait for its answer; from any thread. Raises what the parent raised."""
        refuse_fork(self._pid, verb)
        main = threading.get_ident() == self._main
        gate = self._gate
        if main:
            self._gate = SHUT
        box: Box = queue.SimpleQueue()
        call = next(self._calls)
        try:
            self._enter(call, box)
            self._send((channel.UPCALL, call, verb, payload))
            answer = None
            while answer is None:
                answer = self._wait(box, interruptible=main and gate == OPEN)
        finally:
            self._exit(call, box)
            if main and gate == OPEN:
                self._gate = OPEN
                self._interrupt()
        good, value = answer
        if good:
            return value
        raise errors.from_plain(value)

    def _work(self, execute: Any) -> NoReturn:
        jobs, results = self._jobs, self._results
        words, times, monotonic = self._cell.words, self._cell.times, time.monotonic
        unsent, kept, executed, measured = 0.0, 0, 0, 0.0
        while True:
            if not jobs:
                self._flush()
                unsent, kept = 0.0, 0
                self._await_jobs()
            sequence, payload = jobs.popleft()
            start = monotonic()
            times[STARTED] = start
            words[CURRENT] = sequence
            fence()
            other: tuple[str, str] | None = None
            if words[RECALL] >= sequence:
                self._keep(sequence, 0.0, None, RETURNED)
                words[DONE] = sequence
                continue
            try:
                self._running = sequence
                self._gate = OPEN
                # The parent may have asked between the claim and here, where the handler did nothing.
                if words[REQUEST] >> 1 == sequence:
                    self._interrupt()
                # A call from C: when `execute` returns, its value is in `results` before any bytecode runs, so an
                # interrupt comes either before the end of the job or, seeing a result, not at all.
                results.extend(map(execute, (payload,)))
            except TaskCancelled:
                other = CANCELLED
            except SoftTimeLimitExceeded:
                other = TIMED_OUT
            except BaseException as error:
                self._gate = SHUT
                self._die(error)
            finally:
                # Plain stores, here and in the two clauses above: no signal handler runs until the last is done.
                self._gate = SHUT
                self._running = 0
            if self._twin:
                leave(0)
            end = monotonic()
            # Kept before it is done: a job that died in between counts as running, and none is ever both.
            self._keep(sequence, end - start, results.pop() if other is None else None, other)
            words[DONE] = sequence
            executed += 1
            kept += 1
            unsent += end - start
            if unsent >= UNSENT_SECONDS or kept >= UNSENT_JOBS:
                self._flush()
                unsent, kept = 0.0, 0
            retiring = executed == self._max_tasks
            if self._max_memory and end >= measured + MEMORY_SECONDS:
                measured = end
                retiring = retiring or resident_bytes() > self._max_memory
            if retiring:
                self._flush()
                self._send((channel.RETIRING, ""))
                leave(0)

    # --- interrupts -----------------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        gate = self._gate
        if gate == SHUT or self._results:
            return
        self._gate = SHUT
        self._flush_if_free()
        if gate == OPEN:
            self._gate = OPEN
        self._interrupt()
        self._gate = gate

    def _interrupt(self) -> None:
        """Raise what the parent asks for, once, if it is meant for the running job."""
        request = self._cell.words[REQUEST]
        if request != self._answered and request >> 1 == self._running:
            self._answered = request
            exception = TaskCancelled if request & 1 else SoftTimeLimitExceeded
            # A coroutine that waits on the executor's own loop is told there, and the loop's works are spared.
            if not (self._waits_itself and self._waits_itself(self._main, exception)):
                raise exception

    # --- the socket -----------------------------------------------------------------------------

    def _await_jobs(self) -> None:
        self._enter(0, self._idle)
        while not self._jobs:
            self._wait(self._idle, interruptible=False)
        self._exit(0, self._idle)

    def _enter(self, call: int, box: Box) -> None:
        with self._roles:
            self._waiting[call] = box

    def _wait(self, box: Box, *, interruptible: bool) -> Any:
        """Wait until something may have come for ``box``, as the leader or for the leader's word; return it, or None.

        An interrupt may lose what came, but no role: who leads is in ``_leader``, not in a box.
        """
        with self._roles:
            if self._leader is None:
                self._leader = box
            lead = self._leader is box
        if interruptible:
            self._gate = WAITING
        if lead:
            if box.empty():
                if interruptible:
                    self._poll.poll()
                    self._gate = SHUT
                self._read()
            if box.empty():
                return None
        item = box.get()
        if interruptible:
            self._gate = SHUT
        return item

    def _exit(self, call: int, box: Box) -> None:
        """Leave the waiting threads; a leader appoints another, who would wait for ever otherwise."""
        with self._roles:
            del self._waiting[call]
            if self._leader is box:
                self._leader = next((other for other in self._waiting.values() if other.empty()), None)
                if self._leader is not None:
                    self._leader.put(None)

    def _read(self) -> None:
        try:
            chunk = self._sock.recv(channel.CHUNK)
        except OSError:  # the parent is gone, or a task has closed the socket
            chunk = b""
        if not chunk:
            leave(0)
        for kind, *rest in self._decoder.feed(chunk):
            if kind == channel.JOBS:
                first, payloads = rest
                self._jobs.extend(enumerate(payloads, first))
                with self._roles:
                    if 0 in self._waiting and self._leader is not self._idle:
                        self._idle.put(None)
            else:
                call, good, value = rest
                with self._roles:
                    if call in self._waiting:
                        self._waiting[call].put((good, value))

    # --- the end --------------------------------------------------------------------------------

    def _die(self, error: BaseException) -> NoReturn:
        """The executor let ``error`` through: ``SystemExit``, ``KeyboardInterrupt``, or it is broken itself."""
        if not self._twin:
            self._flush()
        if isinstance(error, SystemExit):
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            leave(error.code if isinstance(error.code, int) else int(error.code is not None))
        traceback.print_exception(error)
        leave(1)
