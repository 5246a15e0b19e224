"""A worker: steps in order on the I/O loop, signals and user code elsewhere, one way to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from umbel.errors import BrokerUnavailable, NotSupported, PluginError, SettingsError, UmbelError
from umbel.finding import executing, locate
from umbel.gateway import LocalGateway
from umbel.ports.pool import ExecutorFactory, Pool, PoolContext
from umbel.ports.step import Step
from umbel.worker.admission import Admission, Gate, check_limits
from umbel.worker.autoscale import Autoscale, check_autoscale, first_slots
from umbel.worker.control import Control
from umbel.worker.intake import Intake
from umbel.worker.once import OneStart
from umbel.worker.operations import Operations
from umbel.worker.outcomes import Records
from umbel.worker.revocations import Revocations
from umbel.worker.scheduler_step import SchedulerStep
from umbel.worker.settlement import SettlementStep
from umbel.worker.slots import Slots
from umbel.worker.starts import Starts
from umbel.worker.steps import in_order
from umbel.worker.time_limits import TimeLimits
from umbel.worker.uniques import Uniques
from umbel.worker.workflows import Workflows

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.worker")


class PoolStep(Step):
    """Starts the pool, carries its completions away, and drains it at the end."""

    name: ClassVar[str] = "pool"
    requires: ClassVar[tuple[str, ...]] = ("settlement", "renewal")

    def __init__(self) -> None:
        self._carrying: asyncio.Task[None] | None = None

    async def start(self, worker: Worker) -> None:
        """Look at the connection while the pool's processes import the application; raise what goes wrong first."""
        starting = asyncio.ensure_future(worker.pool.start(worker.pool_context()))
        checking = asyncio.ensure_future(worker.check_connection())
        try:
            await asyncio.wait([starting, checking], return_when=asyncio.FIRST_EXCEPTION)
            for done in (part for part in (checking, starting) if part.done()):
                done.result()
        except BaseException:
            checking.cancel()
            starting.cancel()
            await asyncio.wait([starting, checking])
            if not starting.cancelled() and starting.exception() is None:
                await worker.pool.stop(timeout=0)
            raise
        self._carrying = asyncio.create_task(self._carry(worker), name="umbel-completions")
        worker.pool_started.set()

    async def _carry(self, worker: Worker) -> None:
        try:
            async for completions in worker.pool.completions():
                worker.settlement.complete(completions)
                worker.intake.refill()
        except Exception as exc:
            worker.fail(exc)
            raise

    async def stop(self, worker: Worker) -> None:
        """Law 6: give back what has not started, drain for the grace period, then cancel."""
        grace = worker.settings.worker.grace
        stopping = asyncio.create_task(worker.pool.stop(timeout=grace))
        hurried = asyncio.create_task(worker.hurry.wait())
        await asyncio.wait([stopping, hurried], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await worker.pool.stop(timeout=0)
        await stopping
        hurried.cancel()
        if self._carrying is not None:
            await asyncio.wait([self._carrying], timeout=5)


class RenewalStep(Step):
    """Extends the leases of everything held, at a third of their length."""

    name: ClassVar[str] = "renewal"

    def __init__(self) -> None:
        self._renewing: asyncio.Task[None] | None = None

    async def start(self, worker: Worker) -> None:
        self._renewing = asyncio.create_task(self._renew(worker), name="umbel-renewal")
        worker.watch(self._renewing)

    async def stop(self, worker: Worker) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])

    async def _renew(self, worker: Worker) -> None:
        lease = worker.settings.broker.lease
        while True:
            await asyncio.sleep(lease / 3)
            transport = worker.gateway.transport
            held = [h for h in worker.settlement.held.values() if not h.settled and not h.lost]
            if not held or not transport.capabilities.renewable_lease:
                continue
            until = worker.app.clock.time() + lease
            try:
                deliveries = [h.delivery for h in held]
                ours = await transport.renew(deliveries, lease=lease)
            except BrokerUnavailable as exc:
                logger.warning("leases could not be renewed, trying again: %s", exc)
                continue
            for h, delivery, still in zip(held, deliveries, ours, strict=True):
                if h.delivery is not delivery:  # come again meanwhile, under a lease of its own
                    continue
                if still:
                    h.extend(until)
                elif h.job_id in worker.settlement.held:  # not settled meanwhile
                    h.lost = True


