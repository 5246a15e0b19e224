"""What goes in one command, and over which connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis import exceptions
from servers.redis import RedisServer

from umbel.errors import BrokerUnavailable
from umbel.model import Result
from umbel_redis.options import RedisOptions
from umbel_redis.result_store import RedisResultStore
from umbel_redis.session import Session


def result(task_id: str, state: str = "SUCCESS", **fields: Any) -> Result:
    document = b'{"status": "%b", "result": 1, "task_id": "%b"}' % (state.encode(), task_id.encode())
    return Result(task_id=task_id, state=state, document=document, **fields)


BATCHES = [
    [result("a", expires=60.0), result("b", expires=60.0)],
    [result("a"), result("b", "FAILURE")],
    [result("a", expires=60.0), result("b", expires=30.0), result("c")],
    [result("a", expires=60.0), result("b", "STARTED", expires=60.0)],
    [result("a", "RETRY", expires=60.0, order=3)],
    [result("a", expires=60.0), result("b", expires=60.0, content_type="application/x-own")],
    [result("é", expires=60.0)],
]


@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_comes_back_as_it_went(redis_url: str, batch: list[Result]) -> None:
    async def main() -> None:
        store = RedisResultStore(redis_url)
        try:
            for _ in range(2):  # the second time all are there, and what has ended stays
                await store.put(batch)
                assert await store.get([one.task_id for one in batch]) == {one.task_id: one for one in batch}
            assert await store.get([]) == {}
        finally:
            await store.close()

    asyncio.run(main())


def using(url: str, do: Callable[[Session], Awaitable[None]]) -> None:
    async def main() -> None:
        session = Session(url, RedisOptions(), BrokerUnavailable)
        try:
            await do(session)
        finally:
            await session.close()

    asyncio.run(main())


def connections(server: RedisServer, url: str) -> list[int]:
    listed = server.command("CLIENT LIST")
    return [int(one["id"]) for one in listed if one["name"] == "umbel" and one["db"] == url.rpartition("/")[2]]


def test_one_connection_serves_one_call_after_another(redis_server: RedisServer, redis_url: str) -> None:
    async def do(session: Session) -> None:
        await session.call(("PING",))
        first = connections(redis_server, redis_url)
        assert len(first) == 1
        for _ in range(5):
            await session.run([("SET", "k", 1), ("GET", "k")])
        assert connections(redis_server, redis_url) == first

    using(redis_url, do)
    assert connections(redis_server, redis_url) == []


def test_calls_at_once_have_connections_of_their_own(redis_server: RedisServer, redis_url: str) -> None:
    async def do(session: Session) -> None:
        assert await asyncio.gather(*[session.call(("INCR", "n")) for _ in range(20)]) != []
        assert 1 < len(connections(redis_server, redis_url)) <= RedisOptions().connections

    using(redis_url, do)


def test_answers_are_read_as_the_library_reads_them(redis_server: RedisServer, redis_url: str) -> None:
    async def do(session: Session) -> None:
        assert await session.call(("PING",)) is True
        told = await session.call(("INFO", "server"))
        assert told.get("redis_mode", told.get("server_mode")) == "standalone"  # the latter in Valkey

    using(redis_url, do)


def test_a_refused_command_spoils_neither_the_others_nor_the_connection(
    redis_server: RedisServer, redis_url: str
) -> None:
    async def do(session: Session) -> None:
        await session.call(("SET", "text", "a"))
        before = connections(redis_server, redis_url)
        with pytest.raises(BrokerUnavailable) as refused:
            await session.run([("SET", "x", 1), ("INCR", "text"), ("SET", "y", 2)])
        assert isinstance(refused.value.__cause__, exceptions.ResponseError)
        assert await session.call(("MGET", "x", "y")) == [b"1", b"2"]
        assert connections(redis_server, redis_url) == before

    using(redis_url, do)


def test_a_connection_that_the_server_has_closed_is_replaced_before_it_is_used(
    redis_server: RedisServer, redis_url: str
) -> None:
    async def do(session: Session) -> None:
        await session.call(("SET", "n", 0))
        (lost,) = connections(redis_server, redis_url)
        redis_server.command("CLIENT", "KILL", "ID", lost)  # answered when it is closed
        await asyncio.sleep(0.1)  # the end of the stream is read
        assert await session.call(("INCR", "n")) == 1
        assert lost not in connections(redis_server, redis_url)

    using(redis_url, do)


def test_a_call_that_is_cancelled_leaves_no_answer_to_the_next(redis_server: RedisServer, redis_url: str) -> None:
    async def do(session: Session) -> None:
        await session.call(("SET", "mine", "right"))
        waiting = asyncio.create_task(session.call(("BLPOP", "nothing", "5")))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await session.call(("GET", "mine")) == b"right"

    using(redis_url, do)
