"""The parent's side of children that run many jobs each: how slots are shared out, and loops that do not come round."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from typing import ClassVar, Final

from attrs import field, frozen

from umbel.errors import SettingsError
from umbel_children.cells import BEAT, STEP
from umbel_children.pool import ChildrenPool
from umbel_children.records import Child, Many

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

    @processes.validator
    def _check_processes(self, attribute: object, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"processes is {value}: a pool needs 1 process at least")

    @block_warning.validator
    def _check_block_warning(self, attribute: object, value: float | None) -> None:
        if value is not None and value <= 0:
            raise ValueError(f"block_warning is {value:g}: it is a number of seconds above 0, or absent for no warning")


class CrowdPool(ChildrenPool):
    """Runs jobs in child processes, many at once in each."""

    rows: ClassVar[int] = 1 << 14
    Options: ClassVar[type] = CrowdOptions

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

    def look_into(self, child: Child, now: float) -> bool:
        """Log a loop that does not come round, once for each time, with the stack of its thread."""
        warning = self.options.block_warning
        if not isinstance(child, Many):
            return False
        if child.asked:
            child.insist()
        if warning is None:
            return bool(child.asked)
        beat = child.cell.times[BEAT]
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
