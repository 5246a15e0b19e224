"""The pool ``eventlet``: many tasks at once in each child, each in a greenlet, in a process that is patched at its birth."""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve

from umbel_children.crowd_pool import CrowdPool


class EventletPool(CrowdPool):
    """Runs tasks in greenlets of child processes whose blocking calls eventlet has made cooperative."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "eventlet"
    capabilities = evolve(CrowdPool.capabilities, slots_per_cpu=100)
    runner: ClassVar[str] = "umbel_eventlet.runner:EventletRunner"
