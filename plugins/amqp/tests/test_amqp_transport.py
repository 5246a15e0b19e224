"""What the laws of the port do not ask for: credit that changes, counts through crashes, delays, queues shared with Celery."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, cast

import pytest
from servers.rabbitmq import RabbitServer

from umbel.errors import PublishRefused, SettingsError
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement
from umbel.ports.transport import Credit
from umbel_amqp.frames import METHOD, Get, ack_frame
from umbel_amqp.holding import Tags
from umbel_amqp.options import TransportOptions, address_of
from umbel_amqp.transport import AmqpTransport

FULL = os.environ.get("UMBEL_TEST_FULL") == "1"


def message(name: object, queue: str = "q", **fields: Any) -> Message:
    fields.setdefault("body", str(name).encode())
    return Message(queue=queue, headers={"id": str(name), "task": "t"}, **fields)


def settled(delivery: Delivery, action: Action = Action.ACK, **how: Any) -> Settlement:
    return Settlement(delivery=delivery, action=action, **how)


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


@asynccontextmanager
async def opened(
    url: str, number: int = 1, options: TransportOptions | None = None
) -> AsyncIterator[list[AmqpTransport]]:
    async with AsyncExitStack() as stack:
        transports = [AmqpTransport(url, options=options) for _ in range(number)]
        for transport in transports:
            stack.push_async_callback(transport.close)
        yield transports


async def take(transport: AmqpTransport, number: int, *queues: str, credit: Credit | None = None) -> list[Delivery]:
    got: list[Delivery] = []
    stream = transport.consume(queues or ["q"], credit=credit or Credit(number), lease=60)
    async with asyncio.timeout(20), aclosing(cast("Any", stream)):
        while len(got) < number:
            got += await anext(stream)
    return got


def crash(transport: AmqpTransport) -> None:
    """End its sessions as the death of its process would."""
    for slot in (transport._in, transport._out):
        if slot.session is not None:
            assert slot.session.connection._transport is not None
            slot.session.connection._transport.abort()


# --- credit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [("q",), ("q", "r", "s")])
def test_a_credit_that_wanders_is_used_in_full_and_never_exceeded(rabbitmq_url: str, queues: tuple[str, ...]) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            number = 600
            await transport.publish([message(n, queues[n % len(queues)]) for n in range(number)], timeout=20)
            credit, seen, out = Credit(1), Counter[str](), 0
            stream = transport.consume(queues, credit=credit, lease=60)
            async with asyncio.timeout(40), aclosing(cast("Any", stream)):
                held: list[Delivery] = []
                while sum(seen.values()) < number:
                    batch = await anext(stream)
                    held += batch
                    out += len(batch)
                    seen.update(delivery.message.id for delivery in batch)
                    assert out <= max(credit.limit, out - len(batch)), "handed out beyond the credit"
                    if out < credit.limit and sum(seen.values()) < number:
                        continue
                    await transport.settle([settled(delivery) for delivery in held])
                    credit.give(len(held))
                    out, held = 0, []
                    credit.resize(1 + (credit.limit * 7 + 3) % 40)
            assert set(seen.values()) == {1}

    asyncio.run(live())


def test_what_there_is_no_credit_for_is_not_hoarded(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, 2) as (busy, idle):
            credit = Credit(10)
            await busy.publish([message(n) for n in range(10)], timeout=30)
            stream = busy.consume(["q"], credit=credit, lease=60)
            async with aclosing(cast("Any", stream)):
                held = await anext(stream)
                while len(held) < 10:
                    held += await anext(stream)
                credit.resize(2)
                await busy.settle([settled(delivery) for delivery in held[:8]])
                credit.give(8)
                await busy.publish([message(n) for n in range(10, 18)], timeout=30)
                waiting = asyncio.ensure_future(anext(stream))
                got = await take(idle, 8)  # within moments, though the busy one's consumer had been offered them
                assert sorted(ids(got)) == sorted(str(n) for n in range(10, 18))
                assert {delivery.count for delivery in got} == {1}, "they were never handed out before"
                waiting.cancel()
                await asyncio.wait([waiting])

    asyncio.run(live())


def test_acknowledgements_travel_together() -> None:
    written: list[bytes] = []

    class Channel:
        number = 1
        settle = staticmethod(written.append)

    tags = Tags(cast("Any", Channel()))
    tags.add(range(1, 8), "c")
    tags.ack([2])
    tags.ack([1, 3, 4, 6])
    assert written == [ack_frame(1, 2), ack_frame(1, 4, multiple=True) + ack_frame(1, 6)]
    assert (len(tags), tags.out["c"]) == (2, 2)
    tags.ack([7, 5])
    assert written[2:] == [ack_frame(1, 7, multiple=True)]
    assert written[0][0] == METHOD


def test_one_session_has_as_many_connections_and_channels_as_ever(rabbitmq: RabbitServer, rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            for turn in range(30):
                await transport.publish([message(turn)], timeout=30)
                (delivery,) = await take(transport, 1, credit=Credit(1 + turn))
                await transport.settle([settled(delivery)])
                await transport.depth(["q", "nowhere"])
            for slot in (transport._in, transport._out):
                assert slot.session is not None
                async with asyncio.timeout(30):
                    while len(slot.session.connection._channels) > 4:  # noqa: ASYNC110  # channels close a moment after their use
                        await asyncio.sleep(0.05)

    asyncio.run(live())


# --- counts and starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_starts_are_counted_through_crashes(rabbitmq_url: str, kind: str) -> None:
    async def live() -> None:
        told = []
        options = TransportOptions(queue_type=kind)
        async with opened(rabbitmq_url, 5, options) as transports:
            await transports[0].publish([message("poison")], timeout=30)
            for transport in transports:
                (delivery,) = await take(transport, 1)
                told.append((delivery.count, delivery.starts))
                if delivery.count > 1:
                    assert list(await transport.renew([delivery], lease=60, starting=True)) == [True]
                assert delivery.message == message("poison")
                crash(transport)
        assert told == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]

    asyncio.run(live())


def test_a_marked_start_is_settled_in_every_way(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            names = ["ack", "dead", "back", "uncounted", "delayed"]
            await transport.publish([message(name) for name in names], timeout=30)
            held = {delivery.message.id: delivery for delivery in await take(transport, 5)}
            assert all(await transport.renew(list(held.values()), lease=60, starting=True))
            done = await transport.settle(
                [
                    settled(held["ack"]),
                    settled(held["dead"], Action.DEAD, cause="no"),
                    settled(held["back"], Action.REQUEUE),
                    settled(held["uncounted"], Action.REQUEUE, counted=False),
                    settled(held["delayed"], Action.REQUEUE, delay=0.3),
                ]
            )
            assert list(done) == [True] * 5
            again = {d.message.id: (d.count, d.starts) for d in await take(transport, 3)}
            assert again == {"back": (2, 1), "uncounted": (1, 0), "delayed": (2, 1)}
            assert ids(await take(transport, 1, "q.dead")) == ["dead"]

    asyncio.run(live())


def test_a_look_into_a_long_queue_keeps_its_order(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            names = [str(n) for n in range(300)]
            await transport.publish([message(name) for name in names], timeout=30)
            assert [m.id for m in await transport.peek("q", limit=3, offset=10)] == names[10:13]
            await transport.publish([message(f"due {n}", due=time.time() + 100 - n) for n in range(3)], timeout=20)
            assert await transport.purge("q") == 303
            await transport.publish([message(f"due {n}", due=time.time() + 100 - n) for n in range(3)], timeout=20)
            later = await transport.peek("q")
            assert [m.id for m in later] == ["due 2", "due 1", "due 0"]
            assert all(m.due is not None and 90 < m.due - time.time() < 101 for m in later)
            end = time.monotonic() + 30  # a quorum queue counts what goes back a moment later
            while (await transport.depth(["q"]))["q"].delayed != 3:
                assert time.monotonic() < end, "what was looked at did not come back"
                await asyncio.sleep(0.02)

    asyncio.run(live())


# --- delays -----------------------------------------------------------------------------------------


def test_a_delayed_message_for_an_exchange_goes_there(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            await transport.declare(
                [
                    QueueSpec(name="a", exchange="x", exchange_type="topic", routing_key="mail.*"),
                    QueueSpec(name="b", exchange="x", exchange_type="topic", routing_key="mail.#"),
                    QueueSpec(name="c", exchange="x", exchange_type="topic", routing_key="fax.#"),
                ]
            )
            due = time.time() + 0.4
            properties = {"exchange": "x", "routing_key": "mail.out", "delivery_mode": 2}
            await transport.publish([message(1, due=due, properties=properties)], timeout=30)
            for queue in ("a", "b"):
                (delivery,) = await take(transport, 1, queue)
                assert time.time() >= due
                assert delivery.message == message(1, queue, properties=properties)
            assert (await transport.depth(["c"]))["c"].ready == 0

    asyncio.run(live())


@pytest.mark.slow
def test_thousands_of_delayed_messages_survive_the_broker(make_rabbitmq: Callable[..., RabbitServer]) -> None:
    server, number, ahead = make_rabbitmq(), *((10_000, 20) if FULL else (2_000, 8))

    async def live() -> None:
        async with opened(server.url) as (producer,):
            due = time.time() + ahead
            names = [str(n) for n in range(number)]
            for at in range(0, number, 1000):
                await producer.publish([message(name, due=due) for name in names[at : at + 1000]], timeout=60)
            assert (await producer.depth(["q"]))["q"].delayed == number
        await asyncio.to_thread(server.sync)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        async with opened(server.url) as (consumer,):
            credit, seen = Credit(1000), Counter[str]()
            stream = consumer.consume(["q"], credit=credit, lease=60)
            async with asyncio.timeout(80), aclosing(cast("Any", stream)):
                while len(seen) < number:
                    batch = await anext(stream)
                    assert not batch or time.time() >= due, "handed out before its time"
                    seen.update(delivery.message.id for delivery in batch)
                    await consumer.settle([settled(delivery) for delivery in batch])
                    credit.give(len(batch))

    asyncio.run(live())


# --- Celery's queues, exchanges, addresses ----------------------------------------------------------


@pytest.mark.parametrize("first", ["celery", "umbel"])
def test_a_classic_queue_is_shared_with_celery(rabbitmq_url: str, first: str) -> None:
    program = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1])
app.send_task("shop.add", (2, 3), task_id="from-celery", priority=4, headers={"x-tenant": "acme"})
"""

    async def umbel() -> None:
        async with opened(rabbitmq_url) as (transport,):
            await transport.declare([QueueSpec(name="celery", type="classic")])

    def celery() -> None:
        subprocess.run([sys.executable, "-c", program, rabbitmq_url], check=True, timeout=60)

    for step in (celery, lambda: asyncio.run(umbel())) if first == "celery" else (lambda: asyncio.run(umbel()), celery):
        step()

    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            (delivery,) = await take(transport, 1, "celery")
            assert delivery.message.id == "from-celery"
            assert delivery.message.priority == 4
            assert delivery.message.headers["x-tenant"] == "acme"
            assert delivery.message.properties["correlation_id"] == "from-celery"
            assert "exchange" not in delivery.message.properties
            # As celery-php publishes: to the exchange of the queue's name.
            by_name = {"exchange": "celery", "routing_key": "celery", "delivery_mode": 2}
            await transport.publish([message("php", "elsewhere", properties=by_name)], timeout=30)
            assert ids(await take(transport, 1, "celery")) == ["php"]

    asyncio.run(live())


