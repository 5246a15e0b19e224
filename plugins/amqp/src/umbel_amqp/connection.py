"""One connection to RabbitMQ: signing in, heartbeats, frames in and out, and one end for all its channels."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import ssl
import struct
import time
from typing import Any, Final, cast

from pamqp import base, commands

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel_amqp import frames
from umbel_amqp.channel import LINGER, Channel, ChannelClosed
from umbel_amqp.options import Address, ConnectionOptions, ssl_context

_HELLO: Final = b"AMQP\x00\x00\x09\x01"
_MOST_UNSENT: Final = 2**20
_LAST_WORDS: Final = 1.0
"""Seconds for an orderly end."""


class Connection(asyncio.Protocol):
    """Made by ``connect``. Once ``fault`` is set, it is over, with all its channels."""

    def __init__(self, address: Address, options: ConnectionOptions, where: str) -> None:
        self.where = where
        self.fault: Exception | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.blocked = ""
        """Why the broker takes no messages on this connection now; empty: it does."""
        self.heartbeat = options.heartbeat
        self.frame_max = options.frame_max
        self.settled_at = -LINGER
        """When something was acknowledged last, by the monotonic clock."""
        self.inherits_counts = False
        """A quorum queue that dead-letters a message tells how often it was lost there: from RabbitMQ 4 on. Before 4.3 the next
        loss does not show in the count, so what was parked, and then lost twice without a mark, counts one less."""
        self._loop = asyncio.get_running_loop()
        self._address = address
        self._transport: asyncio.Transport | None = None
        self._zero = Channel(self, 0)
        self._channels: dict[int, Channel] = {0: self._zero}
        self._channel_max = 2047
        self._freed: set[int] = set()
        self._rest = b""
        self._heard = self._wrote = self._loop.time()
        self._beating: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._open = asyncio.Event()
        self._open.set()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._signing_in = True

    # --- signing in ----------------------------------------------------------------------------------

    async def sign_in(self) -> None:
        """Raises ``PublishRefused`` naming what the broker does not accept, ``BrokerUnavailable``."""
        address, zero = self._address, self._zero
        start = await zero.call(_HELLO)
        self.inherits_counts = isinstance(start, commands.Connection.Start) and _major_version(start) >= 4
        response = f"\0{address.user}\0{address.password}"
        tune = await zero.call(commands.Connection.StartOk(_about_us(), "PLAIN", response, "en_US"))
        if not isinstance(tune, commands.Connection.Tune):
            raise BrokerUnavailable(f"{self.where} signs in in an unknown way: {tune!r}")
        self._channel_max = min(tune.channel_max or 2047, 2047)
        self.frame_max = min(tune.frame_max or self.frame_max, self.frame_max)
        seconds = max(1, round(self.heartbeat))
        ok = commands.Connection.TuneOk(self._channel_max, self.frame_max, seconds)
        self.write(frames.write_method(ok, 0))
        await zero.call(frames.Open(virtual_host=address.vhost))
        self._signing_in = False
        self._beat()

    def _closed_by_broker(self, code: int, text: str) -> Exception:
        if not self._signing_in:
            return BrokerUnavailable(f"{self.where} closed the connection: {text}")
        if code == 403:
            return PublishRefused(
                f"{self.where} does not accept user {self._address.user!r} with this password: "
                f"mend user and password in the broker's URL ({text})"
            )
        if code in (402, 530):
            return PublishRefused(
                f"{self.where} has no vhost {self._address.vhost!r} for user {self._address.user!r}: mend the path of the "
                f"broker's URL, or `rabbitmqctl add_vhost` and `set_permissions` ({text})"
            )
        return BrokerUnavailable(f"{self.where} refused the connection: {text}")

    # --- channels ------------------------------------------------------------------------------------

    async def channel(self) -> Channel:
        """Open one. Raises ``BrokerUnavailable``."""
        if self.fault is not None:
            raise self.fault
        number = self._freed.pop() if self._freed else len(self._channels)
        if number > self._channel_max:
            raise BrokerUnavailable(f"{self.where} allows {self._channel_max} channels on a connection, all in use")
        channel = self._channels[number] = Channel(self, number)
        try:
            await channel.call(commands.Channel.Open())
        except asyncio.CancelledError:
            channel.close()
            raise
        return channel

    def free(self, channel: Channel) -> None:
        """The number of a closed channel may be used again."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]
            self._freed.add(channel.number)

    # --- out -----------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None and self.fault is None:
            self._wrote = self._loop.time()
            self._transport.write(data)

    async def drained(self) -> None:
        """Wait until what was written has mostly left. Raises what the connection died of."""
        await self._writable.wait()
        if self.fault is not None:
            raise self.fault

    async def unblocked(self) -> None:
        """Wait until the broker takes messages on this connection. Raises what the connection died of."""
        await self._open.wait()
        if self.fault is not None:
            raise self.fault

    @property
    def silent(self) -> bool:
        """Whether nothing was heard for so long that the broker may have given the connection up."""
        return self._loop.time() - self._heard > self.heartbeat

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._heard > self.heartbeat:
            self.fail(
                BrokerUnavailable(f"{self.where} has been silent for {now - self._heard:.0f} s (option heartbeat)")
            )
            return
        if now - self._wrote >= self.heartbeat / 3:
            self.write(frames.HEARTBEAT_FRAME)
        self._beating = self._loop.call_later(self.heartbeat / 4, self._beat)

    # --- in ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_MOST_UNSENT)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        if self._rest:
            data = self._rest + data
        at, size, channels = 0, len(data), self._channels
        unpack, end_byte, delivery = frames.FRAME.unpack_from, frames.END_BYTE, frames.DELIVERY
        receiving: Channel | None = None
        try:
            while size - at >= frames.OVERHEAD:
                kind, number, length = unpack(data, at)
                end = at + 7 + length
                if end >= size:
                    if length > self.frame_max:
                        raise ValueError(f"a frame of {length} bytes")
                    break
                if data[end] != end_byte:
                    raise ValueError("a frame without its end")
                channel = channels.get(number) if number else None
                taken = 0
                if channel is not None and kind == frames.METHOD and data.startswith(delivery, at + 7):
                    taken = channel.delivery(data, at, end)
                if receiving is not None and (channel is not receiving or not taken):
                    receiving.hand_over()
                receiving = channel if taken else None
                if taken:
                    at = taken
                    continue
                payload = data[at + 7 : end]
                at = end + 1
                if kind == frames.HEARTBEAT:
                    continue
                if channel is not None:
                    channel.frame(kind, payload)
                elif not number:
                    self._control(frames.read_method(payload))
            if receiving is not None:
                receiving.hand_over()
        except (ValueError, IndexError, struct.error) as error:
            self.fail(BrokerUnavailable(f"{self.where} does not speak AMQP 0-9-1 as it should: {error}"))
            return
        self._rest = data[at:] if at < size else b""

    def _control(self, method: base.Frame) -> None:
        match method:
            case commands.Connection.Close(reply_code=code, reply_text=text):
                self.write(frames.write_method(commands.Connection.CloseOk(), 0))
                self.fail(self._closed_by_broker(code or 0, text or ""))
            case commands.Connection.Blocked(reason=reason):
                self.blocked = reason or "no reason given"
                self._open.clear()
            case commands.Connection.Unblocked():
                self.blocked = ""
                self._open.set()
            case _:
                self._zero.reply(method)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # --- the end -------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(BrokerUnavailable(f"{self.where} closed the connection{f': {exc}' if exc else ''}"))
        if not self._gone.done():
            self._gone.set_result(None)

    def fail(self, reason: Exception) -> None:
        """It is over, for everybody who uses it."""
        if self.fault is not None:
            return
        self.fault = reason
        self._rest = b""
        self._writable.set()
        self._open.set()
        if self._beating is not None:
            self._beating.cancel()
        for channel in list(self._channels.values()):
            channel.die(reason)
        if not self.lost.done():
            self.lost.set_result(None)
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """End it in an orderly way, if the broker lets us within a moment."""
        if self.fault is None and not self._signing_in:
            await asyncio.sleep(self.settled_at + LINGER - time.monotonic())
            last = self._zero.call(commands.Connection.Close(200, "", 0, 0))
            await asyncio.wait([last], timeout=_LAST_WORDS)
        self.fail(BrokerUnavailable(f"this connection to {self.where} is closed"))
        if self._transport is not None:
            await asyncio.wait([self._gone], timeout=_LAST_WORDS)


