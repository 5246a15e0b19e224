"""How a coroutine is told of its soft time limit, or cancelled: for pools and executors that run tasks on event loops.

asyncio can cancel a task, and no more. What is raised here is a cancellation, so that locks, groups and timeouts clean up as
after any; and it is what was asked for, so that a task can catch ``SoftTimeLimitExceeded`` as it does everywhere.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator, Mapping, MutableSequence
from typing import Any, Final, TypeVar

from umbel import errors

T = TypeVar("T")


class SoftTimeLimitExceeded(errors.SoftTimeLimitExceeded, asyncio.CancelledError):
    """Raised in a coroutine when its soft time limit passes."""

    __module__ = errors.__name__


class TaskCancelled(errors.TaskCancelled, asyncio.CancelledError):
    """Raised in a coroutine when it is cancelled."""

    __module__ = errors.__name__


_RAISED: Final[Mapping[type[BaseException], type[asyncio.CancelledError]]] = {
    errors.SoftTimeLimitExceeded: SoftTimeLimitExceeded,
    errors.TaskCancelled: TaskCancelled,
}


class Interruptible:
    """A coroutine in an asyncio task of its own. For the thread of its loop."""

    __slots__ = ("_wanted", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        """The task that awaits ``steps``; to be set before it runs, or by itself."""
        self._wanted: type[asyncio.CancelledError] | None = None

    def interrupt(self, exception: type[BaseException]) -> None:
        """Raise ``exception`` of ``umbel.errors``, soft limit or cancellation, where the coroutine waits."""
        if self.task is not None and not self.task.done():
            self._wanted = _RAISED[exception]
            self.task.cancel()

    @types.coroutine
    def steps(
        self, coroutine: Coroutine[Any, Any, T], words: MutableSequence[int] | memoryview[int], place: int, mark: int
    ) -> Generator[Any, Any, T]:
        """As ``yield from coroutine``. While code of the coroutine runs, ``words[place]`` is ``mark``, and 0 while it waits."""
        send, throw = coroutine.send, coroutine.throw
        error: BaseException | None = None
        while True:
            try:
                words[place] = mark
                waits_for = send(None) if error is None else throw(error)
            except StopIteration as stop:
                value: T = stop.value
                return value
            finally:
                words[place] = 0
            try:
                yield waits_for
                error = None
            except asyncio.CancelledError as cancellation:
                error = cancellation
                if self._wanted is not None:
                    error, self._wanted = self._wanted(), None
                    if self.task is not None:
                        self.task.uncancel()
            except BaseException as failure:
                error = failure


def unwrapped(error: BaseException) -> BaseException:
    """``error``, or the interruption in a group that holds nothing else.

    A task group of Python 3.11 wraps what interrupts its body, for it knows a cancellation by the very class only.
    """
    inner = error
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner if isinstance(inner, (SoftTimeLimitExceeded, TaskCancelled)) else error
