"""What the parent and one child know of each other without a system call: shared memory.

First 128 bytes of words, then the table of slots, then the frames that the child has not sent yet, which so survive its
death, then room for a stack. Every word has one writer, is eight bytes wide and aligned, and is copied whole by
``memoryview``: no word is ever torn.

Jobs are named by their *sequence number* in the child (1, 2, …), which only ascends, also when a job that was taken
back from one child goes to another. A child claims them in that order. One that runs a job at a time says all about it
in the words; one that runs many has a row for each in the table: the sequence number, and when its work began.
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
_WORDS: Final = 128
"""Bytes of words."""
_ROW: Final = 16
_STACK: Final = 1 << 14
"""Bytes for the stack that a child writes of itself when it is told to."""

CURRENT: Final = 0
"""Child: the job it claimed last. Never cleared. Of a child without table: it runs or is about to, unless ``DONE`` says
the same number. Of one with table: it runs or is about to, if it has a row."""
STARTED: Final = 1
"""Child without table: the monotonic clock when it claimed that job (a double). Written before ``CURRENT``, as a row is."""
DONE: Final = 2
"""Child without table: the job it finished or skipped last."""
RECALL: Final = 3
"""Parent: start no job up to this number."""
REQUEST: Final = 4
"""Parent: twice the number of the job to interrupt, plus one to cancel it rather than tell of its soft limit."""
KEPT: Final = 5
"""Child: how many bytes of frames it has kept back."""
ROWS: Final = 6
"""Child with table: how many rows of it were ever used."""
BEAT: Final = 7
"""Child with table: the monotonic clock (a double) when its loop last came round."""
STEP: Final = 8
"""Child with table: the job whose own code runs on its loop at this moment; 0: none, or it cannot tell."""
THREADS: Final = 9
"""Child with table: how many jobs run in threads of its own beside its loop."""

_FENCE = threading.Lock()


def fence() -> None:
    """A full memory fence: what was written before is visible to all before anything is read after.

    Python has none by name; taking a free lock is an atomic read-modify-write, which is one on every machine that
    CPython runs on.
    """
    with _FENCE:
        pass


@contextmanager
def shared_cell(rows: int = 1) -> Iterator[tuple[int, Cell]]:
    """A new cell of zeros, and the file descriptor by which another process maps it, open inside the block.

    Memory is taken for the rows that are used, not for those that there could be.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("umbel-children")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, _WORDS + _ROW * rows + KEEP + _STACK)
        yield fd, Cell(fd, rows)
    finally:
        os.close(fd)


class Cell:
    """The shared words, mapped into this process."""

    def __init__(self, fd: int, rows: int = 1) -> None:
        """``rows``: how many the table has, one at least, and the same number in both processes."""
        start = _WORDS + _ROW * rows
        self._stack = start + KEEP
        self._map = mmap.mmap(fd, self._stack + _STACK)
        self.file = os.dup(fd)
        """The shared memory as a file. Both processes' descriptors are of one open file, and have one position in it."""
        self._view = memoryview(self._map)
        self.words = self._view[:_WORDS].cast("Q")
        self.times = self._view[:_WORDS].cast("d")
        self.jobs = self._view[_WORDS:start].cast("Q")
        """The table: at ``2 * row`` a sequence number, 0 where the row is free."""
        self.begun = self._view[_WORDS:start].cast("d")
        """The table: at ``2 * row + 1`` the monotonic clock when it was claimed."""
        self.kept = self._view[start : self._stack]

    @property
    def running(self) -> int:
        """The job that a child without table has claimed and not ended; 0: none."""
        current = self.words[CURRENT]
        return 0 if self.words[DONE] == current else current

    def recall(self, last: int) -> int:
        """Parent: forbid the child to start any job up to ``last``; return the last one that it may have claimed.

        Dekker's handshake. The parent writes ``RECALL``, fences, reads ``CURRENT``; the child writes ``CURRENT``,
        fences, reads ``RECALL``. So at least one of them sees the other: a job above the returned number is never
        started, and the returned one either runs or is reported as skipped.
        """
        self.words[RECALL] = last
        fence()
        return self.words[CURRENT]

    def rows(self) -> dict[int, float]:
        """Parent: the jobs in the table, and when each was claimed. A row that changes meanwhile is left out.

        A row is freed before it is used again, so one whose number is the same before and after belongs to its time.
        """
        used = 2 * self.words[ROWS]
        before = self.jobs[:used:2].tolist()
        fence()
        begun = self.begun[1 : used + 1 : 2].tolist()
        fence()
        after = self.jobs[:used:2].tolist()
        return {job: since for job, since, again in zip(before, begun, after, strict=True) if job and job == again}

    def ask_for_stack(self) -> None:
        """Parent: let what the child writes into ``file`` from now on be read by ``stack``."""
        os.lseek(self.file, self._stack, os.SEEK_SET)

    def stack(self) -> str:
        """Parent: what the child has written since; empty if nothing."""
        end = os.lseek(self.file, 0, os.SEEK_CUR)
        return bytes(self._view[self._stack : end]).decode(errors="replace")

    def close(self) -> None:
        """Unmap."""
        os.close(self.file)
        for view in (self.words, self.times, self.jobs, self.begun, self.kept, self._view):
            view.release()
        self._map.close()
