"""A channel of a connection: calls and their answers, messages that arrive, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pamqp import base, commands

from umbel.errors import BrokerUnavailable
from umbel_amqp import frames

if TYPE_CHECKING:
    from umbel_amqp.connection import Connection

Raw: TypeAlias = tuple[int, bool, str, str, bytes, bytes]
"""A message as it came: delivery tag, delivered before, exchange, routing key, properties, body."""


Receive: TypeAlias = Callable[[Sequence[Raw]], None]
"""Takes messages of one consumer, in their order."""

LINGER: Final = 1.0
"""Seconds from an acknowledgement to the end of its channel. A quorum queue that is busy lets the channel keep acknowledgements
back, and they are lost with it: what they were for is handed out again, and nobody is told."""
_MOST_WAYS = 1024
"""Ways of messages remembered: as many as there are routing keys, which may be without end."""


class ChannelClosed(Exception):  # internal: whoever called knows which sentence it means
    """The broker refused something, and closed the channel on which it was asked."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Channel:
    """Calls are answered in their order, so any number may be under way. Dead once anything was refused on it."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.dead: Exception | None = None
        self.consumers: dict[str, Receive] = {}
        self.on_cancel: Callable[[str], None] | None = None
        self.on_confirm: Callable[[int, bool, bool], None] | None = None
        """Publish tag, all before it too, accepted."""
        self.on_return: Callable[[int, str, str, str, bytes], None] | None = None
        """Code, reason, exchange, routing key, body."""
        self.on_death: list[Callable[[Exception], None]] = []
        self._replies: deque[asyncio.Future[Any]] = deque()
        self._bearer: tuple[int, bytes] | None = None
        self._properties = b""
        self._missing = 0
        self._pieces: list[bytes] = []
        self._ways: dict[bytes, tuple[str, str, str]] = {}
        self._arrived: list[Raw] = []
        self._arrived_for = ""

    def call(self, method: base.Frame | bytes) -> asyncio.Future[Any]:
        """Send; the future gives the answering method, or the message that ``basic.get`` found."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        reply.add_done_callback(_look_at)
        if self.dead is not None:
            reply.set_exception(self.dead)
            return reply
        self._replies.append(reply)
        self.connection.write(method if isinstance(method, bytes) else frames.write_method(method, self.number))
        return reply

    def send(self, data: bytes) -> None:
        """Send what has no answer. Raises what the channel died of."""
        if self.dead is not None:
            raise self.dead
        self.connection.write(data)

    def settle(self, data: bytes) -> None:
        """Send acknowledgements. Raises what the channel died of."""
        self.send(data)
        self.connection.settled_at = time.monotonic()

    def close_soon(self) -> None:
        """``close`` in ``LINGER`` seconds, after its last acknowledgement."""
        asyncio.get_running_loop().call_later(LINGER, self.close)

    def close(self) -> None:
        """End it, without waiting; what it holds goes back to its queues."""
        if self.dead is None and self.connection.fault is None:
            self.connection.write(frames.write_method(commands.Channel.Close(200, "", 0, 0), self.number))
            self.consumers.clear()
            self.die(BrokerUnavailable("the channel is closed"))

    def die(self, reason: Exception) -> None:
        """End everything that waits for it. What was asked before it was closed is still answered, to nobody."""
        if self.dead is not None:
            return
        self.dead = reason
        for reply in self._replies:
            if not reply.done():
                reply.set_exception(reason)
        for hear in self.on_death:
            hear(reason)

    # --- what arrives ------------------------------------------------------------------------------

    def delivery(self, data: bytes, at: int, end: int) -> int:
        """Take a delivery whose first frame is ``data[at : end + 1]``, if all of it is there, until ``hand_over``.

        Where it ends; 0: it is to be taken frame by frame.
        """
        if self._bearer is not None or (read := frames.read_whole_delivery(data, at, end, self.number)) is None:
            return 0
        after, way, tag, before, properties, body = read
        if (told := self._ways.get(way)) is None:
            if len(self._ways) >= _MOST_WAYS:
                self._ways.clear()
            told = self._ways[way] = frames.read_way(way)
        consumer, exchange, key = told
        if consumer != self._arrived_for:
            self.hand_over()
            self._arrived_for = consumer
        self._arrived.append((tag, before, exchange, key, properties, body))
        return after

    def hand_over(self) -> None:
        """Let the consumer have what has arrived for it."""
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            if (receive := self.consumers.get(self._arrived_for)) is not None:
                receive(arrived)

    def frame(self, kind: int, payload: bytes) -> None:
        """Raises ``ValueError`` where the peer breaks the protocol."""
        if kind == frames.BODY:
            self._pieces.append(payload)
            self._missing -= len(payload)
            if self._missing <= 0:
                self._message(b"".join(self._pieces) if len(self._pieces) > 1 else payload)
        elif kind == frames.HEADER:
            self._missing, self._properties = frames.read_content_header(payload)
            if not self._missing:
                self._message(b"")
        else:
            index = int.from_bytes(payload[:4], "big")
            if index in frames.CONTENT_BEARING:
                self._bearer = index, payload
            elif index == frames.ACK or index == frames.NACK:
                if self.on_confirm is not None:
                    self.on_confirm(*frames.read_confirm(payload), index == frames.ACK)
            else:
                self._method(frames.read_method(payload))

    def _message(self, body: bytes) -> None:
        if self._bearer is None:
            raise ValueError("content without a method")
        (index, payload), self._bearer, self._pieces = self._bearer, None, []
        if index == frames.DELIVER:
            consumer, tag, before, exchange, key = frames.read_deliver(payload)
            if (receive := self.consumers.get(consumer)) is not None:
                receive([(tag, before, exchange, key, self._properties, body)])
        elif index == frames.GET_OK:
            tag, before, exchange, key = frames.read_get_ok(payload)
            self.reply((tag, before, exchange, key, self._properties, body))
        elif self.on_return is not None:
            self.on_return(*frames.read_return(payload), body)

    def _method(self, method: base.Frame) -> None:
        match method:
            case commands.Channel.Close(reply_code=code, reply_text=text):
                self.connection.write(frames.write_method(commands.Channel.CloseOk(), self.number))
                if self.dead is None:  # else both sides close, and the answer to ours is still to come
                    self.connection.free(self)
                    self.die(ChannelClosed(code or 0, text or ""))
            case commands.Channel.CloseOk():
                self.connection.free(self)
            case commands.Basic.Cancel(consumer_tag=consumer):
                if self.on_cancel is not None:
                    self.on_cancel(consumer or "")
            case commands.Channel.Flow(active=active):
                self.connection.write(frames.write_method(commands.Channel.FlowOk(active), self.number))
            case _:
                self.reply(method)

    def reply(self, answer: Any) -> None:
        if not self._replies:
            raise ValueError(f"an answer to nothing: {answer!r}")
        reply = self._replies.popleft()
        if not reply.done():
            reply.set_result(answer)


