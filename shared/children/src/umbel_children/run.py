"""One job in a thread: the mutable record of its execution, and the window in which it may be interrupted.

How an interruption comes, by another thread or by a signal, is the business of whoever runs it.
"""

from __future__ import annotations

import enum
import traceback
from typing import Any

from attrs import define

from umbel.errors import TaskCancelled
from umbel.model import Completion, Ending, Job


class Window(enum.Enum):
    """Whether a job may be interrupted. It only ever moves on."""

    AHEAD = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


@define(eq=False)
class Execution:
    """One job in one thread."""

    job: Job
    window: Window = Window.AHEAD
    cancelled: bool = False
    """Written before ``window`` is read by who cancels; read after ``window`` is opened by who runs: one of them sees."""
    begun: bool = False
    since: float = 0.0
    payload: Any = None
    error: BaseException | None = None
    runtime: float = 0.0

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
