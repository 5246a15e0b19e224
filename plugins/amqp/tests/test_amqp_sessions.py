"""The place of a session, apart from any broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from umbel.errors import BrokerUnavailable
from umbel_amqp.sessions import Slot


async def never() -> Any:
    await asyncio.Event().wait()


def test_who_waits_for_a_session_is_told_when_its_place_is_closed() -> None:
    """An unasked cancellation would end the waiting part of a worker in silence."""

    async def main() -> None:
        slot: Slot[Any] = Slot(never, lambda: None)
        waiters = [asyncio.create_task(slot.get()) for _ in range(3)]
        await asyncio.sleep(0)
        await slot.close()
        for waiter in waiters:
            with pytest.raises(BrokerUnavailable, match="is closed"):
                await waiter
        with pytest.raises(BrokerUnavailable, match="is closed"):
            await slot.get()

    asyncio.run(main())


def test_who_gives_up_waiting_takes_the_session_from_nobody() -> None:
    async def main() -> None:
        slot: Slot[Any] = Slot(never, lambda: None)
        one, other = (asyncio.create_task(slot.get()) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.wait([one])
        await asyncio.sleep(0)
        assert one.cancelled()
        assert not other.done()
        await slot.close()
        with pytest.raises(BrokerUnavailable):
            await other

    asyncio.run(main())
