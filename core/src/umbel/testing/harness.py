"""An app in memory, its worker in this process, and its time in the test's hand.

``in_memory(app)`` puts any app in memory for a while: broker and result store are ``umbel-memory``, the pool is
``umbel-threads``, whatever the settings name. Everything else is as in production: codec, routing, retries, settlement,
middleware, hooks. Serializers and compressors are those that the settings name.

Virtual are countdowns, ETAs, due times of schedules, delays of retries, expiry, rate limits, and pauses before a redelivery.
Real stay how long a task runs, its soft time limit, and the timeouts of ``get`` and of publishing. A hard time limit is not
kept: a thread cannot be killed.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from attrs import evolve

from umbel import protocol
from umbel.errors import PluginNotFound, UmbelError
from umbel.markers import hookimpl
from umbel.model import Action, Message, Settlement
from umbel.plugins.kinds import POOL, RESULT_STORE, SCHEDULER, TRANSPORT
from umbel.plugins.loader import load_driver
from umbel.ports.clock import Clock, VirtualClock
from umbel.scheduling.service import SchedulerService

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.ports.pool import Pool
    from umbel.ports.result_store import ResultStore
    from umbel.ports.scheduler import Scheduler
    from umbel.ports.transport import Transport
    from umbel.task import Task
    from umbel.worker.worker import Worker

SETTINGS: Final[Mapping[str, Any]] = {
    # A lease tells the living from the dead, by a clock that a test moves past any lease; here nobody dies alone.
    "broker.lease": 100 * 365 * 86_400.0,
    "unique.lease": 100 * 365 * 86_400.0,
    "unique.lock_lease": 100 * 365 * 86_400.0,
    "worker.grace": 5.0,
    # The harness is the scheduler, and the only one.
    "worker.with_scheduler": False,
    "scheduler.url": "memory://",
    "scheduler.lease": 100 * 365 * 86_400.0,
    # A test looks at results after the time that it has let pass.
    "results.expires": "never",
}
"""What ``in_memory`` sets over the app's own settings."""

_STARTING: Final = 60.0
"""Seconds that the worker may take to become ready."""
_LOOK: Final = 0.01
"""Seconds after which a look whether anything is left to do is repeated, if no settlement has given a reason before."""


def standing_clock() -> VirtualClock:
    """A clock that stands at the present until it is moved: at a whole second, which survives being written in a header."""
    return VirtualClock(float(int(time.time())))


@contextmanager
def in_memory(
    app: Umbel, *, clock: VirtualClock | None = None, settings: Mapping[str, Any] | None = None
) -> Iterator[Harness]:
    """``app`` in memory while the block lasts, empty at its start. Afterwards it is as it was, its connections included.

    ``clock`` stands still until it is moved; by default it stands at the present. ``settings`` (dotted keys) win over
    the app's own. Nothing runs before ``Harness.worker``. Raises ``PluginNotFound`` where umbel-memory or umbel-threads
    is not installed.
    """
    harness = Harness(app, clock or standing_clock())
    with app.overridden({**SETTINGS, **(settings or {})}, clock=harness.clock, plugins=[harness]):
        yield harness


