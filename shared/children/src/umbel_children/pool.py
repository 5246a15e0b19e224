"""The pool whose children are processes that a clean fork server makes: the parent's side, the same for every runner."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from attrs import evolve

from umbel.capabilities import PoolCapabilities
from umbel.errors import NotSupported
from umbel.model import Completion, Ending, Job, make_completion
from umbel.ports.pool import Pool, PoolContext, Running
from umbel_children import channel
from umbel_children.brood import EXIT_SECONDS, TICK, Brood
from umbel_children.cells import KEPT
from umbel_children.channel import Frame, encode
from umbel_children.estimates import BATCH_JOBS, BATCH_SECONDS, Estimates
from umbel_children.records import PATIENCE, Child, State
from umbel_children.runner import Nature


class ChildrenPool(Pool):
    """Runs jobs in child processes, in each by the runner that a subclass names, one or many at a time.

    A task that crashes, leaks or hangs takes along only its own child, which is replaced at once. What had finished in
    it before is reported all the same. What ran beside it is ``Ending.COLLATERAL`` where it is known who ended the child,
    and as lost as itself where that is not known.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    capabilities = PoolCapabilities(
        soft_limit=True, hard_limit=True, cancel_running=True, recycle=True, resize=True, isolated=True
    )
    runner: ClassVar[str]
    """Dotted path of the subclass of ``umbel_children.runner.Runner`` that runs the jobs of each child."""
    rows: ClassVar[int] = 1
    """The most jobs that one child may hold at once. 1: it runs a job at a time."""

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        self._brood = Brood(self.name, self._on_frames, self._on_death, self._look_after)
        self._pending: deque[Job] = deque()
        self._ended: list[Completion] = []
        self._changed = asyncio.Event()
        self._estimates = Estimates()
        self._stopping: asyncio.Task[None] | None = None
        self._stop_at = float("inf")
        self._over = False

    # --- for subclasses -------------------------------------------------------------------------

    def shares(self, concurrency: int) -> Sequence[int]:
        """How many jobs each child may run at once, for so many slots in all; one entry a child, each up to ``rows``."""
        return [1] * concurrency

    def runner_options(self) -> Mapping[str, Any]:
        """What each child is told: plain data."""
        return {}

    def look_into(self, child: Child, now: float) -> bool:
        """Called at each look, about every 20 ms, at a child that runs jobs; whether to look again without other reason."""
        return False

    def not_apart(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Those of ``jobs`` that any child may take. A child of one job runs it alone as it is."""
        return jobs

    # --- the port -------------------------------------------------------------------------------

    async def start(self, context: PoolContext) -> None:
        """Start the fork server and the children. See ``Pool.start``. Needs ``fork``."""
        if not hasattr(os, "fork"):
            raise NotSupported(f'pool "{self.name}" needs a system with fork; set worker.pool = "threads"')
        nature = Nature(
            pool=self.name,
            runner=self.runner,
            rows=self.rows,
            options=self.runner_options(),
            max_tasks=context.max_tasks_per_child,
            max_memory=context.max_memory_per_child,
        )
        try:
            await self._brood.open(context, nature, self.shares(context.concurrency))
        except BaseException:
            await self.stop(timeout=0)
            raise

    def submit(self, jobs: Sequence[Job]) -> None:
        self._pending.extend(self.not_apart(jobs))
        self._hand_out()

    @property
    def free(self) -> int:
        if self._stopping:
            return 0
        reserve, now = self._estimates.reserve, time.monotonic()
        # A child that starts will soon be ready, unless children fail to start.
        takers = [
            c
            for c in self._brood.filling()
            if (c.state is State.READY or not self._brood.failures) and not c.stuck(now)
        ]
        return sum([c.slots + min(c.slots * reserve, BATCH_JOBS * 2) - len(c.out) for c in takers]) - len(self._pending)

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        """See ``Pool.completions``. An empty batch says that ``free`` has grown for another reason: a child is ready."""
        while self._ended or not self._over:
            await self._changed.wait()
            self._changed.clear()
            batch, self._ended = self._ended, []
            yield batch

    async def recall(self) -> None:
        for child in self._brood.children.values():
            self._put_back(child)
            child.recalled = child.handed
        while self._pending:
            self._end(self._pending.popleft(), Ending.RETURNED)

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        """See ``Pool.cancel``. True: the end of the job has been set going, and is told by its completion.

        The exception is raised once. A task that catches it and returns ends as DONE all the same; one whose executor
        lets it through, because it came just before or after the user's code, ends as CANCELLED.
        """
        child = next((child for child in self._brood.children.values() if child.find(job_id)), None)
        sequence = child.find(job_id) if child else 0
        if child:
            self._put_back(child)
        going = True
        if job := next((job for job in self._pending if job.id == job_id), None):
            self._pending.remove(job)
            self._end(job, Ending.RETURNED)
        elif child is None or child.has_ended(sequence):
            going = False
        elif force:
            self._kill(child, sequence, Ending.CANCELLED, "cancelled by force")
        else:
            child.interrupt(sequence, cancel=True)
            self._brood.watch()
        self._hand_out()
        return going

    def limit(self, job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
        def limited(job: Job) -> Job:
            return evolve(job, time_limit=time_limit, soft_time_limit=soft_time_limit)

        for place, job in enumerate(self._pending):
            if job.id == job_id:
                self._pending[place] = limited(job)
                return True
        for child in self._brood.children.values():
            if sequence := child.find(job_id):
                child.out[sequence] = limited(child.out[sequence])
                self._brood.watch()
                return not child.has_ended(sequence)
        return False

    async def resize(self, concurrency: int) -> None:
        shares = self._brood.shares = list(self.shares(concurrency))
        # Those to keep first: the busy ones, then the ready ones.
        kept = sorted(self._brood.filling(), key=lambda c: (-len(c.out), c.state is State.STARTING))
        for child in kept[len(shares) :]:
            self._dismiss(child)
        for child, share in zip(kept, shares, strict=False):
            if child.slots != share:
                child.slots = share
                child.channel.send(encode((channel.SLOTS, share)))
                self._put_back(child)
        self._brood.fill()
        self._hand_out()

    async def stop(self, *, timeout: float) -> None:
        self._stop_at = min(self._stop_at, time.monotonic() + timeout)
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        self._brood.stir()
        await asyncio.shield(self._stopping)

    def running(self) -> Mapping[int, Running]:
        found: dict[int, Running] = {}
        for child in self._brood.children.values():
            for sequence, since in child.running().items():
                if (job := child.out.get(sequence)) is not None:
                    found[job.id] = Running(since=since, pid=child.pid)
        return found

    def stats(self) -> Mapping[str, Any]:
        brood = self._brood
        return {
            "implementation": self.name,
            "max-concurrency": sum(brood.shares),
            "processes": [child.pid for child in brood.children.values() if child.pid],
            "fork-server": brood.server.pid if brood.server else None,
        }

    async def _stop(self) -> None:
        self._brood.stop_making()
        await self.recall()
        for child in list(self._brood.children.values()):
            self._dismiss(child)
        while not await self._brood.wait(self._stop_at) and time.monotonic() < self._stop_at:
            pass
        for child in list(self._brood.children.values()):
            self._kill(child, 0, Ending.CANCELLED, "the worker stopped before the task had ended")
        while not await self._brood.wait(time.monotonic() + EXIT_SECONDS):
            pass
        await self._brood.close()
        self._over = True
        self._changed.set()

    # --- handing out ----------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give waiting jobs to the children that have room, the idle ones first, to each its share."""
        if self._stopping:
            while self._pending:
                self._end(self._pending.popleft(), Ending.RETURNED)
        if not self._pending:
            return
        now = time.monotonic()
        takers = [
            child
            for child in self._brood.filling()
            if child.state is State.READY and self._room(child) > 0 and not child.stuck(now)
        ]
        takers.sort(key=lambda child: len(child.out) / child.slots)
        for position, child in enumerate(takers):
            share = -(-len(self._pending) // (len(takers) - position))
            self._give(child, min(share, self._room(child)))
        self._brood.watch()

    def _room(self, child: Child) -> int:
        room = max(BATCH_JOBS, child.slots) - len(child.out)
        if self._brood.context.max_tasks_per_child:
            room = min(room, self._brood.context.max_tasks_per_child - child.finished - len(child.out))
        return room

    def _give(self, child: Child, most: int) -> None:
        pending, seconds = self._pending, self._estimates.seconds
        batch: list[Job] = []
        idle = min(most, len(pending), child.slots - len(child.out))
        while len(batch) < idle:
            batch.append(pending.popleft())
        if pending and len(batch) < most:
            work = sum([seconds(job.task) for job in child.out.values()]) + sum([seconds(job.task) for job in batch])
            while pending and len(batch) < most:
                work += seconds(pending[0].task)
                if work > BATCH_SECONDS * child.slots:
                    break
                batch.append(pending.popleft())
        self._hand(child, batch)

    def _hand(self, child: Child, batch: list[Job]) -> None:
        try:
            data = encode((channel.JOBS, child.handed + 1, [job.payload for job in batch]))
        except ValueError:
            batch = [job for job in batch if self._plain(job)]
            data = encode((channel.JOBS, child.handed + 1, [job.payload for job in batch]))
        if batch:
            child.hand(batch, data)
            self._brood.failures = 0

    def _plain(self, job: Job) -> bool:
        try:
            encode(job.payload)
        except ValueError as error:
            self._end(job, Ending.LOST, f"its payload is not plain data and cannot be sent to a child: {error}")
            return False
        return True

    def _put_back(self, child: Child) -> None:
        """Take back what the child has not started, for other slots."""
        self._pending.extendleft(reversed(self.not_apart(child.take_back())))

    def _end(
        self, job: Job, ending: Ending, detail: str = "", runtime: float = 0.0, payload: tuple[Any, ...] | None = None
    ) -> None:
        self._ended.append(make_completion(job.id, ending, payload, detail, runtime))
        self._changed.set()

    # --- news from the children -----------------------------------------------------------------

    def _on_frames(self, child: Child, frames: Sequence[Frame]) -> None:
        for frame in frames:
            kind = frame[0]
            if kind == channel.ENDED:
                self._on_ended(child, *frame[1:])
            elif kind == channel.UPCALL:
                task = asyncio.create_task(child.answer(self._brood.context.upcall, *frame[1:]))
                child.upcalls.add(task)
                task.add_done_callback(child.upcalls.discard)
            elif kind == channel.READY:
                self._changed.set()
            elif kind == channel.RETIRING:
                self._put_back(child)
            elif kind == channel.FULL:
                self._dismiss(child)
        self._let_go_when_spent(child)
        if child.state is State.LEAVING and not child.out:
            self._brood.release(child)
        self._hand_out()

    def _let_go_when_spent(self, child: Child) -> None:
        """A child of many jobs that has begun all that it may is replaced while they go on. One of one job sees to itself."""
        most = self._brood.context.max_tasks_per_child
        if most and self.rows > 1 and child.finished + len(child.out) >= most and child.begun_all():
            self._dismiss(child)

    def _on_ended(
        self,
        child: Child,
        sequence: int,
        runtime: float,
        payload: tuple[Any, ...] | None,
        other: tuple[str, str] | None,
    ) -> None:
        job = child.ended(sequence)
        if job is None:
            return  # skipped, and taken back when the recall was written; or told twice by a child that died telling
        if other is None:
            child.finished += 1
            self._estimates.learn(job.task, runtime)
            self._end(job, Ending.DONE, runtime=runtime, payload=payload)
        elif other[0] == Ending.RETURNED.value and child.wanted(sequence):
            self._pending.extendleft(self.not_apart([job]))
        else:
            ending = Ending(other[0])
            child.finished += ending is not Ending.RETURNED
            self._end(job, ending, other[1], runtime)

    def _on_death(self, child: Child, how: str) -> None:
        for job, ending, detail, runtime in child.fates(how):
            if ending not in (Ending.RETURNED, Ending.COLLATERAL):
                self._estimates.forget(job.task)
            self._end(job, ending, detail, runtime)
        self._hand_out()

    # --- limits ---------------------------------------------------------------------------------

    def _kill(self, child: Child, sequence: int, ending: Ending, detail: str) -> None:
        """Kill a child that runs this job, which then ends so; what runs beside it is collateral (0: all of it ends so).

        What it has not started is taken back first, and with the same stroke it cannot start anything more. So if it
        is still at this job afterwards, the signal hits this job or none, however late it comes.
        """
        self._put_back(child)
        if child.state is not State.KILLED and (not sequence or sequence in child.running()):
            child.verdict, child.blamed = (ending, detail), sequence
            self._brood.kill(child)

    def _dismiss(self, child: Child) -> None:
        """Let a child go after the job that it runs."""
        if child.state is State.STARTING:
            self._kill(child, 0, Ending.CANCELLED, "")
        elif child.state is State.READY:
            child.state = State.LEAVING
            self._put_back(child)
            if not child.out:
                self._brood.release(child)
            self._brood.fill()

    def _look_after(self, child: Child, now: float) -> bool:
        needed, longest, known = False, 0.0, 0
        for sequence, since in child.running().items():
            if (job := child.out.get(sequence)) is None:
                continue
            known += 1
            elapsed = now - since
            longest = max(longest, elapsed)
            if job.time_limit is not None and elapsed >= job.time_limit:
                self._kill(child, sequence, Ending.TIMED_OUT, f"hard time limit of {job.time_limit:g} s")
                break
            if job.soft_time_limit is not None and elapsed >= job.soft_time_limit:
                child.interrupt(sequence, cancel=False)
            needed = needed or job.time_limit is not None or job.soft_time_limit is not None
        before, child.deaf = child.deaf, child.stuck(now)
        if before and not child.deaf:
            self._changed.set()  # it takes jobs again
        if known:
            child.quiet = 0
            needed = self.look_into(child, now) or needed or known < len(child.out)
        else:
            needed = bool(child.out)
            child.quiet = child.quiet + 1 if child.out or child.deaf else 0
            if child.quiet * TICK >= EXIT_SECONDS:
                self._kill(child, 0, Ending.LOST, f"its process did not react for {EXIT_SECONDS:g} s")
        self._let_go_when_spent(child)
        if child.deaf or longest >= PATIENCE:
            self._put_back(child)
            if child.cell.words[KEPT]:
                child.server.signal(child.number, signal.SIGUSR1)
        self._hand_out()
        return needed or child.deaf
