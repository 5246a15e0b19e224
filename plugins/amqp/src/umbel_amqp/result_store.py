"""Results as replies: each goes to the queue that the sender of its task listens to, as Celery's ``rpc://`` does it."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

from attrs import field, frozen
from pamqp.commands import Confirm

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import BrokerUnavailable, PublishRefused, ResultRefused, ResultStoreUnavailable
from umbel.model import Message, Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ResultStore, replaces
from umbel_amqp.channel import Channel, ChannelClosed, Control, Raw
from umbel_amqp.connection import Connection, connect
from umbel_amqp.frames import Consume, QueueDeclare, QueueDelete, ack_frame
from umbel_amqp.messages import read_message, write_message
from umbel_amqp.options import ConnectionOptions, address_of
from umbel_amqp.publishing import Parcel, Publisher
from umbel_amqp.sessions import Slot

log = logging.getLogger("umbel.amqp")

OURS: Final = "umbel.reply."
"""Reply queues of Umbel's begin so: who has a result for one that is not there yet makes it. Celery's senders make their own."""
TOLD: Final = "umbel-result"
"""Header with what only a decoder would find in the document, so that no worker and no client needs to decode it."""
_RETRY: Final = (0.1, 5.0)

T = TypeVar("T")


@frozen(kw_only=True)
class RpcOptions(ConnectionOptions):
    """What the result store takes."""

    broker: str | None = None
    """URL of the broker (``amqp://…``, ``amqps://…``), where ``rpc://`` does not say it."""
    queue_expires: float = 86_400.0
    """Seconds for which a reply queue is kept that nobody listens to. The same for all who use the broker."""
    max_records: int = field(default=100_000)
    """Results kept here until they are asked for or forgotten; beyond that the oldest are dropped."""


class RpcResultStore(ResultStore):
    """A result reaches the one instance whose ``reply_to`` its task carried, and stays in its memory.

    Results that nobody has fetched survive a lost connection, not a restart of the broker.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = RpcOptions
    reply_to: str

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        self.capabilities = ResultStoreCapabilities(push=True, expires=True)
        self.reply_to = f"{OURS}{uuid.uuid4()}"
        self._address = address_of(self.options.broker or url, self.options)
        self._out: Slot[_Sending] = Slot(self._open_sending, _nothing)
        self._in: Slot[_Listening] = Slot(self._open_listening, _nothing)
        self._records: OrderedDict[str, tuple[Result, float | None]] = OrderedDict()
        """With the time after which each is forgotten."""
        self._waiters: dict[str, set[asyncio.Future[Result]]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._closed = False

    # --- sending -------------------------------------------------------------------------------------

    async def put(self, results: Sequence[Result]) -> None:
        """Send each to who asked. Results of tasks that carry no ``reply_to`` go nowhere, nor do those whose sender is gone."""
        self._check_open()
        parcels = [_parcel(result) for result in results if result.reply_to]
        if not parcels:
            return
        sending = await self._reached(self._out.get())
        missing = await self._reached(sending.send(parcels))
        if made := [parcel for parcel in missing if parcel.routing_key.startswith(OURS)]:
            for queue in {parcel.routing_key for parcel in made}:
                await self._reached(sending.control.ask(self._queue(queue)))
            await self._reached(sending.send(made))

    async def _open_sending(self) -> _Sending:
        connection = await connect(self._address, self.options)
        return await _Sending.open(connection)

    def _queue(self, name: str) -> QueueDeclare:  # type: ignore[valid-type]  # a class made by a function
        expires = max(1, round(self.options.queue_expires * 1000))
        return QueueDeclare(queue=name, durable=True, arguments={"x-expires": expires})

    # --- listening -----------------------------------------------------------------------------------

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        self._check_open()
        if not task_ids:
            return {}
        listening = await self._reached(self._in.get())
        await self._reached(listening.caught_up())
        found = {task_id: self._record(task_id) for task_id in task_ids}
        return {task_id: result for task_id, result in found.items() if result is not None}

    async def wait(self, task_id: str) -> Result:
        self._check_open()
        waiter: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(task_id, set()).add(waiter)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="umbel-rpc-watch")
        try:
            if (result := self._record(task_id)) is not None and result.final:
                return result
            return await waiter
        finally:
            waiters = self._waiters.get(task_id, set())
            waiters.discard(waiter)
            if not waiters:
                self._waiters.pop(task_id, None)

    async def forget(self, task_ids: Sequence[str]) -> None:
        """Here: nobody else has them."""
        self._check_open()
        if not task_ids:
            return
        listening = await self._reached(self._in.get())
        await self._reached(listening.caught_up())
        for task_id in task_ids:
            self._records.pop(task_id, None)

    async def _watch(self) -> None:
        """Keep listening for as long as anybody may wait; what the broker refuses for good, tell those who wait now."""
        pause = _RETRY[0]
        while True:
            try:
                listening = await self._in.get()
                pause = _RETRY[0]
                await asyncio.wait([listening.connection.lost])
            except BrokerUnavailable as error:
                log.warning("results cannot be heard, trying again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
                pause = min(pause * 2, _RETRY[1])
            except (PublishRefused, ChannelClosed) as error:
                for waiter in [waiter for waiters in self._waiters.values() for waiter in waiters]:
                    if not waiter.done():
                        waiter.set_exception(ResultStoreUnavailable(str(error)))
                await asyncio.sleep(_RETRY[1])

    async def _open_listening(self) -> _Listening:
        connection = await connect(self._address, self.options)
        return await _Listening.open(connection, self._queue(self.reply_to), self._received)

    def _received(self, raw: Raw) -> None:
        message, _ = read_message(raw, self.reply_to)
        if (result := _result(message)) is None:
            log.error("a reply of content type %r tells no state of a task; it is dropped", message.content_type)
            return
        task_id = result.task_id
        if (before := self._record(task_id)) is not None and not replaces(result, before):
            return
        until = None if result.expires is None else self.clock.time() + result.expires
        self._records[task_id] = result, until
        if len(self._records) > self.options.max_records:
            dropped, _ = self._records.popitem(last=False)
            log.warning("the result of %s was never fetched and is dropped (option max_records)", dropped)
        if result.final:
            for waiter in self._waiters.get(task_id, ()):
                if not waiter.done():
                    waiter.set_result(result)

    def _record(self, task_id: str) -> Result | None:
        result, until = self._records.get(task_id, (None, None))
        if until is not None and until <= self.clock.time():
            del self._records[task_id]
            return None
        return result

    # --- the end -------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ResultStoreUnavailable(f"this result store on RabbitMQ at {self._address} is closed")

    async def _reached(self, work: Awaitable[T]) -> T:
        timeout = self.options.timeout
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError:
            raise ResultStoreUnavailable(f"RabbitMQ at {self._address} has not answered in {timeout:g} s") from None
        except (BrokerUnavailable, PublishRefused, ChannelClosed) as error:
            raise ResultStoreUnavailable(str(error)) from error

    async def close(self) -> None:
        """Delete the queue of replies: nobody else may read it."""
        if self._closed:
            return
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for waiter in [waiter for waiters in self._waiters.values() for waiter in waiters]:
            waiter.cancel()
        if (listening := self._in.live) is not None:
            await listening.end(self.reply_to)
        await self._in.close()
        await self._out.close()


class _Sending:
    def __init__(self, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.control = Control(connection)
        self._channel = channel
        self._publisher = Publisher(channel)

    @classmethod
    async def open(cls, connection: Connection) -> _Sending:
        channel = await connection.channel()
        await channel.call(Confirm.Select())
        return cls(connection, channel)

    @property
    def alive(self) -> bool:
        return self.connection.fault is None and self._channel.dead is None

    async def send(self, parcels: Sequence[Parcel]) -> Sequence[Parcel]:
        """Those whose queue is not there."""
        await self.connection.unblocked()
        try:
            outcomes = await self._publisher.publish(parcels)
        except PublishRefused as refused:
            raise ResultRefused(str(refused)) from refused
        if refusals := [text for text in outcomes.values() if text]:
            raise ResultStoreUnavailable(f"{self.connection.where}: {refusals[0]}")
        return [parcels[place] for place in outcomes]


class _Listening:
    def __init__(self, connection: Connection, channel: Channel, queue: Any) -> None:
        self.connection = connection
        self._channel = channel
        self._queue = queue
        self._unacked = 0

    @classmethod
    async def open(cls, connection: Connection, queue: Any, receive: Any) -> _Listening:
        channel = await connection.channel()
        self = cls(connection, channel, queue)

        def received(raws: Sequence[Raw]) -> None:
            for raw in raws:
                receive(raw)
            if not self._unacked:
                asyncio.get_running_loop().call_soon(self._ack)
            self._unacked = raws[-1][0]

        channel.consumers["replies"] = received
        channel.on_death.append(
            lambda _: connection.fail(BrokerUnavailable(f"{connection.where}: no replies any more"))
        )
        await channel.call(queue)
        await channel.call(Consume(queue=queue.queue, consumer_tag="replies", arguments={}))
        return self

    @property
    def alive(self) -> bool:
        return self.connection.fault is None

    def _ack(self) -> None:
        if self._channel.dead is None:
            self._channel.send(ack_frame(self._channel.number, self._unacked, multiple=True))
        self._unacked = 0

    async def caught_up(self) -> None:
        """Return when everything has arrived that was in the queue at the call."""
        while (await self._channel.call(self._queue)).message_count:  # noqa: ASYNC110  # the broker is asked anew each time
            await asyncio.sleep(0.001)

    async def end(self, queue: str) -> None:
        deleted = self._channel.call(QueueDelete(queue=queue))
        await asyncio.wait([deleted], timeout=1.0)


def _parcel(result: Result) -> Parcel:
    told: dict[str, Any] = {
        "state": result.state,
        "id": result.task_id,
        "expires": result.expires,
        "order": result.order,
    }
    message = Message(
        queue=result.reply_to or "",
        headers={TOLD: told},
        content_type=result.content_type,
        content_encoding=result.content_encoding,
        properties={"correlation_id": result.correlation_id or result.task_id, "delivery_mode": 1},
    )
    try:
        return Parcel("", message.queue, write_message(message, ""), result.document)
    except PublishRefused as refused:
        raise ResultRefused(f"the result of task {result.task_id} cannot be sent: {refused}") from refused


def _result(message: Message) -> Result | None:
    """What a reply says; None for one that another program has sent in a form that is not JSON."""
    if isinstance(told := message.headers.get(TOLD), Mapping):
        task_id, state, expires = told.get("id"), told.get("state"), told.get("expires")
        order = told.get("order")
    else:
        try:
            document = json.loads(message.body)
            task_id, state, expires, order = document["task_id"], document["status"], None, 0
        except (ValueError, KeyError, TypeError):
            return None
    return Result(
        task_id=str(task_id),
        state=str(state),
        document=message.body,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        expires=expires,
        order=order if isinstance(order, int) else 0,
    )


def _nothing() -> None:
    return
