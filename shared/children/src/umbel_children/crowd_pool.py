"""The parent's side of children that run many jobs each: how slots are shared out, and loops that do not come round."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from attrs import Attribute, evolve, field, frozen

from umbel.errors import SettingsError
from umbel.model import Ending, Job
from umbel_children.cells import BEAT, STEP
from umbel_children.pool import ChildrenPool
from umbel_children.records import Child, Many, State

log = logging.getLogger(__name__)

_STACK_SECONDS: Final = 0.2
"""How long a child may take to write its stack."""


@frozen(kw_only=True)
class CrowdOptions:
    """``[worker.pool_options]`` of the pools whose children run many jobs each."""

    processes: int | None = field(default=None)
    """Child processes; ``[worker] concurrency`` is shared out among them. By default as many as there are processors, and
    no more than there are slots."""
    block_warning: float | None = field(default=1.0)
    """Seconds after which a child that does not come round, because one job computes or blocks, is logged with its stack.
    None: never."""
    loop_stall_limit: float | None = field(default=None)
    """Seconds after which a child that does not come round is killed: the task that keeps it ends as by a hard time limit of
    its own, what waits beside it runs again. None: never, it is only logged."""

    @processes.validator
    def _check_processes(self, attribute: object, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"processes is {value}: a pool needs 1 process at least")

    @block_warning.validator
    @loop_stall_limit.validator
    def _check_seconds(self, attribute: Attribute[float | None], value: float | None) -> None:
        if value is not None and value <= 0:
            raise ValueError(f"{attribute.name} is {value:g}: it is a number of seconds above 0, or absent for none")


class CrowdPool(ChildrenPool):
    """Runs jobs in child processes, many at once in each."""

    rows: ClassVar[int] = 1 << 14
    Options: ClassVar[type] = CrowdOptions

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        self._apart: deque[Job] = deque()
        """Jobs that wait for children of their own."""
        self._serves = False
        """Whether there are such jobs, or such children."""

    def shares(self, concurrency: int) -> Sequence[int]:
        """See ``ChildrenPool``: as even as can be. Raises ``SettingsError`` for more than a child can hold."""
        processes = min(self.options.processes or _cpus(), concurrency)
        each, more = divmod(concurrency, processes)
        shares = [each + (number < more) for number in range(processes)]
        if shares[0] > self.rows:
            needed = -(-concurrency // self.rows)
            raise SettingsError(
                [
                    f"[worker] concurrency is {concurrency} on {processes} processes, and one process of pool"
                    f" {self.name!r} holds {self.rows} jobs at most: set processes = {needed} in [worker.pool_options]"
                ]
            )
        return shares

    # --- jobs that run alone --------------------------------------------------------------------

    def not_apart(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """See ``ChildrenPool``. Where each child runs a job at a time, every job is alone."""
        if not any(job.alone for job in jobs) or max(self._brood.shares, default=1) == 1:
            return jobs
        self._apart.extend(job for job in jobs if job.alone)
        self._serves = True
        return [job for job in jobs if not job.alone]

    def _hand_out(self) -> None:
        if self._serves:
            self._serve_apart()
        super()._hand_out()

    def _serve_apart(self) -> None:
        """Give each job that is to run alone a child of its own, beside those that fill the slots; let used ones go."""
        if self._stopping:
            self._return_apart()
        now = time.monotonic()
        for child in [c for c in self._brood.children.values() if c.lone and c.state is State.READY and not c.out]:
            if self._apart and not child.finished:
                if child.stuck(now):
                    continue  # what was given to it was taken back; it gets it again when it comes round
                self._hand(child, [self._apart.popleft()])
                self._brood.watch()
            if not child.out:
                self._brood.release(child)
        self._brood.lone = len(self._apart)
        self._brood.fill()
        self._serves = bool(self._apart) or any(c.lone for c in self._brood.children.values())

    def _return_apart(self) -> None:
        while self._apart:
            self._end(self._apart.popleft(), Ending.RETURNED)

    @property
    def free(self) -> int:
        return super().free - len(self._apart)

    async def recall(self) -> None:
        await super().recall()
        self._return_apart()
        self._hand_out()

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        if job := next((job for job in self._apart if job.id == job_id), None):
            self._apart.remove(job)
            self._end(job, Ending.RETURNED)
            self._hand_out()
            return True
        return await super().cancel(job_id, force=force)

    def limit(self, job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
        for place, job in enumerate(self._apart):
            if job.id == job_id:
                self._apart[place] = evolve(job, time_limit=time_limit, soft_time_limit=soft_time_limit)
                return True
        return super().limit(job_id, time_limit=time_limit, soft_time_limit=soft_time_limit)

    # --- loops that do not come round -----------------------------------------------------------

    def look_into(self, child: Child, now: float) -> bool:
        """Log a loop that does not come round, once for each time, with the stack of its thread; kill it at its limit."""
        warning = self.options.block_warning
        if not isinstance(child, Many):
            return False
        if child.asked:
            child.insist()
        beat = child.cell.times[BEAT]
        limit = self.options.loop_stall_limit
        if limit is not None and now - beat >= limit:
            self._end_stalled(child, limit)
            return True
        if warning is None:
            return limit is not None or bool(child.asked)
        if child.blocked and beat != child.blocked:
            if child.warned:
                log.warning("pool %s: child %d goes on, after %.1f s", self.name, child.pid, beat - child.blocked)
            child.blocked, child.warned = 0.0, False
        if now - beat < warning:
            return True
        if not child.blocked:
            child.blocked = beat
            child.cell.ask_for_stack()
            child.server.signal(child.number, signal.SIGUSR2)
        elif not child.warned:
            stack = child.cell.stack()
            if stack or now - beat > warning + _STACK_SECONDS:
                child.warned = True
                self._warn(child, now - beat, stack)
        return True

    def _end_stalled(self, child: Many, limit: float) -> None:
        """The job whose step it is is to blame; where nobody can tell, all that ran."""
        step = child.cell.words[STEP]
        blamed = step if step in child.out else 0
        ending = Ending.TIMED_OUT if blamed else Ending.LOST
        self._kill(child, blamed, ending, f"its child's loop did not come round for {limit:g} s (loop_stall_limit)")

    def _warn(self, child: Many, seconds: float, stack: str) -> None:
        job = child.out.get(child.cell.words[STEP])
        culprit = f"task {job.task}" if job else "what a task has started, or a task that it cannot tell,"
        log.warning(
            "pool %s: %s has kept child %d from everything else for %.1f s, and %d more jobs wait there. It is at:\n%s",
            self.name,
            culprit,
            child.pid,
            seconds,
            len(child.out) - 1,
            _own_part(stack) or "(it does not say)",
        )


def _own_part(stack: str) -> str:
    """The lines above those of the loop and the pool, which are the same for all."""
    kept: list[str] = []
    for line in stack.splitlines():
        if any(
            f"/{name}" in line for name in ("umbel/ports/interruption.py", "umbel_children/", "asyncio/base_events.py")
        ):
            break
        kept.append(line)
    return "\n".join(kept)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
