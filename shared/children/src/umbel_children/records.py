"""What the parent knows of one child: where it stands, what it has been given, and what became of that."""

from __future__ import annotations

import asyncio
import enum
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from attrs import define, field

from umbel.model import Ending, Job
from umbel_children import channel, errors
from umbel_children.cells import BEAT, CURRENT, DONE, RECALL, REQUEST, STARTED, STEP, THREADS, Cell
from umbel_children.channel import Channel, encode

if TYPE_CHECKING:
    from umbel_children.session import ForkServer

log = logging.getLogger(__name__)

PATIENCE: Final = 0.05
"""A job that runs longer has the jobs behind it taken back for other slots; a child that has not looked at what it was
given for so long gets no more."""
_KILLED: Final = f"signal {signal.SIGKILL:d} "
"""How the end begins that comes from outside: by an operator, or for lack of memory. It is no job's own doing."""


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
    """One that runs a job at a time."""

    number: int
    server: ForkServer
    cell: Cell
    slots: int = 1
    """How many jobs it may run at once."""
    lone: bool = False
    """It fills no slot: it is for one job, which runs alone in it."""
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
    """How what it has claimed, or only ``blamed``, ends when it is killed. None: what kills it is not this pool."""
    blamed: int = 0
    """The job for which it is killed; 0: none alone."""
    deaf: bool = False
    """Whether it was stuck at the last look."""
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
        return sequence > self.recalled and not self._cancelled(sequence)

    def _cancelled(self, sequence: int) -> bool:
        return self.cell.words[REQUEST] == sequence << 1 | 1

    def find(self, job_id: int) -> int:
        """The sequence number of a job that is out; 0: it is not here."""
        return next((sequence for sequence, job in self.out.items() if job.id == job_id), 0)

    def interrupt(self, sequence: int, *, cancel: bool) -> None:
        """Raise in that job, if it still runs when the child looks. A cancel is never replaced by a soft limit."""
        self._request(sequence, cancel)

    def _request(self, sequence: int, cancel: bool) -> None:
        request = sequence << 1 | cancel
        if self.cell.words[REQUEST] < request:
            self.cell.words[REQUEST] = request
            self.server.signal(self.number, signal.SIGUSR1)

    def ended(self, sequence: int) -> Job | None:
        """The child tells of the end of a job. None: it was told before, or the job was taken back."""
        return self.out.pop(sequence, None)

    def has_ended(self, sequence: int) -> bool:
        """Whether the end of a job that is out is only waiting to be told."""
        return self.cell.words[DONE] >= sequence

    def running(self) -> Mapping[int, float]:
        """The jobs that run, and the monotonic clock at their start, never earlier than the truth.

        A job whose end is under way may be among them.
        """
        sequence = self.cell.running
        return {sequence: self.cell.times[STARTED]} if sequence else {}

    def stuck(self, now: float) -> bool:
        """Whether it has not looked at what it was given, so that it is to get no more."""
        return False

    def begun_all(self) -> bool:
        """Whether it has nothing that it has not begun."""
        return not any(sequence > self.cell.words[CURRENT] for sequence in self.out)

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

    async def answer(self, upcall: Callable[[str, Any], Awaitable[Any]], call: int, verb: str, payload: Any) -> None:
        """Have one of its upcalls answered, and send it the answer."""
        try:
            reply = encode((channel.REPLY, call, True, await upcall(verb, payload)))
        except Exception as error:
            reply = encode((channel.REPLY, call, False, errors.to_plain(error)))
        self.channel.send(reply)

    def close(self) -> None:
        """Free what it holds in this process."""
        for task in self.upcalls:
            task.cancel()
        self.channel.close()
        self.cell.close()


@define(eq=False, kw_only=True)
class Many(Child):
    """One that runs many jobs at once, each in a row of the table."""

    asked: dict[int, int] = field(factory=dict)
    """What was asked of jobs that are out: 1 to tell of the soft limit, 2 to cancel."""
    handed_at: float = 0.0
    """The monotonic clock when it was given something that it may not have looked at yet."""
    blocked: float = 0.0
    """The last beat of a loop that was found blocked; 0: it was not."""
    warned: bool = False
    """Whether that was logged."""

    def hand(self, jobs: list[Job], data: bytes) -> None:
        if self.cell.times[BEAT] >= self.handed_at:
            self.handed_at = time.monotonic()
        super().hand(jobs, data)

    def _cancelled(self, sequence: int) -> bool:
        return self.asked.get(sequence) == 2

    def interrupt(self, sequence: int, *, cancel: bool) -> None:
        want = 1 + cancel
        if self.asked.get(sequence, 0) < want:
            self.asked[sequence] = want
            self.channel.send(encode((channel.INTERRUPT, sequence, cancel)))
        self.insist()

    def insist(self) -> None:
        """Tell by a signal, until it listens, the job that keeps the loop from reading what was asked of it."""
        step = self.cell.words[STEP]
        if (want := self.asked.get(step)) and self.cell.times[BEAT] + PATIENCE < time.monotonic():
            self.cell.words[REQUEST] = step << 1 | (want == 2)
            self.server.signal(self.number, signal.SIGUSR1)

    def ended(self, sequence: int) -> Job | None:
        self.asked.pop(sequence, None)
        return super().ended(sequence)

    def has_ended(self, sequence: int) -> bool:
        return False

    def running(self) -> Mapping[int, float]:
        return self.cell.rows()

    def stuck(self, now: float) -> bool:
        return self.cell.times[BEAT] < self.handed_at < now - PATIENCE

    def fates(self, how: str) -> list[tuple[Job, Ending, str, float]]:
        rows, claimed, now = self.cell.rows(), self.cell.words[CURRENT], time.monotonic()
        begun = {sequence for sequence in self.out if sequence <= claimed}
        blamed = self._blamed(begun, how)
        ending, detail = self.verdict or (Ending.LOST, how)
        beside = f"another job ended its child: {detail}"
        if innocent := begun - blamed:
            log.warning("%d jobs that ran beside another in child %d go back: %s", len(innocent), self.pid, detail)
        fates = []
        for sequence, job in self.out.items():
            runtime = now - rows.get(sequence, now)
            if sequence not in begun:
                fates.append((job, Ending.RETURNED, "", 0.0))
            elif sequence in blamed:
                fates.append((job, ending, detail, runtime))
            else:
                fates.append((job, Ending.COLLATERAL, beside, runtime))
        self.out = {}
        return fates

    def _blamed(self, begun: set[int], how: str) -> set[int]:
        """Of the jobs that had begun those by which the child ended, or may have ended: all, where nobody can tell."""
        if self.verdict is not None:
            return {self.blamed} if self.blamed else begun
        step = self.cell.words[STEP]
        if step in begun and not self.cell.words[THREADS] and not how.startswith(_KILLED):
            return {step}
        return begun