class Control:
    """A channel for questions that may be refused, opened again after each refusal. One question at a time."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._channel: Channel | None = None
        self._turn = asyncio.Lock()

    async def ask(self, *methods: base.Frame) -> Sequence[Any]:
        """All answers, in one round trip. Raises ``ChannelClosed`` at the first refusal; what follows it is not done."""
        answers, refusal = await self.try_(*methods)
        if refusal is not None:
            raise refusal
        return answers

    async def try_(self, *methods: base.Frame) -> tuple[Sequence[Any], ChannelClosed | None]:
        """The answers up to the first refusal, and that."""
        async with self._turn:
            if self._channel is None or self._channel.dead is not None:
                self._channel = None
                self._channel = await self.connection.channel()
            replies = [self._channel.call(method) for method in methods]
            answers: list[Any] = []
            try:
                for reply in replies:
                    await asyncio.shield(reply)
                    answers.append(reply.result())
            except ChannelClosed as refusal:
                return answers, refusal
            except asyncio.CancelledError:
                self._channel.close()  # a refusal that is under way must not hit the next question
                raise
            return answers, None


def _look_at(reply: asyncio.Future[Any]) -> None:
    """Nobody may be left to hear of a failure; it is not news then."""
    if not reply.cancelled():
        reply.exception()
