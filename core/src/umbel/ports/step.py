"""The step port: a component that starts and stops with a worker, contributed by ``umbel_add_steps``."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from umbel.worker.worker import Worker


class Step:
    """One component. Both methods run on the worker's I/O loop; ``stop`` is called only if ``start`` has returned."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """Names of steps that must run before this one starts and until it has stopped."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of steps that start after this one and stop before it, where they are there: the same, asked from below."""

    async def start(self, worker: Worker) -> None:
        """Become ready. An exception stops the worker, with the steps started so far stopped in reverse."""

    async def stop(self, worker: Worker) -> None:
        """Free everything. Must end in bounded time."""
