"""Servers that die, forget, say nothing or refuse; and keys that get lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from servers.proxy import CLIENT, SERVER, Proxy
from servers.redis import RedisSentinel, RedisServer

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Action, Delivery, Message, Settlement
from umbel.ports.transport import Credit
from umbel_redis.transport import RedisTransport, TransportOptions


def message(name: str = "1", queue: str = "q", **fields: Any) -> Message:
    return Message(queue=queue, headers={"id": name, "task": "t"}, **fields)


def names(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


def ack(deliveries: Sequence[Delivery]) -> list[Settlement]:
    return [Settlement(delivery=delivery, action=Action.ACK) for delivery in deliveries]


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisTransport]:
    transport = RedisTransport(url, options=TransportOptions(**options))
    try:
        yield transport
    finally:
        await transport.close()


async def take(transport: RedisTransport, number: int = 1, lease: float = 60.0) -> list[Delivery]:
    got: list[Delivery] = []
    async with asyncio.timeout(20):
        stream = transport.consume(["q"], credit=Credit(number), lease=lease)
        async with contextlib.aclosing(stream):  # type: ignore[type-var]  # an async generator
            while len(got) < number:
                got += await anext(stream)
    return got


async def all_verbs(transport: RedisTransport) -> None:
    """Whether everything works, on a queue that is empty."""
    await transport.publish([message("a"), message("b")], timeout=30)
    transport.publish_blocking([message("c")], timeout=5)
    held = await take(transport, 3)
    assert names(held) == ["a", "b", "c"]
    assert list(await transport.renew(held, lease=60, starting=True)) == [True] * 3
    back = Settlement(delivery=held[2], action=Action.REQUEUE)
    assert list(await transport.settle([*ack(held[:2]), back])) == [True] * 3
    assert len(await transport.peek("q")) == 1
    assert await transport.purge("q") == 1
    assert (await transport.depth(["q"]))["q"].ready == 0


# --- the server dies or forgets -------------------------------------------------------------------


def test_what_was_accepted_survives_the_servers_death(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server.url) as transport:
            await transport.publish([message(str(n)) for n in range(6)], timeout=30)
            await transport.publish([message("late", due=time.time() + 2.0)], timeout=30)
            held = await take(transport, 4)
            assert all(await transport.renew(held[:1], lease=60, starting=True))
            back = Settlement(delivery=held[1], action=Action.REQUEUE, counted=False)
            assert all(await transport.settle([*ack(held[2:3]), back]))
            server.kill()
            with pytest.raises(BrokerUnavailable):
                await transport.settle(ack(held[:1]))
            server.start()
        async with opened(server.url) as transport:
            assert await transport.settle(ack(held[3:])) == [True]  # its lease has survived too
            assert await transport.settle([Settlement(delivery=held[0], action=Action.REQUEUE)]) == [True]
            got = await take(transport, 5)
            assert [(one.message.id, one.count, one.starts) for one in got] == [
                ("0", 2, 1),
                ("1", 1, 0),
                ("4", 1, 0),
                ("5", 1, 0),
                ("late", 1, 0),
            ]

    asyncio.run(main())


def test_a_running_consumer_survives_forgotten_scripts_groups_and_everything(
    make_redis: Callable[..., RedisServer],
) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server.url) as transport:
            await all_verbs(transport)
            server.command("SCRIPT", "FLUSH")
            await all_verbs(transport)
            waiting = asyncio.create_task(take(transport))
            await asyncio.sleep(0.1)
            server.command("FLUSHALL")
            await transport.publish([message("after")], timeout=30)
            (held,) = await waiting
            assert "q" in await transport.depth()
            server.command("XGROUP", "DESTROY", "umbel:{q}:0", "umbel")
            (again,) = await take(transport)
            assert (again.message.id, await transport.settle(ack([held]))) == ("after", [False])
            assert await transport.settle(ack([again])) == [True]
            await all_verbs(transport)

    asyncio.run(main())


@pytest.mark.parametrize("lost", ["held", "again", "levels"])
def test_messages_whose_bookkeeping_is_lost_are_found(make_redis: Callable[..., RedisServer], lost: str) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server.url) as transport:
            await transport.publish([message("1"), message("2", priority=7)], timeout=30)
            held = await take(transport, 2)
            if lost == "again":
                back = [Settlement(delivery=one, action=Action.REQUEUE) for one in held]
                assert all(await transport.settle(back))
            elif lost == "levels":
                assert all(await transport.settle(ack(held)))
                await transport.publish([message("1"), message("2", priority=7)], timeout=30)
            server.command("DEL", f"umbel:{{q}}:{lost}")
            again = await take(transport, 2)
            assert names(again) == ["2", "1"]
            assert all(await transport.settle(ack(again)))

    asyncio.run(main())


@pytest.mark.slow
def test_a_failover_is_a_lost_session_and_the_next_one_goes_on(redis_sentinel: RedisSentinel) -> None:
    url = redis_sentinel.url

    async def main() -> None:
        async with opened(url, master=redis_sentinel.name) as transport:
            await transport.publish([message("before")], timeout=30)
            waiting = asyncio.create_task(take(transport, 2))
            await asyncio.sleep(0.3)  # it holds one, and waits for another
            await asyncio.to_thread(redis_sentinel.failover)
            with pytest.raises(BrokerUnavailable):
                await waiting
        deadline = time.monotonic() + 20
        while True:
            async with opened(url, master=redis_sentinel.name) as transport:
                try:
                    await transport.publish([message("after")], timeout=2)
                    break
                except BrokerUnavailable:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.2)

    asyncio.run(main())


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [False, True], ids=["async", "blocking"])
def test_a_publish_ends_within_its_deadline(
    redis_server: RedisServer, redis_url: str, make_proxy: Callable[[int], Proxy], blocking: bool
) -> None:
    proxy = make_proxy(redis_server.port)

    async def publish(transport: RedisTransport, timeout: float) -> None:
        if blocking:
            await asyncio.to_thread(transport.publish_blocking, [message()], timeout=timeout)
        else:
            await transport.publish([message()], timeout=timeout)

    async def fails(transport: RedisTransport) -> None:
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await publish(transport, 0.4)
        assert time.monotonic() - begun < 5.0

    async def main() -> None:
        async with opened(proxy.through(redis_url)) as transport:
            proxy.stall()  # before there is a connection
            await fails(transport)
            proxy.heal()
            await publish(transport, 5)
            proxy.stall()  # with a connection that was good a moment ago
            await fails(transport)
            proxy.heal()
            proxy.delay(0.3, CLIENT)  # every answer comes within the deadline, all of them together do not
            async with opened(proxy.through(redis_url)) as fresh:
                await fails(fresh)
            proxy.heal()
            proxy.refuse()
            proxy.reset()
            await fails(transport)
            proxy.heal()
            await publish(transport, 5)

    asyncio.run(main())


@pytest.mark.parametrize("blocking", [False, True], ids=["async", "blocking"])
def test_a_wrong_password_is_said_at_once_and_never_shown(
    make_redis: Callable[..., RedisServer], blocking: bool
) -> None:
    server = make_redis(password="right")
    url = f"redis://:wr0ng@127.0.0.1:{server.port}/0"

    async def publish(transport: RedisTransport) -> None:
        if blocking:
            await asyncio.to_thread(transport.publish_blocking, [message()], timeout=20)
        else:
            await transport.publish([message()], timeout=20)

    async def main() -> None:
        async with opened(url) as transport:
            begun = time.monotonic()
            with pytest.raises(PublishRefused, match="password") as refused:
                await publish(transport)
            assert time.monotonic() - begun < 10
            assert "wr0ng" not in str(refused.value)

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stall", "half_open"])
def test_a_dead_connection_is_noticed(
    redis_server: RedisServer, redis_url: str, make_proxy: Callable[[int], Proxy], fault: str
) -> None:
    proxy = make_proxy(redis_server.port)

    async def main() -> None:
        async with opened(proxy.through(redis_url), timeout=0.5) as transport:
            waiting = asyncio.create_task(take(transport))
            heard = transport.subscribe("topic")
            hearing = asyncio.ensure_future(anext(heard))
            await asyncio.sleep(0.3)
            proxy.stall() if fault == "stall" else proxy.half_open(keeps=CLIENT)
            begun = time.monotonic()
            with pytest.raises(BrokerUnavailable):
                await waiting
            with pytest.raises(BrokerUnavailable):
                await hearing
            assert time.monotonic() - begun < 0.5 + 4 + 5.0
            proxy.heal()

    asyncio.run(main())


def test_a_server_that_believes_in_a_dead_client_wakes_the_living_all_the_same(
    redis_server: RedisServer, redis_url: str, make_proxy: Callable[[int], Proxy]
) -> None:
    """A token may be handed to a connection that nobody hears: others look by themselves after some seconds."""
    proxy = make_proxy(redis_server.port)

    async def main() -> None:
        async with opened(proxy.through(redis_url)) as dead, opened(redis_url) as living:
            waiting = asyncio.create_task(take(dead))
            await asyncio.sleep(0.2)
            proxy.half_open(keeps=SERVER)
            with pytest.raises(BrokerUnavailable):
                await waiting
            waiting = asyncio.create_task(take(living))
            await asyncio.sleep(0.1)
            await living.publish([message("1")], timeout=30)
            async with asyncio.timeout(8):
                assert names(await waiting) == ["1"]

    asyncio.run(main())


def test_every_cut_is_survived_and_nothing_is_lost(
    redis_server: RedisServer, redis_url: str, make_proxy: Callable[[int], Proxy]
) -> None:
    proxy, sent = make_proxy(redis_server.port), [str(n) for n in range(200)]
    seen: set[str] = set()

    async def session() -> None:
        async with opened(proxy.through(redis_url)) as transport:
            credit = Credit(10)
            stream = transport.consume(["q"], credit=credit, lease=0.5)
            async with contextlib.aclosing(stream):  # type: ignore[type-var]  # an async generator
                async for batch in stream:
                    seen.update(names(batch))
                    await transport.settle(ack(batch))
                    credit.give(len(batch))
                    depth = (await transport.depth(["q"]))["q"]
                    if not depth.ready + depth.delayed + depth.leased:
                        return

    async def main() -> None:
        async with opened(redis_url) as direct:
            await direct.publish([message(name) for name in sent], timeout=30)
        for after in range(100, 20_000, 2500):
            proxy.cut(after=after, to=CLIENT if after % 1000 else SERVER)
            with contextlib.suppress(BrokerUnavailable):
                await session()
        proxy.heal()
        async with asyncio.timeout(20):
            await session()
        assert seen == set(sent)

    asyncio.run(main())
