"""The frames of AMQP 0-9-1: the hot ones (publish, deliver, acknowledge) by hand, the others by ``pamqp``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from struct import Struct
from typing import Final, TypeVar, cast

from pamqp import base, commands
from pamqp.exceptions import PAMQPException

from umbel_amqp.fields import read_text, short_string

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME: Final = Struct(">BHI")
END: Final = b"\xce"
END_BYTE: Final = 0xCE
HEARTBEAT_FRAME: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"
OVERHEAD: Final = 8
"""Bytes of a frame around its payload."""

DELIVER, RETURN, GET_OK, ACK, NACK = 0x003C003C, 0x003C0032, 0x003C0047, 0x003C0050, 0x003C0078
CONTENT_BEARING: Final = frozenset((DELIVER, RETURN, GET_OK))

_PUBLISH: Final = Struct(">HHH")
_ACK: Final = Struct(">BHIHHQBB")
_CONTENT: Final = Struct(">HHQ")
_CONTENT_FRAME: Final = Struct(">BHIHHQ")
_U64: Final = Struct(">Q")
DELIVERY: Final = b"\x00\x3c\x00\x3c"

M = TypeVar("M", bound=base.Frame)


def unchecked(method: type[M]) -> type[M]:
    """``method`` without the library's idea of names: RabbitMQ takes any text of up to 255 bytes."""
    return cast("type[M]", type(method.__name__, (method,), {"validate": lambda self: None}))


QueueDeclare = unchecked(commands.Queue.Declare)
QueueBind = unchecked(commands.Queue.Bind)
QueuePurge = unchecked(commands.Queue.Purge)
QueueDelete = unchecked(commands.Queue.Delete)
ExchangeDeclare = unchecked(commands.Exchange.Declare)
ExchangeBind = unchecked(commands.Exchange.Bind)
Consume = unchecked(commands.Basic.Consume)
Get = unchecked(commands.Basic.Get)
Open = unchecked(commands.Connection.Open)


def write_method(method: base.Frame, channel: int) -> bytes:
    payload = method.index.to_bytes(4, "big") + method.marshal()
    return FRAME.pack(METHOD, channel, len(payload)) + payload + END


def read_method(payload: bytes) -> base.Frame:
    """Raises ``ValueError`` where it is none."""
    index = int.from_bytes(payload[:4], "big")
    try:
        method: base.Frame = commands.INDEX_MAPPING[index]()
        method.unmarshal(payload[4:])
    except (KeyError, ValueError, TypeError, PAMQPException) as error:
        raise ValueError(f"no method that is known: {index:#x}") from error
    return method


# --- publish ---------------------------------------------------------------------------------------


@functools.lru_cache(1024)
def publish_frame(channel: int, exchange: str, routing_key: str, mandatory: bool) -> bytes:
    """``basic.publish``; the same for every message of one way."""
    payload = b"".join(
        (_PUBLISH.pack(60, 40, 0), short_string(exchange), short_string(routing_key), b"\x01" if mandatory else b"\x00")
    )
    return FRAME.pack(METHOD, channel, len(payload)) + payload + END


def content_frames(channel: int, properties: bytes, body: bytes, frame_max: int) -> Sequence[bytes]:
    """Header and body; ``properties`` are flags and values as ``umbel_amqp.messages`` writes them."""
    size = len(body)
    parts = [
        FRAME.pack(HEADER, channel, len(properties) + 12),
        _CONTENT.pack(60, 0, size),
        properties,
        END,
    ]
    if 0 < size <= frame_max - OVERHEAD:
        parts += (FRAME.pack(BODY, channel, size), body, END)
    elif size:
        step = frame_max - OVERHEAD
        for at in range(0, size, step):
            piece = body[at : at + step]
            parts += (FRAME.pack(BODY, channel, len(piece)), piece, END)
    return parts


def read_content_header(payload: bytes) -> tuple[int, bytes]:
    """Size of the body, and the properties."""
    return _U64.unpack_from(payload, 4)[0], payload[12:]


# --- deliver, return, get ---------------------------------------------------------------------------


def read_deliver(payload: bytes) -> tuple[str, int, bool, str, str]:
    """Consumer tag, delivery tag, whether it was delivered before, exchange, routing key."""
    at = 5 + payload[4]
    consumer = payload[5:at].decode()
    (tag,) = _U64.unpack_from(payload, at)
    exchange, at_key = _short(payload, at + 9)
    routing_key, _ = _short(payload, at_key)
    return consumer, tag, payload[at + 8] != 0, exchange, routing_key


def read_whole_delivery(
    data: bytes, at: int, end: int, channel: int
) -> tuple[int, bytes, int, bool, bytes, bytes] | None:
    """The delivery whose method frame begins at ``at`` and ends with the byte at ``end``: where it ends, its way, delivery tag,
    whether it was delivered before, properties, body. None: some of it has not come yet, or it is not of the usual three frames.

    The *way* is what `read_way` reads, the same for all that one consumer gets by one key.
    """
    first = end + 1
    if first + 19 > len(data):
        return None
    kind, number, length, _, _, size = _CONTENT_FRAME.unpack_from(data, first)
    body = first + 8 + length
    last = body + 7 + size
    if kind != HEADER or number != channel or last >= len(data):
        return None
    if FRAME.unpack_from(data, body) != (BODY, channel, size) or data[body - 1] != END_BYTE or data[last] != END_BYTE:
        return None
    tag_at = at + 12 + data[at + 11]
    return (
        last + 1,
        data[at + 11 : tag_at] + data[tag_at + 9 : end],
        _U64.unpack_from(data, tag_at)[0],
        data[tag_at + 8] != 0,
        data[first + 19 : body - 1],
        data[body + 7 : last],
    )


def read_way(way: bytes) -> tuple[str, str, str]:
    """Consumer tag, exchange, routing key."""
    consumer, at = _short(way, 0)
    exchange, at = _short(way, at)
    routing_key, _ = _short(way, at)
    return consumer, exchange, routing_key


def read_get_ok(payload: bytes) -> tuple[int, bool, str, str]:
    """Delivery tag, whether it was delivered before, exchange, routing key."""
    (tag,) = _U64.unpack_from(payload, 4)
    exchange, at = _short(payload, 13)
    routing_key, _ = _short(payload, at)
    return tag, payload[12] != 0, exchange, routing_key


def read_return(payload: bytes) -> tuple[int, str, str, str]:
    """Code, reason, exchange, routing key."""
    reason, at = _short(payload, 6)
    exchange, at = _short(payload, at)
    routing_key, _ = _short(payload, at)
    return int.from_bytes(payload[4:6], "big"), reason, exchange, routing_key


def _short(payload: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + payload[at]
    return read_text(payload[at + 1 : end]), end


# --- acknowledge ------------------------------------------------------------------------------------


def ack_frame(channel: int, tag: int, *, multiple: bool = False) -> bytes:
    return _ACK.pack(METHOD, channel, 13, 60, 80, tag, multiple, END_BYTE)


def requeue_frame(channel: int, tag: int, *, multiple: bool = False) -> bytes:
    """``basic.nack``: back to its place in its queue."""
    return _ACK.pack(METHOD, channel, 13, 60, 120, tag, 2 + multiple, END_BYTE)


def read_confirm(payload: bytes) -> tuple[int, bool]:
    """Publish tag, and whether all before it are meant too."""
    return _U64.unpack_from(payload, 4)[0], bool(payload[12] & 1)
