"""What the laws of the port do not say: what is on the server, what it costs, and what survives whom."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from servers.redis import RedisServer

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Action, Delivery, Message, Result, Settlement, dead_letter_queue
from umbel.ports.transport import Credit
from umbel_redis import advice
from umbel_redis.result_store import RedisResultStore
from umbel_redis.streams import Keys
from umbel_redis.transport import RedisTransport, TransportOptions


def message(name: str = "1", queue: str = "q", **fields: Any) -> Message:
    return Message(queue=queue, headers={"id": name, "task": "t"}, **fields)


def names(deliveries: Sequence[Delivery | Message]) -> list[str]:
    return [(one.message if isinstance(one, Delivery) else one).id for one in deliveries]


def ack(deliveries: Sequence[Delivery]) -> list[Settlement]:
    return [Settlement(delivery=delivery, action=Action.ACK) for delivery in deliveries]


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisTransport]:
    transport = RedisTransport(url, options=TransportOptions(**options))
    try:
        yield transport
    finally:
        await transport.close()


async def take(transport: RedisTransport, number: int = 1, queue: str = "q", lease: float = 60.0) -> list[Delivery]:
    got: list[Delivery] = []
    async with asyncio.timeout(20):
        stream = transport.consume([queue], credit=Credit(number), lease=lease)
        async with contextlib.aclosing(stream):  # type: ignore[type-var]  # an async generator
            while len(got) < number:
                got += await anext(stream)
    return got


class Counter:
    """Commands that clients have sent to a server of the test's own; those of scripts are not among them."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._before = self._now()

    def _now(self) -> int:
        stats = self._server.command("INFO", "commandstats")
        sent = ("evalsha", "eval", "blpop", "sadd", "ping", "publish", "smembers", "xrange")
        return sum(stats[f"cmdstat_{name}"]["calls"] for name in sent if f"cmdstat_{name}" in stats)

    def spent(self) -> int:
        now = self._now()
        spent, self._before = now - self._before, now
        return spent


def test_round_trips_do_not_grow_with_the_batch(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server.url) as transport:
            await transport.publish([message(str(n), priority=n) for n in range(3)], timeout=5)
            first = await take(transport, 3)
            assert all(await transport.renew(first, lease=60))
            assert all(await transport.settle(ack(first)))  # from here on the server knows the scripts and the levels
            counter = Counter(server)
            costs = []
            for number in (5, 500):
                sent = [message(str(n), priority=n % 3) for n in range(number)]
                await transport.publish(sent, timeout=5)
                cost = [counter.spent()]
                got = await take(transport, number)
                cost.append(counter.spent())
                assert all(await transport.renew(got, lease=60))
                cost.append(counter.spent())
                assert all(await transport.settle(ack(got)))
                cost.append(counter.spent())
                costs.append(cost)
        assert costs == [[1, 1, 1, 1]] * 2

    asyncio.run(main())


def test_an_idle_consumer_asks_seldom_and_hears_at_once(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server.url) as transport:
            await transport.publish([message()], timeout=5)
            await transport.settle(ack(await take(transport)))
            waiting = asyncio.create_task(take(transport))
            await asyncio.sleep(0.2)
            counter = Counter(server)
            await asyncio.sleep(1.0)
            assert counter.spent() == 0
            async with asyncio.timeout(1):  # the next look without a bell would be in three seconds
                await transport.publish([message("2")], timeout=5)
                assert names(await waiting) == ["2"]

    asyncio.run(main())


def test_a_bell_is_passed_on_to_the_next_idle_consumer(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url) as one, opened(redis_url) as two:
            waiting = [asyncio.create_task(take(each)) for each in (one, two)]
            await asyncio.sleep(0.2)
            async with asyncio.timeout(1):
                await one.publish([message("1"), message("2")], timeout=5)
                got = await asyncio.gather(*waiting)
        assert sorted(name for each in got for name in names(each)) == ["1", "2"]

    asyncio.run(main())


