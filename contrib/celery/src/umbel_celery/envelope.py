"""One message as the list layout has it: a JSON envelope with the body in base64. Pure functions."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, Final

from umbel.errors import PublishRefused
from umbel.model import Message

SEPARATOR: Final = "\x06\x16"
_OURS: Final = frozenset({"delivery_info", "priority", "body_encoding", "delivery_tag"})
"""Properties that belong to the layout and are no properties of the message."""


class Unreadable(ValueError):
    """What lies in a list is no envelope."""


def write(
    message: Message, tag: str, priority: int, *, queue: str | None = None, headers: Mapping[str, Any] | None = None
) -> str:
    """The envelope of a message for the anonymous exchange, so that whoever restores it finds its queue.

    ``priority``: the number on the wire. Raises ``PublishRefused`` for a header or property that JSON cannot carry.
    """
    envelope = {
        "body": base64.b64encode(message.body).decode("ascii"),
        "content-encoding": message.content_encoding,
        "content-type": message.content_type,
        "headers": dict(message.headers if headers is None else headers),
        "properties": {
            **message.properties,
            "delivery_info": {"exchange": "", "routing_key": message.queue if queue is None else queue},
            "priority": priority,
            "body_encoding": "base64",
            "delivery_tag": tag,
        },
    }
    try:
        return json.dumps(envelope, default=_bytes)
    except (TypeError, ValueError, RecursionError) as exc:
        raise PublishRefused(f"message {message.id!r} has a header or property that JSON cannot carry: {exc}") from exc


def read(raw: bytes, queue: str) -> tuple[Message, int]:
    """The message in an envelope, whoever wrote it, with its priority still as on the wire. Raises ``Unreadable``."""
    try:
        envelope = json.loads(raw, object_hook=_typed if b'"__type__"' in raw else None)
    except (ValueError, RecursionError) as exc:
        raise Unreadable(f"it is not JSON: {exc}") from exc
    if not isinstance(envelope, dict) or "body" not in envelope:
        raise Unreadable("it is not an object with a body")
    given, headers = envelope.get("properties") or {}, envelope.get("headers") or {}
    if not isinstance(given, dict) or not isinstance(headers, dict):
        raise Unreadable("its headers or properties are not an object")
    headers.pop("redelivered", None)  # the delivery's count says it
    properties = {key: value for key, value in given.items() if key not in _OURS}
    info = given.get("delivery_info")
    if isinstance(info, dict) and info.get("exchange"):
        properties.setdefault("exchange", info["exchange"])
        properties.setdefault("routing_key", info.get("routing_key", ""))
    message = Message(
        queue=queue,
        headers=headers,
        body=_body(envelope["body"], given.get("body_encoding")),
        content_type=str(envelope.get("content-type") or "application/json"),
        content_encoding=str(envelope.get("content-encoding") or "utf-8"),
        properties=properties,
    )
    return message, clip(given.get("priority"))


def clip(priority: Any) -> int:
    """A priority as every consumer of the layout reads it: 0 to 9, and 0 for whatever is no number."""
    try:
        return max(0, min(int(priority), 9))
    except (TypeError, ValueError, OverflowError):
        return 0


def redelivered(envelope: dict[str, Any]) -> str:
    """The envelope, marked as Celery marks what is handed out again."""
    if isinstance(headers := envelope.get("headers"), dict):
        headers["redelivered"] = True
    if isinstance(properties := envelope.get("properties"), dict) and isinstance(
        info := properties.get("delivery_info"), dict
    ):
        info["redelivered"] = True
    return json.dumps(envelope)


def _body(body: Any, encoding: Any) -> bytes:
    if not isinstance(body, str):
        if isinstance(body, bytes):
            return body
        raise Unreadable(f"its body is {type(body).__name__}, not text")
    if encoding != "base64":
        return body.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(body)
    except (binascii.Error, ValueError) as exc:
        raise Unreadable(f"its body is not base64: {exc}") from exc


def _bytes(value: Any) -> Any:
    """Bytes as kombu's JSON has them."""
    if not isinstance(value, bytes):
        raise TypeError(f"a value of type {type(value).__name__}")
    try:
        return {"__type__": "bytes", "__value__": value.decode("utf-8")}
    except UnicodeDecodeError:
        return {"__type__": "base64", "__value__": base64.b64encode(value).decode("ascii")}


def _typed(value: dict[str, Any]) -> Any:
    """Bytes again; every other typed value stays as it is, to be sent on unchanged."""
    if len(value) == 2 and isinstance(text := value.get("__value__"), str):
        match value.get("__type__"):
            case "bytes":
                return text.encode("utf-8")
            case "base64":
                try:
                    return base64.b64decode(text)
                except (binascii.Error, ValueError):
                    return value
    return value
