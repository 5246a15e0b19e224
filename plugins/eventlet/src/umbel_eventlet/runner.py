"""Runs the jobs of a child in green threads of eventlet. Imported by the fork server: nothing is patched, and no hub is made,
here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import eventlet  # type: ignore[import-untyped]  # it has no types
from eventlet import greenthread, hubs
from eventlet.event import Event  # type: ignore[import-untyped]  # it has no types

from umbel_children.greenlets import Greenlets, Waiter


class EventletRunner(Greenlets):
    """See ``Greenlets``."""

    works: ClassVar[tuple[str, ...]] = (*Greenlets.works, "eventlet")

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> None:
        """Patch everything, in a child that has imported nothing of the application."""
        eventlet.monkey_patch()

    def soon(self, callback: Callable[[], None]) -> None:
        hubs.get_hub().schedule_call_global(0, callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        hubs.get_hub().schedule_call_global(seconds, callback)

    def spawn(self, function: Callable[..., None], *arguments: Any) -> Any:
        return greenthread.spawn(function, *arguments)

    def watch(self, fileno: int, callback: Callable[[], None]) -> None:
        hub = hubs.get_hub()
        hub.add(hub.READ, fileno, lambda _: callback(), _unexpected, lambda: None)

    def waiter(self) -> Waiter:
        return EventWaiter(Event())

    def sleep_for_ever(self) -> NoReturn:
        Event().wait()
        raise SystemExit("the hub of the child has ended")


class EventWaiter:
    """An event as a ``Waiter``."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def set(self, value: Any) -> None:
        self._event.send(value)

    def get(self) -> Any:
        return self._event.wait()


def _unexpected(*error: Any) -> None:
    raise SystemExit("the socket to the parent was taken away from the hub")
