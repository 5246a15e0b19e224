"""What a task has been through: each attempt that ended, in the header of its retry and in its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from umbel.model import Message, evolve
from umbel.protocol import format_time
from umbel.task import Request

HEADER: Final = "umbel-attempts"
KEPT: Final = 10
"""Attempts that are remembered, the last ones."""
_LINE: Final = 200
"""Characters kept of an error."""

Attempt = Mapping[str, Any]
"""``retries``, ``deliveries``, ``started`` and ``ended`` (ISO 8601; None where the process was lost), ``worker``, ``error``."""


def wanted(headers: Mapping[str, Any]) -> bool:
    """Whether there were attempts before this one."""
    return HEADER in headers


def history(request: Request, error: str | None, now: float) -> list[Attempt]:
    """The last attempts, the one that has just ended included; ``error``: in one line, None after a success."""
    began = request.started
    this: Attempt = {
        "retries": request.retries,
        "deliveries": request.delivery_count,
        "started": format_time(now - (time.monotonic() - began)) if began else None,
        "ended": format_time(now),
        "worker": request.hostname or None,
        "error": None if error is None else error[:_LINE],
    }
    return [*_past(request.message.headers), this][-KEPT:]


def noted(again: Message, attempts: Sequence[Attempt]) -> Message:
    """A retry that carries what has been before it."""
    return evolve(again, headers={**again.headers, HEADER: list(attempts)})


def _past(headers: Mapping[str, Any]) -> list[Attempt]:
    found = headers.get(HEADER)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []
