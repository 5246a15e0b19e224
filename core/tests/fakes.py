"""Small honest drivers in memory, through which the kernel is tested with no plugin installed.

Each keeps the laws of its port that the kernel leans on, and has knobs that a test turns: a broker that is down, a store
that is down, an answer that gets lost, a lease that passes to another, a job whose process dies.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import attrs

from umbel import Umbel, hookimpl
from umbel.capabilities import UNLIMITED, PoolCapabilities, ResultStoreCapabilities, TransportCapabilities
from umbel.errors import (
    BrokerUnavailable,
    ContentRefused,
    DecodeError,
    EncodeError,
    NotSupported,
    PublishRefused,
    ResultRefused,
    ResultStoreUnavailable,
)
from umbel.model import (
    FINAL_STATES,
    HEADER_DEAD_CAUSE,
    Action,
    Completion,
    Delivery,
    Ending,
    Job,
    Message,
    QueueSpec,
    Result,
    Settlement,
    dead_letter_queue,
)
from umbel.ports.clock import Clock
from umbel.ports.compressor import Compressor
from umbel.ports.pool import Executor, Pool, PoolContext
from umbel.ports.pool import Running as RunningJob
from umbel.ports.result_store import ResultStore
from umbel.ports.serializer import Serializer
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, QueueDepth, Transport
from umbel.worker.worker import Worker


def eventually(predicate: Callable[[], Any], timeout: float = 30) -> Any:
    """Wait until ``predicate()`` is true and return what it said; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := predicate()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)
    return found


