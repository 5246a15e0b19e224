"""The way out of a process: publish, and speak to the result store.

A process with connections of its own uses ``LocalGateway``; a child of a worker holds none and sends the same calls up to
its parent through ``umbel.uplink``. Tasks and result handles know only ``Gateway``.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from umbel.canvas.joining import VERBS as JOIN_VERBS
from umbel.claiming import VERBS as CLAIM_VERBS
from umbel.errors import BrokerUnavailable, NotSupported, PublishError, ResultTimeout
from umbel.model import Message, QueueSpec, Result
from umbel.ports.result_store import ResultStore
from umbel.ports.scheduler import Scheduler
from umbel.ports.transport import BlockingPublisher, Transport
from umbel.revocation import VERBS as REVOCATION_VERBS
from umbel.runtime import LoopThread
from umbel.schedule_store import VERBS as SCHEDULE_VERBS


class Gateway(ABC):
    """Every operation comes in two forms: blocking, and awaitable (``a…``) on any event loop."""

    @property
    @abstractmethod
    def reply_to(self) -> str | None:
        """Where the result store wants results sent that this process asks for (``ResultStore.reply_to``)."""

    @abstractmethod
    def publish(self, messages: Sequence[Message], timeout: float) -> None:
        """Return when the broker has accepted every message. Raises ``PublishError`` within ``timeout`` seconds."""

    @abstractmethod
    def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        """Records of those tasks that have one."""

    @abstractmethod
    def wait(self, task_id: str, timeout: float | None) -> Result:
        """The final record of a task. Raises ``ResultTimeout``."""

    @abstractmethod
    def put(self, results: Sequence[Result]) -> None:
        """Store records."""

    @abstractmethod
    def forget(self, task_ids: Sequence[str]) -> None:
        """Delete records."""

    @abstractmethod
    def ask(self, verb: str, payload: Any) -> Any:
        """Carry out a verb of ``_ABILITIES`` where the connections are. Plain data in, plain data out."""

    @abstractmethod
    def cancelled(self, task_id: str) -> bool:
        """Whether the worker of this process asks a running task to end."""

    @abstractmethod
    async def apublish(self, messages: Sequence[Message], timeout: float) -> None: ...

    @abstractmethod
    async def aget(self, task_ids: Sequence[str]) -> Mapping[str, Result]: ...

    @abstractmethod
    async def await_(self, task_id: str, timeout: float | None) -> Result: ...

    @abstractmethod
    async def aput(self, results: Sequence[Result]) -> None: ...

    @abstractmethod
    async def aforget(self, task_ids: Sequence[str]) -> None: ...

    @abstractmethod
    async def aask(self, verb: str, payload: Any) -> Any: ...


class LocalGateway(Gateway):
    """Owns this process's transport and result store, both living on the I/O loop, made on first use."""

    def __init__(
        self,
        runtime: LoopThread,
        make_transport: Callable[[], Transport],
        make_store: Callable[[], ResultStore] | None,
        queues: Mapping[str, QueueSpec],
        make_scheduler: Callable[[], Scheduler] | None = None,
    ) -> None:
        """``queues``: what the settings describe, to be declared in each session before their first use."""
        self._make_scheduler = make_scheduler
        self._scheduler: Scheduler | None = None
        self.runtime = runtime
        self._make_transport = make_transport
        self._make_store = make_store
        self._specs = queues
        self._declared: set[str] = set()
        """Queues of the settings that the present session has declared."""
        self._transport: Transport | None = None
        self._store: ResultStore | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.is_cancelled: Callable[[str], bool] = _never
        """Whether the worker of this process asks a task to end; from any thread."""
        self.added: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {}
        """What plugins answer, by verb: a step of theirs enters it, where their part in a child asks for it."""
        self._lock = threading.Lock()
        self._pid = os.getpid()
        atexit.register(self.close)

    # --- components: made on any thread, used on the I/O loop ---

    @property
    def transport(self) -> Transport:
        """The present transport."""
        if (transport := self._transport) is not None:
            return transport
        with self._lock:
            if self._transport is None:
                self._transport = self._make_transport()
            return self._transport

    @property
    def store(self) -> ResultStore:
        """The result store. Raises ``NotSupported`` where there is none."""
        if (store := self._store) is not None:
            return store
        if self._make_store is None:
            raise NotSupported('there is no result store: [results] url is "disabled"')
        with self._lock:
            if self._store is None:
                self._store = self._make_store()
            return self._store

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler store. Raises ``NotSupported``, ``SettingsError``, ``PluginError`` where there is none."""
        if self._make_scheduler is None:
            raise NotSupported("this process has no scheduler store")
        with self._lock:
            if self._scheduler is None:
                self._scheduler = self._make_scheduler()
            return self._scheduler

    @property
    def reply_to(self) -> str | None:
        return self.store.reply_to if self.has_store else None

    @property
    def has_store(self) -> bool:
        return self._make_store is not None

    async def replace_transport(self, broken: Transport) -> None:
        """Throw a broken session away whole; the next use builds a new one. One of many callers does it.

        A session that does not close at once closes in the background: nobody's deadline waits for it.
        """
        if self._transport is broken:
            self._declared = set()
            self._transport = None
            closing = asyncio.create_task(_close(broken), name="umbel-close")
            self._closing.add(closing)  # the loop keeps only weak references
            closing.add_done_callback(self._closing.discard)
            await asyncio.wait([closing], timeout=0.1)

    async def close_components(self) -> None:
        """Close transport, store and scheduler store."""
        self._declared = set()
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            await scheduler.close()
        transport, self._transport = self._transport, None
        store, self._store = self._store, None
        if transport is not None:
            await transport.close()
        if store is not None:
            await store.close()

    def close(self) -> None:
        """Close everything and end the loop; done at the process's exit too. Blocks for some seconds at most."""
        atexit.unregister(self.close)
        if self._pid != os.getpid():  # after a fork, what there is belongs to the parent
            return
        try:
            if self._transport is not None or self._store is not None or self._scheduler is not None:
                self.runtime.call(self.close_components(), timeout=5)
        finally:
            self.runtime.stop()

    # --- operations, on the I/O loop ---

    def spec(self, queue: str) -> QueueSpec:
        """A queue as the settings describe it."""
        return self._specs.get(queue) or QueueSpec(name=queue)

    async def describe(self, spec: QueueSpec) -> None:
        """Declare one queue more, and keep to it in every session. Raises as ``declare``; then it is forgotten."""
        await self.transport.declare([spec])
        self._specs = {**self._specs, spec.name: spec}

    async def declare(self, transport: Transport, queues: Sequence[str]) -> None:
        """Declare ``queues`` as the settings describe them. Raises ``PublishRefused``, ``BrokerUnavailable``."""
        await transport.declare([self.spec(name) for name in queues])
        if transport is self._transport:
            self._declared.update(name for name in queues if name in self._specs)

    def _undeclared(self, messages: Sequence[Message]) -> list[str]:
        """Queues of the settings that ``messages`` may reach, and that the present session has not declared."""
        if len(self._declared) == len(self._specs):
            return []
        queues = {message.queue for message in messages}
        exchanges = {message.properties.get("exchange") or "" for message in messages}
        missing = [spec for spec in self._specs.values() if spec.name not in self._declared]
        return [spec.name for spec in missing if spec.name in queues or spec.exchange in exchanges]

    async def do_publish(self, messages: Sequence[Message], timeout: float, *, again: bool = True) -> None:
        """Publish under one absolute deadline; a passing fault is tried again on a new session until then, if ``again``.

        Raises as ``Transport.publish``, ``PublishRefused`` also for a queue that is not as the settings describe it.
        """
        deadline = time.monotonic() + timeout
        pause = 0.05
        while True:
            transport = self.transport
            _check_exchanges(transport, messages)
            remaining = deadline - time.monotonic()
            try:
                async with asyncio.timeout(remaining + 0.1):  # a driver bounds its own call; this bounds a driver's bug
                    if queues := self._undeclared(messages):
                        await self.declare(transport, queues)
                        remaining = deadline - time.monotonic()
                    await transport.publish(messages, timeout=max(remaining, 0.001))
                return
            except BrokerUnavailable:
                await self.replace_transport(transport)
                if not again or deadline - time.monotonic() <= pause:
                    raise
            except TimeoutError:
                await self.replace_transport(transport)
                raise BrokerUnavailable(
                    f"the broker has not confirmed within {timeout:g} s ([broker] publish_timeout)"
                ) from None
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
            pause = min(pause * 2, 1.0)

    async def do_get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        return await self.store.get(task_ids)

    async def do_wait(self, task_id: str, timeout: float | None) -> Result:
        if timeout is not None and timeout <= 0:  # a look: no wait can end in no time
            record = (await self.store.get([task_id])).get(task_id)
            if record is not None and record.final:
                return record
        try:
            async with asyncio.timeout(timeout):
                return await self.store.wait(task_id)
        except TimeoutError:
            raise ResultTimeout(f"task {task_id} has no result after {timeout:g} s") from None

    async def do_put(self, results: Sequence[Result]) -> None:
        await self.store.put(results)

    async def do_forget(self, task_ids: Sequence[str]) -> None:
        await self.store.forget(task_ids)

    # --- the two forms ---

    def publish(self, messages: Sequence[Message], timeout: float) -> None:
        transport = self.transport
        direct = transport.capabilities.blocking_publish and not self._undeclared(messages)
        if direct and isinstance(transport, BlockingPublisher):
            _check_exchanges(transport, messages)
            deadline = time.monotonic() + timeout
            try:
                transport.publish_blocking(messages, timeout=timeout)
                return
            except BrokerUnavailable:
                if (timeout := deadline - time.monotonic()) <= 0.05:
                    raise
        self.runtime.call(self.do_publish(messages, timeout))

    def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        return self.runtime.call(self.do_get(task_ids))

    def wait(self, task_id: str, timeout: float | None) -> Result:
        return self.runtime.call(self.do_wait(task_id, timeout))

    def put(self, results: Sequence[Result]) -> None:
        self.runtime.call(self.do_put(results))

    def forget(self, task_ids: Sequence[str]) -> None:
        self.runtime.call(self.do_forget(task_ids))

    async def apublish(self, messages: Sequence[Message], timeout: float) -> None:
        await asyncio.wrap_future(self.runtime.submit(self.do_publish(messages, timeout)))

    async def aget(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        return await asyncio.wrap_future(self.runtime.submit(self.do_get(task_ids)))

    async def await_(self, task_id: str, timeout: float | None) -> Result:
        return await asyncio.wrap_future(self.runtime.submit(self.do_wait(task_id, timeout)))

    async def aput(self, results: Sequence[Result]) -> None:
        await asyncio.wrap_future(self.runtime.submit(self.do_put(results)))

    async def aforget(self, task_ids: Sequence[str]) -> None:
        await asyncio.wrap_future(self.runtime.submit(self.do_forget(task_ids)))

    def ask(self, verb: str, payload: Any) -> Any:
        return self.runtime.call(self.answer(verb, payload))

    async def aask(self, verb: str, payload: Any) -> Any:
        return await asyncio.wrap_future(self.runtime.submit(self.answer(verb, payload)))

    def cancelled(self, task_id: str) -> bool:
        return self.is_cancelled(task_id)

    async def answer(self, verb: str, payload: Any) -> Any:
        """Answer a child's upcall: the same operations, in plain data."""
        match verb:
            case "publish":
                messages, timeout = payload
                await self.do_publish([Message.from_plain(m) for m in messages], timeout)
                return None
            case "put":
                await self.do_put([Result.from_plain(r) for r in payload])
                return None
            case "get":
                return [r.to_plain() for r in (await self.do_get(payload)).values()]
            case "wait":
                task_id, timeout = payload
                return (await self.do_wait(task_id, timeout)).to_plain()
            case "forget":
                await self.do_forget(payload)
                return None
            case "cancelled":
                return self.is_cancelled(payload)
        if (ability := _ABILITIES.get(verb)) is not None:
            return await ability(self, payload)
        if (added := self.added.get(verb)) is not None:
            return await added(payload)
        raise PublishError(f"a child asked for {verb!r}, which this worker does not know")


_ABILITIES: Final[Mapping[str, Callable[[LocalGateway, Any], Coroutine[Any, Any, Any]]]] = {
    **REVOCATION_VERBS,
    **CLAIM_VERBS,
    **JOIN_VERBS,
    **SCHEDULE_VERBS,
}
"""What can be asked of a process with connections, beside the operations of every gateway."""


def _never(task_id: str) -> bool:
    return False


def _check_exchanges(transport: Transport, messages: Sequence[Message]) -> None:
    if transport.capabilities.exchanges:
        return
    for message in messages:
        if exchange := message.properties.get("exchange"):
            raise NotSupported(
                f"task {message.task!r} is sent with exchange={exchange!r}, and the broker of [broker] url has no exchanges: "
                "send it to a queue, or take a broker that has them (amqp://)"
            )


async def _close(broken: Transport) -> None:
    try:
        await broken.close()
    except Exception:  # it is broken: closing it may fail in any way, and there is nothing left to save
        return