class Worker:
    """Runs tasks of one app until told to stop. Made on any thread; ``run`` belongs on the main thread.

    Plugins that hold it in a hook use ``app``, ``settings``, ``name``, ``incarnation``, ``operations``, ``background`` and
    ``watch``.
    """

    def __init__(self, app: Umbel) -> None:
        """Make every component; nothing is connected yet. Raises ``SettingsError``, ``PluginError``, ``NotSupported``."""
        if executing:
            raise UmbelError(
                'this script starts a worker when a child imports it: start it under `if __name__ == "__main__":`'
            )
        self.app = app
        self.settings = app.settings
        app.load_tasks()
        chosen = self.settings.worker
        self.name = chosen.name or f"umbel-{os.getpid()}@{socket.gethostname()}"
        self.incarnation = secrets.token_hex(4)
        self.queues: list[str] = list(chosen.queues) or [self.settings.default_queue]
        self.pool: Pool = app.plugins.make_pool(chosen.pool, chosen.pool_options)
        able = self.pool.capabilities
        self.concurrency = first_slots(chosen) or (1 if able.main_thread else _cpus() * able.slots_per_cpu)
        gateway = app.gateway
        if not isinstance(gateway, LocalGateway):
            raise UmbelError("a worker cannot be started inside a worker's child")
        self.gateway = gateway
        self.records = Records(app, self.name)
        self.gates: list[Gate] = []
        """Asked in this order about every batch that is to start; empty costs nothing."""
        self.time_limits = TimeLimits(self)
        self.uniques = Uniques(self)
        self.gates += [OneStart(self), self.uniques]
        self.operations = Operations(self)
        self.revocations = Revocations(self)
        self.stopping = False
        self.pool_started = threading.Event()
        self.failure: BaseException | None = None
        self._stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._tasks: set[asyncio.Future[object]] = set()
        self._unkept: set[str] = set()
        self._check_settings()

    # --- life ---

    def run(self, *, last: bool = False) -> int:
        """Run until stopped; return the exit status: 0, or 1 after a failure, which is logged.

        Blocks. On the main thread it takes TERM and INT for itself meanwhile: the first stops, the second hurries. ``last``:
        the process ends with it, and a signal that comes afterwards does not change its exit status any more.
        """
        _ = self.app.runtime.loop  # before a signal's handler may ask for it, amid its start: that holds a lock
        done = threading.Event()
        on_main = threading.current_thread() is threading.main_thread()
        before = {s: signal.signal(s, self._signalled) for s in (signal.SIGTERM, signal.SIGINT)} if on_main else {}
        try:
            future = self.app.runtime.submit(self._main())
            future.add_done_callback(lambda _: done.set())
            if self.pool.capabilities.main_thread:
                while not self.pool_started.wait(0.05) and not done.is_set():
                    pass
                if not done.is_set():
                    self.pool.run_main_thread()
            while not done.wait(1.0):
                pass  # a signal that comes in the moment in which a wait begins is only seen at its end (CPython)
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if last else handler)
        exc = future.exception()
        if exc is not None:
            raise exc
        return 0 if self.failure is None else 1

    def request_stop(self) -> None:
        """Stop as TERM does; a second call hurries. From any thread; returns at once."""
        self.app.runtime.loop.call_soon_threadsafe(self._stop_or_hurry)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        again = ", dropping what runs" if self.stopping else ""
        logger.warning("%s: stopping%s", signal.Signals(number).name, again)
        self.request_stop()

    def _stop_or_hurry(self) -> None:
        if self._stop.is_set():
            self.hurry.set()
        self._stop.set()

    def fail(self, exc: BaseException) -> None:
        """Stop because a component cannot go on."""
        if self.failure is None:
            self.failure = exc
            logger.critical("the worker stops: %s", exc, exc_info=not isinstance(exc, UmbelError) and exc)
        self._stop.set()

    def watch(self, task: asyncio.Task[None]) -> None:
        """Stop the worker if a component's task fails, or ends by a cancellation that nobody asked of it."""

        def ended(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                if (
                    not task.cancelling()
                ):  # what it awaited was cancelled, by a driver's fault: without it all would hang
                    self.fail(UmbelError(f"{task.get_name()} was cancelled from within"))
            elif (exc := task.exception()) is not None:
                self.fail(exc)

        task.add_done_callback(ended)

    def make_steps(self) -> None:
        """Make every component, its own and those of plugins, in the order in which they start. Nothing is connected yet.

        Raises ``PluginBroken``, ``UmbelError`` for steps that cannot be put in order.
        """
        self.settlement = SettlementStep(self)
        self.slots = Slots(self)
        self.admission = Admission(self)
        self.autoscale = Autoscale(self)
        self.starts = Starts(self)
        self.intake = Intake(self)
        self.workflows = Workflows(self)
        steps: list[Step] = [self.settlement, RenewalStep(), PoolStep(), self.starts, self.intake, Control(self)]
        if self.settings.worker.with_scheduler:
            steps.append(SchedulerStep(self))
        steps += [self.revocations, self.slots, self.admission, self.autoscale, self.uniques, self.workflows]
        added: list[tuple[str, Step]] = self.app.plugins.contributed("umbel_add_steps", worker=self)
        self.steps = in_order([*steps, *(step for _, step in added)])
        self.added_by = {step.name: plugin for plugin, step in added}

    async def _main(self) -> None:
        self.make_steps()
        ready, stopping, stopped = (
            self.app.plugins.observer(f"umbel_worker_{event}") for event in ("ready", "stopping", "stopped")
        )
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.gateway.close_components)
            for step in self.steps:
                if not await self._start(step):
                    break
                stack.push_async_callback(step.stop, self)
            else:
                logger.info("%s is ready", self.name)
                if ready:
                    ready(worker=self)
                await self._stop.wait()
            self.stopping = True
            if stopping:
                stopping(worker=self)
        if stopped:
            stopped(worker=self)

    async def _start(self, step: Step) -> bool:
        """Start a component, unless the worker is told to stop before it is ready. Raises what ``start`` raises."""
        starting, told = asyncio.ensure_future(step.start(self)), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
        if starting.cancelled():
            return False
        starting.result()
        return True

    async def check_connection(self) -> None:
        """Answer a wrong address or password at once, instead of trying for ever."""
        await self.gateway.transport.depth(self.queues)

    # --- work ---

    def wall(self, moment: float) -> float:
        """A moment of ``time.monotonic()`` as Unix time."""
        return self.app.clock.time() - (time.monotonic() - moment)

    def background(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run ``coroutine`` on the I/O loop, where the caller is, without waiting for it."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)

    def pool_context(self) -> PoolContext:
        """What the pool is told at its start."""
        chosen = self.settings.worker
        sources = self.app._sources
        arguments: dict[str, Any] = {
            "app": locate(self.app) if self.pool.capabilities.isolated else self.app.reference,
            "token": id(self.app),
            "pid": os.getpid(),
            "hostname": self.name,
            "command_line": dict(sources["command_line"]),
            "file": None if sources["file"] is None else str(sources["file"]),
            "reply_to": self.gateway.reply_to,
        }
        return PoolContext(
            factory=ExecutorFactory(target="umbel.worker.execution:make_executor", arguments=arguments),
            concurrency=self.concurrency,
            upcall=self.gateway.answer,
            max_tasks_per_child=chosen.max_tasks_per_child,
            max_memory_per_child=chosen.max_memory_per_child,
            start_timeout=chosen.start_timeout,
        )

    def tell_unkept_limits(self, task: str, hard: float | None, soft: float | None) -> None:
        """Warn, once for each task, of a call whose time limits this pool cannot keep; the task runs without them."""
        able = self.pool.capabilities
        if ((hard and not able.hard_limit) or (soft and not able.soft_limit)) and task not in self._unkept:
            self._unkept.add(task)
            pool = self.settings.worker.pool
            logger.warning("a call of task %s has a time limit, which pool %r cannot keep; it runs without", task, pool)

    def _check_settings(self) -> None:
        """Refuse at start what cannot be kept, in one sentence that names the setting."""
        codec = self.settings.codec
        if codec.serializer not in codec.accept:
            accept = list(codec.accept)
            raise SettingsError(
                [f"[codec] serializer is {codec.serializer!r}, which [codec] accept = {accept} refuses: add it there"]
            )
        _ = self.gateway.transport
        _ = self.app.codec.accepted, self.app.codec.accepted_compression, self.app.result_codec.accepted
        able = self.pool.capabilities
        wanted = (
            ("time_limit", able.hard_limit),
            ("soft_time_limit", able.soft_limit),
        )
        for task in self.app.tasks.values():
            check_limits(task.name, task.options, self)
            for option, possible in wanted:
                if getattr(task.options, option) and not possible:
                    raise NotSupported(
                        f"task {task.name!r} has a {option}, which pool {self.settings.worker.pool!r} cannot keep: take "
                        f'the limit away, or set [worker] pool = "prefork"'
                    )
        check_autoscale(self)
        for option in ("max_tasks_per_child", "max_memory_per_child"):
            if getattr(self.settings.worker, option) and not able.recycle:
                raise NotSupported(
                    f"[worker] {option} needs a pool of processes, and {self.settings.worker.pool!r} is none"
                )


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["PluginError", "SettingsError", "Worker"]
