"""The parent's side: one fork server, and one record for each of its children."""

from __future__ import annotations

import asyncio
import enum
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from attrs import define, field

from umbel.errors import UmbelError
from umbel.model import Ending, Job
from umbel.ports.pool import PoolContext
from umbel_prefork import channel
from umbel_prefork.cells import CURRENT, RECALL, REQUEST, STARTED, Cell
from umbel_prefork.channel import Channel, Frame, encode

_CLOSE_SECONDS: Final = 5.0
"""How long a fork server may take to end by itself."""


class State(enum.Enum):
    """Where a child stands. Each state but READY and LEAVING (which last as long as their jobs) has a deadline."""

    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    """Gets no more jobs, and ends after those it has begun."""
    ENDING = "ending"
    """Was told to end, or says that it does; killed at the deadline."""
    KILLED = "killed"
    """Its session is given up at the deadline."""


@define(eq=False, kw_only=True)
class Child:
    """What the parent knows of one child."""

    number: int
    server: ForkServer
    cell: Cell
    channel: Channel = field(init=False)
    state: State = State.STARTING
    deadline: float | None = None
    pid: int = 0
    out: dict[int, Job] = field(factory=dict)
    """Handed over and not reported, by sequence number, ascending."""
    handed: int = 0
    """The last sequence number used."""
    recalled: int = 0
    """Jobs up to this number go back to the worker, should the child report them as skipped."""
    finished: int = 0
    """Jobs that it ran to an end."""
    failure: str = ""
    """What it said of itself before it ended at its start."""
    verdict: tuple[Ending, str] | None = None
    """How what it has claimed ends when it is killed. None: what kills it is not this pool."""
    quiet: int = 0
    """Ticks in a row at which it had jobs and ran none."""
    upcalls: set[asyncio.Task[None]] = field(factory=set)

    def hand(self, jobs: list[Job], data: bytes) -> None:
        """Send the frame of these jobs, which are numbered from ``handed + 1``."""
        self.out.update(enumerate(jobs, self.handed + 1))
        self.handed += len(jobs)
        self.channel.send(data)

    def take_back(self) -> list[Job]:
        """The jobs that it has not started, and now never will."""
        if self.cell.words[RECALL] == self.handed or not self.out:
            return []
        claimed = self.cell.recall(self.handed)
        unstarted = [sequence for sequence in self.out if sequence > claimed]
        return [self.out.pop(sequence) for sequence in unstarted]

    def wanted(self, sequence: int) -> bool:
        """Whether a job that the child has skipped should run elsewhere: it was neither recalled nor cancelled."""
        return sequence > self.recalled and self.cell.words[REQUEST] != sequence << 1 | 1

    def find(self, job_id: int) -> int:
        """The sequence number of a job that is out; 0: it is not here."""
        return next((sequence for sequence, job in self.out.items() if job.id == job_id), 0)

    def interrupt(self, sequence: int, *, cancel: bool) -> None:
        """Raise in that job, if it still runs when the child looks. A cancel is never replaced by a soft limit."""
        request = sequence << 1 | cancel
        if self.cell.words[REQUEST] < request:
            self.cell.words[REQUEST] = request
            self.server.signal(self.number, signal.SIGUSR1)

    def running_since(self) -> tuple[int, float]:
        """The job that runs and the monotonic clock at its start, never earlier than the truth; 0: none."""
        return self.cell.running, self.cell.times[STARTED]

    def fates(self, how: str) -> list[tuple[Job, Ending, str, float]]:
        """End, detail and runtime of all jobs that are out, now that the process is dead; ``how``, in words."""
        claimed = self.cell.words[CURRENT]
        runtime = time.monotonic() - self.cell.times[STARTED]
        ending, detail = self.verdict or (Ending.LOST, how)
        fates = [
            (job, ending, detail, runtime) if sequence <= claimed else (job, Ending.RETURNED, "", 0.0)
            for sequence, job in self.out.items()
        ]
        self.out = {}
        return fates

    def close(self) -> None:
        """Free what it holds in this process."""
        for task in self.upcalls:
            task.cancel()
        self.channel.close()
        self.cell.close()


