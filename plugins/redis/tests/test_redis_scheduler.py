"""The scheduler store beyond the laws of its port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from servers.proxy import Proxy
from servers.redis import RedisServer

from umbel.errors import EncodeError, SchedulerUnavailable
from umbel.model import ScheduleEntry, evolve
from umbel_redis.options import RedisOptions
from umbel_redis.scheduler import RedisScheduler


def entry(name: str = "1", **fields: object) -> ScheduleEntry:
    return ScheduleEntry(name=name, task="t", schedule={"every": 10.0}, **fields)  # type: ignore[arg-type]  # as given


def test_an_entry_that_cannot_be_stored_is_named_and_harms_no_other(redis_url: str) -> None:
    async def main() -> None:
        scheduler = RedisScheduler(redis_url)
        with pytest.raises(EncodeError, match="schedule entry 'bad' cannot be stored"):
            await scheduler.upsert([entry("good"), entry("bad", args=(object(),))])
        assert await scheduler.load() == []
        await scheduler.close()

    asyncio.run(main())


def test_who_switches_an_entry_off_is_not_overruled_by_a_late_mark(redis_url: str) -> None:
    async def main() -> None:
        scheduler = RedisScheduler(redis_url)
        fence = (await scheduler.lead("me", lease=60)).fence
        await scheduler.upsert([entry(next_due=10.0)])
        (due,) = await scheduler.due(10.0)
        await scheduler.upsert([entry(next_due=10.0, enabled=False)])
        assert await scheduler.mark([evolve(due, last_due=10.0, next_due=20.0, total_runs=1)], fence=fence)
        assert list(await scheduler.due(1e9)) == []
        assert await scheduler.load() == [entry(last_due=10.0, next_due=10.0, total_runs=1, enabled=False)]
        await scheduler.close()

    asyncio.run(main())


def test_a_leader_whose_lease_has_ended_marks_nothing(redis_url: str) -> None:
    async def main() -> None:
        scheduler = RedisScheduler(redis_url)
        fence = (await scheduler.lead("me", lease=0.05)).fence
        await scheduler.upsert([entry(next_due=10.0)])
        await asyncio.sleep(0.1)
        assert not await scheduler.mark([entry(next_due=20.0, total_runs=1)], fence=fence)
        assert await scheduler.load() == [entry(next_due=10.0)]
        await scheduler.close()

    asyncio.run(main())


def test_fleets_with_prefixes_share_a_server(redis_url: str) -> None:
    async def main() -> None:
        one, other = (RedisScheduler(redis_url, options=RedisOptions(prefix=prefix)) for prefix in ("a", "b"))
        await one.upsert([entry("of one")])
        assert (await one.lead("me", lease=60)).owner == "me"
        assert await other.load() == []
        assert (await other.lead("you", lease=60)).owner == "you"
        await one.close()
        await other.close()

    asyncio.run(main())


def test_a_silent_server_ends_calls_and_close_in_time(
    redis_server: RedisServer, redis_url: str, make_proxy: Callable[[int], Proxy]
) -> None:
    proxy = make_proxy(redis_server.port)

    async def main() -> None:
        scheduler = RedisScheduler(proxy.through(redis_url), options=RedisOptions(timeout=0.3))
        await scheduler.upsert([entry()])
        assert (await scheduler.lead("me", lease=60)).owner == "me"
        proxy.stall()
        begun = time.monotonic()
        with pytest.raises(SchedulerUnavailable, match="does not answer in time"):
            await scheduler.due(1e9)
        await scheduler.close()
        assert time.monotonic() - begun < 8
        proxy.heal()
        heir = RedisScheduler(redis_url)
        assert (await heir.lead("you", lease=60)).owner == "me", "the lease is what ends it"
        assert await heir.load() == [entry()]
        await heir.close()

    asyncio.run(main())
