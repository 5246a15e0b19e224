"""A runner: what runs the jobs of a child, in the child. Each pool of children gives one; this is what all have."""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from attrs import frozen

from umbel.errors import UmbelError
from umbel.model import Ending
from umbel.ports.pool import ExecutorFactory, Upcall
from umbel_children import channel
from umbel_children.cells import KEEP, KEPT, Cell


@frozen(kw_only=True)
class Nature:
    """What the children of a pool are; plain data but for the class itself, and the same for every child."""

    pool: str
    """The pool's name, for messages."""
    runner: str
    """Dotted path of the subclass of ``Runner``. Its module is imported by the fork server."""
    rows: int = 1
    """The most jobs that one child may hold at once: rows of the table in ``Cell``."""
    options: Mapping[str, Any] = {}
    """What the pool tells its runner. Plain data."""
    max_tasks: int | None = None
    max_memory: int | None = None

    def to_plain(self) -> tuple[Any, ...]:
        """For the channel."""
        return self.pool, self.runner, self.rows, dict(self.options), self.max_tasks, self.max_memory

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> Nature:
        """The same again."""
        pool, runner, rows, options, max_tasks, max_memory = plain
        return cls(pool=pool, runner=runner, rows=rows, options=options, max_tasks=max_tasks, max_memory=max_memory)


class Runner(ABC):
    """One child's own side. Made in the child; ``run`` never returns."""

    preloads: ClassVar[bool] = True
    """Whether the fork server imports the application, for all children at once. False: each child imports its own."""

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> None:
        """Called first of all in each child, before anything of the application is imported that was not preloaded."""
        return

    def __init__(self, sock: socket.socket, cell: Cell, nature: Nature, slots: int) -> None:
        """``slots``: how many jobs it may run at once, until it is told otherwise."""
        self._twin = False
        """Whether this is a process that a job has forked. Where the job's code returns in it, nothing is left to do."""
        os.register_at_fork(after_in_child=self._forked)
        self._writing = threading.Lock()
        """Held by the thread that writes into the socket, or into what the cell keeps for it."""
        self._sock = sock
        self._cell = cell
        self._nature = nature
        self._slots = slots

    def _forked(self) -> None:
        self._twin = True

    @abstractmethod
    def run(self, factory: ExecutorFactory) -> NoReturn:
        """Make the executor, say so, run jobs until the parent closes the socket or it is time to retire."""

    def make(self, factory: ExecutorFactory, upcall: Upcall) -> Any:
        """The executor. Ends the process, with the reason told, where it cannot be made or is too large from the start."""
        try:
            executor = factory.make(upcall)
            most = self._nature.max_memory
            if most and (used := resident_bytes()) > most:
                raise UmbelError(
                    f"a new child of the {self._nature.pool} pool uses {used} bytes before its first task, more than"
                    f" max_memory_per_child = {most}; raise that setting"
                )
        except UmbelError as error:
            self._fail(str(error))
        except BaseException:
            self._fail(traceback.format_exc())
        return executor

    # --- frames to the parent -------------------------------------------------------------------

    def _send(self, frame: channel.Frame) -> None:
        data = channel.encode(frame)
        with self._writing:
            self._send_locked(data)

    def _send_locked(self, data: bytes | memoryview) -> None:
        try:
            self._sock.sendall(data)
        except OSError:
            leave(1)  # the parent is gone, or a task has closed the socket: what has ended stands in the cell

    def _keep(
        self, sequence: int, runtime: float, payload: tuple[Any, ...] | None, other: tuple[str, str] | None
    ) -> None:
        """Report the end of a job with the next flush, or after the death of this process, whichever comes first."""
        try:
            data = channel.encode((channel.ENDED, sequence, runtime, payload, other))
        except ValueError as error:
            other = Ending.LOST.value, f"the executor returned something that is not plain data: {error}"
            data = channel.encode((channel.ENDED, sequence, runtime, None, other))
        words, size = self._cell.words, len(data)
        with self._writing:
            if words[KEPT] + size > KEEP:
                self._flush_locked()
            if size > KEEP:
                self._send_locked(data)
            else:
                used = words[KEPT]
                self._cell.kept[used : used + size] = data
                words[KEPT] = used + size

    def _flush(self) -> None:
        with self._writing:
            self._flush_locked()

    def _flush_locked(self) -> None:
        # If this process dies between the two lines, the parent has the frames twice, and takes each job's end once.
        self._send_locked(self._cell.kept[: self._cell.words[KEPT]])
        self._cell.words[KEPT] = 0

    def _flush_if_free(self) -> None:
        """For signal handlers: whoever holds the lock may be this thread, below; the parent asks again at its next tick."""
        if self._cell.words[KEPT] and self._writing.acquire(blocking=False):
            try:
                self._flush_locked()
            finally:
                self._writing.release()

    def _fail(self, text: str) -> NoReturn:
        try:
            self._sock.sendall(channel.encode((channel.FAILED, text)))
        except ConnectionError:
            pass  # the parent is gone, and with it everybody who could be told
        leave(1)


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not tell, the most it ever was."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def leave(code: int) -> NoReturn:
    """End this process at once, without running what the fork server left to run at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed or absent; there is nobody left to tell
    os._exit(code)


def refuse_fork(pid: int, verb: str) -> None:
    """Raise in a process that a task has forked from the child ``pid``: the socket is not its own."""
    if os.getpid() != pid:
        raise UmbelError(
            f"{verb!r} cannot be done in a process that a task has forked; do it in the task itself,"
            " or start the process with subprocess or multiprocessing's spawn"
        )
