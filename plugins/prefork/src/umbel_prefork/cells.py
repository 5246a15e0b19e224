"""What the parent and one child know of each other without a system call: shared memory.

First 64 bytes of words, then the frames that the child has not sent yet, which so survive its death. Every word has one
writer, is eight bytes wide and aligned, and is copied whole by ``memoryview``: no word is ever torn.

Jobs are named by their *sequence number* in the child (1, 2, …), which only ascends, also when a job that was taken
back from one child goes to another.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

KEEP: Final = 1 << 15
"""Bytes of frames that a child can keep back."""
_SIZE: Final = 64 + KEEP

CURRENT: Final = 0
"""Child: the job it claimed last. Never cleared; it runs or is about to, unless ``DONE`` says the same number."""
STARTED: Final = 1
"""Child: the monotonic clock when it claimed that job (a double). Written before ``CURRENT``."""
DONE: Final = 2
"""Child: the job it finished or skipped last."""
RECALL: Final = 3
"""Parent: start no job up to this number."""
REQUEST: Final = 4
"""Parent: twice the number of the job to interrupt, plus one to cancel it rather than tell of its soft limit."""
KEPT: Final = 5
"""Child: how many bytes of frames it has kept back."""

_FENCE = threading.Lock()


def fence() -> None:
    """A full memory fence: what was written before is visible to all before anything is read after.

    Python has none by name; taking a free lock is an atomic read-modify-write, which is one on every machine that
    CPython runs on.
    """
    with _FENCE:
        pass


@contextmanager
def shared_cell() -> Iterator[tuple[int, Cell]]:
    """A new cell of zeros, and the file descriptor by which another process maps it, open inside the block."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("umbel-prefork")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, _SIZE)
        yield fd, Cell(fd)
    finally:
        os.close(fd)


class Cell:
    """The shared words, mapped into this process."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _SIZE)
        self._view = memoryview(self._map)
        self.words = self._view[:64].cast("Q")
        self.times = self._view[:64].cast("d")
        self.kept = self._view[64:]

    @property
    def running(self) -> int:
        """The job that the child has claimed and not ended; 0: none."""
        current = self.words[CURRENT]
        return 0 if self.words[DONE] == current else current

    def recall(self, last: int) -> int:
        """Parent: forbid the child to start any job up to ``last``; return the last one that it may have started.

        Dekker's handshake. The parent writes ``RECALL``, fences, reads ``CURRENT``; the child writes ``CURRENT``,
        fences, reads ``RECALL``. So at least one of them sees the other: a job above the returned number is never
        started, and the returned one either runs or is reported as skipped.
        """
        self.words[RECALL] = last
        fence()
        return self.words[CURRENT]

    def close(self) -> None:
        """Unmap."""
        for view in (self.words, self.times, self.kept, self._view):
            view.release()
        self._map.close()
