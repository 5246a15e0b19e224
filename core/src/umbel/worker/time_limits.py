"""Time limits that are changed while the worker runs: for what comes, what waits here, and what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from umbel.errors import DecodeError
from umbel.protocol import read_limits

if TYPE_CHECKING:
    from umbel.task import Task
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

Limits = tuple[float | None, float | None]
"""Hard and soft, in seconds."""


class TimeLimits:
    """``worker.time_limits``. Lives on the I/O loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._former: dict[str, set[Limits]] = {}
        """By task: what its limits were before they were changed here."""

    def called(self, task: str, header: Any, own: Limits) -> Limits:
        """The limits of a call whose header ``timelimit`` says something; ``own``: the task's.

        Senders write the task's own limits into it as they know them, so what was the task's limit before it was changed
        here is none of the call's own. A header that cannot be read says nothing: the executor refuses the message.
        """
        try:
            hard, soft = read_limits(header)
        except DecodeError:
            return own
        for former_hard, former_soft in self._former.get(task, ()):
            hard = None if hard == former_hard else hard
            soft = None if soft == former_soft else soft
        return hard or own[0], soft or own[1]

    def change(self, task: Task[..., Any], hard: float | None, soft: float | None) -> None:
        """Set the limits of ``task``, None: none; calls that are here get them too. Raises ``ValueError``."""
        before = task.options
        task.override(time_limit=hard or None, soft_time_limit=soft or None)
        self._former.setdefault(task.name, set()).add((before.time_limit, before.soft_time_limit))
        for held in list(self._worker.settlement.held.values()):
            if held.delivery.message.task == task.name and held.concluding is None:
                held.options = task.options
                self._tell_pool(held)

    def _tell_pool(self, held: Held) -> None:
        job = self._worker.settlement.job(held)
        self._worker.pool.limit(held.job_id, time_limit=job.time_limit, soft_time_limit=job.soft_time_limit)
