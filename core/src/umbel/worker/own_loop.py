"""The event loop on which a thread runs the ``async`` tasks that it is given."""

from __future__ import annotations

import asyncio


class OwnLoop:
    """One thread's event loop, closed when the thread ends and lets go of it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self._loop = self.runner.get_loop()

    def __del__(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.runner.close()
        else:  # garbage collected under another loop, where this one cannot run to its end
            self._loop.close()
