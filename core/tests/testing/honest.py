"""Small honest drivers in memory: each passes its whole contract, with every ability or with none.

The animals of the zoo are these with one fault each, so their parts are cut where faults go.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar

from attrs import define, evolve, field

from umbel.capabilities import (
    UNLIMITED,
    PoolCapabilities,
    ResultStoreCapabilities,
    SchedulerCapabilities,
    TransportCapabilities,
)
from umbel.errors import (
    BrokerUnavailable,
    ContentRefused,
    DecodeError,
    EncodeError,
    NotSupported,
    PublishRefused,
    ResultStoreUnavailable,
    SoftTimeLimitExceeded,
    TaskCancelled,
    UmbelError,
)
from umbel.model import (
    HEADER_DEAD_AT,
    HEADER_DEAD_CAUSE,
    HEADER_DEAD_COUNT,
    HEADER_DEAD_QUEUE,
    Action,
    Completion,
    Delivery,
    Ending,
    Job,
    Lease,
    Message,
    QueueSpec,
    Result,
    ScheduleEntry,
    Settlement,
    dead_letter_queue,
)
from umbel.ports.clock import Clock
from umbel.ports.compressor import Compressor
from umbel.ports.pool import Executor, Pool, PoolContext
from umbel.ports.result_store import ClaimStore, JoinState, JoinStore, QueryableStore, ResultStore
from umbel.ports.scheduler import Scheduler
from umbel.ports.serializer import Serializer
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, QueueDepth, Transport

POLL = 0.001
QUIET = 0.15


# --- transport ------------------------------------------------------------------------------------


@define(eq=False)
class Kept:
    """A message that a broker keeps."""

    message: Message
    order: int
    until: float
    """Not before this time: delayed, or leased. ``inf``: as long as the session lives."""
    holder: object = None
    count: int = 0
    starts: int = 0
    fence: int = 0


@define
class Broker:
    """What instances share."""

    kept: list[Kept] = field(factory=list)
    queues: dict[str, QueueSpec] = field(factory=dict)
    listeners: list[tuple[str, deque[tuple[str, bytes]]]] = field(factory=list)
    said: list[tuple[str, str, bytes]] = field(factory=list)
    order: itertools.count[int] = field(factory=itertools.count)
    lock: threading.Lock = field(factory=threading.Lock)


class ModestTransport(Transport):
    """Can only what every transport must: holds for the session, keeps no delay, knows no priority."""

    capabilities = TransportCapabilities(confirm=True)

    def __init__(self, broker: Broker, clock: Clock | None = None) -> None:
        super().__init__("honest://", clock=clock)
        self.broker = broker
        self.closed = False

    async def enter(self) -> None:
        self.check()
        await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        if self.closed:
            raise BrokerUnavailable("honest:// is closed")

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        await self.enter()
        self.accept(messages)

    def accept(self, messages: Sequence[Message]) -> None:
        now, able = self.clock.time(), self.capabilities
        for message in messages:
            if message.due is not None and message.due > now + able.max_delay:
                raise NotSupported("honest:// keeps no such delay")
            if able.max_message_size is not None and len(message.body) > able.max_message_size:
                raise PublishRefused("honest:// takes no body of that size")
        with self.broker.lock:
            for message in messages:
                self.keep(copy.deepcopy(message))

    def keep(self, message: Message) -> None:
        self.broker.queues.setdefault(message.queue, QueueSpec(name=message.queue))
        until = 0.0 if message.due is None else message.due
        self.broker.kept.append(Kept(message, next(self.broker.order), until))

    def ready(self, queues: Sequence[str]) -> list[Kept]:
        """What may be handed out now, in order."""
        now = self.clock.time()
        found = [kept for kept in self.broker.kept if kept.message.queue in queues and kept.until <= now]
        return sorted(found, key=self.place)

    def place(self, kept: Kept) -> tuple[float, int]:
        return (-kept.message.priority if self.capabilities.priority_levels > 1 else 0, kept.order)

    def room(self, credit: Credit) -> int:
        return credit.available

    def hand_out(self, kept: Kept, lease: float) -> Delivery:
        able = self.capabilities
        kept.until = self.clock.time() + lease if able.renewable_lease else float("inf")
        kept.holder = self
        kept.count += 1
        kept.fence += 1
        return Delivery(
            message=copy.deepcopy(kept.message),
            queue=kept.message.queue,
            token=(kept, kept.fence),
            count=kept.count if able.delivery_count else min(kept.count, 2),
            starts=kept.starts,
            leased_until=kept.until if able.renewable_lease else None,
        )

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        silent = time.monotonic()
        while True:
            self.check()
            with self.broker.lock:
                batch = [self.hand_out(kept, lease) for kept in self.ready(queues)[: self.room(credit)]]
            if batch or self.speaks(silent):
                credit.take(len(batch))
                yield batch
                silent = time.monotonic()
            await self.pause()

    async def pause(self) -> None:
        await asyncio.sleep(POLL)

    def speaks(self, silent: float) -> bool:
        return time.monotonic() > silent + QUIET

    def held(self, delivery: Delivery) -> Kept | None:
        kept, fence = delivery.token
        return kept if kept in self.broker.kept and kept.fence == fence else None

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        await self.enter()
        if any(settlement.delay > self.capabilities.max_delay for settlement in settlements):
            raise NotSupported("honest:// keeps no delay")
        return [self.carry_out(settlement) for settlement in settlements]

    def carry_out(self, settlement: Settlement) -> bool:
        if (kept := self.held(settlement.delivery)) is None:
            return False
        kept.fence += 1
        if settlement.action is Action.REQUEUE:
            self.give_back(kept, settlement)
            return True
        self.broker.kept.remove(kept)
        if settlement.action is Action.DEAD:
            self.bury(settlement, kept)
        return True

    def give_back(self, kept: Kept, settlement: Settlement) -> None:
        kept.until = self.clock.time() + settlement.delay
        kept.holder = None
        kept.count -= not settlement.counted

    def bury(self, settlement: Settlement, kept: Kept) -> None:
        queue = kept.message.queue
        headers = {
            **kept.message.headers,
            HEADER_DEAD_CAUSE: settlement.cause,
            HEADER_DEAD_QUEUE: queue,
            HEADER_DEAD_AT: self.clock.time(),
            HEADER_DEAD_COUNT: settlement.delivery.count,
        }
        self.keep(evolve(kept.message, queue=dead_letter_queue(queue), headers=headers, due=None))

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        await self.enter()
        if not self.capabilities.renewable_lease:
            return [True] * len(deliveries)
        found = [self.held(delivery) for delivery in deliveries]
        for kept in found:
            if kept is not None:
                kept.until = self.clock.time() + lease
                kept.starts += starting and self.capabilities.start_marks
        return [kept is not None for kept in found]

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self.enter()
        for spec in queues:
            if self.broker.queues.setdefault(spec.name, spec) != spec:
                raise PublishRefused(f"queue {spec.name!r} has other arguments")

    def waiting(self, queue: str) -> list[Kept]:
        ready = self.ready([queue])
        delayed = [k for k in self.broker.kept if k.message.queue == queue and k.holder is None and k not in ready]
        return ready + sorted(delayed, key=lambda kept: kept.until)

    async def purge(self, queue: str) -> int:
        await self.enter()
        gone = self.waiting(queue)
        for kept in gone:
            self.broker.kept.remove(kept)
        return len(gone)

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        await self.enter()
        return {queue: self.count(queue) for queue in queues or self.broker.queues}

    def count(self, queue: str) -> QueueDepth:
        kept = [kept for kept in self.broker.kept if kept.message.queue == queue]
        ready, waiting = len(self.ready([queue])), len(self.waiting(queue))
        return QueueDepth(ready=ready, delayed=waiting - ready, leased=len(kept) - waiting)

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        await self.enter()
        return [copy.deepcopy(kept.message) for kept in self.waiting(queue)[offset : offset + limit]]

    async def close(self) -> None:
        self.closed = True
        for kept in self.broker.kept:
            if kept.holder is self:
                kept.holder, kept.until = None, 0.0
                kept.fence += 1


class HonestTransport(ModestTransport, BlockingPublisher, Broadcaster):
    """Can everything."""

    capabilities = TransportCapabilities(
        confirm=True,
        max_delay=UNLIMITED,
        priority_levels=10,
        renewable_lease=True,
        delivery_count=True,
        start_marks=True,
        broadcast=True,
        blocking_publish=True,
        max_message_size=20_000_000,
    )

    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        self.check()
        self.accept(messages)

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        await self.enter()
        self.broker.said.append((topic, key, payload))
        for place, heard in self.broker.listeners:
            if place == topic:
                heard.append((key, payload))

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        listener = (topic, self.first_heard(topic))
        self.broker.listeners.append(listener)
        try:
            while True:
                self.check()
                while listener[1]:
                    yield listener[1].popleft()
                await asyncio.sleep(POLL)
        finally:
            self.broker.listeners = [other for other in self.broker.listeners if other is not listener]

    def first_heard(self, topic: str) -> deque[tuple[str, bytes]]:
        return deque()


# --- result store ---------------------------------------------------------------------------------


@define
class Join:
    marks: dict[str, bytes] = field(factory=dict)
    size: int | None = None
    fired: bool = False
    owner: str = ""
    until: float = 0.0


@define
class Memory:
    """What instances share."""

    records: dict[str, tuple[Result, float]] = field(factory=dict)
    """With the time at which they end."""
    joins: dict[str, Join] = field(factory=dict)
    claims: dict[str, Lease] = field(factory=dict)
    fences: itertools.count[int] = field(factory=lambda: itertools.count(1))


class ModestStore(ResultStore):
    """Can only what every store must."""

    capabilities = ResultStoreCapabilities()

    def __init__(self, memory: Memory, clock: Clock | None = None) -> None:
        super().__init__("honest://", clock=clock)
        self.memory = memory
        self.closed = False
        self.waiting: set[asyncio.Task[Any]] = set()

    async def enter(self) -> None:
        if self.closed:
            raise ResultStoreUnavailable("honest:// is closed")
        await asyncio.sleep(0)

    def live(self, task_id: str) -> Result | None:
        record, end = self.memory.records.get(task_id, (None, 0.0))
        return record if end > self.clock.time() or not self.capabilities.expires else None

    async def put(self, results: Sequence[Result]) -> None:
        await self.enter()
        for result in results:
            if not self.settled(result):
                end = float("inf") if result.expires is None else self.clock.time() + result.expires
                self.memory.records.pop(result.task_id, None)
                self.memory.records[result.task_id] = (result, end)

    def settled(self, result: Result) -> bool:
        known = self.live(result.task_id)
        return known is not None and known.final

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        await self.enter()
        return {task_id: result for task_id in task_ids if (result := self.live(task_id)) is not None}

    async def wait(self, task_id: str) -> Result:
        await self.enter()
        task = asyncio.current_task()
        assert task is not None
        self.waiting.add(task)
        try:
            while (result := self.live(task_id)) is None or not self.wakes(result):  # noqa: ASYNC110  # small, not quick
                await asyncio.sleep(POLL)
            return result
        finally:
            self.waiting.discard(task)

    def wakes(self, result: Result) -> bool:
        return result.final

    async def forget(self, task_ids: Sequence[str]) -> None:
        await self.enter()
        for task_id in task_ids:
            self.memory.records.pop(task_id, None)

    async def close(self) -> None:
        self.closed = True
        for task in self.waiting:
            task.cancel()


class HonestStore(ModestStore, JoinStore, ClaimStore, QueryableStore):
    """Can everything."""

    capabilities = ResultStoreCapabilities(expires=True, join=True, claim=True, query=True)

    async def join(
        self,
        key: str,
        marks: Mapping[str, bytes],
        *,
        size: int | None,
        owner: str,
        lease: float,
        expires: float | None = None,
    ) -> JoinState:
        await self.enter()
        join = self.memory.joins.setdefault(key, Join())
        join.marks = {**marks, **join.marks}
        join.size = join.size if size is None else size
        fires = self.fires(join)
        if fires:
            join.owner, join.until = owner, self.clock.time() + lease
        return JoinState(count=len(join.marks), size=join.size, fires=fires)

    def fires(self, join: Join) -> bool:
        complete = join.size is not None and len(join.marks) >= join.size
        return complete and not join.fired and join.until <= self.clock.time()

    async def members(self, key: str) -> Mapping[str, bytes]:
        await self.enter()
        return dict(self.memory.joins.get(key, Join()).marks)

    async def fired(self, key: str, owner: str) -> bool:
        await self.enter()
        join = self.memory.joins[key]
        if not self.may_fire(join, owner):
            return False
        join.fired = True
        return True

    def may_fire(self, join: Join, owner: str) -> bool:
        return join.owner == owner

    async def unfired(self, limit: int = 100) -> Sequence[str]:
        await self.enter()
        return [key for key, join in self.memory.joins.items() if self.fires(join)][:limit]

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes = b"") -> Lease:
        await self.enter()
        now, held = self.clock.time(), self.memory.claims.get(name)
        if held is not None and held.until > now and held.owner != owner:
            return held
        if held is None or held.until <= now:
            held = Lease(name=name, owner=owner, fence=self.next_fence(held), until=now)
        held = self.memory.claims[name] = evolve(held, until=now + lease, value=value)
        return held

    def next_fence(self, former: Lease | None) -> int:
        return next(self.memory.fences)

    async def release(self, name: str, owner: str) -> bool:
        await self.enter()
        held = self.memory.claims.get(name)
        if held is None or not self.may_release(held, owner):
            return False
        del self.memory.claims[name]
        return True

    def may_release(self, held: Lease, owner: str) -> bool:
        return held.owner == owner

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self.enter()
        now = self.clock.time()
        return [held for name, held in self.memory.claims.items() if name.startswith(prefix) and held.until > now]

    async def query(self, *, state: str | None = None, limit: int = 100, offset: int = 0) -> Sequence[Result]:
        await self.enter()
        found = [record for record, _ in self.newest_first() if state in (None, record.state)]
        return found[offset : offset + limit]

    def newest_first(self) -> Sequence[tuple[Result, float]]:
        return list(reversed(self.memory.records.values()))


# --- scheduler ------------------------------------------------------------------------------------


@define
class Timetable:
    """What instances share."""

    entries: dict[str, ScheduleEntry] = field(factory=dict)
    leader: Lease = field(factory=lambda: Lease(name="leader", owner="", fence=0, until=0.0))


class HonestScheduler(Scheduler):
    """Keeps every law."""

    capabilities = SchedulerCapabilities(shared=True)

    def __init__(self, timetable: Timetable, clock: Clock | None = None) -> None:
        super().__init__("honest://", clock=clock)
        self.timetable = timetable
        self.owner = ""
        self.closed = False

    async def enter(self) -> None:
        if self.closed:
            raise UmbelError("honest:// is closed")
        await asyncio.sleep(0)

    async def load(self) -> Sequence[ScheduleEntry]:
        await self.enter()
        return list(self.timetable.entries.values())

    async def upsert(self, entries: Sequence[ScheduleEntry]) -> None:
        await self.enter()
        for entry in entries:
            known = self.timetable.entries.get(entry.name)
            self.timetable.entries[entry.name] = entry if known is None else self.merged(known, entry)

    def merged(self, known: ScheduleEntry, entry: ScheduleEntry) -> ScheduleEntry:
        return evolve(entry, last_due=known.last_due, total_runs=known.total_runs)

    async def remove(self, names: Sequence[str]) -> int:
        await self.enter()
        return sum(self.timetable.entries.pop(name, None) is not None for name in names)

    async def due(self, now: float, limit: int = 1000) -> Sequence[ScheduleEntry]:
        await self.enter()
        found = [entry for entry in self.timetable.entries.values() if self.is_due(entry, now)]
        return sorted(found, key=lambda entry: entry.next_due or 0.0)[:limit]

    def is_due(self, entry: ScheduleEntry, now: float) -> bool:
        return entry.enabled and entry.next_due is not None and entry.next_due <= now

    async def mark(self, entries: Sequence[ScheduleEntry], *, fence: int) -> bool:
        await self.enter()
        if not self.leads(fence):
            return False
        for entry in entries:
            if entry.name in self.timetable.entries:
                self.timetable.entries[entry.name] = entry
        return True

    def leads(self, fence: int) -> bool:
        return fence == self.timetable.leader.fence

    async def lead(self, owner: str, *, lease: float) -> Lease:
        await self.enter()
        now, leader = self.clock.time(), self.timetable.leader
        if leader.owner != owner and leader.until > now:
            return leader
        fence = leader.fence + (leader.owner != owner)
        self.owner = owner
        self.timetable.leader = evolve(leader, owner=owner, fence=fence, until=now + lease)
        return self.timetable.leader

    async def close(self) -> None:
        self.closed = True
        self.give_up()

    def give_up(self) -> None:
        if self.owner and self.timetable.leader.owner == self.owner:
            self.timetable.leader = evolve(self.timetable.leader, owner="", until=0.0)


# --- codecs ---------------------------------------------------------------------------------------


class HonestSerializer(Serializer):
    """JSON without extensions."""

    name: ClassVar[str] = "honest"
    content_type: ClassVar[str] = "application/x-honest"
    content_encoding: ClassVar[str] = "utf-8"

    def dumps(self, value: Any) -> bytes:
        try:
            return json.dumps(value).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise EncodeError(self.told(error)) from error

    def told(self, error: Exception) -> str:
        return str(error)

    def loads(self, data: bytes) -> Any:
        try:
            return json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise DecodeError(str(error)) from error


class HonestCompressor(Compressor):
    """zlib."""

    name: ClassVar[str] = "honest"
    encoding: ClassVar[str] = "application/x-honest"

    def compress(self, data: bytes) -> bytes:
        return zlib.compress(data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            restored = self.restore(stream, data, limit)
        except zlib.error as error:
            raise DecodeError(str(error)) from error
        if len(restored) > limit:
            raise ContentRefused("too large")
        if not self.complete(stream):
            raise DecodeError("truncated")
        return restored

    def restore(self, stream: Any, data: bytes, limit: int) -> bytes:
        restored: bytes = stream.decompress(data, limit + 1)
        return restored

    def complete(self, stream: Any) -> bool:
        return bool(stream.eof)


# --- pool -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in what a pool has given up, which does not listen to anything else."""


