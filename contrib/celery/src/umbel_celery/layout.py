"""Which key holds what, and which list a priority belongs to."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from typing import Final

from umbel_celery.envelope import SEPARATOR
from umbel_celery.options import TransportOptions


class Layout:
    """The names of Celery's layout and of ours beside it, and the two ways to write a priority."""

    def __init__(self, options: TransportOptions, db: int) -> None:
        prefix = options.global_keyprefix
        self.prefix: Final = prefix
        self.common: Final = tuple(
            prefix + name for name in ("unacked_index", "unacked", "_umbel.claims", "_umbel.leases", "_umbel.count.")
        )
        """The first keys of every script."""
        self.queues: Final = f"{prefix}_umbel.queues"
        self.delayed_prefix: Final = f"{prefix}_umbel.delayed."
        self._channel_prefix = f"{prefix}/{db}."
        self._inverted = options.priority == "inverted"
        self._steps = options.priority_steps

    def delayed(self, queue: str) -> str:
        """The delayed messages of a queue."""
        return self.delayed_prefix + queue

    def bindings(self, exchange: str) -> tuple[str, str]:
        """The bindings of an exchange, and those of them that kombu's sweep leaves alone."""
        return f"{self.prefix}_kombu.binding.{exchange}", f"{self.prefix}_kombu.binding_permanent.{exchange}"

    def channel(self, exchange: str, key: str = "") -> str:
        """The channel of a fanout exchange."""
        return f"{self._channel_prefix}{exchange}/{key}" if key else f"{self._channel_prefix}{exchange}"

    # --- priorities ---

    def on_wire(self, priority: int) -> int:
        """``Message.priority`` as the envelope has it; the same function reads it."""
        return 9 - priority if self._inverted else priority

    def step(self, number: int) -> int:
        """The step that a priority of the wire falls on."""
        return self._steps[bisect(self._steps, number) - 1]

    def list_of(self, queue: str, number: int) -> str:
        """The list for a priority of the wire."""
        step = self.step(number)
        return f"{self.prefix}{queue}{SEPARATOR}{step}" if step else f"{self.prefix}{queue}"

    def lists(self, queues: Sequence[str]) -> list[str]:
        """All lists of some queues in the order in which they are served: by step, and queue by queue in each."""
        steps = self._steps if self._inverted else tuple(reversed(self._steps))
        return [self.list_of(queue, step) for step in steps for queue in queues]
