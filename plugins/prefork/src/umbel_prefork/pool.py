"""The default pool: user code in child processes that a clean fork server makes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final

from umbel.capabilities import PoolCapabilities
from umbel.errors import NotSupported, UmbelError
from umbel.model import Completion, Ending, Job
from umbel.ports.pool import Pool, PoolContext

from umbel_prefork import channel, errors
from umbel_prefork.cells import DONE, shared_cell
from umbel_prefork.channel import Channel, encode
from umbel_prefork.estimates import BATCH_JOBS, BATCH_SECONDS, Estimates
from umbel_prefork.session import EXIT_SECONDS, Child, ForkServer, State, describe_exit

log = logging.getLogger(__name__)

TICK: Final = 0.02
"""Seconds between two looks at the cells, while a job is out that needs it."""
PATIENCE: Final = 0.05
"""A job that runs longer has the jobs behind it taken back for other slots."""
BACKOFF: Final = 5.0
"""The most seconds between two tries to start what does not start."""
SPAWNS: Final = 16
"""The most requests for a child that wait at the fork server: a socket takes only so many file descriptors."""
ORPHAN_SECONDS: Final = 1.0
"""How long the end of children is awaited whose fork server is dead."""


class PreforkPool(Pool):
    """Runs each job in a child process; one job at a time in each.

    A task that crashes, leaks or hangs takes along only its own child, which is replaced at once. Jobs that finished
    less than a millisecond before a crash in the same child, and were not reported yet, are LOST with it.
    """

    name: ClassVar[str] = "prefork"
    capabilities = PoolCapabilities(
        soft_limit=True, hard_limit=True, cancel_running=True, recycle=True, resize=True, isolated=True
    )

    _context: PoolContext
    _loop: asyncio.AbstractEventLoop
    _first: asyncio.Future[None]

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        self._slots = 0
        self._server: ForkServer | None = None
        self._children: dict[int, Child] = {}
        self._numbers = 0
        self._pending: deque[Job] = deque()
        self._ended: list[Completion] = []
        self._changed = asyncio.Event()
        self._estimates = Estimates()
        self._timer: asyncio.TimerHandle | None = None
        self._failures = 0
        self._start_again_at = 0.0
        self._rebuilding: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._stop_at = float("inf")
        self._stirred = asyncio.Event()
        self._over = False

    # --- the port -------------------------------------------------------------------------------

    async def start(self, context: PoolContext) -> None:
        """Start the fork server and the children. See ``Pool.start``. Needs ``fork``."""
        if not hasattr(os, "fork"):
            raise NotSupported('pool "prefork" needs a system with fork; set worker.pool = "threads"')
        self._context = context
        self._slots = context.concurrency
        self._loop = asyncio.get_running_loop()
        self._first = self._loop.create_future()
        try:
            await self._open_session()
            await self._first
        except BaseException:
            await self.stop(timeout=0)
            raise

    def submit(self, jobs: Sequence[Job]) -> None:
        self._pending.extend(jobs)
        if self._stopping:
            self._return_pending()
        else:
            self._hand_out()

    @property
    def free(self) -> int:
        if self._stopping:
            return 0
        wanted = 1 + self._estimates.reserve
        # A child that starts will soon be ready, unless children fail to start.
        slots = [c for c in self._filling() if c.state is State.READY or not self._failures]
        return sum([wanted - len(c.out) for c in slots]) - len(self._pending)

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        """See ``Pool.completions``. An empty batch says that ``free`` has grown for another reason: a child is ready."""
        while self._ended or not self._over:
            await self._changed.wait()
            self._changed.clear()
            batch, self._ended = self._ended, []
            yield batch

    async def recall(self) -> None:
        self._return_pending()
        for child in self._children.values():
            for job in child.take_back():
                self._end(job, Ending.RETURNED)
            child.unwanted.update(child.out)

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        """See ``Pool.cancel``. True: the end of the job has been set going, and is told by its completion.

        The exception is raised once. A task that catches it and returns ends as DONE all the same; one whose executor
        lets it through, because it came just before or after the user's code, ends as CANCELLED.
        """
        for job in self._pending:
            if job.id == job_id:
                self._pending.remove(job)
                self._end(job, Ending.RETURNED)
                return True
        for child in self._children.values():
            if sequence := child.find(job_id):
                return self._cancel(child, sequence, force=force)
        return False

    async def resize(self, concurrency: int) -> None:
        self._slots = concurrency
        # Those to keep first: the busy ones, then the ready ones.
        kept = sorted(self._filling(), key=lambda c: (-len(c.out), c.state is State.STARTING))
        for child in kept[concurrency:]:
            self._dismiss(child)
        self._fill()
        self._hand_out()

    async def stop(self, *, timeout: float) -> None:
        self._stop_at = min(self._stop_at, time.monotonic() + timeout)
        self._stirred.set()
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    def stats(self) -> Mapping[str, Any]:
        return {
            "implementation": self.name,
            "max-concurrency": self._slots,
            "processes": [child.pid for child in self._children.values() if child.pid],
            "fork-server": self._server.pid if self._server else None,
        }

    # --- handing out ----------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give waiting jobs to the children that have room, the idle ones first, to each its share."""
        if not self._pending:
            return
        takers = [child for child in self._children.values() if child.state is State.READY and self._room(child) > 0]
        takers.sort(key=lambda child: len(child.out))
        for position, child in enumerate(takers):
            if not self._pending:
                break
            share = -(-len(self._pending) // (len(takers) - position))
            self._give(child, min(share, self._room(child)))
        self._arm()

    def _room(self, child: Child) -> int:
        room = BATCH_JOBS - len(child.out)
        if self._context.max_tasks_per_child:
            room = min(room, self._context.max_tasks_per_child - child.finished - len(child.out))
        return room

    def _give(self, child: Child, most: int) -> None:
        pending, seconds = self._pending, self._estimates.seconds
        work = sum([seconds(job.task) for job in child.out.values()])
        batch: list[Job] = []
        while pending and len(batch) < most:
            work += seconds(pending[0].task)
            if work > BATCH_SECONDS and (batch or child.out):
                break
            batch.append(pending.popleft())
        if not batch:
            return
        first = child.handed + 1
        try:
            data = encode((channel.JOBS, first, [job.payload for job in batch]))
        except ValueError:
            batch = [job for job in batch if self._plain(job)]
            data = encode((channel.JOBS, first, [job.payload for job in batch]))
        child.out.update(enumerate(batch, first))
        child.handed += len(batch)
        child.channel.send(data)
        self._failures = 0

    def _plain(self, job: Job) -> bool:
        try:
            encode(job.payload)
        except ValueError as error:
            self._end(job, Ending.LOST, f"its payload is not plain data and cannot be sent to a child: {error}")
            return False
        return True

    def _put_back(self, child: Child) -> None:
        """Take back what the child has not started, for other slots."""
        self._pending.extendleft(reversed(child.take_back()))
        if self._stopping:
            self._return_pending()

    def _return_pending(self) -> None:
        while self._pending:
            self._end(self._pending.popleft(), Ending.RETURNED)

    def _end(
        self,
        job: Job,
        ending: Ending,
        detail: str = "",
        runtime: float = 0.0,
        payload: tuple[Any, ...] | None = None,
    ) -> None:
        self._ended.append(
            Completion(job_id=job.id, ending=ending, payload=payload, detail=detail, runtime=runtime)
        )
        self._changed.set()

    # --- news from the children -----------------------------------------------------------------

    def _on_child_frame(self, child: Child, frame: tuple[Any, ...]) -> None:
        kind = frame[0]
        if kind == channel.DONE:
            child.finished += len(frame[1])
            for sequence, runtime, payload in frame[1]:
                job = child.out.pop(sequence)
                self._estimates.learn(job.task, runtime)
                self._end(job, Ending.DONE, runtime=runtime, payload=payload)
        elif kind == channel.UPCALL:
            task = self._loop.create_task(self._answer(child, *frame[1:]))
            child.upcalls.add(task)
            task.add_done_callback(child.upcalls.discard)
            return
        elif kind == channel.SKIPPED:
            self._on_skipped(child, *frame[1:])
        elif kind == channel.BROKEN:
            _, sequence, ending, detail, runtime = frame
            child.finished += 1
            self._end(child.out.pop(sequence), Ending(ending), detail, runtime)
        elif kind == channel.READY:
            if child.state is State.STARTING:
                child.state, child.deadline = State.READY, None
                self._changed.set()
            if not self._first.done():
                self._first.set_result(None)
        elif kind == channel.FAILED:
            child.failure = frame[1]
            self._await_exit(child)
        elif kind == channel.RETIRING:
            self._put_back(child)
            self._await_exit(child)
        self._after(child)

    def _on_skipped(self, child: Child, first: int, last: int) -> None:
        # What is not out any more was taken back when the recall was written.
        for sequence in [s for s in child.out if first <= s <= last]:
            job = child.out.pop(sequence)
            if self._stopping or sequence in child.unwanted:
                self._end(job, Ending.RETURNED)
            else:
                self._pending.appendleft(job)

    def _after(self, child: Child) -> None:
        """The child has reported: give it and others more to do, or let it go."""
        if not child.out:
            child.unwanted.clear()
            if child.state is State.LEAVING:
                child.channel.finish()
                self._await_exit(child)
        self._stirred.set()
        self._hand_out()

    async def _answer(self, child: Child, call: int, verb: str, payload: Any) -> None:
        try:
            reply = encode((channel.REPLY, call, True, await self._context.upcall(verb, payload)))
        except Exception as error:
            reply = encode((channel.REPLY, call, False, errors.to_plain(error)))
        child.channel.send(reply)

    # --- limits and cancelling ------------------------------------------------------------------

    def _cancel(self, child: Child, sequence: int, *, force: bool) -> bool:
        job = child.out[sequence]
        child.unwanted.add(sequence)
        self._put_back(child)
        if job in self._pending:
            self._pending.remove(job)
            self._end(job, Ending.RETURNED)
        elif child.cell.words[DONE] >= sequence:
            return False
        elif force:
            self._kill(child, sequence, Ending.CANCELLED, "cancelled by force")
        else:
            child.interrupt(sequence, cancel=True)
        self._hand_out()
        return True

    def _kill(self, child: Child, sequence: int, ending: Ending, detail: str) -> None:
        """Kill a child that runs this job, which then ends so (0: all that it has claimed).

        What it has not started is taken back first, and with the same stroke it cannot start anything more. So if it
        is still at this job afterwards, the signal hits this job or none, however late it comes.
        """
        self._put_back(child)
        if child.state is State.KILLED or (sequence and child.cell.running != sequence):
            return
        child.verdict = sequence, ending, detail
        self._doom(child)
        self._fill()

    def _doom(self, child: Child) -> None:
        self._expect(child, State.KILLED)
        child.server.signal(child.number, signal.SIGKILL)

    def _dismiss(self, child: Child) -> None:
        """Let a child go after the job that it runs."""
        if child.state is State.STARTING:
            self._kill(child, 0, Ending.CANCELLED, "")
        elif child.state is State.READY:
            child.state = State.LEAVING
            self._put_back(child)
            self._after(child)

    def _expect(self, child: Child, state: State, seconds: float = EXIT_SECONDS) -> None:
        child.state, child.deadline = state, time.monotonic() + seconds
        self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        if any([self._look_after(child, now) for child in list(self._children.values())]):
            self._arm()
        self._hand_out()

    def _look_after(self, child: Child, now: float) -> bool:
        """Do what the time demands; whether the child must be looked at again."""
        if child.deadline is not None:
            if now >= child.deadline:
                self._on_overdue(child)
            return True
        sequence, started = child.running_since()
        job = child.out.get(sequence)
        if job is None:
            child.quiet = child.quiet + 1 if child.out else 0
            if child.quiet * TICK >= EXIT_SECONDS:
                self._kill(child, 0, Ending.LOST, f"its process did not react for {EXIT_SECONDS:g} s")
            return bool(child.out)
        child.quiet = 0
        elapsed = now - started
        if job.time_limit is not None and elapsed >= job.time_limit:
            self._kill(child, sequence, Ending.TIMED_OUT, f"hard time limit of {job.time_limit:g} s")
        elif job.soft_time_limit is not None and elapsed >= job.soft_time_limit:
            child.interrupt(sequence, cancel=False)
        if elapsed >= PATIENCE:
            self._put_back(child)
            if child.unreported():
                child.server.signal(child.number, signal.SIGUSR1)
        return len(child.out) > 1 or job.time_limit is not None or job.soft_time_limit is not None

    def _on_overdue(self, child: Child) -> None:
        if child.state is State.STARTING:
            child.failure = (
                f"it was not ready within {self._context.start_timeout:g} s;"
                " make its start faster or raise the pool's start timeout"
            )
            self._kill(child, 0, Ending.LOST, "")
        elif child.state is State.ENDING:
            self._doom(child)
        elif child.server.alive:
            child.server.give_up(f"it has not ended process {child.pid} within {EXIT_SECONDS:g} s")
        else:
            self._bury(child, child.failure)

    # --- children and sessions ------------------------------------------------------------------

    def _filling(self) -> list[Child]:
        """The children that fill a slot, now or soon."""
        return [c for c in self._children.values() if c.state in (State.STARTING, State.READY)]

    def _fill(self) -> None:
        """Make the children that are missing."""
        server = self._server
        if server is None or not server.ready or self._stopping or time.monotonic() < self._start_again_at:
            return
        asked = sum([not child.pid for child in self._children.values()])
        for _ in range(min(self._slots - len(self._filling()), SPAWNS - asked)):
            try:
                self._spawn(server)
            except OSError as error:
                self._on_start_failure(f"the worker cannot make a socket and shared memory for it: {error}")
                return

    def _spawn(self, server: ForkServer) -> None:
        self._numbers += 1
        ours, theirs = socket.socketpair()
        with theirs, shared_cell() as (fd, cell):
            child = Child(number=self._numbers, server=server, cell=cell)
            child.channel = Channel(ours, partial(self._on_child_frame, child), partial(self._on_child_end, child))
            self._children[child.number] = child
            self._expect(child, State.STARTING, self._context.start_timeout)
            if not server.spawn(theirs, fd, child.number):
                server.give_up("it takes no requests")

    def _await_exit(self, child: Child) -> None:
        """The child is about to end: replace it."""
        if child.state is not State.KILLED:
            self._expect(child, State.ENDING)
        self._fill()

    def _on_child_end(self, child: Child) -> None:
        """It has closed its socket: dead, or as good as dead. The fork server tells how it ended."""
        if not child.server.alive:
            self._bury(child, child.failure)
        elif child.state not in (State.ENDING, State.KILLED):
            self._doom(child)

    def _on_server_frame(self, kind: int, number: int, value: Any) -> None:
        child = self._children[number]
        if kind == channel.SPAWNED:
            child.pid = value
            self._fill()
        else:
            self._bury(child, describe_exit(value))

    def _bury(self, child: Child, how: str) -> None:
        """The process is dead: give every job that it had its end, and replace it."""
        if self._children.pop(child.number, None) is None:
            return
        unexpected = child.state is not State.ENDING and child.verdict is None and child.server.alive
        child.state = State.KILLED
        child.channel.drain()
        for job, ending, detail, runtime in child.fates(how):
            if ending is not Ending.RETURNED:
                self._estimates.forget(job.task)
            self._end(job, ending, detail, runtime)
        child.close()
        if child.failure and child.server.alive:
            self._on_start_failure(child.failure)
        elif unexpected and not child.handed:
            self._on_start_failure(f"its process ended before its first job: {how}")
        self._stirred.set()
        self._fill()
        self._hand_out()

    def _on_start_failure(self, why: str) -> None:
        self._failures += 1
        if not self._first.done():
            self._first.set_exception(UmbelError(why))
        elif not self._stopping:
            delay = self._backoff()
            self._start_again_at = time.monotonic() + delay
            self._loop.call_later(delay, self._fill)
            log.error("a child of the prefork pool could not start; next try in %.1f s: %s", delay, why)

    def _backoff(self) -> float:
        return min(BACKOFF, 0.05 * 2 ** min(self._failures, 10))

    async def _open_session(self) -> None:
        server = self._server = ForkServer(self._on_server_frame, self._on_session_lost)
        threads = await server.start(self._context)
        if threads:
            log.warning(
                "importing the application starts threads, which will not exist in the children: %s;"
                " start them in the hook umbel_child_started",
                ", ".join(threads),
            )
        self._fill()

    def _on_session_lost(self, server: ForkServer, why: str) -> None:
        """The fork server is gone. Its children die with it; their jobs end when they are dead; all is made anew."""
        self._failures += 1
        for child in list(self._children.values()):
            child.failure = why
            self._expect(child, State.KILLED, ORPHAN_SECONDS)
            if not child.channel.open:
                self._bury(child, why)
            elif child.pid:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # dead already, by the fork server's death
        if not self._first.done():
            self._first.set_exception(UmbelError(why))
        elif not self._stopping:
            log.error("%s; the prefork pool starts another", why)
            self._rebuilding = self._loop.create_task(self._rebuild(server))

    async def _rebuild(self, lost: ForkServer) -> None:
        await lost.close()
        while True:
            await asyncio.sleep(self._backoff())
            try:
                await self._open_session()
            except UmbelError as error:
                self._failures += 1
                log.error("the prefork pool has no children: %s", error)
                await self._server.close()
            else:
                return

    async def _stop(self) -> None:
        if self._rebuilding:
            self._rebuilding.cancel()
            await asyncio.wait([self._rebuilding])
        await self.recall()
        for child in list(self._children.values()):
            self._dismiss(child)
        while self._children and (left := self._stop_at - time.monotonic()) > 0:
            await self._stir(left)
        for child in list(self._children.values()):
            self._kill(child, 0, Ending.CANCELLED, "the worker stopped before the task had ended")
        while self._children:
            await self._stir(EXIT_SECONDS)
        if self._server:
            await self._server.close()
        if self._timer:
            self._timer.cancel()
        if self._slots and not self._first.done():
            self._first.set_exception(UmbelError("the prefork pool was stopped while it started"))
            self._first.exception()  # `start` may not be waiting for it any more
        self._over = True
        self._changed.set()

    async def _stir(self, timeout: float) -> None:
        self._stirred.clear()
        try:
            await asyncio.wait_for(self._stirred.wait(), timeout)
        except TimeoutError:
            pass  # the caller looks at the clock
