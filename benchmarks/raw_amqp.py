"""RabbitMQ through a bare socket: frames made once and sent again, frames counted and not read. What the server can do at most.

Nothing of Umbel is in it. A message costs this client 1 to 3 µs, a tenth of what it costs the server.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from pamqp import body, commands, frame, header

_FRAME: Final = struct.Struct(">BHI")
_ACK: Final = struct.Struct(">BHIHHQBB")
_CHANNEL: Final = 1
_CHUNK: Final = 1 << 18
_PATIENCE: Final = 60.0


class RawClient:
    """One connection with one channel. Blocking; for ``with``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((str(parts.hostname), int(parts.port or 5672)), timeout=_PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._answer()
        login = f"\0{unquote(parts.username or 'guest')}\0{unquote(parts.password or 'guest')}"
        self._ask(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), 0)
        self._socket.sendall(frame.marshal(commands.Connection.TuneOk(2047, 131_072, 0), 0))
        self._ask(commands.Connection.Open(unquote(parts.path[1:]) or "/"), 0)
        self._ask(commands.Channel.Open())

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def declare(self, queue: str, arguments: Mapping[str, Any]) -> None:
        self._ask(commands.Queue.Declare(queue=queue, durable=True, arguments=dict(arguments)))

    def delete(self, queue: str) -> None:
        self._ask(commands.Queue.Delete(queue=queue))

    def confirm(self) -> None:
        self._ask(commands.Confirm.Select())

    def publish(self, queue: str, count: int, *, size: int, persistent: bool, batch: int = 500) -> float:
        """Seconds until the broker has confirmed ``count`` messages, of which ``10 * batch`` are under way at most."""
        batch = min(batch, count)
        data = self._message(queue, size, persistent) * batch
        confirmed = sent = 0
        begun = time.perf_counter()
        while confirmed < count:
            if sent < count and sent - confirmed <= 9 * batch:
                self._socket.sendall(data)
                sent += batch
            else:
                confirmed = self._confirmed(confirmed)
        return time.perf_counter() - begun

    def publish_singly(self, queue: str, count: int, *, size: int, persistent: bool) -> list[float]:
        """Seconds that each of ``count`` messages took to be confirmed, before the next was sent."""
        data = self._message(queue, size, persistent)
        taken = []
        for _ in range(count):
            begun = time.perf_counter()
            self._socket.sendall(data)
            self._confirmed(0)
            taken.append(time.perf_counter() - begun)
        return taken

    def consume(self, queue: str, count: int, *, prefetch: int) -> float:
        """Seconds until ``count`` messages have come, and were acknowledged, half a prefetch at a time."""
        self._ask(commands.Basic.Qos(0, prefetch, False))
        begun = time.perf_counter()
        self._socket.sendall(frame.marshal(commands.Basic.Consume(queue=queue, consumer_tag="raw"), _CHANNEL))
        got = acknowledged = 0
        unpack, step, rest = _FRAME.unpack_from, max(1, prefetch // 2), b""
        while got < count:
            data = rest + self._received()
            at, size = 0, len(data)
            while at + 7 < size:
                kind, _, length = unpack(data, at)
                if at + 8 + length > size:
                    break
                at += 8 + length
                got += kind == 3
            rest = data[at:]
            if got - acknowledged >= step or got == count:
                self._socket.sendall(_ACK.pack(1, _CHANNEL, 13, 60, 80, got, 1, 0xCE))
                acknowledged = got
        self._rest = rest
        self._ask(commands.Basic.Cancel("raw"))
        taken = time.perf_counter() - begun
        left = self._ask(commands.Queue.Declare(queue=queue, passive=True)).message_count
        assert (got, left) == (count, 0), f"{got} of {count} came, {left} are left"
        return taken

    # --- frames --------------------------------------------------------------------------------------

    def _message(self, queue: str, size: int, persistent: bool) -> bytes:
        properties = commands.Basic.Properties(delivery_mode=2 if persistent else 1)
        parts = (
            commands.Basic.Publish(routing_key=queue, mandatory=False),
            header.ContentHeader(0, size, properties),
            body.ContentBody(b"m" * size),
        )
        return b"".join(frame.marshal(part, _CHANNEL) for part in parts)

    def _confirmed(self, highest: int) -> int:
        """The highest tag after more confirmations have come."""
        data = self._rest + self._received()
        whole = len(data) - len(data) % _ACK.size
        for _, _, _, _, method, tag, _, _ in _ACK.iter_unpack(data[:whole]):
            assert method == 80, "the server does not take a message"
            highest = max(highest, tag)
        self._rest = data[whole:]
        return highest

    def _received(self) -> bytes:
        data = self._socket.recv(_CHUNK)
        if not data:
            raise ConnectionError("the server has closed the connection")
        return data

    def _ask(self, method: Any, channel: int = _CHANNEL) -> Any:
        self._socket.sendall(frame.marshal(method, channel))
        return self._answer()

    def _answer(self) -> Any:
        """The next method that comes."""
        while len(self._rest) < 8 or len(self._rest) < 8 + _FRAME.unpack_from(self._rest)[2]:
            self._rest += self._received()
        taken, _, value = frame.unmarshal(self._rest)
        self._rest = self._rest[taken:]
        return value
