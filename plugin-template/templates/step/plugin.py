"""A step of the worker: touches a file as long as the broker answers, for whoever watches the worker from outside."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from umbel.markers import hookimpl
from umbel.ports.step import Step

if TYPE_CHECKING:
    from umbel.worker.worker import Worker

FILE = "{{ cookiecutter.name|upper }}_FILE"
"""The environment variable that names the file."""
INTERVAL = 5.0
"""Seconds between two touches."""
SILENCE = 60.0
"""Seconds without an answer of the broker after which the file is left to age."""


class {{ cookiecutter.__class }}:
    """The plugin: contributes the step to every worker of the app."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)

    @hookimpl
    def umbel_add_steps(self) -> Sequence[Step]:
        return [Heartbeat(Path(os.environ.get(FILE, "{{ cookiecutter.name }}")))]


class Heartbeat(Step):
    """Runs on the worker's I/O loop, so nothing in it may block for long; started after the intake, stopped before it."""

    name: ClassVar[str] = "{{ cookiecutter.name }}"
    requires: ClassVar[tuple[str, ...]] = ("intake",)

    def __init__(self, path: Path) -> None:
        self.path = path

    async def start(self, worker: Worker) -> None:
        """Touch the file for the first time; an ``OSError`` stops the worker, which could never tell that it is well."""
        self.path.touch()
        self._beating = asyncio.create_task(self._beat(worker))

    async def stop(self, worker: Worker) -> None:
        """Stop touching it, and remove it."""
        self._beating.cancel()
        await asyncio.wait([self._beating])
        self.path.unlink(missing_ok=True)

    async def _beat(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            last_poll = worker.intake.last_poll
            if last_poll is not None and time.monotonic() - last_poll < SILENCE:
                self.path.touch()