def never(predicate: Callable[[], Any], seconds: float = 0.05) -> bool:
    """Whether ``predicate()`` stays false for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if predicate():
            return False
        time.sleep(0.002)
    return True


# --- serializers, a compressor --------------------------------------------------------------------


def _as_text(value: object) -> str:
    if isinstance(value, (datetime, date, time_of_day)):
        return value.isoformat()
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    raise TypeError(type(value).__qualname__)


class JsonSerializer(Serializer):
    """Writes times, UUIDs and decimals as plain text, as many peers do."""

    name = "json"
    content_type = "application/json"
    content_encoding = "utf-8"

    def dumps(self, value: Any) -> bytes:
        try:
            return json.dumps(value, default=_as_text).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise EncodeError(f"{exc} cannot be written as JSON") from exc

    def loads(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise DecodeError(f"the body is not JSON: {exc}") from exc


class ReprSerializer(Serializer):
    """A second serializer, which carries bytes as well."""

    name = "repr"
    content_type = "application/x-repr"
    content_encoding = "utf-8"

    def dumps(self, value: Any) -> bytes:
        return repr(value).encode()

    def loads(self, data: bytes) -> Any:
        from ast import literal_eval

        try:
            return literal_eval(data.decode())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as exc:
            raise DecodeError(f"not a literal: {exc}") from exc


class Squeezer(Compressor):
    name = "squeeze"
    encoding = "application/x-squeeze"
    aliases = ("sq",)

    def compress(self, data: bytes) -> bytes:
        return zlib.compress(data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        machine = zlib.decompressobj()
        try:
            out = machine.decompress(data, limit + 1)
        except zlib.error as exc:
            raise DecodeError(f"damaged: {exc}") from exc
        if len(out) > limit:
            raise ContentRefused(f"more than {limit} bytes after decompression")
        if not machine.eof:
            raise DecodeError("truncated")
        return out


# --- the broker -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Entry:
    message: Message
    queue: str
    order: int
    count: int = 0
    starts: int = 0
    fence: int = 0
    hidden_until: float = 0.0
    """Due time, or end of the lease."""
    leased: bool = False


class Broker:
    """The queues that outlive sessions, and the faults that a test gives them. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entries: list[Entry] = []
        self.topics: dict[str, list[asyncio.Queue[tuple[str, bytes]]]] = {}
        self.capabilities = TransportCapabilities(
            confirm=True,
            max_delay=UNLIMITED,
            priority_levels=10,
            renewable_lease=True,
            delivery_count=True,
            start_marks=True,
            broadcast=True,
        )
        self.bound = False
        """What is handed out is held as long as the session lives, under no lease."""
        self.down = False
        """Every call raises ``BrokerUnavailable``; what is leased stays leased."""
        self.silent = False
        """Consumers hang without a word."""
        self.hang: set[str] = set()
        """Verbs that never answer."""
        self.fail: list[str] = []
        """Verbs whose next call fails with nothing done."""
        self.lose_answers: list[str] = []
        """Verbs whose next call is carried out, and whose answer is lost."""
        self.refuse: Callable[[Message], bool] = lambda _: False
        self.stall_close = False
        self.pace = 1.0
        """How long a second of a returned message's delay lasts."""
        self.sessions = 0
        self.closed = 0
        self.log: list[tuple[str, tuple[str, ...]]] = []
        """Verb and task ids of every call that was carried out."""
        self.settlements: list[Settlement] = []
        """Those that were carried out."""
        self.declared: list[QueueSpec] = []
        self.most_out = 0
        self.threads: list[str] = []
        """Names of the threads that have published blocking."""
        self._order = 0

    def calls(self, verb: str) -> list[tuple[str, ...]]:
        return [ids for what, ids in list(self.log) if what == verb]

    def add(self, message: Message) -> Entry:
        with self.lock:
            self._order += 1
            entry = Entry(message=message, queue=message.queue, order=self._order, hidden_until=message.due or 0.0)
            self.entries.append(entry)
            return entry

    def messages(self, name: str = "default") -> list[Message]:
        """Everything in a queue, oldest first, leased or not."""
        with self.lock:
            return [entry.message for entry in self.entries if entry.queue == name]

    def find(self, task_id: str) -> Entry:
        with self.lock:
            (entry,) = (entry for entry in self.entries if entry.message.id == task_id)
            return entry

    def steal(self, task_id: str, hide: float = 0.0) -> None:
        """The lease has ended and the message has passed to another consumer, who holds it for ``hide`` seconds."""
        with self.lock:
            entry = self.find(task_id)
            entry.fence += 1
            entry.count += bool(hide)
            entry.leased, entry.hidden_until = bool(hide), time.time() + hide if hide else 0.0

    def sever(self) -> None:
        """The session is lost, and with it all that was held by it alone: it is handed out again."""
        with self.lock:
            self.fail.append("poll")
            for entry in self.entries if self.bound else ():
                if entry.leased:
                    entry.fence += 1
                    entry.leased, entry.hidden_until = False, 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing is left but dead letters."""
        return not any(not entry.queue.endswith(".dead") for entry in list(self.entries))

    # --- what transports do ---

    def claim(self, queues: Sequence[str], limit: int, lease: float, now: float) -> list[Delivery]:
        with self.lock:
            ready = [e for e in self.entries if e.queue in queues and e.hidden_until <= now]
            ready.sort(key=lambda e: (-e.message.priority, e.order))
            batch = []
            for entry in ready[:limit]:
                entry.count += 1
                entry.fence += 1
                entry.leased = True
                entry.hidden_until = float("inf") if self.bound else now + lease
                batch.append(
                    Delivery(
                        message=attrs.evolve(entry.message, headers=dict(entry.message.headers)),
                        queue=entry.queue,
                        token=(entry, entry.fence),
                        count=entry.count,
                        starts=entry.starts,
                        leased_until=None if self.bound else now + lease,
                    )
                )
            return batch

    def held(self, delivery: Delivery) -> bool:
        entry, fence = delivery.token
        return entry in self.entries and entry.fence == fence

    def settle(self, settlement: Settlement, now: float) -> bool:
        with self.lock:
            delivery = settlement.delivery
            if not self.held(delivery):
                return False
            entry: Entry = delivery.token[0]
            if settlement.action is Action.REQUEUE:
                entry.fence += 1
                entry.count -= not settlement.counted
                entry.leased = False
                entry.hidden_until = now + settlement.delay * self.pace if settlement.delay else 0.0
            else:
                self.entries.remove(entry)
            if settlement.action is Action.DEAD:
                headers = {**entry.message.headers, HEADER_DEAD_CAUSE: settlement.cause}
                self.add(attrs.evolve(entry.message, queue=dead_letter_queue(entry.queue), headers=headers, due=None))
            self.settlements.append(settlement)
            return True

    def renew(self, delivery: Delivery, until: float, starting: bool) -> bool:
        with self.lock:
            if not self.held(delivery):
                return False
            entry: Entry = delivery.token[0]
            entry.starts += starting
            entry.hidden_until = until
            return True


class FakeTransport(Transport, Broadcaster):
    """A session with the broker."""

    def __init__(self, broker: Broker, clock: Clock) -> None:
        super().__init__("fake://", clock=clock)
        self.broker = broker
        self.capabilities = broker.capabilities
        self.closed = False
        broker.sessions += 1

    async def _call(self, verb: str, ids: Sequence[str], work: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        if verb in self.broker.hang:
            await asyncio.Event().wait()
        if self.broker.down or self.closed:
            raise BrokerUnavailable("the fake broker is down" if self.broker.down else "the session is closed")
        if verb in self.broker.fail:
            self.broker.fail.remove(verb)
            raise BrokerUnavailable(f"{verb} did not get through")
        answer = work()
        self.broker.log.append((verb, tuple(ids)))
        if verb in self.broker.lose_answers:
            self.broker.lose_answers.remove(verb)
            raise BrokerUnavailable(f"the answer to {verb} was lost")
        return answer

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if "publish" in self.broker.hang:
            await asyncio.sleep(timeout)
            raise BrokerUnavailable("not confirmed in time")

        def accept() -> None:
            for message in messages:
                if self.broker.refuse(message):
                    raise PublishRefused(f"message {message.id} is refused")
                if message.due is not None and message.due - self.clock.time() > self.capabilities.max_delay:
                    raise NotSupported("the fake broker keeps no such delay")
            for message in messages:
                self.broker.add(message)

        await self._call("publish", [m.id for m in messages], accept)

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        while True:
            await self._call("poll", (), lambda: None)
            while self.broker.silent:  # noqa: ASYNC110  # a test's own thread changes it
                await asyncio.sleep(0.002)
            batch = self.broker.claim(queues, credit.available, lease, self.clock.time())
            credit.take(len(batch))
            self.broker.most_out = max(self.broker.most_out, credit.out)
            yield batch
            if not batch:
                await asyncio.sleep(0.002)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        now, ids = self.clock.time(), [s.delivery.message.id for s in settlements]
        done: list[bool] = await self._call("settle", ids, lambda: [self.broker.settle(s, now) for s in settlements])
        return done

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        until, verb = self.clock.time() + lease, "start" if starting else "renew"
        held: list[bool] = await self._call(
            verb,
            [d.message.id for d in deliveries],
            lambda: [self.broker.renew(d, until, starting) for d in deliveries],
        )
        return held

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self._call("declare", (), lambda: self.broker.declared.extend(queues))

    async def purge(self, queue: str) -> int:
        return 0

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        return cast(
            "Mapping[str, QueueDepth]",
            await self._call(
                "depth", (), lambda: {name: QueueDepth(ready=len(self.broker.messages(name))) for name in queues}
            ),
        )

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        return self.broker.messages(queue)[offset : offset + limit]

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        for listener in self.broker.topics.get(topic, ()):
            listener.put_nowait((key, payload))

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.broker.topics.setdefault(topic, []).append(heard)
        try:
            while True:
                yield await heard.get()
        finally:
            self.broker.topics[topic].remove(heard)

    async def close(self) -> None:
        if self.broker.stall_close:
            await asyncio.Event().wait()
        self.broker.closed += not self.closed
        self.closed = True


class BlockingTransport(FakeTransport, BlockingPublisher):
    """A session that publishes on the caller's own thread as well."""

    def __init__(self, broker: Broker, clock: Clock) -> None:
        super().__init__(broker, clock)
        self.capabilities = attrs.evolve(broker.capabilities, blocking_publish=True)

    def publish_blocking(self, messages: Sequence[Message], *, timeout: float) -> None:
        self.broker.threads.append(threading.current_thread().name)
        asyncio.run(self.publish(messages, timeout=timeout))


