"""One job on the main thread: the mutable record of its execution, and the window in which it may be interrupted."""

from __future__ import annotations

import enum
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from attrs import define, field

from umbel.errors import TaskCancelled
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import Executor


class Window(enum.Enum):
    """Whether a job may be interrupted. It only ever moves on."""

    AHEAD = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


@define(eq=False)
class Run:
    """One job. The I/O loop aims at it; the signal handler, on the main thread, raises what was aimed, or nothing."""

    job: Job
    window: Window = Window.AHEAD
    cancelled: bool = False
    """Written before ``window`` is read by who cancels; read after ``window`` is opened by who runs: one of them sees."""
    aimed: deque[type[BaseException]] = field(factory=deque)
    begun: bool = False
    since: float = 0.0
    payload: Any = None
    error: BaseException | None = None
    runtime: float = 0.0

    def work(self, executor: Executor) -> None:
        """Run the job to its end. Raises nothing, whatever the job does.

        A job is interrupted twice at most, by its soft limit and by a cancel, and either may land just before the
        window is closed: hence three layers, the last of which nothing can reach.
        """
        self.since = started = time.monotonic()
        try:
            try:
                try:
                    self.window = Window.OPEN
                    if self.cancelled:
                        raise TaskCancelled
                    self.begun = True
                    self.payload = executor.execute(self.job.payload)
                finally:
                    self.window = Window.CLOSED
            except BaseException as error:
                self.window = Window.CLOSED
                self.error = error
        except BaseException as error:
            self.window = Window.CLOSED
            self.error = error
        self.runtime = time.monotonic() - started

    def land(self, waits_itself: Callable[[int, type[BaseException]], bool] | None) -> None:
        """Raise the strongest of what was aimed at this job, unless it is over. In the signal handler only.

        ``waits_itself``: the executor's own way, for a job that waits on an event loop of this thread.
        """
        exception: type[BaseException] | None = None
        while self.aimed:
            aimed = self.aimed.popleft()
            exception = aimed if exception is not TaskCancelled else exception
        if exception is None or self.window is not Window.OPEN:
            return
        if not (waits_itself and waits_itself(threading.get_ident(), exception)):
            raise exception

    def completion(self) -> Completion:
        """How it ended. A payload is a payload, even if an interruption came too late to matter."""
        ending, detail = Ending.DONE, ""
        if not self.begun:
            ending = Ending.RETURNED
        elif self.payload is None:
            interrupted = self.cancelled and isinstance(self.error, TaskCancelled)
            ending = Ending.CANCELLED if interrupted else Ending.LOST
            detail = "the executor returned None" if self.error is None else _in_one_line(self.error)
        return Completion(job_id=self.job.id, ending=ending, payload=self.payload, detail=detail, runtime=self.runtime)


def _in_one_line(error: BaseException) -> str:
    """Type and text; never raises, although ``str(error)`` may."""
    return traceback.format_exception_only(error)[-1].strip()