class Harness:
    """What a test holds of an app in memory. For the test's own thread; its methods block, in real time."""

    def __init__(self, app: Umbel, clock: VirtualClock) -> None:
        self.app = app
        self.clock = clock
        self.published: list[Message] = []
        """Every message that the broker has accepted, oldest first: calls, retries, callbacks, the next of a chain."""
        self._dues: set[float] = set()
        """When something in the broker becomes due; times that have passed may be among them."""
        self._lock = threading.Lock()
        self._settled: asyncio.Event | None = None
        self._stopped_at = 0.0
        """When, in real time, the last stop of the clock began."""
        self._url = f"memory://test-{secrets.token_hex(8)}"
        self._transport, self._store, self._pool = _drivers(self)
        self._ready = threading.Event()
        self._worker: Worker | None = None
        self._scheduler: SchedulerService | None = None
        # A daemon: one that is stuck must not keep the process of the tests from ending.
        self._thread = threading.Thread(target=self._run, name="umbel-testing-worker", daemon=True)
        self._error: BaseException | None = None

    # --- the plugin: whatever the settings name, it is in memory ---

    @hookimpl(tryfirst=True)
    def umbel_make_transport(self, clock: Clock) -> Transport:
        transport: Transport = self._transport(self._url, clock=clock)
        return transport

    @hookimpl(tryfirst=True)
    def umbel_make_result_store(self, clock: Clock) -> ResultStore:
        store: ResultStore = self._store(self._url, clock=clock)
        return store

    @hookimpl(tryfirst=True)
    def umbel_make_scheduler(self, clock: Clock) -> Scheduler:
        scheduler, _ = load_driver(SCHEDULER, "memory")
        return scheduler(self._url, clock=clock)

    @hookimpl(tryfirst=True)
    def umbel_make_pool(self) -> Pool:
        pool: Pool = self._pool()
        # Threads are not killed and not replaced. Apps that want that in production are to be testable all the same.
        pool.capabilities = evolve(pool.capabilities, hard_limit=True, recycle=True)
        return pool

    @hookimpl
    def umbel_worker_ready(self) -> None:
        self._ready.set()

    def accepted(self, messages: Sequence[Message]) -> None:
        """The broker has taken ``messages``. From any thread."""
        with self._lock:
            self.published += messages
        self.due(message.due for message in messages if message.due is not None)

    def due(self, times: Iterable[float]) -> None:
        """The broker keeps something back until each of ``times``. From any thread."""
        with self._lock:
            self._dues.update(times)

    def settled(self) -> None:
        """The broker has carried settlements out: a moment to look whether anything is left to do. On the I/O loop."""
        if self._settled is not None:
            self._settled.set()

    # --- what was sent ---

    def calls(self, task: Task[..., Any] | str) -> list[protocol.Invocation]:
        """What was sent of one task, decoded, oldest first: ``args``, ``kwargs``, ``retries``, ``eta``, ``headers``, …"""
        name = task if isinstance(task, str) else task.name
        messages = [message for message in self.published if message.task == name]
        return [protocol.read_invocation(m.headers, self._decode(m), self.app.timezone) for m in messages]

    def _decode(self, message: Message) -> Any:
        return self.app.codec.decode(message.body, message.content_type, message.headers.get("compression"))

    # --- running ---

    @contextmanager
    def worker(self, *, queues: Sequence[str] = (), schedules: bool = True, timeout: float = 10) -> Iterator[Worker]:
        """A worker of the app in threads of this process, from ready to stopped.

        It consumes the default queue and every queue that the settings or a task's options name, and ``queues``. Entries of
        schedules run when time is let pass, unless ``schedules`` is false. At the end
        it is stopped as by TERM; tasks that still run then have ``worker.grace`` seconds. Raises what kept it from
        starting, and ``AssertionError`` if it failed or did not stop.
        """
        if self._worker is not None:
            raise UmbelError(f"app {self.app.name!r} has its worker already: one serves a whole test")
        self._worker = worker = self.app.worker()
        worker.queues = self._queues(queues)
        self._scheduler = SchedulerService(self.app) if schedules else None
        self._thread.start()
        deadline = time.monotonic() + _STARTING
        while not self._ready.wait(0.01) and self._thread.is_alive() and time.monotonic() < deadline:
            pass
        try:
            if not self._ready.is_set():
                raise self._error or AssertionError(f"the worker did not start: {worker.failure!r}")
            yield worker
        except BaseException:
            self._stop(worker, timeout)
            raise
        self._stop(worker, timeout)
        if self._thread.is_alive():
            raise AssertionError(f"the worker has not stopped after {timeout:g} s: {self._unfinished()}")
        if failure := self._error or worker.failure:
            raise AssertionError(f"the worker has failed: {failure!r}") from failure

    def _run(self) -> None:
        assert self._worker is not None
        try:
            self._worker.run()
        except BaseException as error:
            self._error = error

    def _stop(self, worker: Worker, timeout: float) -> None:
        for _ in range(2):  # as a person would: TERM, and TERM again where that takes too long
            if self._thread.is_alive():
                worker.request_stop()
                self._thread.join(timeout / 2)

    def _queues(self, more: Sequence[str]) -> list[str]:
        settings = self.app.settings
        of_tasks = [task.options.queue for task in self.app.tasks.values()]
        named = [settings.default_queue, *settings.worker.queues, *settings.queues, *of_tasks, *more]
        return list(dict.fromkeys(name for name in named if name))

    def run_until_idle(self, timeout: float = 10) -> None:
        """Wait until nothing is left that can be done now: every message is settled, or due later.

        Results are stored by then, and observers have heard. Messages in a queue that the worker does not consume are left
        alone. Raises ``AssertionError``, naming what is not finished, after ``timeout`` seconds, or if the worker failed.
        """
        self._let_pass(None, timeout)

    def advance(
        self, seconds: float = 0.0, *, minutes: float = 0.0, hours: float = 0.0, days: float = 0.0, timeout: float = 10
    ) -> None:
        """Let that much time pass on the clock, stopping at each moment at which something is due until it is done.

        So a task that is retried every day for a month is retried thirty times in ``advance(days=30)``, each at its own
        time. ``timeout`` bounds, in real time, the work at each stop. Raises as ``run_until_idle``.
        """
        end = self.clock.time() + seconds + 60 * minutes + 3600 * hours + 86_400 * days
        self._let_pass(end, timeout)

    def _let_pass(self, end: float | None, timeout: float) -> None:
        """Wait on this thread while time passes on the I/O loop, where each stop costs no switch of threads."""
        worker = self._running()
        self._stopped_at = time.monotonic()
        passing = self.app.runtime.submit(self._pass(worker, end))
        while not passing.done():
            try:
                passing.result(max(0.0, self._stopped_at + timeout - time.monotonic()))
            except TimeoutError:
                if time.monotonic() >= self._stopped_at + timeout and passing.cancel():
                    raise AssertionError(f"not idle after {timeout:g} s: {self._unfinished()}") from None
        passing.result()

    async def _pass(self, worker: Worker, end: float | None) -> None:
        await self._until_idle(worker)
        if end is None:
            return
        while (due := self._next_due()) is not None and due <= end:
            self.clock.set(due)
            await self._until_idle(worker)
        self.clock.set(end)
        await self._until_idle(worker)

    def _next_due(self) -> float | None:
        now = self.clock.time()
        with self._lock:
            self._dues = {due for due in self._dues if due > now}
            return min(self._dues, default=None)

    def _running(self) -> Worker:
        if self._worker is None:
            raise UmbelError("nothing runs the tasks: use the fixture umbel_worker, or `with harness.worker():`")
        if not self._thread.is_alive():
            raise AssertionError(f"the worker has ended: {self._error or self._worker.failure!r}")
        return self._worker

    async def _until_idle(self, worker: Worker) -> None:
        self._stopped_at = time.monotonic()
        settled = self._settled = asyncio.Event()
        while self._thread.is_alive():
            settled.clear()
            if self._scheduler is not None and (due := await self._scheduler.send_due()) is not None:
                self.due([due])
            if not await self._busy(worker):
                break
            # What was acknowledged early ends without a settlement.
            again = asyncio.get_running_loop().call_later(_LOOK, settled.set)
            await settled.wait()
            again.cancel()
        self._running()

    async def _busy(self, worker: Worker) -> bool:
        # A message is ready or leased until it is settled, and what follows from it is published before that. Only what was
        # acknowledged early is known to the worker alone. No other coroutine comes between the two looks.
        depths = await worker.gateway.transport.depth(worker.queues)
        return any(depth.ready or depth.leased for depth in depths.values()) or bool(worker.settlement.held)

    def _unfinished(self) -> str:
        assert self._worker is not None
        held = [held.delivery.message for held in list(self._worker.settlement.held.values())]
        running = ", ".join(f"{message.task}[{message.id}]" for message in held) or "no task"
        return f"{running} in the worker's hands"


def _drivers(harness: Harness) -> tuple[Any, Any, Any]:
    try:
        transport, _ = load_driver(TRANSPORT, "memory")
        store, _ = load_driver(RESULT_STORE, "memory")
        pool, _ = load_driver(POOL, "threads")
    except PluginNotFound as error:
        raise PluginNotFound(
            f'a test in memory needs umbel-memory and umbel-threads: pip install "umbel[memory,threads]" ({error})'
        ) from error
    return _recording(transport, harness), store, pool


def _recording(transport: Any, harness: Harness) -> Any:
    """A class of transports that tell ``harness`` what they have accepted, and until when they keep what is given back."""

    class Recording(transport):  # type: ignore[misc]  # the class is found at run time, by its plugin's name
        async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
            await super().publish(messages, timeout=timeout)
            harness.accepted(messages)

        def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
            super().publish_blocking(messages, timeout=timeout)
            harness.accepted(messages)

        async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
            done: Sequence[bool] = await super().settle(settlements)
            harness.due(harness.clock.time() + s.delay for s in settlements if s.action is Action.REQUEUE)
            harness.settled()
            return done

    return Recording
