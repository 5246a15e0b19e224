"""One job on the main thread, and the signal that may interrupt it there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from attrs import define, field

from umbel.errors import TaskCancelled
from umbel.ports.pool import Executor
from umbel_children.run import Execution, Window


@define(eq=False)
class Run(Execution):
    """One job. The I/O loop aims at it; the signal handler, on the main thread, raises what was aimed, or nothing."""

    aimed: deque[type[BaseException]] = field(factory=deque)

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
