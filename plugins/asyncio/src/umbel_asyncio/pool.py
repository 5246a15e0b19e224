"""The pool ``asyncio``: in each child an event loop on which tasks run as coroutines, and threads for those that are none."""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve

from umbel_children.crowd_pool import CrowdPool


class AsyncioPool(CrowdPool):
    """Runs ``async def`` tasks on the event loop of a child, as many at once as it has slots, and others in its threads."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "asyncio"
    capabilities = evolve(CrowdPool.capabilities, slots_per_cpu=100)
    runner: ClassVar[str] = "umbel_asyncio.runner:LoopRunner"
