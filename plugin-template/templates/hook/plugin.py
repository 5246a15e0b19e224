"""A listener: counts how deliveries end, and tells when the worker has stopped."""

from __future__ import annotations

import logging
from collections import Counter
from typing import ClassVar

from umbel.markers import hookimpl
from umbel.model import Outcome

logger = logging.getLogger(__name__)


class {{ cookiecutter.__class }}:
    """Hears of every settled task. Its hooks run on the worker's I/O loop, so they must not block.

    A hook names only the arguments it wants; ``docs/reference/hooks.md`` of Umbel lists all hooks.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        """Deliveries by verdict."""

    @hookimpl
    def umbel_task_settled(self, outcome: Outcome) -> None:
        self.ends[outcome.verdict.value] += 1

    @hookimpl
    def umbel_worker_stopped(self) -> None:
        told = ", ".join(f"{number} {verdict}" for verdict, number in self.ends.most_common())
        logger.info("{{ cookiecutter.name }}: settled %s", told or "nothing")
