"""The pool ``prefork`` in the tests' rig."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rigs import Rig, started

from umbel_prefork.pool import PreforkPool

EXECUTOR = Path(__file__).with_name("prefork_executor.py")


async def answer(verb: str, payload: Any) -> Any:
    """The upcalls that the tests make."""
    from umbel.errors import PublishRefused, TaskFailed

    match verb:
        case "double":
            return payload * 2
        case "sleep":
            await asyncio.sleep(payload)
            return "slept"
        case "refuse":
            raise PublishRefused(payload)
        case "value error":
            raise ValueError(payload)
        case "attributes":
            raise TaskFailed("shop.Broken", payload, "Traceback …")
        case "foreign":
            raise asyncio.QueueEmpty(payload)
        case "unplain":
            return object()
    raise AssertionError(verb)


@asynccontextmanager
async def rig(
    concurrency: int = 2, *, target: str = "make", arguments: dict[str, Any] | None = None, **context: Any
) -> AsyncIterator[Rig]:
    """A started pool; stopped afterwards, and every job that was submitted has ended."""
    async with started(
        PreforkPool(),
        concurrency,
        executor=EXECUTOR,
        make=target,
        arguments=arguments,
        answer=answer,
        processes=concurrency,
        **context,
    ) as rig:
        yield rig


def children_of(pid: int) -> list[int]:
    """Processes, zombies included, whose parent is ``pid``."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found