# --- the result store -----------------------------------------------------------------------------


class Shelf:
    """The records that outlive sessions."""

    def __init__(self) -> None:
        self.records: dict[str, Result] = {}
        self.history: list[tuple[str, str]] = []
        """Task id and state of every put that was carried out, in order."""
        self.down = False
        self.tries = 0
        """Puts, carried out or not."""
        self.refuse: Callable[[Result], bool] = lambda _: False

    def document(self, task_id: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.records[task_id].document)
        return document

    def state(self, task_id: str) -> str | None:
        return self.records[task_id].state if task_id in self.records else None


class FakeStore(ResultStore):
    capabilities = ResultStoreCapabilities()

    def __init__(self, shelf: Shelf, clock: Clock) -> None:
        super().__init__("fake://", clock=clock)
        self.shelf = shelf

    async def _check(self) -> None:
        await asyncio.sleep(0)
        if self.shelf.down:
            raise ResultStoreUnavailable("the fake store is down")

    async def put(self, results: Sequence[Result]) -> None:
        self.shelf.tries += 1
        await self._check()
        for result in results:
            if self.shelf.refuse(result):
                raise ResultRefused(f"a document of {len(result.document)} bytes is too large")
            self.shelf.history.append((result.task_id, result.state))
            known = self.shelf.records.get(result.task_id)
            if known is None or known.state not in FINAL_STATES:
                self.shelf.records[result.task_id] = result

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        await self._check()
        return {i: self.shelf.records[i] for i in task_ids if i in self.shelf.records}

    async def wait(self, task_id: str) -> Result:
        while (found := self.shelf.records.get(task_id)) is None or not found.final:  # noqa: ASYNC110  # a test's own thread changes it
            await asyncio.sleep(0.002)
        return found

    async def forget(self, task_ids: Sequence[str]) -> None:
        await self._check()
        for task_id in task_ids:
            self.shelf.records.pop(task_id, None)

    async def close(self) -> None:
        return


