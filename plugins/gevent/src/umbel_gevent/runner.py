"""Runs the jobs of a child in greenlets of gevent. Imported by the fork server: nothing is patched, and no hub is made, here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, ClassVar, Final, NoReturn

import gevent  # type: ignore[import-untyped]  # it has no types

# These are patched in later: imported here, they are shared by all children.
import gevent.queue  # type: ignore[import-untyped]  # it has no types
import gevent.selectors  # type: ignore[import-untyped]  # it has no types
import gevent.ssl  # type: ignore[import-untyped]  # it has no types
import gevent.subprocess  # type: ignore[import-untyped]  # it has no types
from gevent import monkey
from gevent.event import AsyncResult, Event  # type: ignore[import-untyped]  # it has no types

from umbel_children.greenlets import Greenlets, Waiter

_INSTALLED: Final = metadata.entry_points()
"""gevent asks which plugins want to hear of its patching, two dozen times, and each would be a scan of the environment."""


class GeventRunner(Greenlets):
    """See ``Greenlets``."""

    works: ClassVar[tuple[str, ...]] = (*Greenlets.works, "gevent")

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> None:
        """Patch everything, in a child that has imported nothing of the application."""
        with warnings.catch_warnings():
            # asyncio has imported ssl before, in the fork server; it looks up every name of it in the module, and so finds
            # what is patched.
            warnings.simplefilter("ignore", monkey.MonkeyPatchWarning)
            scan, metadata.entry_points = metadata.entry_points, _INSTALLED.select
            try:
                monkey.patch_all()
            finally:
                metadata.entry_points = scan

    def soon(self, callback: Callable[[], None]) -> None:
        gevent.get_hub().loop.run_callback(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        gevent.spawn_later(seconds, callback)

    def spawn(self, function: Callable[..., None], *arguments: Any) -> Any:
        return gevent.spawn(function, *arguments)

    def watch(self, fileno: int, callback: Callable[[], None]) -> None:
        self._watcher = gevent.get_hub().loop.io(fileno, 1)
        self._watcher.start(callback)

    def waiter(self) -> Waiter:
        made: Waiter = AsyncResult()
        return made

    def sleep_for_ever(self) -> NoReturn:
        Event().wait()
        raise SystemExit("the hub of the child has ended")
