"""Claiming: a broker session that is thrown away whole on any fault, and the start of what it hands out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from umbel.errors import BrokerUnavailable
from umbel.model import Delivery, Verdict
from umbel.ports.step import Step
from umbel.ports.transport import Credit
from umbel.worker import settle
from umbel.worker.admission import returned

if TYPE_CHECKING:
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

_PATIENCE = 0.25
"""Seconds for which a delivery may wait behind others that run, while none of them ends."""
_ELSEWHERE = 1.0
"""Seconds for which a message that may not start here beside another is left to other workers."""
_CLOSING = 5.0
"""Seconds that a consumer has to give back what it has claimed and not handed out."""
_RETRY_PAUSE = (0.1, 5.0)
"""First and longest pause in seconds before a lost broker session is built again."""


class Intake(Step):
    """Consumes while the worker runs; its ``stop`` is a barrier: afterwards nothing more is claimed."""

    name: ClassVar[str] = "intake"
    requires: ClassVar[tuple[str, ...]] = ("pool", "settlement", "renewal")

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._app = worker.app
        self._received = worker.app.plugins.observer("umbel_task_received")
        self._suspects: deque[Held] = deque()
        self._suspects_out: set[int] = set()
        self._last_start = 0
        """Job of the one redelivered message that runs on its last start."""
        self._session: asyncio.Task[None] | None = None
        self._patience: asyncio.Task[None] | None = None
        self._stalled_at: int | None = None
        self._changing = asyncio.Lock()
        self.queues = list(worker.queues)
        self.last_poll: float | None = None
        """``time.monotonic()`` of the last answer of the broker; None before the first."""
        self.credit = Credit(0)

    async def start(self, worker: Worker) -> None:
        self.refill()
        self._begin()
        self._patience = asyncio.create_task(self._give_back_what_waits(), name="umbel-patience")
        worker.watch(self._patience)

    def _begin(self) -> None:
        self._session = asyncio.create_task(self._consume(), name="umbel-intake")
        self._worker.watch(self._session)

    async def consume_from(self, queues: Sequence[str]) -> None:
        """Consume exactly these queues from now on. What was claimed from others is run; the session stays."""
        async with self._changing:
            self.queues = list(queues)
            if self._session is not None:
                await self._end()
                if not self._worker.stopping:
                    self._begin()

    async def _end(self) -> None:
        if self._session is not None:
            self._session.cancel()
            _, unended = await asyncio.wait([self._session], timeout=_CLOSING)
            if unended:  # what it holds comes back with its session, or by its lease
                logger.error("the broker's consumer has not closed within %g s, and is left behind", _CLOSING)

    async def stop(self, worker: Worker) -> None:
        async with self._changing:
            await self._end()
        if self._patience is not None:
            self._patience.cancel()
        self._give_back_suspects()

    def _give_back_suspects(self, *, delay: float = 0.0, which: Callable[[Held], bool] = lambda _: True) -> None:
        back = [held for held in self._suspects if which(held)]
        self._suspects = deque(held for held in self._suspects if held not in back)
        for held in back:
            held.delay = delay
            self._worker.settlement.end(held, returned(held))

    def _on_last_start(self, held: Held) -> bool:
        """Whether the start of a redelivered message would be its last one."""
        marks = self._worker.gateway.transport.capabilities.start_marks
        return held.max_deliveries - settle.starts_so_far(held.delivery, marks) == 1

    async def _give_back_what_waits(self) -> None:
        """Hoard nothing behind long tasks: what no slot has started for a while may start at once in another worker."""
        settlement = self._worker.settlement
        while True:
            before = settlement.ended
            await asyncio.sleep(_PATIENCE)
            held = settlement.held.values()
            if settlement.ended == before and self._last_start in settlement.held:
                self._give_back_suspects(delay=_ELSEWHERE, which=self._on_last_start)
            if (
                settlement.ended == before
                and len(held) > self._worker.concurrency
                and not any(h.concluding for h in held)
            ):
                self._stalled_at = before
                self._give_back_suspects()
                await self._worker.pool.recall()

    def refill(self) -> None:
        """Let the broker hand out as much as the pool asks for, within the bound of the settings."""
        wanted = self.credit.out + max(0, self._worker.pool.free - len(self._suspects))
        bounds = [self._worker.settings.worker.prefetch or wanted]
        if self._stalled_at == self._worker.settlement.ended:  # every slot has a long task: no more than one for each
            bounds.append(self._worker.concurrency)
        self.credit.resize(min(wanted, *bounds))

    # --- the session ---

    async def _consume(self) -> None:
        """Law 5: one session after another, each built from the desired state."""
        pause = _RETRY_PAUSE[0]
        while self.queues:
            transport = self._worker.gateway.transport
            try:
                await self._worker.gateway.declare(transport, self.queues)
                stream = transport.consume(self.queues, credit=self.credit, lease=self._worker.settings.broker.lease)
                async with contextlib.aclosing(stream):  # type: ignore[type-var]  # an async generator, as every driver's is
                    while True:
                        async with asyncio.timeout(self._worker.settings.worker.watchdog):
                            batch = await anext(stream)
                        self.last_poll, pause = time.monotonic(), _RETRY_PAUSE[0]
                        if batch:
                            await _to_its_end(self._admit(batch))
            except (BrokerUnavailable, TimeoutError) as exc:
                silent = f"the broker has been silent for {self._worker.settings.worker.watchdog:g} s"
                reason = silent if isinstance(exc, TimeoutError) else exc
                logger.warning("broker session lost, building a new one in %.1f s: %s", pause, reason)
                self._worker.settlement.set_adrift()
                await self._worker.gateway.replace_transport(transport)
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
                pause = min(pause * 2, _RETRY_PAUSE[1])

    # --- admission ---

    async def _admit(self, batch: Sequence[Delivery]) -> None:
        admission, settlement = self._worker.admission, self._worker.settlement
        ready: list[Held] = []
        limited: list[Held] = []
        for delivery in batch:
            if delivery.count > 1 and settlement.adopt(delivery):
                continue
            if self._received:
                self._received(delivery=delivery)
            options = admission.options(delivery)
            held = settlement.hold(delivery, options)
            if (outcome := admission.refusal(held)) is not None:
                settlement.end(held, outcome)
            elif options.rate_limit or options.concurrency_limit:
                limited.append(held)
            elif delivery.count > 1 and self._may_crash(delivery):
                self._suspects.append(held)
            else:
                ready.append(held)
        if limited:
            ready += self._unsuspected(admission.limit(limited))
        await self._start(ready)
        await self.admit_suspects()
        self.refill()

    async def proceed(self, calls: Sequence[Held]) -> None:
        """Start what its limits let through later than the rest of its batch, unless it has ended meanwhile.

        Raises ``BrokerUnavailable``; then all of them are given back.
        """
        settlement, revocations = self._worker.settlement, self._worker.revocations
        ready: list[Held] = []
        for held in calls:
            if held.job_id in settlement.held and revocations.covers(held.delivery.message):
                settlement.end(held, revocations.refused(held.delivery.message))
            elif held.job_id in settlement.held:
                ready.append(held)
        await self._start(self._unsuspected(ready))
        await self.admit_suspects()
        self.refill()

    def _unsuspected(self, calls: Sequence[Held]) -> list[Held]:
        """``calls`` without those that are to be started one by one, which wait for that now."""
        suspects = [held for held in calls if held.delivery.count > 1 and self._may_crash(held.delivery)]
        self._suspects += suspects
        return [held for held in calls if held not in suspects] if suspects else list(calls)

    async def _start(self, batch: Sequence[Held]) -> None:
        """Hand deliveries to the pool, after acknowledging those that want it early.

        Raises ``BrokerUnavailable``; then all of them are given back.
        """
        settlement = self._worker.settlement
        for gate in self._worker.gates:
            batch = await gate.admit(batch)
        if early := [held for held in batch if held.options.ack == "early"]:
            try:
                await settlement.acknowledge_early(early)
            except BrokerUnavailable:
                for held in batch:
                    settlement.end(held, returned(held))
                raise
        if jobs := [settlement.job(held) for held in batch if held.job_id in settlement.held]:
            self._worker.pool.submit(jobs)

    async def admit_suspects(self) -> None:
        """Start redelivered messages, a few at a time, each start recorded first.

        Their last handing-out may have ended in a crash that they caused. A worker that is killed then leaves at most as
        many recorded starts as it has slots, and what it merely held is not blamed.
        """
        while self._suspects and await self._admit_some():
            pass  # some leases had passed to others: there is room for more, and nothing else would come to start them

    def _choose(self) -> list[Held]:
        """Redelivered messages that may run now: as many as there are slots, but only one of those on their last start.

        Two that always run side by side would be blamed for one's crashes alike; alone, each shows what it is.
        """
        held_now = self._worker.settlement.held
        self._suspects_out &= held_now.keys()
        room = self._worker.concurrency - len(self._suspects_out)
        chosen: list[Held] = []
        passed: list[Held] = []
        while self._suspects and len(chosen) < room:
            held = self._suspects.popleft()
            if self._on_last_start(held):
                if self._last_start in held_now:
                    passed.append(held)
                    continue
                self._last_start = held.job_id
            chosen.append(held)
        self._suspects.extendleft(reversed(passed))
        return chosen

    async def _admit_some(self) -> bool:
        """Start as many redelivered messages as may run now; True if some were ours no more."""
        settlement = self._worker.settlement
        if not (chosen := self._choose()):
            return False
        self._suspects_out.update(held.job_id for held in chosen)
        lease = self._worker.settings.broker.lease
        deliveries = [held.delivery for held in chosen]
        try:
            ours = await self._worker.gateway.transport.renew(deliveries, lease=lease, starting=True)
        except BrokerUnavailable:
            for held in chosen:
                settlement.end(held, returned(held))
            raise
        marks = self._worker.gateway.transport.capabilities.start_marks
        ready: list[Held] = []
        for held, delivery, still in zip(chosen, deliveries, ours, strict=True):
            if not still and held.delivery is not delivery:  # come again meanwhile
                self._suspects.append(held)
                self._suspects_out.discard(held.job_id)
                continue
            if not still:
                settlement.drop(held)
                continue
            held.extend(self._app.clock.time() + lease)
            held.starts = settle.starts_so_far(held.delivery, marks) + 1
            if settle.exhausted(held.starts - 1, held.max_deliveries):
                detail = f"its process was lost {held.starts - 1} times"
                self._worker.pool.submit([settlement.conclusion(held, Verdict.LOST, detail)])
            else:
                ready.append(held)
        await self._start(ready)
        return not all(ours)

    def withdraw(self, held: Held) -> bool:
        """Take a message out of those that wait for their turn or a slot; it is the caller's to end. False: it is none."""
        if held not in self._suspects:
            return self._worker.slots.withdraw(held)
        self._suspects.remove(held)
        return True

    @property
    def waiting(self) -> bool:
        """Whether redelivered messages wait for their turn."""
        return bool(self._suspects)

    def _may_crash(self, delivery: Delivery) -> bool:
        """Whether running it may have ended its process. Of a task that is not here nothing runs but the refusal."""
        task = delivery.message.task
        return not task or task in self._app.tasks  # protocol 1 names the task in the body


async def _to_its_end(admission: Coroutine[Any, Any, None]) -> None:
    """Await ``admission`` even while being cancelled: a delivery is either not taken on, or is started or given back."""
    admitting = asyncio.ensure_future(admission)
    try:
        await asyncio.shield(admitting)
    except asyncio.CancelledError:
        await asyncio.wait([admitting])
        raise


def describe(delivery: Delivery) -> Mapping[str, object]:
    """A held delivery for ``status`` and remote control."""
    headers = delivery.message.headers
    return {
        "id": delivery.message.id,
        "name": delivery.message.task,
        "args": headers.get("argsrepr", ""),
        "kwargs": headers.get("kwargsrepr", ""),
        "delivery_info": {
            "exchange": delivery.message.properties.get("exchange", ""),
            "routing_key": delivery.queue,
            "priority": delivery.message.priority,
            "redelivered": delivery.count > 1,
        },
    }
