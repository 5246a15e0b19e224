"""The drivers over TLS: with the authority that signed the server's certificate, and not without."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from servers.redis import RedisServer

from umbel.errors import PublishRefused, ResultStoreUnavailable
from umbel.model import Action, Message, Result, Settlement
from umbel.ports.transport import Credit
from umbel_redis.result_store import RedisResultStore, ResultStoreOptions
from umbel_redis.transport import RedisTransport


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[RedisServer]:
    """``redis_server`` only to skip where there is no Redis."""
    with RedisServer(tmp_path_factory.mktemp("tls"), tls=True) as server:
        yield server


def ca(server: RedisServer) -> str:
    assert server.certificates is not None
    return str(server.certificates.ca)


async def closed(*drivers: RedisTransport | RedisResultStore) -> None:
    for driver in drivers:
        await driver.close()
    await asyncio.sleep(0.2)  # the end of TLS is said and heard some turns of the loop later


def test_messages_travel_over_tls(server: RedisServer) -> None:
    async def main() -> None:
        transport = RedisTransport(server.tls_url, options=RedisTransport.Options(ssl_ca_certs=ca(server)))
        await transport.publish([Message(queue="q", headers={"id": "a", "task": "t"}, body=b"x")], timeout=10)
        transport.publish_blocking([Message(queue="q", headers={"id": "b", "task": "t"}, body=b"y")], timeout=10)
        taken = []
        async with aclosing(transport.consume(["q"], credit=Credit(5), lease=30.0)) as stream:  # type: ignore[type-var]  # an async generator
            async for batch in stream:
                taken += batch
                if len(taken) == 2:
                    break
        assert sorted(delivery.message.id for delivery in taken) == ["a", "b"]
        done = await transport.settle([Settlement(delivery=each, action=Action.ACK) for each in taken])
        assert list(done) == [True, True]
        await closed(transport)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_broadcasts_travel_over_tls(server: RedisServer) -> None:
    async def main() -> None:
        transport = RedisTransport(server.tls_url, options=RedisTransport.Options(ssl_ca_certs=ca(server)))
        stream = transport.subscribe("topic")
        hearing = asyncio.ensure_future(anext(stream))
        while not hearing.done():
            await transport.broadcast("topic", b"hello", key="k")
            await asyncio.wait([hearing], timeout=0.1)
        assert hearing.result() == ("k", b"hello")
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
        await closed(transport)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_results_are_heard_over_tls(server: RedisServer) -> None:
    async def main() -> None:
        options = ResultStoreOptions(ssl_ca_certs=ca(server), poll_interval=30.0)
        store, other = (RedisResultStore(server.tls_url, options=options) for _ in range(2))
        waiting = asyncio.ensure_future(other.wait("a"))
        await asyncio.sleep(0.3)
        await store.put([Result(task_id="a", state="SUCCESS", document=b'{"status": "SUCCESS"}')])
        assert (await asyncio.wait_for(waiting, 10)).final
        assert (await store.claim("lock", "me", lease=5)).owner == "me"
        await closed(store, other)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_certificate_of_an_unknown_authority_is_refused(server: RedisServer) -> None:
    async def main() -> None:
        transport, store = RedisTransport(server.tls_url), RedisResultStore(server.tls_url)
        with pytest.raises(PublishRefused, match=r"is not trusted .*ssl_ca_certs"):
            await transport.publish([Message(queue="q")], timeout=5)
        with pytest.raises(ResultStoreUnavailable, match=r"is not trusted .*ssl_ca_certs"):
            await store.get(["a"])
        await closed(transport, store)

    asyncio.run(asyncio.wait_for(main(), 60))