async def connect(address: Address, options: ConnectionOptions) -> Connection:
    """To the first node that answers. Raises ``PublishRefused`` (naming the setting), ``BrokerUnavailable`` (naming each)."""
    context = ssl_context(address, options)
    problems: list[str] = []
    for host, port in address.hosts:
        where = f"RabbitMQ at {host}:{port}"
        connection = Connection(address, options, where)
        try:
            async with asyncio.timeout(options.connect_timeout):
                await asyncio.get_running_loop().create_connection(lambda: connection, host, port, ssl=context)  # noqa: B023  # called before the next turn
                await connection.sign_in()
            return connection
        except ssl.SSLCertVerificationError as error:
            raise PublishRefused(
                f"the certificate of {where} is not trusted ({error.verify_message}): see ssl_ca_certs, ssl_check_hostname"
            ) from error
        except TimeoutError:
            problems.append(f"{where} does not answer within {options.connect_timeout:g} s")
        except OSError as error:
            problems.append(f"{where} cannot be reached: {error.strerror or error}")
        except BrokerUnavailable as error:
            problems.append(str(error))
        except ChannelClosed as error:
            problems.append(f"{where} refused: {error}")
        finally:
            if connection._signing_in:
                connection.fail(BrokerUnavailable(f"{where} was given up"))
    raise BrokerUnavailable("; ".join(problems))


def _major_version(start: commands.Connection.Start) -> int:
    """Of the broker, by its own word; 0 where it has none."""
    first = str(start.server_properties.get("version", "")).partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _about_us() -> dict[str, Any]:
    return {
        "product": "umbel",
        "platform": f"{platform.python_implementation()} {platform.python_version()}",
        "connection_name": f"umbel-{os.getpid()}@{socket.gethostname()}",
        "capabilities": {
            "authentication_failure_close": True,
            "basic.nack": True,
            "connection.blocked": True,
            "consumer_cancel_notify": True,
            "publisher_confirms": True,
            "exchange_exchange_bindings": True,
        },
    }