def test_a_queue_of_another_kind_is_used_where_nobody_asks_for_one(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, 2) as (classic, unaware):
            await classic.declare([QueueSpec(name="q", type="classic", max_priority=5)])
            await unaware.publish([message("low"), message("high", priority=5)], timeout=30)
            assert ids(await take(unaware, 2)) == ["high", "low"]

    asyncio.run(live())


def test_nothing_of_ours_is_seen_by_others(rabbitmq_url: str) -> None:
    """A delayed message, as another program finds it in its queue."""

    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            sent = message(1, due=time.time() + 1, properties={"delivery_mode": 2, "correlation_id": "1"})
            await transport.publish([sent], timeout=30)
            control = await transport._control()
            async with asyncio.timeout(10):
                while not (await transport.depth(["q"]))["q"].ready:  # noqa: ASYNC110  # asks anew each time
                    await asyncio.sleep(0.02)
            ((_, _, _, _, properties, body),) = await control.ask(Get(queue="q", no_ack=True))
            assert body == b"1"
            assert b"BCC" not in properties
            assert b"x-death" in properties, "then the codec has something to take off"

    asyncio.run(live())


@pytest.mark.parametrize(
    ("url", "hosts", "vhost", "user"),
    [
        ("amqp://", [("localhost", 5672)], "/", "guest"),
        ("amqps://u:p%40@h", [("h", 5671)], "/", "u"),
        ("amqp://u@h:1//", [("h", 1)], "/", "u"),
        ("amqp://u:p@h1:1,h2,[::1]:3/v%2Fx", [("h1", 1), ("h2", 5672), ("::1", 3)], "v/x", "u"),
        ("rpc://u:p@[::1]/v", [("::1", 5672)], "v", "u"),
    ],
)
def test_addresses(url: str, hosts: list[tuple[str, int]], vhost: str, user: str) -> None:
    address = address_of(url, TransportOptions())
    assert (list(address.hosts), address.vhost, address.user) == (hosts, vhost, user)
    assert "p%40" not in repr(address)
    assert "p@" not in repr(address)


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(SettingsError, match="h:port"):
        address_of("amqp://h:port,ok:70000", TransportOptions())


def test_a_message_for_an_unknown_exchange_names_it(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            lost = {"exchange": "nowhere", "routing_key": "k", "delivery_mode": 2}
            with pytest.raises(PublishRefused, match="no exchange 'nowhere'"):
                await transport.publish([message(1, properties=lost)], timeout=10)
            await transport.publish([message(2)], timeout=10)
            assert ids(await take(transport, 1)) == ["2"]

    asyncio.run(live())
