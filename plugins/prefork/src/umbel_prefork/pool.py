"""The default pool: user code in child processes that a clean fork server makes, one job at a time in each."""

from __future__ import annotations

from typing import ClassVar

from umbel_children.pool import ChildrenPool


class PreforkPool(ChildrenPool):
    """Runs each job in a child process; one job at a time in each."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    name: ClassVar[str] = "prefork"
    runner: ClassVar[str] = "umbel_prefork.runner:OneByOne"