class ForkServer:
    """One fork server process. Any fault ends it whole, children included, and the pool makes another."""

    def __init__(
        self,
        on_frame: Callable[[int, int, Any], None],
        on_end: Callable[[ForkServer, str], None],
    ) -> None:
        """Calls ``on_frame(kind, number, value)`` for news of a child, and ``on_end`` once when the process fails."""
        self.alive = False
        self.ready = False
        """Whether it can make children."""
        self.pid = 0
        self._on_frame = on_frame
        self._on_end = on_end
        self._started: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    async def start(self, context: PoolContext) -> list[str]:
        """Start the process and import the application in it; the names of threads that the import has started.

        Raises ``UmbelError`` with the traceback of the import, or when ``start_timeout`` passes.
        """
        factory = context.factory
        try:
            begin = encode(
                (
                    channel.BEGIN,
                    factory.target,
                    dict(factory.arguments),
                    context.max_tasks_per_child,
                    context.max_memory_per_child,
                )
            )
        except ValueError as error:
            raise UmbelError(f"the arguments of {factory.target} cannot be sent to a process: {error}") from error
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _launch(theirs.fileno())
        self.pid = self._process.pid
        self.alive = True
        self._channel = Channel(ours, self._receive, self._end)
        self._channel.send(begin)
        try:
            return await asyncio.wait_for(self._started, context.start_timeout)
        except TimeoutError:
            raise UmbelError(
                f"the fork server has not imported {factory.target} within {context.start_timeout:g} s;"
                " make the import faster or raise the pool's start timeout"
            ) from None

    def spawn(self, child_socket: socket.socket, cell_fd: int, number: int) -> bool:
        """Ask for a child; False if the process does not take requests any more."""
        return self._channel.send_fds(encode((channel.SPAWN, number)), (child_socket.fileno(), cell_fd))

    def signal(self, number: int, signum: int) -> None:
        """Signal a child (its whole process group, to kill it), unless it has ended."""
        if self.alive:
            self._channel.send(encode((channel.SIGNAL, number, int(signum))))

    def give_up(self, why: str) -> None:
        """End the process because it does not do its work."""
        if self.alive:
            self._end(why)

    async def close(self) -> None:
        """End the process, and with it every child. Returns when it is reaped."""
        self.alive = self.ready = False
        if not self.pid:
            return
        self._channel.close()
        loop = asyncio.get_running_loop()
        kill_at = loop.time() + _CLOSE_SECONDS
        while self._process.poll() is None:
            if loop.time() >= kill_at:
                self._process.kill()
            await asyncio.sleep(0.002)

    def _receive(self, frames: Sequence[Frame]) -> None:
        for kind, number, *rest in frames:
            if kind == channel.READY:
                self._settle(number)
            elif kind == channel.FAILED:
                self._settle(UmbelError(f"the application cannot be imported:\n{number}"))
            else:
                self._on_frame(kind, number, rest[0])

    def _settle(self, answer: list[str] | UmbelError) -> None:
        if self._started.done():
            return
        if isinstance(answer, UmbelError):
            self._started.set_exception(answer)
        else:
            self.ready = True
            self._started.set_result(answer)

    def _end(self, why: str = "") -> None:
        was_ready = self.ready
        self.alive = self.ready = False
        self._channel.close()
        self._process.kill()
        try:
            how = describe_exit(self._process.wait(0.1))
        except subprocess.TimeoutExpired:
            how = "does not end"  # `close` goes on waiting
        if was_ready:
            self._on_end(self, f"the fork server died: {why or how}")
        self._settle(UmbelError(f"the fork server of the prefork pool died at its start: {how}"))


def _launch(fd: int) -> subprocess.Popen[bytes]:
    # Not `-m`: the path must be ours before anything is imported, however this process came by it.
    code = f"import sys; sys.path[:] = {sys.path!r}; from umbel_prefork.server import main; main({fd})"
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    command = [sys.executable, *flags, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(fd,), process_group=0)


def describe_exit(code: int | str) -> str:
    """How a process ended, in the words of ``Ending.LOST``."""
    if isinstance(code, str):
        return code
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"  # a real-time signal has no name
