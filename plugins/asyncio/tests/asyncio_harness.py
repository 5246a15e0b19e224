"""The pool ``asyncio`` in the tests' rig."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rigs import Rig, started

from umbel.errors import PublishRefused
from umbel_asyncio.pool import AsyncioPool
from umbel_children.crowd_pool import CrowdOptions

EXECUTOR = Path(__file__).with_name("asyncio_executor.py")


async def answer(verb: str, payload: Any) -> Any:
    match verb:
        case "double":
            return payload * 2
        case "refuse":
            raise PublishRefused(payload)
        case "never":
            await asyncio.sleep(60)
    raise AssertionError(verb)


@asynccontextmanager
async def rig(
    slots: int,
    *,
    processes: int = 1,
    block_warning: float | None = 1.0,
    loop_stall_limit: float | None = None,
    **context: Any,
) -> AsyncIterator[Rig]:
    """A started pool; stopped afterwards, and every job that was submitted has ended."""
    options = CrowdOptions(processes=processes, block_warning=block_warning, loop_stall_limit=loop_stall_limit)
    number = min(processes, slots)
    async with started(
        AsyncioPool(options=options), slots, executor=EXECUTOR, answer=answer, processes=number, **context
    ) as rig:
        yield rig
