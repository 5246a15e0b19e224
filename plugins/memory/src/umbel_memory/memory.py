"""The memory that all result stores of one name share, under one lock."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Mapping
from typing import Generic, TypeVar

from attrs import define, field, frozen

from umbel.model import Lease, Result
from umbel_memory.shared import Registry

Value = TypeVar("Value")


class Expiring(Generic[Value]):
    """Values by key, the last set last. A value that was given an end is gone from then on."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}
        self._ends: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        """Every end ever set; those that were replaced are skipped when they surface."""

    def live(self, now: float) -> Mapping[str, Value]:
        """What has not ended by ``now``; a view, good until the next change."""
        while self._heap and self._heap[0][0] <= now:
            end, key = heapq.heappop(self._heap)
            if self._ends.get(key) == end:
                self.remove(key)
        return self._values

    def set(self, key: str, value: Value, *, end: float | None) -> None:
        self.remove(key)
        self._values[key] = value
        if end is not None:
            self._ends[key] = end
            heapq.heappush(self._heap, (end, key))

    def remove(self, key: str) -> None:
        self._values.pop(key, None)
        self._ends.pop(key, None)
        if len(self._heap) > 2 * len(self._ends) + 64:
            self._heap = [(end, key) for key, end in self._ends.items()]
            heapq.heapify(self._heap)


@frozen(eq=False)
class Waiter:
    """One ``wait`` call, on its own event loop."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Result]

    def answer(self, result: Result) -> None:
        """Give it ``result``, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self._answer_here, result)
        except RuntimeError:
            pass  # its loop is closed: nobody waits any more

    def _answer_here(self, result: Result) -> None:
        if not self.future.done():
            self.future.set_result(result)


@define(eq=False)
class Join:
    """The finished members of one group, and who may fire."""

    marks: dict[str, bytes] = field(factory=dict)
    size: int | None = None
    expires: float | None = None
    marked: float = 0.0
    fired: bool = False
    holder: str | None = None
    held_until: float = 0.0

    @property
    def fireable(self) -> bool:
        """Complete, and not fired."""
        return self.size is not None and len(self.marks) >= self.size and not self.fired

    def held(self, now: float) -> bool:
        return self.holder is not None and now < self.held_until


class Memory:
    """Records, joins and claims of one name. ``lock`` guards every field."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.records: Expiring[Result] = Expiring()
        self.joins: Expiring[Join] = Expiring()
        self.claims: Expiring[Lease] = Expiring()
        self.fences = itertools.count(1)
        self.waiters: dict[str, set[Waiter]] = {}

    def wake(self, result: Result) -> None:
        """Answer everybody who waits for the task of this final ``result``."""
        for waiter in self.waiters.pop(result.task_id, ()):
            waiter.answer(result)

    def unwait(self, task_id: str, waiter: Waiter) -> None:
        waiters = self.waiters.get(task_id, set())
        waiters.discard(waiter)
        if not waiters:
            self.waiters.pop(task_id, None)


memories: Registry[Memory] = Registry(Memory)
