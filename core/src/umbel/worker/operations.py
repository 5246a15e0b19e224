"""What may be asked of a worker while it runs: by remote control, and by plugins that hold the worker in a hook."""

from __future__ import annotations

import os
import resource
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from umbel.errors import NotSupported
from umbel.model import HeldTask, QueueSpec
from umbel.worker.limits import parse_rate

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

_REVOKED_KEPT: Final = 50_000


class Operations:
    """``worker.operations``. Every method belongs on the worker's I/O loop, where hooks and steps run; none blocks it.

    What is changed here holds for this worker until it ends: nothing is written to the settings.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._started = time.time()
        self.revoked: OrderedDict[str, None] = OrderedDict()
        """Ids of tasks that are not to run; the oldest are forgotten first."""

    # --- looking ---

    def held(self) -> Sequence[HeldTask]:
        """Everything that is claimed and not settled, oldest first."""
        running, wall = self._worker.pool.running(), self._worker.wall
        return [
            HeldTask(
                delivery=held.delivery,
                acknowledged=held.settled,
                started=wall(running[held.job_id].since) if held.job_id in running else None,
                pid=running[held.job_id].pid if held.job_id in running else None,
            )
            for held in self._worker.settlement.held.values()
        ]

    def active(self) -> Sequence[HeldTask]:
        """What runs."""
        return [task for task in self.held() if task.started is not None]

    def reserved(self) -> Sequence[HeldTask]:
        """What is claimed and waits for a slot. Delayed and rate-limited tasks are not here: they wait in the broker."""
        return [task for task in self.held() if task.started is None]

    def queues(self) -> Sequence[QueueSpec]:
        """The queues that are consumed now."""
        return [self._worker.gateway.spec(name) for name in self._worker.intake.queues]

    def stats(self) -> Mapping[str, Any]:
        """Figures of this worker as plain data."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        worker = self._worker
        poll = worker.intake.last_poll
        return {
            "total": worker.settlement.totals,
            "pid": os.getpid(),
            "uptime": int(time.time() - self._started),
            "pool": {"implementation": worker.settings.worker.pool, **worker.pool.stats()},
            "prefetch_count": worker.intake.credit.limit,
            "held": len(worker.settlement.held),
            "stale": worker.settlement.stale,
            "last_poll_age": None if poll is None else round(time.monotonic() - poll, 3),
            "rusage": {"utime": usage.ru_utime, "stime": usage.ru_stime, "maxrss": usage.ru_maxrss},
        }

    # --- tasks ---

    def revoke(self, task_ids: Sequence[str], *, terminate: bool = False) -> None:
        """Do not run these tasks, whenever they come; with ``terminate``, end those that run (by force, where it can)."""
        for task_id in task_ids:
            self.revoked[task_id] = None
            if len(self.revoked) > _REVOKED_KEPT:
                self.revoked.popitem(last=False)
        if terminate:
            chosen = set(task_ids)
            for held in list(self._worker.settlement.held.values()):
                if held.delivery.message.id in chosen:
                    self._worker.background(self._worker.pool.cancel(held.job_id, force=True))

    def rate_limit(self, task: str, rate: str | None) -> None:
        """Let this worker start ``task`` so often (``100/m``); None: without a limit.

        Raises ``UnknownTask``, ``SettingsError`` for a rate that cannot be read.
        """
        if rate is not None:
            parse_rate(rate)
        self._worker.app.tasks[task].override(rate_limit=rate)
        self._worker.intake.forget_rate(task)

    def time_limits(self, task: str, hard: float | None, soft: float | None = None) -> None:
        """Time limits in seconds of the calls of ``task`` that are claimed from now on; None: none.

        A call that was sent with limits of its own keeps those. Raises ``UnknownTask``, ``NotSupported`` for a limit that
        the pool cannot keep, ``ValueError`` for a soft limit beyond the hard one.
        """
        able = self._worker.pool.capabilities
        for limit, possible, what in ((hard, able.hard_limit, "hard"), (soft, able.soft_limit, "soft")):
            if limit and not possible:
                raise NotSupported(f"pool {self._worker.settings.worker.pool!r} cannot keep a {what} time limit")
        self._worker.app.tasks[task].override(time_limit=hard or None, soft_time_limit=soft or None)

    # --- the worker itself ---

    async def resize_pool(self, slots: int) -> None:
        """Change the number of slots, ``Worker.concurrency``; those too many end after the task they run.

        Raises ``NotSupported``, and ``ValueError`` below 1.
        """
        worker = self._worker
        if not worker.pool.capabilities.resize:
            raise NotSupported(f"pool {worker.settings.worker.pool!r} cannot change its size while it runs")
        if slots < 1:
            raise ValueError(f"a pool has 1 slot at least, not {slots}")
        await worker.pool.resize(slots)
        worker.concurrency = slots
        worker.intake.refill()

    async def add_queue(self, queue: str | QueueSpec) -> bool:
        """Consume one queue more, declared as given or as the settings describe it. False if it is consumed already.

        Raises ``PublishRefused`` where the broker has it otherwise, ``BrokerUnavailable``; then nothing has changed.
        """
        worker = self._worker
        spec = worker.gateway.spec(queue) if isinstance(queue, str) else queue
        await worker.gateway.describe(spec)
        if spec.name in worker.intake.queues:
            return False
        await worker.intake.consume_from([*worker.intake.queues, spec.name])
        return True

    async def cancel_queue(self, name: str) -> bool:
        """Consume a queue no more; what was claimed from it is run. False if it was not consumed."""
        queues = self._worker.intake.queues
        if name not in queues:
            return False
        await self._worker.intake.consume_from([queue for queue in queues if queue != name])
        return True

    def shutdown(self) -> None:
        """Stop as TERM does: give back what has not started, end what runs within the grace period; again: at once."""
        self._worker.request_stop()
