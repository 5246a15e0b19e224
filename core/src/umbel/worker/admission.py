"""What is decided about a delivery before it runs: refused, given back until its time, or let through.

What can be decided here and now is. What the fleet has to be asked for, its rate or a slot of a key, is asked for beside the
straight way: a store that is slow holds up the tasks that need it, and no others.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, cast

from umbel.errors import BrokerUnavailable, DecodeError, NotSupported, SettingsError
from umbel.limit_keys import HEADER, short
from umbel.model import Delivery, Outcome, TaskOptions, Verdict, evolve
from umbel.ports.result_store import ClaimStore
from umbel.ports.step import Step
from umbel.protocol import EARLY, parse_time
from umbel.worker.fleet_rate import FleetRate
from umbel.worker.limits import RateLimiter, parse_rate
from umbel.worker.slot_claims import FAULTS, STORE_PATIENCE, Key

if TYPE_CHECKING:
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

_UNKNOWN: Final = TaskOptions()
_UNREAD: Final = TaskOptions(concurrency_limit=1)
"""Of a message whose task only its body names (protocol 1), where any task has limits, or may be revoked: it is read before
anything else."""
_LAST_WORDS: Final = 1.0
"""Seconds that a stopping worker waits for what it has asked the fleet for."""


class Gate(Protocol):
    """Decides about batches before they start, with a look elsewhere: entered in ``Worker.gates`` by who needs one."""

    async def admit(self, batch: Sequence[Held]) -> Sequence[Held]:
        """Those of ``batch`` that may start; the others are ended, by ``Settlement.end``, before this returns.

        The worker takes nothing else on meanwhile, so it must end in bounded time. Raises nothing: what cannot be decided is
        given back (``returned``).
        """
        ...


class Admission(Step):
    """Decides for one worker, on its I/O loop, from headers alone: Law 1 keeps it from looking into a body."""

    name: ClassVar[str] = "admission"
    requires: ClassVar[tuple[str, ...]] = ("slots", "pool")
    before: ClassVar[tuple[str, ...]] = ("intake",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._app = worker.app
        self._rates: dict[str, RateLimiter] = {}
        self._fleet_rates: dict[str, FleetRate] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._starting: set[asyncio.Task[None]] = set()
        """What is let through is started to its end, whatever ends: it may be acknowledged already."""
        self._of_unread = _UNKNOWN
        self.limits_changed()

    async def start(self, worker: Worker) -> None:
        """Nothing to start: what asks, asks from its first delivery on."""

    async def stop(self, worker: Worker) -> None:
        """Give back what waits for the fleet's word. Nothing more comes: the intake has stopped."""
        worker.slots.give_back_waiting()
        if self._asking:
            _, unanswered = await asyncio.wait(self._asking, timeout=_LAST_WORDS)
            for asking in unanswered:
                asking.cancel()
            if unanswered:
                await asyncio.wait(unanswered)
        if self._starting:
            await asyncio.wait(self._starting)

    # --- at once ---

    def options(self, delivery: Delivery) -> TaskOptions:
        """The options of a delivery's task; those of a task that is not here are the defaults."""
        task = delivery.message.task
        if (known := self._app.tasks.find(task)) is not None:
            return known.options
        if not task and self._worker.revocations.hidden(delivery.message):
            return _UNREAD
        return _UNKNOWN if task else self._of_unread

    def refusal(self, held: Held) -> Outcome | None:
        """An outcome for what is not to run at all, or not now; None for what may start, within its limits."""
        message = held.delivery.message
        # A first handing-out is another message of the same id: the retry, say, of the one that was not settled.
        if held.delivery.count > 1 and message.id in self._worker.settlement.unsettled:
            return self._worker.settlement.unsettled.pop(message.id)
        if self._worker.revocations.covers(message):
            return self._worker.revocations.refused(message)
        headers = message.headers
        if headers.get("expires") is None and headers.get("eta") is None:
            return None
        now = self._app.clock.time()
        try:
            expires = parse_time(headers.get("expires"), self._app.timezone)
            eta = parse_time(headers.get("eta"), self._app.timezone)
        except DecodeError as exc:
            return self._worker.records.ended(Verdict.UNREADABLE, message, exc)
        if expires is not None and now > expires:
            return None  # the executor says so, and sends the errbacks that only the body knows
        if eta is not None and eta - now > EARLY:  # from a sender that leaves it to the worker to keep the time
            held.delay = min(eta - now, self._worker.gateway.transport.capabilities.max_delay or math.inf)
            return returned(held)
        return None

    def limit(self, batch: Sequence[Held]) -> Sequence[Held]:
        """Those of ``batch``, of tasks with limits, that may start at once; the others are given back, or asked for."""
        through: list[Held] = []
        asked: dict[Key, list[Held]] = {}
        for held in batch:
            options, message = held.options, held.delivery.message
            keyed = options.concurrency_limit and options.concurrency_key
            if not message.task or (keyed and HEADER not in message.headers):
                self._read(held)
            elif options.concurrency_limit or options.rate_limit_scope == "fleet":
                key = short(str(message.headers[HEADER])) if keyed else ""
                asked.setdefault((message.task, key), []).append(held)
            else:
                through += self._within_own_rate([held])
        for limited, calls in asked.items():
            self._background(self._ask(limited, calls), self._asking)
        return through

    def _within_own_rate(self, calls: Sequence[Held]) -> Sequence[Held]:
        now = self._app.clock.time()
        through = []
        for held in calls:
            if wait := self._wait(held, now):
                self.give_back(held, wait)
            else:
                through.append(held)
        return through

    def _wait(self, held: Held, now: float) -> float:
        task, rate = held.delivery.message.task, parse_rate(cast("str", held.options.rate_limit))
        limiter = self._rates.get(task)
        if limiter is None:
            limiter = self._rates[task] = RateLimiter(rate)
        elif limiter.rate != rate:
            limiter.change(rate, now)
        return limiter.wait(held.delivery.message.id, now)

    def give_back(self, held: Held, delay: float) -> None:
        """Back to the queue, unstarted and uncounted, for ``delay`` seconds."""
        held.delay = min(delay, self._worker.gateway.transport.capabilities.max_delay or math.inf)
        self._worker.settlement.end(held, returned(held))

    def limits_changed(self) -> None:
        """Limits have been set or taken away."""
        limited = any(task.options.rate_limit or task.options.concurrency_limit for task in self._app.tasks.values())
        self._of_unread = _UNREAD if limited else _UNKNOWN

    # --- asking the fleet ---

    def _read(self, held: Held) -> None:
        """Let an executor read the body, and send the message again with its limit's key in a header (``key`` of a payload)."""
        job = self._worker.settlement.job(held)
        payload = ("key", *job.payload[1:])
        self._worker.pool.submit([evolve(job, payload=payload, time_limit=None, soft_time_limit=None)])

    async def _ask(self, key: Key, calls: Sequence[Held]) -> None:
        """A slot for each call first: unlike a start of the rate, it can be given up again."""
        if limit := calls[0].options.concurrency_limit:
            try:
                calls = await self._worker.slots.take(key, limit, calls)
            except asyncio.CancelledError:
                for held in calls:
                    self.give_back(held, 0.0)
                raise
        if calls:
            await self._ask_for_starts(key[0], calls)

    async def _ask_for_starts(self, task: str, calls: Sequence[Held]) -> None:
        options = calls[0].options
        if options.rate_limit and options.rate_limit_scope == "fleet":
            try:
                calls = await self._within_fleet_rate(task, options.rate_limit, calls)
            except asyncio.CancelledError:
                for held in calls:
                    self.give_back(held, 0.0)
                raise
        elif options.rate_limit:
            calls = self._within_own_rate(calls)
        self._background(self._proceed(calls), self._starting)

    async def _within_fleet_rate(self, task: str, text: str, calls: Sequence[Held]) -> Sequence[Held]:
        rate, limiter = parse_rate(text), self._fleet_rates.get(task)
        if limiter is None:
            store = cast("ClaimStore", self._worker.gateway.store)
            owner = f"{self._worker.name}/{self._worker.incarnation}"
            limiter = self._fleet_rates[task] = FleetRate(store, task, rate, owner=owner, clock=self._app.clock)
        elif limiter.rate != rate:
            limiter.change(rate)
        try:
            async with asyncio.timeout(STORE_PATIENCE):
                number = await limiter.take(len(calls))
        except FAULTS as exc:
            logger.warning("the rate of task %s cannot be asked for, its calls go back for a moment: %s", task, exc)
            for held in calls:
                self.give_back(held, 1.0)
            return ()
        for held in calls[number:]:
            self.give_back(held, limiter.put_off(held.delivery.message.id))
        return calls[:number]

    def got_slot(self, held: Held) -> None:
        """A call that has waited for its slot has it now. Returns at once."""
        self._background(self._ask_for_starts(held.delivery.message.task, [held]), self._asking)

    async def _proceed(self, calls: Sequence[Held]) -> None:
        """Start what its limits let through, after a while."""
        if self._worker.stopping:
            for held in calls:
                self.give_back(held, 0.0)
        elif calls:
            try:
                await self._worker.intake.proceed(calls)
            except BrokerUnavailable as exc:
                logger.warning("broker unavailable: %s", exc)

    def _background(self, coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (exc := task.exception()) is not None:
                self._worker.fail(exc)

        task = asyncio.create_task(coroutine, name="umbel-admission")
        tasks.add(task)
        task.add_done_callback(ended)


def returned(held: Held) -> Outcome:
    """The outcome of a delivery that goes back to its queue unstarted."""
    message = held.delivery.message
    return Outcome(verdict=Verdict.RETURNED, task_id=message.id, task=message.task)


def check_limits(task: str, options: TaskOptions, worker: Worker) -> None:
    """Refuse limits that cannot be read or kept. Raises ``SettingsError``, ``NotSupported``, each naming the setting."""
    if options.rate_limit:
        try:
            parse_rate(options.rate_limit)
        except SettingsError as exc:
            raise SettingsError([f"task {task!r}: {exc}"]) from None
    if options.rate_limit and options.rate_limit_scope == "fleet":
        _check_store(f'task {task!r} has rate_limit_scope = "fleet"', worker)
    if options.concurrency_limit:
        _check_store(f"task {task!r} has concurrency_limit = {options.concurrency_limit}", worker)


def _check_store(wanted: str, worker: Worker) -> None:
    remedy = "take the limit away, or set [results] url to a store that has claims, such as sqlite:// or redis://"
    if not worker.gateway.has_store:
        raise NotSupported(f"{wanted}, which the workers agree on in the result store, and there is none: {remedy}")
    if not worker.gateway.store.capabilities.claim:
        scheme = str(worker.settings.results.url).partition(":")[0]
        raise NotSupported(
            f"{wanted}, which the workers agree on by claims, and result store {scheme!r} has none: {remedy}"
        )
