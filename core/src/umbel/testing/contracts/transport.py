"""The laws of the transport port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from typing import cast

import attrs
import pytest

from umbel.capabilities import TransportCapabilities
from umbel.errors import BrokerUnavailable
from umbel.model import QueueSpec
from umbel.ports.transport import BlockingPublisher, Broadcaster, Credit, Transport
from umbel.testing.contracts.bench import Belongings, closing, interrupt, law
from umbel.testing.contracts.transport_bench import LONG, TransportBench, ack, ids, in_threads
from umbel.testing.contracts.transport_delivery import DeliveryLaws
from umbel.testing.contracts.transport_exchanges import ExchangeLaws
from umbel.testing.contracts.transport_flow import FlowLaws
from umbel.testing.contracts.transport_session import SessionLaws, next_of


class TransportContract(DeliveryLaws, FlowLaws, ExchangeLaws, SessionLaws):
    """Subclass it and give the fixture ``make_transport``: a callable that makes an instance on one and the same broker.

    Laws use queues with names of their own, so one broker may serve all tests; what they leave behind, the factory's
    fixture removes. Fit the kit to a slow broker with the class attributes of ``TransportLaws``; give the fixtures
    ``clock``, ``unreachable``, ``sever`` and ``restart`` where the driver allows.
    """

    # --- identity -------------------------------------------------------------------------------

    @law
    async def test_a_driver_says_what_it_is(self, bench: TransportBench) -> None:
        transport = bench.transport()
        assert isinstance(transport, Transport)
        assert isinstance(transport.capabilities, TransportCapabilities)
        assert attrs.has(type(transport).Options)
        assert isinstance(transport.options, type(transport).Options)
        assert type(transport).api_version[0] == Transport.api_version[0]
        declared = transport.capabilities
        assert isinstance(transport, Broadcaster) == declared.broadcast, "broadcast is declared, or it is not there"
        assert isinstance(transport, BlockingPublisher) == declared.blocking_publish
        assert declared.max_delay >= 0
        assert 1 <= declared.priority_levels <= 10

    # --- the end --------------------------------------------------------------------------------

    @law
    async def test_close_is_harmless_unused_and_twice(self, bench: TransportBench) -> None:
        unused, used = bench.transport(), bench.transport()
        await unused.close()
        await unused.close()
        await bench.send(used, "1")
        await used.close()
        await used.close()

    @law
    async def test_close_ends_what_is_under_way(self, bench: TransportBench) -> None:
        transport, other = bench.transport(), bench.transport()
        accepted: list[str] = []

        async def send() -> None:
            for number in count():
                await bench.send(transport, str(number))
                accepted.append(str(number))

        async def consume(queue: str, credit: Credit) -> None:
            async with closing(transport.consume([queue], credit=credit, lease=LONG)) as stream:
                async for batch in stream:
                    await transport.settle([ack(delivery) for delivery in batch])

        async def listen() -> None:
            async for _ in cast("Broadcaster", transport).subscribe(bench.queue):
                pass

        busy = [send(), consume("idle" + bench.queue, Credit(5)), consume(bench.queue + "-none", Credit(0))]
        if bench.capabilities.broadcast:
            busy.append(listen())
        tasks = [asyncio.ensure_future(coroutine) for coroutine in busy]
        await bench.until(lambda: len(accepted) > 5, "messages accepted")
        await bench.soon(transport.close(), "the end of close")
        _, pending = await asyncio.wait(tasks, timeout=bench.patience)
        assert not pending, "what was under way goes on after close"
        for task in tasks:
            error = task.exception() if not task.cancelled() else None
            assert error is None or isinstance(error, BrokerUnavailable), f"not BrokerUnavailable: {error!r}"
        ready = (await bench.depth(other)).ready
        assert set(accepted) <= set(ids(await bench.take(other, ready))), "an accepted message is lost"

    @law
    async def test_use_after_close_raises(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1")
        held = await bench.take(transport)
        await transport.close()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: bench.send(transport, "2"),
            lambda: bench.take(transport),
            lambda: transport.settle([ack(held[0])]),
            lambda: transport.renew(held, lease=LONG),
            lambda: transport.declare([QueueSpec(name=bench.queue)]),
            lambda: transport.purge(bench.queue),
            lambda: transport.depth([bench.queue]),
            lambda: transport.peek(bench.queue),
        ]
        if bench.capabilities.broadcast:
            speaker = cast("Broadcaster", transport)
            calls += [lambda: speaker.broadcast(bench.queue, b""), lambda: anext(speaker.subscribe(bench.queue))]
        for call in calls:
            with pytest.raises(BrokerUnavailable):
                await bench.soon(call(), "an error")

    # --- leaks ----------------------------------------------------------------------------------

    async def _live(self, bench: TransportBench) -> None:
        """All that a transport does, from its making to its close; every iterator is closed."""
        transport = bench.transport()
        await transport.declare([QueueSpec(name=bench.queue)])
        await bench.send(transport, "1", "2", "3")
        for delivery in await bench.take(transport, 2):
            await transport.renew([delivery], lease=LONG)
            await transport.settle([ack(delivery)])
        await bench.take_nothing(transport, queues=[f"{bench.queue}-none"])
        await transport.depth([bench.queue])
        await transport.peek(bench.queue)
        await transport.purge(bench.queue)
        if bench.capabilities.broadcast:
            await transport.broadcast(bench.queue, b"x")  # type: ignore[attr-defined]  # a Broadcaster, as it declares
            async with closing(cast("Broadcaster", transport).subscribe(bench.queue)) as stream:
                await interrupt(next_of(stream), 20)
        await transport.close()

    async def _leaks(self, bench: TransportBench, kind: str) -> None:
        await self._live(bench)  # what a process makes once is no leak
        before = Belongings.now()
        for _ in range(3):
            await self._live(bench)
        await bench.until(lambda: not before.left_over(kind), f"the end of all {kind}; left: {before.left_over(kind)}")

    @law
    async def test_no_task_is_left_behind(self, bench: TransportBench) -> None:
        await self._leaks(bench, "tasks")

    @law
    async def test_no_thread_is_left_behind(self, bench: TransportBench) -> None:
        await self._leaks(bench, "threads")

    @law
    async def test_no_file_or_socket_is_left_behind(self, bench: TransportBench) -> None:
        await self._leaks(bench, "files")

    # --- abilities ------------------------------------------------------------------------------

    @law
    async def test_a_blocking_publish_keeps_the_promises_of_publish(self, bench: TransportBench) -> None:
        transport = bench.transport()
        if not bench.capabilities.blocking_publish:
            return  # that there is no such method, test_a_driver_says_what_it_is tests
        publisher = cast("BlockingPublisher", transport)

        def send(part: int) -> None:
            for number in range(25):
                publisher.publish_blocking([bench.message(f"{part}-{number}")], timeout=bench.patience)

        raised = await asyncio.to_thread(in_threads, *(partial(send, part) for part in range(4)))
        assert raised == []
        got = ids(await bench.take(transport, 100))
        for part in range(4):
            assert [name for name in got if name.startswith(f"{part}-")] == [f"{part}-{n}" for n in range(25)]
        await transport.close()
        (error,) = await asyncio.to_thread(in_threads, partial(send, 9))
        assert isinstance(error, BrokerUnavailable)

    @law
    async def test_a_broadcast_reaches_all_who_listen(self, bench: TransportBench) -> None:
        if not bench.capabilities.broadcast:
            return  # that there is no such method, test_a_driver_says_what_it_is tests
        speaker = bench.transport()
        streams = [cast("Broadcaster", bench.transport()).subscribe(bench.queue) for _ in range(2)]
        heard: list[list[tuple[str, bytes]]] = [[], []]
        listening = [asyncio.ensure_future(_hear(*pair)) for pair in zip(streams, heard, strict=True)]
        try:
            await _until_heard(bench, cast("Broadcaster", speaker), heard)
            said = [("worker.heartbeat", b"\x00\xff"), ("", b""), ("ünï.🌸", b"x" * 10_000)]
            for key, payload in said:
                await cast("Broadcaster", speaker).broadcast(f"{bench.queue}-other", b"elsewhere", key=key)
                await cast("Broadcaster", speaker).broadcast(bench.queue, payload, key=key)
            await bench.until(lambda: min(len(_news(mine)) for mine in heard) >= len(said), "all heard by all")
            await asyncio.sleep(bench.quiet)
            assert [_news(mine) for mine in heard] == [said, said]
        finally:
            await _end(listening)

    @law
    async def test_a_broadcast_is_not_kept(self, bench: TransportBench) -> None:
        if not bench.capabilities.broadcast:
            return
        speaker = cast("Broadcaster", bench.transport())
        await speaker.broadcast(bench.queue, b"early", key="early")
        heard: list[tuple[str, bytes]] = []
        listening = [asyncio.ensure_future(_hear(cast("Broadcaster", bench.transport()).subscribe(bench.queue), heard))]
        try:
            await _until_heard(bench, speaker, [heard])
            assert _news(heard) == []
        finally:
            await _end(listening)


TEST = "kit.test"
"""Routing key of broadcasts that only find out whether somebody listens yet."""


async def _hear(stream: AsyncIterator[tuple[str, bytes]], heard: list[tuple[str, bytes]]) -> None:
    async with closing(stream):
        async for item in stream:
            heard.append(item)  # noqa: PERF401  # others look at it meanwhile


async def _until_heard(bench: TransportBench, speaker: Broadcaster, heard: Sequence[Sequence[object]]) -> None:
    """Speak until everybody has heard something: only then do they listen for sure."""
    deadline = time.monotonic() + bench.patience
    while not all(heard):
        assert time.monotonic() < deadline, "a subscriber hears nothing"
        await speaker.broadcast(bench.queue, b"", key=TEST)
        await asyncio.sleep(0.01)


def _news(heard: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [item for item in heard if item[0] != TEST]


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
