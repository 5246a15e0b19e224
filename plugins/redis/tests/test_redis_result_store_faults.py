"""The result store while its server dies, falls silent or changes, and what it costs the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers.proxy import Proxy
from servers.redis import RedisCluster, RedisSentinel, RedisServer

from umbel.errors import ResultRefused, ResultStoreUnavailable
from umbel.model import Result
from umbel_redis.keys import shard_of
from umbel_redis.result_store import RedisResultStore, ResultStoreOptions

Make = Callable[..., RedisServer]


def results(number: int, name: str = "t") -> list[Result]:
    return [
        Result(
            task_id=f"{name}{n}", state="SUCCESS", document=b'{"status": "SUCCESS", "result": %d}' % n, expires=3600.0
        )
        for n in range(number)
    ]


def store_at(url: str, **options: Any) -> RedisResultStore:
    return RedisResultStore(url, options=ResultStoreOptions(**{"timeout": 5.0, **options}))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what another process does rings no bell
            await asyncio.sleep(0.05)


async def connected(server: RedisServer) -> int:
    """How many connections of ours the server has."""
    found: Any = await asyncio.to_thread(server.command, "CLIENT LIST")
    return sum(client["name"] == "umbel" for client in found)


# --- what it costs -------------------------------------------------------------------------------


def test_a_batch_is_one_command(make_redis: Make) -> None:
    server = make_redis()

    async def main() -> None:
        store = store_at(server.url)
        await store.put(results(1))
        server.command("CONFIG", "RESETSTAT")
        await store.put(results(100))
        await store.get([result.task_id for result in results(100)])
        await store.close()

    asyncio.run(main())
    calls = {name: found["calls"] for name, found in server.command("INFO", "commandstats").items()}
    assert (calls.get("cmdstat_evalsha"), calls.get("cmdstat_mget")) == (1, 1)
    assert calls.get("cmdstat_eval") is None


def test_of_one_call_a_final_state_stays(redis_url: str) -> None:
    (one,) = results(1)
    started = Result(task_id=one.task_id, state="STARTED", document=b"{}")

    async def main() -> None:
        store = store_at(redis_url)
        await store.put([started, one, started, *results(1500, "x"), started])
        assert await store.get([one.task_id]) == {one.task_id: one}
        assert list((await store.get([r.task_id for r in results(1500, "x")])).values()) == results(1500, "x")
        await store.close()

    asyncio.run(main())


def test_what_no_key_can_hold_is_refused_and_harms_no_other(redis_url: str) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 2**30

    (fit,) = results(1)

    async def main() -> None:
        store = store_at(redis_url)
        for unfit in (
            Result(task_id="\ud800", state="SUCCESS", document=b"{}"),
            Result(task_id="t", state="SUCCESS", document=Huge()),
        ):
            with pytest.raises(ResultRefused):
                await store.put([fit, unfit])
        await store.put([fit])
        assert await store.get([fit.task_id]) == {fit.task_id: fit}
        await store.close()

    asyncio.run(main())


def test_who_waits_too_long_for_a_connection_is_told_so_and_harms_no_other(make_redis: Make) -> None:
    server = make_redis()

    async def main() -> None:
        store = store_at(server.url, connections=1, timeout=1.0)
        await store.put(results(1))
        server.pause()
        first = asyncio.ensure_future(store.put(results(1)))
        await asyncio.sleep(0.5)
        server.resume()
        assert await first is None
        server.pause()
        calls = [asyncio.ensure_future(store.put(results(1))) for _ in range(3)]
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        server.resume()
        assert all(isinstance(end, ResultStoreUnavailable) for end in ends)
        # Who waited for the connection, and who waited on it, ran out of the same time: either may have been first.
        assert all("busy" in str(end) or "does not answer in time" in str(end) for end in ends), ends
        await store.put(results(1))
        await store.close()

    asyncio.run(main())


def test_thousands_wait_on_two_connections(make_redis: Make) -> None:
    server = make_redis()

    async def main() -> None:
        store, other = store_at(server.url), store_at(server.url)
        waiting = [asyncio.ensure_future(store.wait(result.task_id)) for result in results(10_000)]
        await until(lambda: server.command("PUBSUB", "NUMSUB", "celery-task-meta-t9999")[-1] == 1)
        assert await connected(server) <= 2
        for at in range(0, 10_000, 500):
            await other.put(results(10_000)[at : at + 500])
        assert await asyncio.wait_for(asyncio.gather(*waiting), 30) == results(10_000)
        await store.close()
        await other.close()

    asyncio.run(main())


def test_a_server_that_forgot_the_scripts_is_told_them_again(redis_url: str, redis_server: RedisServer) -> None:
    async def main() -> None:
        store = store_at(redis_url)
        for number in range(2):
            await store.put(results(3, f"round{number}-"))
            assert len(await store.get([result.task_id for result in results(3, f"round{number}-")])) == 3
            assert (await store.claim("c", "me", lease=60)).owner == "me"
            redis_server.command("SCRIPT", "FLUSH")
        await store.close()

    asyncio.run(main())


# --- death, silence, change ----------------------------------------------------------------------


def test_who_waits_does_not_notice_that_the_server_died(make_redis: Make) -> None:
    server = make_redis()

    async def main() -> None:
        store, other = store_at(server.url, poll_interval=60), store_at(server.url)
        waiting = [asyncio.ensure_future(store.wait(result.task_id)) for result in results(1000)]
        await asyncio.sleep(0.3)
        await other.put(results(1000)[:300])
        server.kill()
        with pytest.raises(ResultStoreUnavailable, match="cannot be reached"):
            await other.put(results(1000)[300:])
        await asyncio.to_thread(server.start)
        await other.put(results(1000)[300:])
        assert await asyncio.wait_for(asyncio.gather(*waiting), 20) == results(1000)
        await store.close()
        await other.close()

    asyncio.run(main())


def test_what_was_stored_while_the_subscription_was_cut_is_found(
    make_redis: Make, make_proxy: Callable[[int], Proxy]
) -> None:
    server = make_redis()
    proxy = make_proxy(server.port)

    async def main() -> None:
        store, other = store_at(proxy.through(server.url), poll_interval=60), store_at(server.url)
        for number in range(5):
            waiting = [asyncio.ensure_future(store.wait(r.task_id)) for r in results(50, f"{number}-")]
            await asyncio.sleep(0.1)
            proxy.refuse()
            proxy.reset()
            await other.put(results(50, f"{number}-"))
            proxy.heal()
            assert await asyncio.wait_for(asyncio.gather(*waiting), 10) == results(50, f"{number}-")
        await store.close()
        await other.close()
        await until(lambda: proxy.live == 0)

    asyncio.run(main())


def test_a_black_hole_ends_calls_in_time_and_keeps_who_waits(
    make_redis: Make, make_proxy: Callable[[int], Proxy]
) -> None:
    server = make_redis()
    proxy = make_proxy(server.port)

    async def main() -> None:
        store = store_at(proxy.through(server.url), timeout=0.5, poll_interval=0.3)
        other = store_at(server.url)
        await store.put(results(1))
        waiting = [asyncio.ensure_future(store.wait(r.task_id)) for r in results(100, "w")]
        await asyncio.sleep(0.2)
        proxy.stall()
        begun = time.monotonic()
        calls = [store.put(results(1)), store.get(["t0"]), store.forget(["t0"]), store.members("j"), store.claims()]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert time.monotonic() - begun < 8
        assert all(isinstance(end, ResultStoreUnavailable) for end in ends), ends
        assert "does not answer in time" in str(ends[0])
        await other.put(results(100, "w"))
        proxy.heal()
        assert await asyncio.wait_for(asyncio.gather(*waiting), 10) == results(100, "w")
        await store.put(results(1))
        proxy.stall()
        under_way = asyncio.ensure_future(store.put(results(1)))
        still = asyncio.ensure_future(store.wait("never"))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await store.close()
        assert time.monotonic() - begun < 8
        with pytest.raises(ResultStoreUnavailable, match="closed"):
            await under_way
        assert still.cancelled()
        await other.close()

    asyncio.run(main())


def test_a_half_open_subscription_is_noticed(make_redis: Make, make_proxy: Callable[[int], Proxy]) -> None:
    from servers.proxy import CLIENT

    server = make_redis()
    proxy = make_proxy(server.port)

    async def main() -> None:
        store, other = store_at(proxy.through(server.url), timeout=0.5, poll_interval=0.3), store_at(server.url)
        waiting = asyncio.ensure_future(store.wait("t0"))
        await asyncio.sleep(0.2)
        proxy.half_open(keeps=CLIENT)
        await other.put(results(1))
        assert await asyncio.wait_for(waiting, 10) == results(1)[0]
        await store.close()
        await other.close()

    asyncio.run(main())


def test_what_only_a_person_can_mend_ends_the_wait(make_redis: Make) -> None:
    server = make_redis(password="right")

    async def main() -> None:
        store = store_at(f"redis://:hidden@127.0.0.1:{server.port}/0")
        calls = [store.wait("t0"), store.put(results(1)), store.get(["t0"]), store.wait("t0")]
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        for end in ends:
            assert isinstance(end, ResultStoreUnavailable)
            assert "refused its default user" in str(end)
            assert "hidden" not in str(end)
        await store.close()

    asyncio.run(main())


def test_another_master_takes_over(redis_sentinel: RedisSentinel) -> None:
    async def main() -> None:
        store = store_at("sentinel://" + ",".join(redis_sentinel.hosts), master=redis_sentinel.name, poll_interval=1.0)
        await store.put(results(3))
        waiting = asyncio.ensure_future(store.wait("later0"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(redis_sentinel.failover)
        end = time.monotonic() + 15
        while True:
            try:
                await store.put(results(1, "later"))
                break
            except ResultStoreUnavailable:
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
        assert await asyncio.wait_for(waiting, 15) == results(1, "later")[0]
        assert set(await store.get(["t0", "t1", "t2", "later0"])) == {"t0", "t1", "t2", "later0"}
        await store.close()

    asyncio.run(main())


def test_a_node_of_a_cluster_that_comes_back_is_used_again(redis_cluster: RedisCluster) -> None:
    async def main() -> None:
        store = store_at(redis_cluster.url, cluster=True, timeout=2.0, poll_interval=1.0)
        other = store_at(redis_cluster.url, cluster=True, timeout=2.0)
        await store.put(results(30))
        waiting = [asyncio.ensure_future(store.wait(result.task_id)) for result in results(30, "later")]
        await asyncio.sleep(0.3)
        redis_cluster.masters[1].kill()
        with pytest.raises(ResultStoreUnavailable):
            await other.put(results(30, "later"))
        await asyncio.to_thread(redis_cluster.masters[1].start)
        await asyncio.to_thread(redis_cluster.wait_until_ok)
        await other.put(results(30, "later"))
        assert await asyncio.wait_for(asyncio.gather(*waiting), 15) == results(30, "later")
        assert len(await store.get([result.task_id for result in results(30)])) == 30
        await store.close()
        await other.close()

    asyncio.run(main())


def test_the_fence_of_a_claim_outlives_the_claim(redis_url: str, redis_server: RedisServer) -> None:
    database = int(redis_url.rpartition("/")[2])

    async def main() -> None:
        store, fences = store_at(redis_url), []
        for owner in ("a", "b", "a"):
            fences.append((await store.claim("lock", owner, lease=0.05)).fence)
            await asyncio.sleep(0.08)
        assert fences == sorted(set(fences))
        assert await store.claims() == []
        await store.close()

    asyncio.run(main())
    left = [key.decode() for key in redis_server.command("KEYS", "*", database=database)]
    assert [key for key in left if "held" in key] == []


def test_a_join_whose_time_is_over_leaves_no_trace(redis_url: str, redis_server: RedisServer) -> None:
    database = int(redis_url.rpartition("/")[2])

    async def main() -> None:
        store = store_at(redis_url)
        assert (await store.join("j", {"a": b"1"}, size=1, owner="x", lease=0.01, expires=2.0)).fires
        await asyncio.sleep(0.05)
        assert await store.unfired() == ["j"]
        await store.close()

    asyncio.run(main())
    until_gone(redis_server, database)  # by itself: there may be no worker left that looks


def test_joins_that_nobody_fires_are_listed_as_long_as_the_longest_of_them_lives(
    redis_url: str, redis_server: RedisServer
) -> None:
    database = int(redis_url.rpartition("/")[2])
    one, other = next((f"j{n}", f"j{m}") for n in range(99) for m in range(n) if shard_of(f"j{n}") == shard_of(f"j{m}"))

    def left() -> int:
        (index,) = redis_server.command("KEYS", "*:unfired", database=database)
        return int(redis_server.command("PTTL", index, database=database))

    async def main() -> None:
        store = store_at(redis_url)
        for expires, least, most in ((60.0, 1, 60_000), (600.0, 60_001, 600_000), (60.0, 60_001, 600_000)):
            assert (await store.join(one, {"a": b"1"}, size=1, owner="x", lease=0.01, expires=expires)).fires
            assert least <= left() <= most
        assert (await store.join(other, {"a": b"1"}, size=1, owner="x", lease=0.01, expires=None)).fires
        assert left() == -1
        assert (await store.join(one, {"a": b"1"}, size=1, owner="x", lease=0.01, expires=60.0)).fires
        assert left() == -1
        await store.close()

    asyncio.run(main())


def until_gone(server: RedisServer, database: int) -> None:
    end = time.monotonic() + 30
    while server.command("KEYS", "*", database=database):
        assert time.monotonic() < end
        time.sleep(0.05)