# --- the pools ------------------------------------------------------------------------------------


class FakePool(Pool):
    """Jobs wait in order, at most ``concurrency`` of them run, and a test can end any of them in any way.

    ``inline`` runs them one after another on the thread that called ``Worker.run``; under ``manual`` a job runs when the
    test says so, on the test's own thread.
    """

    name = "fake"

    def __init__(self, *, inline: bool, fakes: Fakes) -> None:
        super().__init__()
        self.capabilities = PoolCapabilities(
            main_thread=inline, hard_limit=True, soft_limit=True, cancel_running=True, recycle=True, resize=not inline
        )
        self.fakes = fakes
        self.inline = inline
        self.lock = threading.RLock()
        self.waiting: OrderedDict[int, Job] = OrderedDict()
        self.busy: OrderedDict[int, Job] = OrderedDict()
        self.since: dict[int, float] = {}
        self.submitted: list[Job] = []
        self.reserve = fakes.reserve
        self.overfilled = False
        """More was submitted at once than ``free`` had asked for."""
        self._work: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._deadline = float("inf")

    async def start(self, context: PoolContext) -> None:
        if self.fakes.pool_error is not None:
            raise self.fakes.pool_error
        self.context = context
        self._loop = asyncio.get_running_loop()
        self._ends: asyncio.Queue[Completion | None] = asyncio.Queue()

        def upcall(verb: str, payload: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(context.upcall(verb, payload), self._loop).result(10)

        self.executor: Executor = context.factory.make(upcall)

    @property
    def free(self) -> int:
        with self.lock:
            return self.context.concurrency + self.reserve - len(self.waiting) - len(self.busy)

    def submit(self, jobs: Sequence[Job]) -> None:
        with self.lock:
            self.overfilled |= len([job for job in jobs if job.payload[0] == "run"]) > max(0, self.free)
            for job in jobs:
                assert all(limit is None or limit > 0 for limit in (job.time_limit, job.soft_time_limit))
                self.submitted.append(job)
                self.waiting[job.id] = job
                self._work.put(job.id)
            self._promote()

    def _promote(self) -> None:
        while not self.inline and self.waiting and len(self.busy) < self.context.concurrency:
            job_id, job = self.waiting.popitem(last=False)
            self.since[job_id] = time.monotonic()
            self.busy[job_id] = job

    async def completions(self) -> AsyncIterator[Sequence[Completion]]:
        while (end := await self._ends.get()) is not None:
            yield [end]

    def end(self, job: Job, ending: Ending, detail: str = "", payload: tuple[Any, ...] | None = None) -> bool:
        """A job is over. From any thread; False if it was over before."""
        completion = Completion(job_id=job.id, ending=ending, detail=detail, payload=payload)
        with self.lock:
            if self.waiting.pop(job.id, None) is None and self.busy.pop(job.id, None) is None:
                return False
            self._promote()
            self._loop.call_soon_threadsafe(self._ends.put_nowait, completion)
        return True

    def run(self, job: Job) -> None:
        """Run a job to its end on the calling thread."""
        fates = self.fakes.fates.get(job.task)
        if fates and job.payload[0] == "run":
            self.end(job, fates.pop(0), "signal 9 (SIGKILL)")
        else:
            self.end(job, Ending.DONE, payload=self.executor.execute(job.payload))

    def job(self, task_id: str) -> Job:
        """The unfinished job of a task; waits for it."""

        def found() -> Job | None:
            with self.lock:
                jobs = [*self.busy.values(), *self.waiting.values()]
            return next((job for job in jobs if Message.from_plain(job.payload[1]).id == task_id), None)

        return cast("Job", eventually(found))

    def run_main_thread(self) -> None:
        while (job_id := self._work.get()) is not None:
            with self.lock:
                if (job := self.waiting.pop(job_id, None)) is not None:
                    self.since[job_id] = time.monotonic()
                    self.busy[job_id] = job
            if job is not None:
                self.run(job)
        close_runner(self.executor)

    async def recall(self) -> None:
        for job in list(self.waiting.values()):
            self.end(job, Ending.RETURNED)

    async def cancel(self, job_id: int, *, force: bool) -> bool:
        if (job := self.waiting.get(job_id)) is not None:
            return self.end(job, Ending.RETURNED)
        return (job := self.busy.get(job_id)) is not None and self.end(job, Ending.CANCELLED)

    async def resize(self, concurrency: int) -> None:
        with self.lock:
            self.context = attrs.evolve(self.context, concurrency=concurrency)
            self._promote()

    def running(self) -> Mapping[int, RunningJob]:
        with self.lock:
            return {job_id: RunningJob(since=self.since[job_id], pid=4711) for job_id in self.busy}

    def _busy(self) -> bool:
        with self.lock:  # then the end of what has just left is under way
            return bool(self.busy)

    async def stop(self, *, timeout: float) -> None:
        await self.recall()
        self._deadline = min(self._deadline, time.monotonic() + timeout)
        while self._busy() and time.monotonic() < self._deadline:  # noqa: ASYNC110  # a test's own thread changes it
            await asyncio.sleep(0.002)
        for job in list(self.busy.values()):
            self.end(job, Ending.CANCELLED)
        self._work.put(None)
        self._loop.call_soon(self._ends.put_nowait, None)


def close_runner(executor: Executor) -> None:
    """Let go of the calling thread's event loop, if async tasks have made one: it lives as long as its thread."""
    threads = getattr(executor, "_threads", None)
    own = getattr(threads, "loop", None)
    if threads is None or own is None:
        return
    threads.loop = None
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        own.close()  # not left to a collection, which may find its sockets first and warn of them


# --- the plugin -----------------------------------------------------------------------------------


class Fakes:
    """The plugin that offers all of it, and a listener that notes what it hears."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.shelf = Shelf()
        self.pools: list[FakePool] = []
        self.pool_error: Exception | None = None
        self.reserve = 0
        """How many jobs a pool wants waiting beyond those it runs."""
        self.fates: dict[str, list[Ending]] = {}
        """By task name: how its next jobs end without being run."""
        self.made: list[str] = []
        """Every plugin that was asked for, in order."""
        self.heard: list[str] = []
        """The worker's life, as the hooks tell it."""
        self.settled: list[tuple[Settlement, Any]] = []

    @property
    def pool(self) -> FakePool:
        return self.pools[-1]

    @hookimpl
    def umbel_make_transport(self, url: str, clock: Clock) -> Transport | None:
        self.made.append(url)
        return FakeTransport(self.broker, clock) if url.startswith("fake://") else None

    @hookimpl
    def umbel_make_result_store(self, url: str, clock: Clock) -> ResultStore | None:
        self.made.append(url)
        return FakeStore(self.shelf, clock) if url.startswith("fake://") else None

    @hookimpl
    def umbel_make_serializer(self, name: str) -> Serializer | None:
        self.made.append(name)
        return {"json": JsonSerializer, "repr": ReprSerializer}[name]() if name in ("json", "repr") else None

    @hookimpl
    def umbel_make_compressor(self, name: str) -> Compressor | None:
        self.made.append(name)
        return Squeezer() if name == "squeeze" else None

    @hookimpl
    def umbel_make_pool(self, name: str) -> Pool | None:
        self.made.append(name)
        if name not in ("inline", "manual"):
            return None
        self.pools.append(FakePool(inline=name == "inline", fakes=self))
        return self.pool

    @hookimpl
    def umbel_worker_ready(self) -> None:
        self.heard.append("ready")

    @hookimpl
    def umbel_worker_stopping(self) -> None:
        self.heard.append("stopping")

    @hookimpl
    def umbel_worker_stopped(self) -> None:
        self.heard.append("stopped")

    @hookimpl
    def umbel_task_settled(self, settlement: Settlement, outcome: Any) -> None:
        self.settled.append((settlement, outcome))


class Running:
    """A worker that runs in a thread of the test's own."""

    def __init__(self, app: Umbel) -> None:
        self.worker: Worker = app.worker()
        self.status: int | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="worker")

    def _run(self) -> None:
        try:
            self.status = self.worker.run()
        except BaseException as exc:
            self.error = exc

    def stop(self) -> None:
        self.worker.request_stop()

    def join(self, timeout: float = 10) -> None:
        self.thread.join(timeout)
        assert not self.thread.is_alive(), "the worker did not stop"


@contextmanager
def running(app: Umbel, fakes: Fakes) -> Iterator[Running]:
    """A worker of ``app`` from ready to stopped; its jobs that are still running at the end are cancelled."""
    ready = fakes.heard.count("ready")
    run = Running(app)
    run.thread.start()
    try:
        eventually(lambda: fakes.heard.count("ready") > ready or not run.thread.is_alive())
        yield run
    finally:
        if run.thread.is_alive():
            fakes.broker.down = fakes.broker.silent = fakes.shelf.down = False
            fakes.broker.hang.clear()
            run.stop()
            run.stop()
        run.join()
