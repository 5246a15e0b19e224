"""Events as Celery's monitors read them, from what the worker's hooks tell. Pure functions."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from attrs import frozen

from umbel.model import Action, Delivery, Message, Outcome, Settlement, Verdict

_LONGEST_TEXT: Final = 1024
_LARGEST_DOCUMENT: Final = 100_000
_FAILED: Final = frozenset(
    {Verdict.FAILURE, Verdict.TIMED_OUT, Verdict.LOST, Verdict.UNREADABLE, Verdict.UNKNOWN_TASK, Verdict.REJECTED}
)


@frozen
class Event:
    """One event, still without the fields that every event of the worker bears."""

    type: str
    fields: Mapping[str, Any]
    timestamp: float
    document: bytes | None = None
    """The result document of a task that succeeded: it is read where the event is sent, not on the worker's I/O loop."""


def received(message: Message, *, uuid: str = "", name: str = "") -> Event:
    """A task has come in. ``uuid`` and ``name`` where only the body knew them."""
    headers = message.headers
    fields = {
        "uuid": uuid or message.id,
        "name": name or message.task,
        "args": str(headers.get("argsrepr") or "()"),
        "kwargs": str(headers.get("kwargsrepr") or "{}"),
        "root_id": headers.get("root_id") or uuid or message.id,
        "parent_id": headers.get("parent_id"),
        "retries": headers.get("retries") or 0,
        "eta": headers.get("eta"),
        "expires": headers.get("expires"),
    }
    return Event("task-received", fields, time.time())


def started(delivery: Delivery, at: float) -> Event:
    """Work on a task has begun."""
    return Event("task-started", {"uuid": delivery.message.id}, at)


def ended(settlement: Settlement, outcome: Outcome) -> Sequence[Event]:
    """A delivery has ended. Nothing for one that goes back to its queue unfinished: its task has not ended."""
    message = settlement.delivery.message
    uuid = outcome.task_id or message.id
    if not uuid or (settlement.action is Action.REQUEUE and outcome.verdict is not Verdict.REQUEUED):
        return ()
    now = time.time()
    before = () if message.id else (received(message, uuid=uuid, name=outcome.task),)
    exception = {"uuid": uuid, "exception": outcome.detail}
    if outcome.traceback:
        exception["traceback"] = outcome.traceback
    made: tuple[Event, ...] = ()
    match outcome.verdict:
        case Verdict.SUCCESS:
            documents = [each.document for each in outcome.results if each.content_type == "application/json"]
            fields = {"uuid": uuid, "runtime": outcome.runtime}
            made = (Event("task-succeeded", fields, now, documents[0] if documents else b""),)
        case Verdict.RETRY:
            made = (Event("task-retried", {"traceback": None, **exception}, now),)
        case Verdict.EXPIRED | Verdict.REVOKED | Verdict.CANCELLED:
            terminated = outcome.verdict is not Verdict.EXPIRED and outcome.detail == "terminated"
            expired = outcome.verdict is Verdict.EXPIRED
            fields = {"uuid": uuid, "terminated": terminated, "signum": None, "expired": expired}
            made = (Event("task-revoked", fields, now),)
        case Verdict.REQUEUED:
            made = (Event("task-rejected", {"uuid": uuid, "requeue": True}, now),)
        case verdict if verdict in _FAILED:
            made = (Event("task-failed", exception, now),)
            if verdict is Verdict.REJECTED:
                made += (Event("task-rejected", {"uuid": uuid, "requeue": False}, now),)
    return (*before, *made) if made else ()


def _result(document: bytes) -> str:
    """The result as Python writes it; empty where no result is kept, or not as JSON, and its size where it is large."""
    if len(document) > _LARGEST_DOCUMENT:
        return f"<{len(document)} bytes>"
    text = repr(json.loads(document).get("result")) if document else ""
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


SOFTWARE: Final[Mapping[str, str]] = {
    "sw_ident": "umbel",
    "sw_ver": version("umbel-core"),
    "sw_sys": platform.system(),
}


def on_wire(event: Event, *, hostname: str, clock: int) -> dict[str, Any]:
    """The event with the fields that all bear."""
    west = time.altzone if time.localtime().tm_isdst else time.timezone
    return {
        "hostname": hostname,
        "utcoffset": west // 3600,
        "pid": os.getpid(),
        "clock": clock,
        **event.fields,
        **({} if event.document is None else {"result": _result(event.document)}),
        "timestamp": event.timestamp,
        "type": event.type,
    }
