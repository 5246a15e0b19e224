"""Putting back what its taker has held for too long: ours after its lease, Celery's after the visibility timeout."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from umbel_celery import envelope, scripts
from umbel_celery.envelope import SEPARATOR
from umbel_celery.layout import Layout
from umbel_celery.session import Session

log = logging.getLogger("umbel.celery")


async def restore_overdue(session: Session, layout: Layout, visibility_timeout: float) -> None:
    """Restore some of what is overdue, the oldest to the very front. Raises what the client library raises."""
    found = await session.run(scripts.OVERDUE, layout.common, (visibility_timeout,))
    for at in range(len(found) - 3, -1, -3):
        tag, score, value = found[at : at + 3]
        lists, raw = await _destination(session, layout, tag, value)
        if await session.run(scripts.RESTORE, (*layout.common, *lists), (tag, score, raw)) and lists:
            log.warning("message %s was held for too long and is handed out again", _shown(tag))


async def _destination(session: Session, layout: Layout, tag: bytes, value: bytes) -> tuple[list[str], str]:
    """The lists that a message belongs to, and its envelope, marked as redelivered; no list for what cannot be read."""
    if not value:  # acknowledged by halves: nothing is left to restore
        return [], ""
    try:
        stored, exchange, routing_key = json.loads(value)
        raw, number = envelope.redelivered(stored), envelope.clip((stored.get("properties") or {}).get("priority"))
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        log.error("entry %s of the hash unacked cannot be read, and stays there: %s", _shown(tag), exc)
        return [], ""
    queues = await _bound(session, layout, str(exchange or ""), str(routing_key or ""))
    return [layout.list_of(queue, number) for queue in queues], raw


async def _bound(session: Session, layout: Layout, exchange: str, routing_key: str) -> list[str]:
    """The queues that kombu would find: by the name, by an equal routing key, or by the pattern of a topic binding."""
    if not exchange:
        return [routing_key]
    queues = []
    members: Any = await session.client.smembers(layout.bindings(exchange)[0])
    for member in sorted(members):
        bound_key, pattern, queue = (*member.decode("utf-8", "replace").split(SEPARATOR), "", "")[:3]
        if _matches(pattern, routing_key) if pattern else bound_key == routing_key:
            queues.append(queue)
    if not queues:
        log.warning(
            "nothing is bound to exchange %r with key %r: its message goes to that queue", exchange, routing_key
        )
    return queues or [routing_key or exchange]


def _matches(pattern: str, routing_key: str) -> bool:
    try:
        return re.match(pattern, routing_key) is not None
    except re.error as exc:
        log.warning("the binding pattern %r is no regular expression: %s", pattern, exc)
        return False


def _shown(tag: bytes) -> str:
    return tag.decode("utf-8", "replace")
