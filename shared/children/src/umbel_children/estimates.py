"""How long work takes, measured: what decides how many jobs travel together and how many wait at hand."""

from __future__ import annotations

import math
from typing import Final

BATCH_SECONDS: Final = 0.02
"""Predicted work that one child may hold. A longer job travels alone. The worker takes on up to 500 messages at once, in 10 ms or
more, and ends as many: with 10 ms of work at hand children idle meanwhile (11,000 empty tasks/s on RabbitMQ, and 15,000 so)."""
BATCH_JOBS: Final = 1024
RESERVE_SECONDS: Final = 0.06
"""Predicted work that waits at hand for each slot, so that it does not idle while the worker fetches more."""
RESERVE_JOBS: Final = 1024
_MOST_TASKS: Final = 4096


class Estimates:
    """Moving averages of the runtime: of each task, and of the whole mixture."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._mean = math.inf

    def learn(self, task: str, runtime: float) -> None:
        """A job of ``task`` took ``runtime`` seconds. Quick to believe that it is slow, slow to believe it is quick."""
        known = self._seconds.get(task)
        if known is None:
            if len(self._seconds) >= _MOST_TASKS:
                self._seconds.clear()
            self._seconds[task] = runtime
        else:
            self._seconds[task] = known + (runtime - known) * (0.5 if runtime > known else 0.1)
        self._mean = runtime if self._mean == math.inf else self._mean + (runtime - self._mean) * 0.05

    def forget(self, task: str) -> None:
        """A job of ``task`` killed its child: let the next ones travel alone, so that nobody suffers with them."""
        self._seconds.pop(task, None)

    def seconds(self, task: str) -> float:
        """Predicted runtime; infinite for a task that is not known."""
        return self._seconds.get(task, math.inf)

    @property
    def reserve(self) -> int:
        """How many jobs should wait at hand for each slot."""
        return min(RESERVE_JOBS, int(RESERVE_SECONDS / max(self._mean, 1e-6)))