def test_a_waiting_consumer_hears_of_what_is_due_soon_and_of_what_is_given_back(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport, opened(redis_url) as other:
            waiting = asyncio.create_task(take(transport))
            await asyncio.sleep(0.2)
            async with asyncio.timeout(1):
                await transport.publish([message(due=transport.clock.time() + 0.1)], timeout=5)
                got = await waiting
            waiting = asyncio.create_task(take(other))
            await asyncio.sleep(0.2)
            async with asyncio.timeout(1):
                back = Settlement(delivery=got[0], action=Action.REQUEUE, counted=False, delay=0.1)
                assert await transport.settle([back]) == [True]
                (again,) = await waiting
            assert (again.count, again.leased_until is not None) == (1, True)

    asyncio.run(main())


def test_what_is_done_leaves_nothing_on_the_server(redis_url: str, redis_server: RedisServer) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport:
            await transport.publish([message(str(n), priority=n % 2) for n in range(40)], timeout=5)
            await transport.publish([message("late", due=transport.clock.time() + 0.05)], timeout=5)
            got = await take(transport, 41)
            assert all(await transport.renew(got[:10], lease=60, starting=True))
            back = [Settlement(delivery=one, action=Action.REQUEUE, delay=0.01) for one in got[:20]]
            assert all(await transport.settle([*back, *ack(got[20:])]))
            again = await take(transport, 20)
            assert {one.count for one in again} == {2}
            dead = [Settlement(delivery=one, action=Action.DEAD, cause="no") for one in again]
            assert all(await transport.settle(dead))
            assert all(await transport.settle(ack(await take(transport, 20, dead_letter_queue("q")))))

    asyncio.run(main())
    database = int(redis_url.rpartition("/")[2])
    left = {key.decode() for key in redis_server.command("KEYS", "*", database=database)}
    streams = {key for key in left if redis_server.command("TYPE", key, database=database) == b"stream"}
    assert all(redis_server.command("XLEN", key, database=database) == 0 for key in streams)
    assert left - streams - {"umbel:{q}:wake", "umbel:{q}.dead:wake"} == {
        "umbel:queues",
        "umbel:{q}:levels",
        "umbel:{q}.dead:levels",
    }


def test_a_queue_and_its_dead_letters_share_a_slot_whatever_its_name() -> None:
    for name in ("q", "", "}", "{", "a}b{c", ".dead", "a.dead.dead", "%", "ü 🌸"):
        keys = [key for queue in (name, dead_letter_queue(name)) for key in Keys("", queue).all]
        tags = {key.partition("{")[2].partition("}")[0] for key in keys}
        assert len(tags) == 1, name
        assert tags != {""}, name
        assert len(set(keys)) == len(keys), name


def test_a_large_batch_is_several_scripts_and_keeps_its_order(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport:
            await transport.publish([message(str(n), body=b"x" * 3000) for n in range(2500)], timeout=20)
            got = [one for _ in range(5) for one in await take(transport, 500)]
            assert names(got) == [str(n) for n in range(2500)]
            assert all(await transport.settle(ack(got)))
            assert (await transport.depth(["q"]))["q"].ready == 0

    asyncio.run(main())


def test_several_queues_of_one_consumer_share_its_credit(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport:
            for queue in ("busy", "quiet"):
                number = 50 if queue == "busy" else 2
                await transport.publish([message(f"{queue}{n}", queue) for n in range(number)], timeout=5)
            await transport.publish([message("urgent", "quiet", priority=9)], timeout=5)
            credit, order = Credit(2), []
            stream = transport.consume(["busy", "quiet"], credit=credit, lease=60)
            async with contextlib.aclosing(stream):  # type: ignore[type-var]  # an async generator
                while len(order) < 10:
                    batch = await anext(stream)
                    order += names(batch)
                    assert all(await transport.settle(ack(batch)))
                    credit.give(len(batch))
            assert order[0] == "urgent"
            assert {"quiet0", "quiet1"} < set(order)

    asyncio.run(main())


def test_peek_pages_through_levels_given_back_unread_and_delayed(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport:
            now = transport.clock.time()
            await transport.publish([message(f"a{n}") for n in range(4)], timeout=5)
            held = await take(transport, 3)
            await transport.publish([message(f"b{n}", priority=5) for n in range(2)], timeout=5)
            await transport.publish([message("d2", due=now + 200), message("d1", due=now + 100)], timeout=5)
            back = [Settlement(delivery=held[n], action=Action.REQUEUE) for n in (1, 0)]
            later = Settlement(delivery=held[2], action=Action.REQUEUE, delay=150)
            assert all(await transport.settle([*back, later]))
            order = ["b0", "b1", "a0", "a1", "a3", "d1", "a2", "d2"]
            for limit in (1, 3, 100):
                pages = [await transport.peek("q", limit=limit, offset=at) for at in range(0, 9, limit)]
                assert [name for page in pages for name in names(page)] == order
            depth = (await transport.depth(["q"]))["q"]
            assert (depth.ready, depth.delayed, depth.leased) == (5, 3, 0)
            assert await transport.purge("q") == 8
            assert await transport.peek("q") == []

    asyncio.run(main())


def test_an_entry_of_somebody_else_is_handed_out_as_unreadable(redis_url: str, redis_server: RedisServer) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport:
            await transport.publish([message("1")], timeout=5)
            database = int(redis_url.rpartition("/")[2])
            redis_server.command("XADD", "umbel:{q}:0", "*", "field", "value", database=database)
            redis_server.command("XADD", "umbel:{q}:0", "*", b"\x81\xc1", "value", database=database)
            got = await take(transport, 3)
            assert [one.message.content_type for one in got[1:]] == ["application/x-unreadable"] * 2
            assert all(
                await transport.settle([Settlement(delivery=one, action=Action.DEAD, cause="no") for one in got])
            )

    asyncio.run(main())


def test_what_is_no_plain_data_is_refused(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url, max_message_size=100) as transport:
            bad: list[Message] = [
                Message(queue="q", headers={"id": "bad", "x": object()}),
                Message(queue="q", headers={"id": "bad", "x": 2**70}),
                message("bad", priority=10),
                message("bad", due=float("inf")),
                message("bad", body=b"x" * 101),
            ]
            for one in bad:
                with pytest.raises(PublishRefused, match="'bad'"):
                    await transport.publish([message("good"), one], timeout=5)
            with pytest.raises(PublishRefused, match="no text"):
                await transport.publish([message(queue="\udc80")], timeout=5)
            await transport.publish([message("good")], timeout=5)
            assert names(await transport.peek("q")) == ["good"]

    asyncio.run(main())


def test_delayed_messages_cost_the_server_little_and_the_process_nothing(
    make_redis: Callable[..., RedisServer],
) -> None:
    server, number = make_redis("appendonly no"), 20_000

    async def main() -> None:
        async with opened(server.url) as transport:
            due = transport.clock.time() + 7200
            await transport.publish([message("first", due=due)], timeout=5)
            before = server.command("INFO", "memory")["used_memory"]
            for at in range(0, number, 5000):
                batch = [message(str(n), due=due, body=b"x" * 100) for n in range(at, at + 5000)]
                await transport.publish(batch, timeout=20)
            assert (await transport.depth(["q"]))["q"].delayed == number + 1
            assert (server.command("INFO", "memory")["used_memory"] - before) / number < 500

    asyncio.run(main())


def test_a_child_made_by_fork_publishes_over_a_connection_of_its_own(redis_url: str) -> None:
    transport = RedisTransport(redis_url)
    transport.publish_blocking([message("parent")], timeout=5)
    child = os.fork()
    if not child:
        try:
            transport.publish_blocking([message("child")], timeout=5)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    transport.publish_blocking([message("again")], timeout=5)

    async def main() -> None:
        assert sorted(names(await transport.peek("q"))) == ["again", "child", "parent"]
        await transport.close()

    asyncio.run(main())


# --- advice about the server ----------------------------------------------------------------------


def told(server: RedisServer, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    async def main() -> None:
        for _ in range(2):
            async with opened(server.url, **options) as transport:
                await take_nothing(transport)

    with caplog.at_level(logging.WARNING, "umbel.redis"):
        asyncio.run(main())
    return [record.getMessage() for record in caplog.records]


async def take_nothing(transport: RedisTransport) -> None:
    stream = transport.consume(["q"], credit=Credit(1), lease=60)
    async with contextlib.aclosing(stream):  # type: ignore[type-var]  # an async generator
        assert await anext(stream) == []


def test_f18_an_unsafe_server_is_told_of_once(
    make_redis: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_redis("appendonly no", "maxmemory 50mb", "maxmemory-policy allkeys-lru", 'save ""')
    eviction, persistence = told(server, caplog)
    assert "maxmemory-policy noeviction" in eviction
    assert "appendonly yes" in persistence


def test_a_result_store_on_an_unsafe_server_is_told_of_once(
    make_redis: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_redis("appendonly no", "maxmemory 50mb", "maxmemory-policy allkeys-lru", 'save ""')

    async def main() -> None:
        for _ in range(2):
            store = RedisResultStore(server.url)
            await store.put([Result(task_id="a", state="SUCCESS", document=b"{}")])
            await store.close()

    with caplog.at_level(logging.WARNING, "umbel.redis"):
        asyncio.run(main())
    eviction, persistence = [record.getMessage() for record in caplog.records]
    assert "it may delete results, locks and groups when memory runs short" in eviction
    assert "its end loses all results, locks and groups" in persistence


def test_a_safe_server_or_one_that_does_not_tell_is_not_told_of(
    make_redis: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    assert told(make_redis("maxmemory 50mb", "maxmemory-policy noeviction"), caplog) == []
    server = make_redis("appendonly no", 'save ""', "user worker on nopass ~* &* +@all -config")
    hidden = server.url.replace("redis://", "redis://worker:x@")

    async def main() -> None:
        async with opened(hidden) as transport:
            await take_nothing(transport)

    asyncio.run(main())
    assert caplog.records == []


def test_a_server_too_old_is_refused() -> None:
    class Old:
        clustered = False
        address = "redis://old:6379/0"

        async def call(self, command: tuple[Any, ...]) -> Any:
            assert command[0] == "INFO"
            return {"redis_version": "6.2.14"}

    with pytest.raises(PublishRefused, match=r"redis://old:6379/0 runs Redis 6\.2\.14; .* 7\.0"):
        asyncio.run(advice.inspect(Old()))  # type: ignore[arg-type]  # all of a session that it uses


def test_a_full_server_refuses_what_is_new_and_can_be_emptied(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis("maxmemory 6mb", "maxmemory-policy noeviction", "appendonly no")

    async def main() -> None:
        async with opened(server.url) as transport:
            sent = 0

            async def fill() -> None:
                nonlocal sent
                while sent < 10_000:
                    await transport.publish([message(str(sent), body=b"x" * 10_000)], timeout=5)
                    sent += 1

            with pytest.raises(BrokerUnavailable, match="memory"):
                await fill()
            with pytest.raises(BrokerUnavailable, match="memory"):
                transport.publish_blocking([message("blocking", body=b"x")], timeout=5)
            assert sent > 10
            for at in range(0, sent, 50):
                got = await take(transport, min(50, sent - at))
                assert all(await transport.renew(got, lease=60, starting=True))
                assert all(await transport.settle(ack(got)))
            await transport.publish([message("room")], timeout=5)

    asyncio.run(main())


def test_a_closed_transport_says_so(redis_url: str) -> None:
    async def main() -> None:
        transport = RedisTransport(redis_url)
        await transport.close()
        with pytest.raises(BrokerUnavailable, match="closed"):
            await transport.publish([message()], timeout=5)
        with pytest.raises(BrokerUnavailable, match="closed"):
            transport.publish_blocking([message()], timeout=5)
        with pytest.raises(BrokerUnavailable, match="closed"):
            await anext(transport.subscribe("t"))

    asyncio.run(main())


def test_a_consumer_of_no_queue_at_all_stays_quiet(redis_url: str) -> None:
    async def main() -> None:
        async with opened(redis_url) as transport:
            stream = transport.consume([], credit=Credit(1), lease=60)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            await transport.close()
            with pytest.raises(BrokerUnavailable, match="closed"):
                await waiting

    asyncio.run(main())
