"""Messages as AMQP carries them, and back.

What AMQP has no place for travels in one header, ``umbel-amqp``, that is taken off on arrival: how often the message was
handed out and started before this copy of it was made, its due time, and properties that are not AMQP's. A plain message of
a producer has no such header.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from umbel.model import Message, make_message
from umbel_amqp.channel import Raw
from umbel_amqp.fields import short_string, write_table
from umbel_amqp.properties import read_properties

META: Final = "umbel-amqp"

DELIVERIES, STARTS, DUE, PROPERTIES, PARKED = "deliveries", "starts", "due", "properties", "parked"

_TRACES: Final = (
    "x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason",
    "x-last-death-exchange", "x-last-death-queue", "x-last-death-reason",
)  # fmt: skip
"""What RabbitMQ adds on the way through our own queues."""

_FLAGS: Final = struct.Struct(">H")

_SHORT: Final = {"correlation_id": 0x0400, "reply_to": 0x0200, "message_id": 0x0080, "type": 0x0020, "app_id": 0x0008}
"""Properties that are text and that a sender may set. Not ``user_id``, which must be the connection's; nor ``expiration``: the
broker would drop the message without a word, where a worker stores that it has expired."""

_REDELIVERIES: Final = "x-delivery-count"
_ACQUIRED: Final = "x-acquired-count"
"""From RabbitMQ 4.3 on, whose other count has left out what was given back."""


@frozen(kw_only=True)
class Marks:
    """What this copy of a message knows of its past."""

    deliveries: int = 0
    """Handings-out that count and that the broker does not know of."""
    starts: int = 0
    due: float | None = None
    parked: int | None = None
    """Number of the delivery that this is a copy of."""


NO_MARKS: Final = Marks()


def write_message(message: Message, exchange: str, marks: Marks = NO_MARKS, keys: Sequence[str] = ()) -> bytes:
    """The content header's properties of a message that is published to ``exchange``.

    ``keys``: further routing keys, which nobody sees on arrival. Raises ``PublishRefused``.
    """
    properties = message.properties
    mode = properties.get("delivery_mode")
    meta: dict[str, Any] = {}
    if marks is not NO_MARKS:
        given = {DELIVERIES: marks.deliveries, STARTS: marks.starts, DUE: marks.due, PARKED: marks.parked}
        meta = {name: value for name, value in given.items() if value}
    if not _is_amqp(properties, exchange):
        meta[PROPERTIES] = dict(properties)
    headers = message.headers
    if meta:
        headers = {**headers, META: meta}
    if keys:
        headers = {**headers, "BCC": list(keys)}
    flags = 0xF800  # content type and encoding, headers, delivery mode, priority
    parts = [
        b"",
        short_string(message.content_type),
        short_string(message.content_encoding),
        write_table(headers),
        b"\x01" if mode == 1 else b"\x02",
        bytes((min(max(message.priority, 0), 255),)),
    ]
    for name, flag in _SHORT.items():
        value = properties.get(name)
        if type(value) is str:
            flags |= flag
            parts.append(short_string(value))
    parts[0] = _FLAGS.pack(flags)
    return b"".join(parts)


def _is_amqp(properties: Mapping[str, Any], exchange: str) -> bool:
    """Whether AMQP's own properties, and the way it comes, will say exactly ``properties`` on arrival."""
    if properties.get("delivery_mode") not in (1, 2):
        return False
    for name, value in properties.items():
        if name in _SHORT:
            if type(value) is not str:
                return False
        elif name == "exchange":
            if not value or value != exchange or "routing_key" not in properties:
                return False
        elif name == "routing_key":
            if type(value) is not str or "exchange" not in properties:
                return False
        elif name != "delivery_mode":
            return False
    return not exchange or "exchange" in properties


@frozen(kw_only=True)
class Past:
    """What the broker, and the marks of its copies, tell of a message that came out of a queue."""

    count: int = 1
    """As ``Delivery.count``."""
    starts: int = 0
    inexact: bool = False
    """The queue counts no further than this: it only says that the message was delivered before."""
    due: float | None = None
    parked: int | None = None


FRESH: Final = Past()
"""Of a message that comes for the first time, which nearly all do."""


def read_message(raw: Raw, queue: str, inherits: bool = False) -> tuple[Message, Past]:
    """``inherits``: see ``Connection.inherits_counts``. Raises ``ValueError`` where the properties are not AMQP's."""
    _, before, exchange, routing_key, data, body = raw
    headers, properties, content_type, content_encoding, priority = read_properties(data)
    if exchange:
        properties["exchange"] = exchange
        properties["routing_key"] = routing_key
    past = FRESH
    if before or _REDELIVERIES in headers or META in headers:
        past, properties = _take_off(headers, properties, before, inherits)
    return make_message(queue, headers, body, content_type, content_encoding, priority, None, properties), past


def _take_off(
    headers: dict[str, Any], properties: dict[str, Any], before: bool, inherits: bool
) -> tuple[Past, dict[str, Any]]:
    """The past of a message, and its own properties; what tells of them is taken off ``headers``."""
    redeliveries = headers.pop(_REDELIVERIES, None)
    redeliveries = headers.pop(_ACQUIRED, redeliveries)
    redeliveries = redeliveries if type(redeliveries) is int else None
    meta = headers.pop(META, None)
    deliveries = starts = due = parked = 0
    if isinstance(meta, dict):
        deliveries, starts, due, parked = (_number(meta.get(name)) for name in (DELIVERIES, STARTS, DUE, PARKED))
        if due or deliveries or starts:
            for trace in _TRACES:
                headers.pop(trace, None)
        if isinstance(kept := meta.get(PROPERTIES), dict):
            properties = kept
    if redeliveries is None:
        again = int(before)
    elif parked and inherits:  # the first was the parking session's, which ``deliveries`` has counted
        again = max(redeliveries - 1, 0)
    else:
        again = max(redeliveries, int(before))
    past = Past(
        count=1 + int(deliveries) + again,
        starts=int(starts),
        inexact=before and redeliveries is None,
        due=due or None,
        parked=parked or None,
    )
    return past, properties


def _number(value: Any) -> Any:
    """Anybody may write headers: what is no number says nothing."""
    return value if type(value) in (int, float) else 0
