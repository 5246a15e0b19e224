"""What the instances of one process share, and how one event loop wakes another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from umbel.errors import UmbelError
from umbel.ports.clock import Clock, VirtualClock

State = TypeVar("State")

_registries: list[Registry[Any]] = []


class Registry(Generic[State]):
    """The shared states of one kind by the name in the URL. Thread-safe."""

    def __init__(self, make: Callable[[], State]) -> None:
        self._make = make
        self._states: dict[str, State] = {}
        self._lock = threading.Lock()
        _registries.append(self)

    def get(self, url: str) -> State:
        """The state that every instance for ``url`` shares: the host and path name it, the query does not."""
        parts = urlsplit(url)
        name = parts.netloc + parts.path.rstrip("/")
        with self._lock:
            if name not in self._states:
                self._states[name] = self._make()
            return self._states[name]

    def clear(self) -> None:
        with self._lock:
            self._states.clear()


def forget_all() -> None:
    """Drop every shared state of this process: instances made from now on find nothing.

    Instances made before keep what they share with each other. Thread-safe.
    """
    for registry in _registries:
        registry.clear()


class Session:
    """The life of one driver instance: bound to the event loop of its first call, ended by ``close``."""

    def __init__(self, url: str, closed_error: type[UmbelError]) -> None:
        self._url = url
        self._closed_error = closed_error
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    def enter(self) -> None:
        """Check that a call may be made now, on this loop.

        The binding is enforced although nothing here needs it: what passes on the test double must pass on a broker.
        """
        if self.closed:
            raise self._closed_error(f"{self._url} is closed; make a new instance")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError(
                f"{self._url} was first used on another event loop; make one instance for each loop (they share state)"
            )

    async def checkpoint(self) -> None:
        """Let other tasks run, as a call that does I/O would; a caller's polling loop must not starve its own loop."""
        self.enter()
        await asyncio.sleep(0)
        self.enter()


class Bell:
    """Wakes one coroutine, from any thread. The waiter clears it *before* it looks, so no ring is lost."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._rung = False

    def ring(self) -> None:
        if self._rung:
            return
        self._rung = True
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:
            pass  # the waiter's loop is closed: there is nobody to wake

    def clear(self) -> None:
        self._rung = False
        self._event.clear()

    async def wait(self, seconds: float | None = None) -> None:
        """Wait until it rings, at most ``seconds`` of real time."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            pass


@contextmanager
def rung_by(clock: Clock, bell: Bell) -> Iterator[None]:
    """Ring ``bell`` at each step of a clock that a test moves; any other clock runs by itself."""
    if not isinstance(clock, VirtualClock):
        yield
        return
    clock.subscribe(bell.ring)
    try:
        yield
    finally:
        clock.unsubscribe(bell.ring)
