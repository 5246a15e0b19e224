"""The children that fill the slots: made, replaced when they end, and made anew with their fork server when it fails."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from umbel.errors import UmbelError
from umbel.ports.pool import PoolContext
from umbel_children import channel
from umbel_children.cells import KEPT, shared_cell
from umbel_children.channel import Channel, Decoder, Frame
from umbel_children.records import Child, Many, State
from umbel_children.runner import Nature
from umbel_children.session import ForkServer, describe_exit

log = logging.getLogger(__name__)

TICK: Final = 0.02
"""Seconds between two looks at the children, while one needs it."""
EXIT_SECONDS: Final = 5.0
"""How long a process that was told to end, or was killed, may take; and how long one may ignore its jobs."""
ORPHAN_SECONDS: Final = 1.0
"""How long the end of children is awaited whose fork server is dead."""
BACKOFF: Final = 5.0
"""The most seconds between two tries to start what does not start."""
SPAWNS: Final = 16
"""The most requests for a child that wait at the fork server: a socket takes only so many file descriptors."""


class Brood:
    """Keeps the children alive. What they do is not its business; it tells of their frames and deaths."""

    context: PoolContext
    nature: Nature

    def __init__(
        self,
        name: str,
        on_frames: Callable[[Child, Sequence[Frame]], None],
        on_death: Callable[[Child, str], None],
        look_after: Callable[[Child, float], bool],
    ) -> None:
        """``on_death(child, how)`` comes once for each child, when nothing of it runs any more.

        ``name``: the pool's. ``look_after(child, now)`` comes at each tick for each child without a deadline of its own,
        and tells whether ticks are needed further.
        """
        self.name = name
        self.shares: list[int] = []
        """How many jobs each child may run at once; so many children there are to be. One that runs several has a table."""
        self.children: dict[int, Child] = {}
        self.lone = 0
        """How many more children there are to be, each for a job that is to run alone."""
        self.failures = 0
        """Starts that failed since a child was last given a job."""
        self.server: ForkServer | None = None
        self._on_frames = on_frames
        self._on_death = on_death
        self._look_after = look_after
        self._first: asyncio.Future[None] | None = None
        self._numbers = 0
        self._start_again_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._rebuilding: asyncio.Task[None] | None = None
        self._closing = False
        self._stirred = asyncio.Event()

    async def open(self, context: PoolContext, nature: Nature, shares: Sequence[int]) -> None:
        """Return when the first child is ready. Raises ``UmbelError`` if the application or a child does not start."""
        self.context = context
        self.nature = nature
        self.shares = list(shares)
        self._first = asyncio.get_running_loop().create_future()
        await self._open_session()
        await self._first

    def filling(self) -> list[Child]:
        """The children that fill a slot, now or soon."""
        return [c for c in self.children.values() if c.state in (State.STARTING, State.READY) and not c.lone]

    def waiting(self) -> list[Child]:
        """The lone ones that have had no job, or will have one soon."""
        free = (State.STARTING, State.READY)
        return [c for c in self.children.values() if c.lone and c.state in free and not c.out and not c.finished]

    def fill(self) -> None:
        """Make the children that are missing."""
        server = self.server
        if server is None or not server.ready or self._closing or time.monotonic() < self._start_again_at:
            return
        asked = sum([not child.pid for child in self.children.values()])
        missing = [(share, False) for share in self._missing()]
        if self.lone:
            missing += [(1, True)] * (self.lone - len(self.waiting()))
        for share, lone in missing[: SPAWNS - asked]:
            try:
                self._spawn(server, share, lone)
            except OSError as error:
                self._on_start_failure(f"the worker cannot make a socket and shared memory for it: {error}")
                return

    def _missing(self) -> list[int]:
        """The shares that no child has."""
        filling = self.filling()
        if len(filling) >= len(self.shares):
            return []
        left = list(self.shares)
        for child in filling:
            if child.slots in left:
                left.remove(child.slots)
        return left[: len(self.shares) - len(filling)]

    def kill(self, child: Child) -> None:
        """End a child now, and replace it."""
        self._expect(child, State.KILLED, EXIT_SECONDS)
        child.server.signal(child.number, signal.SIGKILL)
        self.fill()

    def release(self, child: Child) -> None:
        """Tell a child without jobs to end."""
        child.channel.finish()
        self._expect(child, State.ENDING, EXIT_SECONDS)

    def stop_making(self) -> None:
        """Replace no child any more, whatever becomes of those there are."""
        self._closing = True

    def watch(self) -> None:
        """See to it that the next tick comes."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    async def wait(self, deadline: float) -> bool:
        """Wait until every child has ended, or the deadline (monotonic) has passed or was changed; True for the first.

        From the first call on nothing is made any more.
        """
        self.stop_making()
        if self._rebuilding and not self._rebuilding.done():
            self._rebuilding.cancel()
            await asyncio.wait([self._rebuilding])
        if self.children:
            self._stirred.clear()
            try:
                await asyncio.wait_for(self._stirred.wait(), deadline - time.monotonic())
            except TimeoutError:
                pass  # the caller looks at the clock
        return not self.children

    def stir(self) -> None:
        """Let ``wait`` return."""
        self._stirred.set()

    async def close(self) -> None:
        """End the fork server. Every child has ended."""
        if self.server:
            await self.server.close()
        if self._timer:
            self._timer.cancel()
        self._refuse(f"the {self.name} pool was stopped while it started")

    # --- children -------------------------------------------------------------------------------

    def _spawn(self, server: ForkServer, slots: int, lone: bool) -> None:
        self._numbers += 1
        with shared_cell(self.nature.rows) as (fd, cell):
            ours, theirs = socket.socketpair()
            with theirs:
                kind = Many if self.nature.rows > 1 else Child
                child = kind(number=self._numbers, server=server, cell=cell, slots=slots, lone=lone)
                child.channel = Channel(ours, partial(self._on_child_frames, child), partial(self._on_child_end, child))
                self.children[child.number] = child
                self._expect(child, State.STARTING, self.context.start_timeout)
                if not server.spawn(theirs, fd, child.number, slots):
                    server.give_up("it takes no requests")

    def _expect(self, child: Child, state: State, seconds: float) -> None:
        child.state, child.deadline = state, time.monotonic() + seconds
        self.watch()

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        for child in list(self.children.values()):
            if child.deadline is None:
                needed = self._look_after(child, now)
            else:
                needed = True
                if now >= child.deadline:
                    self._on_overdue(child)
            if needed:
                self.watch()

    def _on_overdue(self, child: Child) -> None:
        if child.state is not State.KILLED:
            if child.state is State.STARTING:
                child.failure = (
                    f"it was not ready within {self.context.start_timeout:g} s;"
                    " make its start faster or raise the pool's start timeout"
                )
            self.kill(child)
        elif child.server.alive:
            child.server.give_up(f"it has not ended process {child.pid} within {EXIT_SECONDS:g} s")
        else:
            self._bury(child, child.failure)

    def _on_child_frames(self, child: Child, frames: Sequence[Frame]) -> None:
        for frame in frames:
            kind = frame[0]
            if kind == channel.READY and child.state is State.STARTING:
                child.state, child.deadline = State.READY, None
                if self._first and not self._first.done():
                    self._first.set_result(None)
            elif kind in (channel.RETIRING, channel.FAILED):
                child.failure = (
                    child.failure or frame[1]
                )  # its death may have been told before its last words were read
                if child.state is not State.KILLED:
                    self._expect(child, State.ENDING, EXIT_SECONDS)
                    if not child.failure:
                        self.fill()
        self._on_frames(child, frames)

    def _on_child_end(self, child: Child) -> None:
        """It has closed its socket: dead, or cut off by a task of its own. The fork server tells how it ended."""
        if not child.server.alive:
            self._bury(child, child.failure)
        elif child.state in (State.READY, State.LEAVING) and child.handed:
            # What it has not begun is taken back, and the job that runs, which need not be the one that cut it off, may end.
            self._on_child_frames(child, [(channel.RETIRING, "")])
        elif child.state not in (State.ENDING, State.KILLED):
            self.kill(child)

    def _on_server_frame(self, kind: int, number: int, value: Any) -> None:
        if kind == channel.SPAWNED:
            self.children[number].pid = value
            self.fill()
        else:
            self._bury(self.children[number], describe_exit(value))

    def _bury(self, child: Child, how: str) -> None:
        """The process is dead: deliver what it has sent, tell of its death, and replace it."""
        if self.children.pop(child.number, None) is None:
            return
        told = child.state is State.ENDING or child.verdict or not child.server.alive
        child.state = State.KILLED
        child.channel.drain()
        # What it had not sent; its last frame may have come in part.
        self._on_child_frames(child, Decoder().feed(bytes(child.cell.kept[: child.cell.words[KEPT]])))
        if child.server.alive and (child.failure or not (told or child.handed)):
            self._on_start_failure(child.failure or f"its process ended before its first job: {how}")
        self._on_death(child, how)
        child.close()
        self.stir()
        self.fill()

    def _on_start_failure(self, why: str) -> None:
        self.failures += 1
        if not self._refuse(why) and not self._closing:
            delay = self._backoff()
            self._start_again_at = time.monotonic() + delay
            asyncio.get_running_loop().call_later(delay, self.fill)
            log.error("a child of the %s pool could not start; next try in %.1f s: %s", self.name, delay, why)

    def _refuse(self, why: str) -> bool:
        """Let ``open`` raise, if it waits for the first child."""
        if self._first is None or self._first.done():
            return False
        self._first.set_exception(UmbelError(why))
        self._first.exception()  # it may have been cancelled, and then nobody else asks
        return True

    def _backoff(self) -> float:
        return min(BACKOFF, 0.05 * (1 << min(self.failures, 10)))

    # --- sessions -------------------------------------------------------------------------------

    async def _open_session(self) -> None:
        self.server = ForkServer(self._on_server_frame, self._on_session_lost)
        threads = await self.server.start(self.context, self.nature)
        if threads:
            log.warning(
                "importing the application starts threads, which will not exist in the children: %s;"
                " start them in the hook umbel_child_started",
                ", ".join(threads),
            )
        self.fill()

    def _on_session_lost(self, server: ForkServer, why: str) -> None:
        """The fork server is gone. Its children die with it; their jobs end when they are dead; all is made anew."""
        self.failures += 1
        for child in list(self.children.values()):
            child.failure = why
            self._expect(child, State.KILLED, ORPHAN_SECONDS)
            if not child.channel.open:
                self._bury(child, why)
            elif child.pid:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # dead already, by the fork server's death
        if not self._refuse(why) and not self._closing:
            log.error("%s; the %s pool starts another", why, self.name)
            self._rebuilding = asyncio.get_running_loop().create_task(self._rebuild(server))

    async def _rebuild(self, lost: ForkServer) -> None:
        while True:
            await lost.close()
            await asyncio.sleep(self._backoff())
            try:
                return await self._open_session()
            except UmbelError as error:
                self.failures += 1
                log.error("the %s pool has no children: %s", self.name, error)
                lost = self.server or lost
