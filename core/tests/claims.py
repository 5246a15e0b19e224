"""A store of claims that a test can break, and a result store that has it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from umbel import hookimpl
from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import ResultStoreUnavailable
from umbel.model import Lease
from umbel.ports.clock import Clock, SystemClock
from umbel.ports.result_store import ClaimStore, ResultStore

from .fakes import Fakes, FakeStore

C = TypeVar("C", bound=Clock)


class Claims(ClaimStore, Generic[C]):
    """Claims in memory, each call with a switch to whoever else asks."""

    def __init__(self, clock: C) -> None:
        self.clock = clock
        self.leases: dict[str, Lease] = {}
        self.calls: list[str] = []
        self.down = False
        self.lose_answers = 0
        """Calls that are carried out, and whose answer is lost."""

    async def _asked(self, verb: str) -> None:
        self.calls.append(verb)
        await asyncio.sleep(0)
        if self.down:
            raise ResultStoreUnavailable("down")

    def live(self) -> dict[str, Lease]:
        self.leases = {name: lease for name, lease in self.leases.items() if lease.until > self.clock.time()}
        return self.leases

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        await self._asked("claim")
        held = self.live().get(name)
        if held is None or held.owner == owner:
            kept = value if value is not None else held.value if held else b""
            held = self.leases[name] = Lease(
                name=name, owner=owner, fence=1, until=self.clock.time() + lease, value=kept
            )
        if self.lose_answers:
            self.lose_answers -= 1
            raise ResultStoreUnavailable("the answer is lost")
        await asyncio.sleep(0)
        return held

    async def release(self, name: str, owner: str) -> bool:
        await self._asked("release")
        held = self.live().get(name)
        if held is None or held.owner != owner:
            return False
        del self.leases[name]
        return True

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        await self._asked("claims")
        return [lease for name, lease in self.live().items() if name.startswith(prefix)]


class ClaimingStore(FakeStore, ClaimStore):
    """A session with a shelf and its claims."""

    capabilities = ResultStoreCapabilities(claim=True)

    def __init__(self, fakes: Fakes, claims: Claims[Any], clock: Clock) -> None:
        super().__init__(fakes.shelf, clock)
        self._claims = claims

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        return await self._claims.claim(name, owner, lease=lease, value=value)

    async def release(self, name: str, owner: str) -> bool:
        return await self._claims.release(name, owner)

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        return await self._claims.claims(prefix)


class Claiming:
    """The plugin whose result store has claims; the fakes have everything else."""

    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes
        self.claims = Claims(SystemClock())

    @hookimpl(tryfirst=True)
    def umbel_make_result_store(self, url: str, clock: Clock) -> ResultStore | None:
        return ClaimingStore(self.fakes, self.claims, clock)
