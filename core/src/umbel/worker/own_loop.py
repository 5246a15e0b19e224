"""The event loop on which a thread runs the ``async`` tasks that it is given."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

from umbel.ports.interruption import Interruptible, unwrapped


class OwnLoop:
    """One thread's event loop, closed when the thread ends and lets go of it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self._loop = self.runner.get_loop()
        self._now: Interruptible | None = None
        self._stepping = [0]
        self.sound = True
        """False once an exception has struck the loop's own works: it is to be closed, and another made."""

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end on this thread; what it returns or raises."""
        now = Interruptible()

        async def main() -> tuple[Any, BaseException | None]:
            now.task, self._now = asyncio.current_task(), now
            try:
                return await now.steps(coroutine, self._stepping, 0, 1), None
            except BaseException as error:
                return None, unwrapped(error)
            finally:
                self._now = None

        self.sound = False
        value, error = self.runner.run(main(), context=contextvars.copy_context())
        self.sound = True
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return value

    def interrupt(self, exception: type[BaseException]) -> bool:
        """Raise ``exception`` in the coroutine where it waits; False if it does not wait, but runs, or there is none.

        From any thread, and from signal handlers of this one.
        """
        now = self._now
        if now is None or self._stepping[0]:
            return False
        self._loop.call_soon_threadsafe(now.interrupt, exception)
        return True

    def close(self) -> None:
        """Cancel what is left on the loop, and close it."""
        self.runner.close()

    def __del__(self) -> None:
        if self._loop.is_closed():
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:  # garbage collected under another loop, where this one cannot run to its end
            self._loop.close()
            return
        try:
            self.runner.close()
        except ValueError:  # a collection of both has closed the loop's own sockets before it: nothing is left to close
            return
