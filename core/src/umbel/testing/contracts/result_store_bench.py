"""What the laws of the result store port work with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from umbel.capabilities import ResultStoreCapabilities
from umbel.model import Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ResultStore
from umbel.testing.contracts.bench import Bench


class StoreBench(Bench):
    """Instances over one backend, and names of the law's own."""

    def __init__(
        self,
        make: Callable[[], ResultStore],
        *,
        clock: Clock | None,
        time_limit: float,
        patience: float,
        quiet: float,
        lease: float,
    ) -> None:
        super().__init__(clock=clock, time_limit=time_limit, patience=patience)
        self._make = make
        self.quiet = quiet
        self.lease = lease
        self.prefix = f"kit-{uuid4().hex[:12]}-"
        self.asker: str | None = None
        """Where the results made from now on are to be sent, if the store sends them: to the machine made last."""

    def store(self) -> ResultStore:
        """One more machine."""
        made = self._make()
        self.close_after(made.close)
        self.asker = made.reply_to
        return made

    @property
    def capabilities(self) -> ResultStoreCapabilities:
        return self._make().capabilities

    def id(self, name: str) -> str:
        return self.prefix + name

    def result(self, name: str, state: str = "SUCCESS", document: bytes = b"{}", **fields: Any) -> Result:
        return Result(task_id=self.id(name), state=state, document=document, reply_to=self.asker, **fields)

    def results(self, *names: str) -> list[Result]:
        return [self.result(name, document=name.encode()) for name in names]

    async def lease_ends(self, times: int = 1) -> None:
        """Let what was to last ``self.lease`` seconds, or ``times`` as many, when this was called end."""
        await self.elapse(self.lease * times * 1.05 + 0.02)
