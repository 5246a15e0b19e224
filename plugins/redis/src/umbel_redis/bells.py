"""Waiting for something to do: a blocking read of the queues' tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from umbel.errors import BrokerUnavailable
from umbel_redis.scripts import RING
from umbel_redis.session import Session
from umbel_redis.streams import Keys


class Bells:
    """One consumer's wait for the tokens of its queues: one read for each share of queues that lie in one slot.

    A token taken is a duty to look at the queue: who cannot look puts it back with ``stop``.
    """

    def __init__(self, session: Session, patient: Session, shares: Sequence[Sequence[Keys]]) -> None:
        """``patient`` allows an answer to come as late as ``wait`` may wait."""
        self._session = session
        self._patient = patient
        self._shares = shares
        self._reads: dict[int, asyncio.Task[Any]] = {}

    async def wait(self, timeout: float) -> None:
        """Return when a token was taken, or after ``timeout`` seconds. Raises ``BrokerUnavailable``."""
        for number, share in enumerate(self._shares):
            if number not in self._reads:
                read = self._patient.call(("BLPOP", *(keys.wake for keys in share), f"{timeout:.3f}"))
                self._reads[number] = asyncio.create_task(read, name="umbel-redis-bell")
        alone = len(self._reads) == 1  # then the read itself ends in time, and none is left under way
        done, _ = await asyncio.wait(
            self._reads.values(), timeout=None if alone else timeout, return_when=asyncio.FIRST_COMPLETED
        )
        self._reads = {number: read for number, read in self._reads.items() if read not in done}
        for ended in done:
            ended.result()

    async def stop(self) -> None:
        """End what is under way. It may have taken a token, so all are put back."""
        if not self._reads:
            return
        reads, self._reads = self._reads, {}
        for read in reads.values():
            read.cancel()
        await asyncio.wait(reads.values())
        for read in reads.values():
            if not read.cancelled():
                read.exception()  # known elsewhere: the next call fails too
        await self.ring()

    async def ring(self) -> None:
        """Have somebody look at each queue. Best effort: a token that is lost delays, and loses nothing."""
        with contextlib.suppress(BrokerUnavailable):  # whoever waits looks by himself after some seconds
            await self._session.run([RING.on([key for keys in share for key in keys.all]) for share in self._shares])
