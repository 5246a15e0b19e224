"""The pool port: where user code runs.

Law 1: the I/O loop never runs user code and never decodes a task body. A pool is told what to run as an *executor
factory* and moves opaque jobs to wherever it runs them: child processes, threads, or the main thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from attrs import frozen

from umbel.capabilities import PoolCapabilities
from umbel.model import Completion, Job
from umbel.ports.options import NoOptions

Upcall = Callable[[str, Any], Any]
"""``upcall(verb, payload) -> reply``: how running code asks its worker to do I/O. Blocks the calling thread.

It may have an attribute ``awaitable``, a function of the same parameters for code on an event loop, which goes on meanwhile.
"""


class Executor(Protocol):
    """Runs jobs. Made once in each child (or once for all threads); thread-safe where the pool uses threads."""

    def execute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run one job's payload to its end and return the plain data of ``Completion.payload``.

        Catches whatever user code raises, except ``SystemExit`` and ``KeyboardInterrupt``.
        """
        ...


class AsyncExecutor(Executor, Protocol):
    """An executor that knows of coroutines. Pools look for its methods, and do without where there are none."""

    def interrupt_thread(self, thread: int, exception: type[BaseException]) -> bool:
        """Raise ``exception`` in the job of that thread, which waits on an event loop that the executor has made there.

        False if it does not: then the pool raises it in the thread. From any thread, and from signal handlers of that one.
        """
        ...

    def awaits(self, payload: tuple[Any, ...]) -> bool:
        """Whether this job is one for ``aexecute``. Quick, and told by what lies open in the payload."""
        ...

    async def aexecute(self, payload: tuple[Any, ...]) -> tuple[Any, ...]:
        """As ``execute``, on the running loop. An interruption is raised as ``CancelledError`` that is also
        ``SoftTimeLimitExceeded`` or ``TaskCancelled``.
        """
        ...


@frozen(kw_only=True)
class ExecutorFactory:
    """How to make an executor in any process: a dotted ``module:function`` and plain arguments for it.

    The function may carry an attribute ``preload``, to be called with the arguments alone in a process that children are
    forked from: it imports what they will all need.
    """

    target: str
    arguments: Mapping[str, Any]

    def make(self, upcall: Upcall) -> Executor:
        """Import the target and call it with ``upcall`` and the arguments. Imports the application."""
        from pkgutil import resolve_name

        executor: Executor = resolve_name(self.target)(upcall, **self.arguments)
        return executor


@frozen(kw_only=True)
class Running:
    """One job that runs at this moment."""

    since: float
    """``time.monotonic()`` at its start."""
    pid: int
    """The process that runs it."""


@frozen(kw_only=True)
class PoolContext:
    """What the worker gives a pool at start."""

    factory: ExecutorFactory
    concurrency: int
    """Slots: how many jobs may run at once."""
    upcall: Callable[[str, Any], Awaitable[Any]]
    """Answers an upcall on the I/O loop. Plain data in, plain data out; raises to refuse."""
    max_tasks_per_child: int | None = None
    max_memory_per_child: int | None = None
    """Resident bytes, checked between tasks."""
    start_timeout: float = 60.0
    """Seconds that a child may take to become ready."""


class Pool(ABC):
    """Runs jobs in slots. All methods are called on the worker's I/O loop, unless said otherwise."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    """attrs class of the driver's own settings, ``[worker.pool_options]``."""

    capabilities: PoolCapabilities

    def __init__(self, *, options: Any = None) -> None:
        """No I/O, no thread, no process yet."""
        self.options = self.Options() if options is None else options

    @abstractmethod
    async def start(self, context: PoolContext) -> None:
        """Start the slots; return when the application is imported and the first slot is ready.

        Raises ``UmbelError`` with the child's own error when the application cannot be imported.
        """

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs. Never blocks, never raises for lack of room: the worker does not send more than ``free`` asks for."""

    @property
    @abstractmethod
    def free(self) -> int:
        """How many more jobs the pool would like now, so that no slot idles and none hoards. May be negative."""

    @abstractmethod
    def completions(self) -> AsyncIterator[Sequence[Completion]]:
        """Ends of jobs, in batches, until ``stop`` has ended and everything is reported. One iterator in a pool's life.

        A batch may be empty: it says that ``free`` has grown for another reason (a child became ready).
        """

    @abstractmethod
    async def recall(self) -> None:
        """Give back every job that has not started; each ends as RETURNED."""

    @abstractmethod
    async def cancel(self, job_id: int, *, force: bool) -> bool:
        """End one job: RETURNED if it has not started, otherwise CANCELLED.

        Raises ``TaskCancelled`` in the running task; with ``force``, kills the child that runs exactly this job. True says
        that this is on its way: a job that ends in the same moment, or whose executor catches the exception, is DONE.
        False if the job has ended already or the pool cannot (capability ``cancel_running``).
        """

    def limit(self, job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
        """Give a job that is here other limits, whether it waits or runs. Never blocks.

        Both count from its start, so one that has passed already is acted on at once; None: no limit. True if they are in
        force; False if the job is not here, or the pool cannot.
        """
        return False

    @abstractmethod
    async def resize(self, concurrency: int) -> None:
        """Change the number of slots. Surplus slots end after the job they run. Raises ``NotSupported``."""

    @abstractmethod
    async def stop(self, *, timeout: float) -> None:
        """Recall, wait up to ``timeout`` seconds for running jobs, end the rest as CANCELLED, free everything.

        Returns only when no child is left. Calling it again, with a shorter timeout, shortens the wait.
        """

    def run_main_thread(self) -> None:
        """Run jobs on the calling (main) thread until ``stop`` (capability ``main_thread``). Not on the I/O loop."""
        raise TypeError(f"pool {type(self).__name__} does not run on the main thread")

    def running(self) -> Mapping[int, Running]:
        """The jobs whose work has begun and not ended, by job id. Cheap: asked several times a second.

        A pool that leaves this out has all its jobs shown as waiting, and their starts told when they end.
        """
        return {}

    def stats(self) -> Mapping[str, Any]:
        """What the pool tells of itself: ``processes`` (pids), ``max-concurrency``, … Plain data."""
        return {}
