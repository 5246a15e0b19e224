"""Speaking to workers over the broker's broadcast: the client's side of remote control.

A request goes to everybody on ``umbel.pidbox``; replies come back on ``reply.umbel.pidbox`` under the asker's key. The topics
are ours alone: a plugin that answers Celery's requests must not find each of them carried out already.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from umbel.ports.transport import Broadcaster, Transport
from umbel.protocol import new_id

REQUESTS = "umbel.pidbox"
REPLIES = "reply.umbel.pidbox"


async def tell(
    transport: Transport,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    destination: Sequence[str] | None = None,
) -> None:
    """Send a request to workers, all of them or those of ``destination``, and await no answer. Raises ``BrokerUnavailable``."""
    request = _request(method, arguments, destination)
    await cast("Broadcaster", transport).broadcast(REQUESTS, json.dumps(request).encode())


async def ask(
    transport: Transport,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    destination: Sequence[str] | None = None,
    timeout: float = 1.0,
) -> dict[str, Any]:
    """Send a request to workers and collect what they answer within ``timeout`` seconds, by worker name.

    Returns early when every worker of ``destination`` has answered. Raises ``BrokerUnavailable``.
    """
    broadcaster = cast("Broadcaster", transport)
    key, ticket = new_id(), new_id()
    request = {
        **_request(method, arguments, destination),
        "ticket": ticket,
        "reply_to": {"exchange": REPLIES, "routing_key": key},
    }
    replies: dict[str, Any] = {}
    stream = broadcaster.subscribe(REPLIES)

    async def listen() -> None:
        async for reply_key, payload in stream:
            answer = json.loads(payload)
            if reply_key == key and answer.get("ticket") == ticket:
                replies.update(answer["reply"])
                if destination is not None and set(destination) <= replies.keys():
                    return

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.05)  # the subscription begins with its first wait
    await broadcaster.broadcast(REQUESTS, json.dumps(request).encode())
    await asyncio.wait([listening], timeout=timeout)
    listening.cancel()
    await asyncio.wait([listening])
    return replies


def _request(method: str, arguments: Mapping[str, Any] | None, destination: Sequence[str] | None) -> dict[str, Any]:
    return {
        "method": method,
        "arguments": dict(arguments or {}),
        "destination": None if destination is None else list(destination),
        "pattern": None,
        "matcher": None,
        "ticket": None,
        "reply_to": None,
    }
