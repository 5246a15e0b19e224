"""What may be asked of a worker while it runs: by remote control, and by plugins that hold the worker in a hook."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from umbel.errors import NotSupported
from umbel.model import HeldTask, QueueSpec, evolve
from umbel.revocation import GRACE, Revocation, revocations
from umbel.worker.admission import check_limits

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

_LIMITING: Final = ("rate_limit", "concurrency_limit", "time_limit", "soft_time_limit")
LIMITS: Final = (*_LIMITING, "rate_limit_scope", "concurrency_key")
"""The options of a task that limit it."""


class Operations:
    """``worker.operations``. Every method belongs on the worker's I/O loop, where hooks and steps run; none blocks it.

    What is changed here holds for this worker until it ends: nothing is written to the settings.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._started = time.time()

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
            "limit_slots": worker.slots.stats(),
            **worker.autoscale.stats(),
            "stale": worker.settlement.stale,
            "last_poll_age": None if poll is None else round(time.monotonic() - poll, 3),
            "rusage": {"utime": usage.ru_utime, "stime": usage.ru_stime, "maxrss": usage.ru_maxrss},
        }

    # --- tasks ---

    @property
    def revoked(self) -> Mapping[str, Revocation]:
        """By id: the tasks that are not to run."""
        return self._worker.revocations.ids

    def revocations(self) -> Sequence[Revocation]:
        """Everything that is revoked, by id, by name and by header, as far as this worker knows."""
        return self._worker.revocations.all()

    def revoke(
        self,
        task_ids: Sequence[str] = (),
        *,
        task: str | None = None,
        headers: Mapping[str, Any] | None = None,
        terminate: bool = False,
        grace: float = GRACE,
        expires: float | None = None,
    ) -> Mapping[str, Sequence[str]]:
        """Do not run these tasks, whenever they come; with ``terminate``, end those that run. See ``Control.revoke``.

        Kept in the result store soon, where that can: then it holds for every worker. Returns the ids of those that are
        ``running`` here, and of those ``waiting`` here for a slot. Raises ``ValueError``.
        """
        found: dict[str, list[str]] = {"running": [], "waiting": []}
        now = self._worker.app.clock.time()
        for revocation in revocations(
            task_ids, task=task, headers=headers, terminate=terminate, grace=grace, expires=expires, now=now
        ):
            for where, ids in self._worker.revocations.revoke(revocation, is_kept=False).items():
                found[where] += ids
        return found

    def rate_limit(self, task: str, rate: str | None, scope: str | None = None) -> None:
        """Let this worker start ``task`` so often (``100/m``); None: without a limit. What waits is looked at again within
        a minute, or the time between two starts if that is longer.

        ``scope``: ``worker``, or ``fleet``, where all workers are to be told the same; None: as it is. Raises
        ``UnknownTask``, ``SettingsError`` for a rate that cannot be read, ``NotSupported`` without a store for a fleet's.
        """
        changes = {"rate_limit": rate} if scope is None else {"rate_limit": rate, "rate_limit_scope": scope}
        self.change_limits(task, changes)

    def concurrency_limit(self, task: str, limit: int | None) -> None:
        """Let this worker take part in so many calls of ``task`` at once, for each key; None: without a limit.

        Every worker counts by its own limit, so all are to be told the same. Raises ``UnknownTask``, ``ValueError`` below
        1, ``NotSupported`` without a store that has claims.
        """
        self.change_limits(task, {"concurrency_limit": limit})

    def change_limits(self, task: str, changes: Mapping[str, Any]) -> None:
        """Change several limits of ``task`` at once, by the names of ``TaskOptions``; none, if one is refused.

        Raises as ``rate_limit``, ``concurrency_limit`` and ``time_limits``, ``ValueError`` for a name that is no limit's.
        """
        if unknown := changes.keys() - set(LIMITS):
            raise ValueError(f"{sorted(unknown)[0]!r} is no limit; limits are {', '.join(LIMITS)}")
        known = self._worker.app.tasks[task]
        wanted = evolve(known.options, **changes)
        check_limits(task, wanted, self._worker)
        if changes.keys() & {"time_limit", "soft_time_limit"}:
            self.time_limits(task, wanted.time_limit, wanted.soft_time_limit)
        known.override(**changes)
        self._worker.admission.limits_changed()

    def limits(self, tasks: Sequence[str] = ()) -> Mapping[str, Mapping[str, Any]]:
        """The limits in force here, by task: of ``tasks``, else of all that have any. Raises ``UnknownTask``."""
        registered = self._worker.app.tasks
        found = {
            name: {limit: getattr(registered[name].options, limit) for limit in LIMITS} for name in tasks or registered
        }
        return {name: limits for name, limits in found.items() if tasks or any(map(limits.get, _LIMITING))}

    def time_limits(self, task: str, hard: float | None, soft: float | None = None) -> None:
        """Time limits in seconds of the calls of ``task``, those that run or wait here included; None: none.

        They count from the start of a call: one that is over its new limit is ended at once. A call that was sent with limits
        of its own keeps those; one that runs in a pool that cannot change a limit (``Pool.limit``) keeps its former ones.
        Raises ``UnknownTask``, ``NotSupported`` for a limit that the pool cannot keep, ``ValueError`` for a soft limit beyond
        the hard one.
        """
        able = self._worker.pool.capabilities
        for limit, possible, what in ((hard, able.hard_limit, "hard"), (soft, able.soft_limit, "soft")):
            if limit and not possible:
                raise NotSupported(f"pool {self._worker.settings.worker.pool!r} cannot keep a {what} time limit")
        self._worker.time_limits.change(self._worker.app.tasks[task], hard, soft)

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

    def autoscale(self, least: int | None = None, most: int | None = None) -> Mapping[str, int]:
        """Let the number of slots follow the work between these bounds; None: as it is, or 1 and the present number.

        Returns ``min``, ``max`` and ``current``. Raises ``NotSupported`` for a pool whose size cannot change, ``ValueError``.
        """
        return self._worker.autoscale.change(least, most)

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
