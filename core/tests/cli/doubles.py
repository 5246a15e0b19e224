"""A broker, a result store and a serializer that live in this process and are named by dotted path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from umbel.capabilities import ResultStoreCapabilities, TransportCapabilities
from umbel.errors import BrokerUnavailable
from umbel.model import Action, Delivery, Message, Result, Settlement, dead_letter_queue
from umbel.ports.result_store import ResultStore
from umbel.ports.serializer import Serializer
from umbel.ports.transport import Broadcaster, Credit, QueueDepth, Transport

TOML = """
[broker]
url = "doubles:FakeTransport"
[results]
url = "doubles:FakeStore"
serializer = "doubles:PlainJson"
[codec]
serializer = "doubles:PlainJson"
accept = ["doubles:PlainJson"]
"""


class FakeTransport(Transport):
    """Queues as lists; the state is the class's own, for one test."""

    api_version = (1, 0)
    capabilities = TransportCapabilities()

    queues: ClassVar[dict[str, list[Message]]] = {}
    leased: ClassVar[list[Delivery]] = []
    requeued: ClassVar[list[Settlement]] = []
    batch: ClassVar[int] = 2
    publishes_until_refusal: ClassVar[int] = 1_000_000
    on_publish: ClassVar[Any] = None
    closed: ClassVar[int] = 0

    async def publish(self, messages: Sequence[Message], *, timeout: float) -> None:
        if FakeTransport.publishes_until_refusal == 0:
            raise BrokerUnavailable("the broker has gone")
        FakeTransport.publishes_until_refusal -= 1
        for message in messages:
            self.queues.setdefault(message.queue, []).append(message)
            if FakeTransport.on_publish is not None:
                FakeTransport.on_publish(message)

    async def consume(
        self, queues: Sequence[str], *, credit: Credit, lease: float
    ) -> AsyncIterator[Sequence[Delivery]]:
        while True:
            if not credit.available:
                await asyncio.Event().wait()
            name = queues[0]
            number = min(credit.available, self.batch)
            waiting = self.queues.get(name, [])
            self.queues[name], messages = waiting[number:], waiting[:number]
            batch = [Delivery(message=message, queue=name, token=object()) for message in messages]
            credit.take(len(batch))
            self.leased.extend(batch)
            yield batch
            await asyncio.sleep(0)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        for settlement in reversed(settlements):
            self.leased[:] = [d for d in self.leased if d.token is not settlement.delivery.token]
            if settlement.action is Action.REQUEUE:
                self.requeued.append(settlement)
                self.queues[settlement.delivery.queue].insert(0, settlement.delivery.message)
        return [True] * len(settlements)

    async def renew(self, deliveries: Sequence[Delivery], *, lease: float, starting: bool = False) -> Sequence[bool]:
        return [True] * len(deliveries)

    async def declare(self, queues: Sequence[Any]) -> None: ...

    async def purge(self, queue: str) -> int:
        return len(self.queues.pop(queue, []))

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        return {
            name: QueueDepth(
                ready=len(self.queues.get(name, [])),
                leased=sum(delivery.queue == name for delivery in self.leased),
                oldest=self.clock.time() - 200 if self.queues.get(name) else None,
            )
            for name in queues or self.queues
        }

    async def peek(self, queue: str, *, limit: int = 100, offset: int = 0) -> Sequence[Message]:
        return self.queues.get(queue, [])[offset : offset + limit]

    async def close(self) -> None:
        FakeTransport.closed += 1


class UnlistedTransport(FakeTransport):
    """A broker that cannot list its queues."""

    async def depth(self, queues: Sequence[str] = ()) -> Mapping[str, QueueDepth]:
        return await super().depth(queues) if queues else {}


class TalkingTransport(FakeTransport, Broadcaster):
    """One worker, ``w1@host``, answers."""

    capabilities = TransportCapabilities(broadcast=True)
    heard: ClassVar[asyncio.Queue[tuple[str, bytes]] | None] = None

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None:
        request = json.loads(payload)
        stats = {
            "pid": 42,
            "uptime": 3700,
            "pool": {"implementation": "prefork", "max-concurrency": 4},
            "held": 2,
            "last_poll_age": 0.2,
            "total": {"tasks.add": 5, "tasks.mail": 7},
        }
        answer = {"ticket": request["ticket"], "reply": {"w1@host": stats}}
        assert TalkingTransport.heard is not None
        TalkingTransport.heard.put_nowait((request["reply_to"]["routing_key"], json.dumps(answer).encode()))

    async def subscribe(self, topic: str) -> AsyncIterator[tuple[str, bytes]]:
        TalkingTransport.heard = asyncio.Queue()
        while True:
            yield await TalkingTransport.heard.get()


class SilentTransport(TalkingTransport):
    """Broadcasts, and nobody is there."""

    async def broadcast(self, topic: str, payload: bytes, *, key: str = "") -> None: ...


class FakeStore(ResultStore):
    api_version = (1, 0)
    capabilities = ResultStoreCapabilities()
    records: ClassVar[dict[str, Result]] = {}

    async def put(self, results: Sequence[Result]) -> None:
        self.records.update((result.task_id, result) for result in results)

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        return {task_id: self.records[task_id] for task_id in task_ids if task_id in self.records}

    async def wait(self, task_id: str) -> Result:
        if task_id not in self.records:
            await asyncio.Event().wait()
        return self.records[task_id]

    async def forget(self, task_ids: Sequence[str]) -> None:
        for task_id in task_ids:
            self.records.pop(task_id, None)

    async def close(self) -> None: ...


class PlainJson(Serializer):
    api_version = (1, 0)
    name = "plain"
    content_type = "application/json"
    content_encoding = "utf-8"

    def dumps(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    def loads(self, data: bytes) -> Any:
        return json.loads(data)


def store(task_id: str, status: str, result: Any, traceback: str | None = None) -> None:
    """Put a result document."""
    document = {"status": status, "result": result, "traceback": traceback, "task_id": task_id}
    FakeStore.records[task_id] = Result(task_id=task_id, state=status, document=json.dumps(document).encode())


def bury(
    task_id: str, *, task: str = "tasks.add", queue: str = "default", cause: str = "lost: signal 9", **more: Any
) -> None:
    """Put a dead letter."""
    headers = {
        "id": task_id,
        "task": task,
        "lang": "py",
        "umbel-dead-cause": cause,
        "umbel-dead-queue": queue,
        "umbel-dead-at": 1_700_000_000.0,
        "umbel-dead-count": 3,
        **more.pop("headers", {}),
    }
    came_by = {"exchange": "post", "routing_key": "letters"}
    fields = {"queue": dead_letter_queue(queue), "headers": headers, "body": b"[[1, 2], {}, {}]", "properties": came_by}
    message = Message(**{**fields, **more})
    FakeTransport.queues.setdefault(dead_letter_queue(queue), []).append(message)


def waiting(queue: str) -> list[str]:
    """Ids of the messages in a queue, in order."""
    return [message.id for message in FakeTransport.queues.get(queue, [])]