@define(eq=False)
class Run:
    """One job while it runs. Whatever is to interrupt it is raised by its next upcall."""

    job: Job
    raising: list[type[BaseException]] = field(factory=list)
    killed: bool = False
    timers: list[asyncio.TimerHandle] = field(factory=list)


class ModestPool(Pool):
    """A thread for each job, and only what every pool must."""

    name: ClassVar[str] = "honest"
    capabilities = PoolCapabilities()

    loop: asyncio.AbstractEventLoop
    context: PoolContext
    executor: Executor

    def __init__(self, *, options: Any = None) -> None:
        super().__init__(options=options)
        self.slots = 0
        self.pending: deque[Job] = deque()
        self.running: dict[int, Run] = {}
        self.ended: list[Completion] = []
        self.news = asyncio.Event()
        self.local = threading.local()
        self.threads: list[threading.Thread] = []
        self.stopping = self.stopped = False
        self.deadline = float("inf")

    async def start(self, context: PoolContext) -> None:
        self.loop, self.context, self.slots = asyncio.get_running_loop(), context, context.concurrency
        try:
            self.executor = await asyncio.to_thread(context.factory.make, self.upcall)
        except BaseException as error:
            raise UmbelError(f"the application did not load: {error!r}") from error

    def submit(self, jobs: Sequence[Job]) -> None:
        self.pending.extend(jobs)
        self.hand_out()

    def room(self) -> int:
        return self.slots - len(self.running)

    def hand_out(self) -> None:
        if self.stopping:
            self.return_all()
        while self.pending and self.room() > 0:
            run = Run(self.pending.popleft())
            self.running[run.job.id] = run
            self.arm(run)
            self.launch(run)

    def launch(self, run: Run) -> None:
        self.threads.append(threading.Thread(target=self.work, args=(run,), daemon=True))
        self.threads[-1].start()

    def arm(self, run: Run) -> None:
        soft, hard = run.job.soft_time_limit, run.job.time_limit
        if soft is not None and self.capabilities.soft_limit:
            run.timers.append(self.loop.call_later(soft, self.soft_limit, run))
        if hard is not None and self.capabilities.hard_limit:
            run.timers.append(self.loop.call_later(hard, self.kill, run, Ending.TIMED_OUT))

    def soft_limit(self, run: Run) -> None:
        run.raising.append(SoftTimeLimitExceeded)

    def work(self, run: Run) -> None:
        self.local.run = run
        try:
            payload = self.executor.execute(run.job.payload)
            end = Completion(job_id=run.job.id, ending=Ending.DONE, payload=payload)
        except TaskCancelled:
            end = Completion(job_id=run.job.id, ending=Ending.CANCELLED)
        except BaseException as error:
            end = Completion(job_id=run.job.id, ending=Ending.LOST, detail=self.told(error))
        if not run.killed:
            self.loop.call_soon_threadsafe(self.finish, run, end)

    def told(self, error: BaseException) -> str:
        return repr(error)

    def upcall(self, verb: str, payload: Any) -> Any:
        run: Run = self.local.run
        if run.killed:
            raise Killed
        if run.raising:
            raise run.raising.pop(0)
        return self.answer(asyncio.run_coroutine_threadsafe(self.ask(verb, payload), self.loop).result)

    def answer(self, result: Callable[[], Any]) -> Any:
        return result()

    async def ask(self, verb: str, payload: Any) -> Any:
        return await self.context.upcall(verb, payload)

    def finish(self, run: Run, end: Completion) -> None:
        if self.running.pop(run.job.id, None) is not None:
            self.disarm(run)
            self.report(end)
            self.hand_out()

    def disarm(self, run: Run) -> None:
        for timer in run.timers:
            timer.cancel()

    def kill(self, run: Run, ending: Ending) -> None:
        run.killed = True
        self.finish(run, Completion(job_id=run.job.id, ending=ending))

    def report(self, end: Completion) -> None:
        self.ended.append(end)
        self.news.set()

    @property
    def free(self) -> int:
        return 2 * self.slots - len(self.running) - len(self.pending)

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        while self.ended or not self.stopped:
            await self.news.wait()
            self.news.clear()
            batch, self.ended = self.ended, []
            yield batch

    def return_all(self) -> None:
        while self.pending:
            self.report(Completion(job_id=self.pending.popleft().id, ending=Ending.RETURNED))

    async def recall(self) -> None:
        self.return_all()

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        for job in self.pending:
            if job.id == job_id:
                self.pending.remove(job)
                self.report(Completion(job_id=job_id, ending=Ending.RETURNED))
                return True
        run = self.running.get(job_id)
        if run is None or not self.capabilities.cancel_running:
            return False
        if force:
            self.kill(run, Ending.CANCELLED)
        else:
            run.raising.append(TaskCancelled)
        return True

    async def resize(self, concurrency: int) -> None:
        if not self.capabilities.resize:
            raise NotSupported("its slots are as many as it began with")
        self.slots = concurrency
        self.hand_out()

    async def stop(self, *, timeout: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + timeout)
        self.stopping = True
        self.return_all()
        while self.running and time.monotonic() < self.deadline:  # noqa: ASYNC110  # small, not quick
            await asyncio.sleep(POLL)
        for run in list(self.running.values()):
            self.kill(run, Ending.CANCELLED)
        while self.threads:  # a thread may wait for an answer of this loop: leave it running
            await asyncio.to_thread(self.threads.pop().join)
        self.stopped = True
        self.news.set()


class HonestPool(ModestPool):
    """Can everything that threads of one process can."""

    capabilities = PoolCapabilities(soft_limit=True, hard_limit=True, cancel_running=True, resize=True)
