"""What goes wrong between us and RabbitMQ: every fault is noticed, named, and got over; nothing is lost by it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, cast

import pytest
from servers.process import free_port
from servers.proxy import CLIENT, SERVER, Proxy
from servers.rabbitmq import RabbitServer

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement
from umbel.ports.transport import Credit
from umbel_amqp.frames import QueueDelete
from umbel_amqp.options import TransportOptions
from umbel_amqp.transport import AmqpTransport

MakeProxy = Callable[[int], Proxy]
MakeRabbit = Callable[..., RabbitServer]

QUICK = TransportOptions(heartbeat=1.0, connect_timeout=2.0, timeout=3.0)


def message(name: object, queue: str = "q", **fields: Any) -> Message:
    fields.setdefault("body", str(name).encode())
    return Message(queue=queue, headers={"id": str(name), "task": "t"}, **fields)


def ack(delivery: Delivery) -> Settlement:
    return Settlement(delivery=delivery, action=Action.ACK)


@asynccontextmanager
async def opened(*urls: str, options: TransportOptions | None = None) -> AsyncIterator[list[AmqpTransport]]:
    async with AsyncExitStack() as stack:
        transports = [AmqpTransport(url, options=options) for url in urls]
        for transport in transports:
            stack.push_async_callback(transport.close)
        yield transports


async def take(transport: AmqpTransport, number: int, queue: str = "q", seconds: float = 40.0) -> list[Delivery]:
    got: list[Delivery] = []
    stream = transport.consume([queue], credit=Credit(number), lease=60)
    async with asyncio.timeout(seconds), aclosing(cast("Any", stream)):
        while len(got) < number:
            got += await anext(stream)
    return got


async def until(condition: Callable[[], object], what: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


# --- the broker is not there, or does not want us ---------------------------------------------------


def test_without_a_broker_a_publish_ends_with_its_deadline() -> None:
    async def live() -> None:
        async with opened(f"amqp://127.0.0.1:{free_port()}") as (transport,):
            begun = time.monotonic()
            with pytest.raises(BrokerUnavailable, match="cannot be reached"):
                await transport.publish([message(1)], timeout=1.0)
            assert time.monotonic() - begun < 4.0

    asyncio.run(live())


@pytest.mark.parametrize(
    ("mangle", "named"),
    [
        (lambda url: url.replace("guest:guest@", "guest:wrong@"), "user 'guest'.*password"),
        (lambda url: url.rsplit("/", 1)[0] + "/nowhere", "no vhost 'nowhere'"),
    ],
)
def test_what_the_broker_does_not_accept_is_named_at_once(
    rabbitmq_url: str, mangle: Callable[[str], str], named: str
) -> None:
    async def live() -> None:
        async with opened(mangle(rabbitmq_url)) as (transport,):
            begun = time.monotonic()
            with pytest.raises(PublishRefused, match=named) as refused:
                await transport.publish([message(1)], timeout=20.0)
            assert time.monotonic() - begun < 15.0
            assert "wrong" not in str(refused.value), "the password is in the error"

    asyncio.run(live())


def test_the_next_host_is_tried_when_one_does_not_answer(rabbitmq: RabbitServer, make_proxy: MakeProxy) -> None:
    vhost = rabbitmq.vhost()
    path = vhost.rsplit("/", 1)[1]
    proxy = make_proxy(rabbitmq.port)
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{proxy.port}"

    async def live() -> None:
        options = TransportOptions(hosts=(f"127.0.0.1:{rabbitmq.port}",))
        async with opened(f"amqp://guest:guest@{hosts}/{path}", options=options) as (transport,):
            await transport.publish([message(1)], timeout=30)
            assert proxy.accepted == 1
            proxy.refuse()
            proxy.reset()
            await until(lambda: transport._out.live is None, "the reset noticed")
            await transport.publish([message(2)], timeout=30)
            assert [d.message.id for d in await take(transport, 2)] == ["1", "2"]

    try:
        asyncio.run(live())
    finally:
        rabbitmq.delete_vhost(vhost)


def test_tls_checks_the_certificate_and_names_the_setting(make_rabbitmq: MakeRabbit) -> None:
    server = make_rabbitmq(tls=True)
    assert server.certificates is not None
    ca = str(server.certificates.ca)

    async def live() -> None:
        async with opened(server.tls_url) as (distrustful,):
            with pytest.raises(PublishRefused, match="ssl_ca_certs"):
                await distrustful.publish([message(1)], timeout=5)
        async with opened(server.tls_url, options=TransportOptions(ssl_ca_certs=ca)) as (transport,):
            await transport.publish([message(1, body=b"x" * 300_000)], timeout=30)
            (delivery,) = await take(transport, 1)
            assert len(delivery.message.body) == 300_000
        async with opened(server.tls_url, options=TransportOptions(ssl_cert_reqs="none")) as (trusting,):
            await trusting.publish([message(2)], timeout=30)
        with pytest.raises(PublishRefused, match="ssl_ca_certs"):
            async with opened(server.tls_url, options=TransportOptions(ssl_ca_certs="/none.pem")) as (broken,):
                await broken.publish([message(1)], timeout=5)

    asyncio.run(live())


# --- the connection fails ---------------------------------------------------------------------------


async def _work(transport: AmqpTransport, seen: Counter[str], faults: list[BrokerUnavailable]) -> None:
    """A worker as the kernel builds it: one session after another."""
    while True:
        credit = Credit(20)
        stream = transport.consume(["q"], credit=credit, lease=60)
        try:
            async with aclosing(cast("Any", stream)):
                async for batch in stream:
                    seen.update(delivery.message.id for delivery in batch)
                    await transport.settle([ack(delivery) for delivery in batch])
                    credit.give(len(batch))
        except BrokerUnavailable as fault:
            faults.append(fault)
            await asyncio.sleep(0.05)


async def _send_all(
    transport: AmqpTransport, names: Sequence[str], pause: float, faults: list[BrokerUnavailable]
) -> None:
    """A producer that tries again until the broker has said yes to each."""
    end = time.monotonic() + 90
    for name in names:
        while True:
            assert time.monotonic() < end, f"message {name} is never accepted: {faults[-1]}"
            try:
                await transport.publish([message(name)], timeout=3.0)
                break
            except BrokerUnavailable as fault:
                faults.append(fault)
                await asyncio.sleep(0.05)
        await asyncio.sleep(pause)


def _reset(proxy: Proxy) -> None:
    proxy.reset()


def _cut(proxy: Proxy) -> None:
    proxy.cut(after=150, to=CLIENT)


def _cut_ours(proxy: Proxy) -> None:
    proxy.cut(after=150, to=SERVER)


def _half_open(proxy: Proxy) -> None:
    proxy.half_open(keeps=CLIENT)


def _dead_client(proxy: Proxy) -> None:
    proxy.half_open(keeps=SERVER)


@pytest.mark.parametrize("fault", [_reset, _cut, _cut_ours, _half_open, _dead_client])
def test_nothing_is_lost_by_faults_of_the_network(
    rabbitmq_url: str, rabbitmq: RabbitServer, make_proxy: MakeProxy, fault: Callable[[Proxy], None]
) -> None:
    proxy = make_proxy(rabbitmq.port)
    names = [str(n) for n in range(300)]

    async def live() -> None:
        seen: Counter[str] = Counter()
        faults: list[BrokerUnavailable] = []
        async with opened(*[proxy.through(rabbitmq_url)] * 2, options=QUICK) as (producer, consumer):
            working = asyncio.ensure_future(_work(consumer, seen, faults))
            sending = asyncio.ensure_future(_send_all(producer, names, 0.002, faults))
            for _ in range(4):
                await asyncio.sleep(0.15)
                await asyncio.to_thread(fault, proxy)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(proxy.heal)
            await sending
            await until(lambda: set(seen) == set(names), "every accepted message handed out")
            working.cancel()
            await asyncio.wait([working])
            assert faults, "no fault was noticed: the test tested nothing"
            await until(lambda: proxy.live <= 4, "the end of the connections that were given up", 5)

    asyncio.run(live())


def test_a_black_hole_is_noticed_within_the_heartbeat(
    rabbitmq_url: str, rabbitmq: RabbitServer, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(rabbitmq.port)

    async def live() -> None:
        async with opened(proxy.through(rabbitmq_url), options=QUICK) as (transport,):
            await transport.publish([message(1)], timeout=30)
            (held,) = await take(transport, 1)
            stream = transport.consume(["q"], credit=Credit(5), lease=60)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(2.5)
            assert not waiting.done(), "what is quiet is not dead"
            begun = time.monotonic()
            proxy.stall()
            with pytest.raises(BrokerUnavailable, match="silent"):
                await waiting
            assert time.monotonic() - begun < 8.0
            assert list(await transport.settle([ack(held)])) == [False]
            proxy.heal()
            assert [d.message.id for d in await take(transport, 1)] == ["1"]

    asyncio.run(live())


def test_what_is_settled_after_the_broker_gave_us_up_is_fenced_off(rabbitmq_url: str) -> None:
    """As if this process had been stopped for longer than the heartbeat: its clock has gone on, it has read nothing."""

    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url, options=QUICK) as (sleeper, other):
            await sleeper.publish([message(1), message(2)], timeout=30)
            held = await take(sleeper, 2)
            time.sleep(3.5)  # noqa: ASYNC251  # nothing of this process is to run
            assert list(await sleeper.settle([ack(held[0])])) == [False]
            assert list(await sleeper.renew([held[1]], lease=60)) == [False]
            again = await take(other, 2)
            assert [(d.message.id, d.count) for d in again] == [("1", 2), ("2", 2)]

    asyncio.run(live())


# --- the broker fails -------------------------------------------------------------------------------


def test_nothing_is_lost_by_a_broker_that_is_killed_and_restarted(make_rabbitmq: MakeRabbit) -> None:
    server = make_rabbitmq()
    names = [str(n) for n in range(300)]

    async def live() -> None:
        seen: Counter[str] = Counter()
        faults: list[BrokerUnavailable] = []
        async with opened(server.url, server.url, options=QUICK) as (producer, consumer):
            await producer.publish(
                [message(f"later {n}", due=time.time() + 1 + n / 50) for n in range(100)], timeout=20
            )
            working = asyncio.ensure_future(_work(consumer, seen, faults))
            sending = asyncio.ensure_future(_send_all(producer, names, 0.01, faults))
            await asyncio.sleep(1)
            await asyncio.to_thread(server.sync)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await sending
            expected = {*names, *(f"later {n}" for n in range(100))}
            await until(lambda: set(seen) == expected, f"all of {len(expected)} messages", 80)
            working.cancel()
            await asyncio.wait([working])

    asyncio.run(live())


def test_an_alarm_stops_publishing_and_nothing_else(make_rabbitmq: MakeRabbit) -> None:
    server = make_rabbitmq()

    async def live() -> None:
        async with opened(server.url, options=QUICK) as (transport,):
            await transport.publish([message(n) for n in range(3)], timeout=30)
            held = await take(transport, 1)
            await asyncio.to_thread(server.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.00001)")
            begun = time.monotonic()
            with pytest.raises(BrokerUnavailable, match=r"low on memory.*alarm"):
                await transport.publish([message(9)], timeout=1.5)
            assert time.monotonic() - begun < 8.0
            with pytest.raises(BrokerUnavailable, match="low on memory"):
                await transport.broadcast("topic", b"x")
            assert list(await transport.settle([ack(held[0])])) == [True]
            assert [d.message.id for d in await take(transport, 2)] == ["1", "2"]
            assert (await transport.depth(["q"]))["q"].ready == 0
            sending = asyncio.ensure_future(transport.publish([message("after")], timeout=30))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.4)")
            await sending

    asyncio.run(live())


def test_a_queue_that_was_deleted_is_made_again(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url) as (transport, other):
            await transport.publish([message(1)], timeout=30)
            await (await other._control()).ask(QueueDelete(queue="q"))
            await transport.publish([message(2), message(3)], timeout=30)
            assert [d.message.id for d in await take(other, 2)] == ["2", "3"]

    asyncio.run(live())


def test_a_consumer_hears_that_its_queue_was_deleted(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url) as (transport, other):
            stream = transport.consume(["q"], credit=Credit(5), lease=60)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.3)
            await (await other._control()).ask(QueueDelete(queue="q"))
            with pytest.raises(BrokerUnavailable, match="deleted"):
                await waiting

    asyncio.run(live())


# --- the broker refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (QueueSpec(name="q"), QueueSpec(name="q", type="classic"), r"queue 'q'.*x-queue-type.*type to what"),
        (
            QueueSpec(name="q", type="classic"),
            QueueSpec(name="q", type="classic", max_priority=5),
            r"x-max-priority: .*'5'.* none.*max_priority",
        ),
        (QueueSpec(name="q"), QueueSpec(name="q", arguments={"x-max-length": 7}), r"arguments\.x-max-length"),
        (
            QueueSpec(name="q", exchange="e"),
            QueueSpec(name="q", exchange="e", exchange_type="topic"),
            r"queue 'q'.*exchange_type",
        ),
        (QueueSpec(name="q"), QueueSpec(name="q", type="stream"), "quorum or classic"),
        (QueueSpec(name="q"), QueueSpec(name="q", max_priority=5), 'type = "classic"'),
    ],
)
def test_a_refused_declaration_says_which_setting_differs(
    rabbitmq_url: str, first: QueueSpec, then: QueueSpec, told: str
) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            await transport.declare([first])
            held = asyncio.ensure_future(take(transport, 1))
            with pytest.raises(PublishRefused, match=told):
                await transport.declare([then])
            await transport.publish([message(1)], timeout=5)
            assert list(await transport.settle([ack(d) for d in await held])) == [True], "the session has survived"

    asyncio.run(live())


def test_a_message_that_the_server_finds_too_large_is_refused_alone(make_rabbitmq: MakeRabbit) -> None:
    server = make_rabbitmq(max_message_size=100)

    async def live() -> None:
        async with opened(server.url) as (transport,):
            with pytest.raises(PublishRefused, match="max_message_size"):
                await transport.publish([message("large", body=b"x" * 101)], timeout=5)
            await transport.publish([message("small")], timeout=5)
            assert [d.message.id for d in await take(transport, 1)] == ["small"]

    asyncio.run(live())


def test_a_full_queue_is_unavailable_until_there_is_room(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (transport,):
            limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
            await transport.declare([QueueSpec(name="q", type="classic", arguments=limits)])
            with pytest.raises(BrokerUnavailable, match="queue 'q': the queue does not take it"):
                await transport.publish([message(n) for n in range(20)], timeout=1)
            publishing = asyncio.ensure_future(transport.publish([message("late")], timeout=60))
            await asyncio.sleep(0.3)
            assert not publishing.done()
            await transport.purge("q")
            await publishing
            assert [d.message.id for d in await take(transport, 1)] == ["late"]

    asyncio.run(live())


# --- the end of a channel -----------------------------------------------------------------------------


def test_what_is_acknowledged_just_before_the_end_stays_so(rabbitmq_url: str) -> None:
    """A quorum queue lets a channel keep back what is more than it can take at once: a hundred frames are."""

    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url) as (transport, other):
            await transport.publish([message(n) for n in range(400)], timeout=30)
            taken = await take(transport, 400)
            assert all(await transport.settle([ack(delivery) for delivery in taken[1::2]]))  # a frame for each
            await transport.close()
            again = await take(other, 200)
            assert {delivery.message.id for delivery in again} == {delivery.message.id for delivery in taken[::2]}

    asyncio.run(live())


# --- the consumer timeout ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_task_outlives_the_consumer_timeout(make_rabbitmq: MakeRabbit) -> None:
    server = make_rabbitmq(consumer_timeout=2000)
    server.eval("application:set_env(rabbit, channel_tick_interval, 300)")

    async def live(kind: str) -> None:
        options = TransportOptions(queue_type=kind, consumer_timeout=2.0)
        async with opened(server.url, server.url, options=options) as (transport, other):
            await transport.publish([message("long", kind), message("lost", kind)], timeout=30)
            (long,) = await take(transport, 1, kind)
            (lost,) = await take(other, 1, kind)
            sessions = transport._in.live, other._in.live
            await asyncio.sleep(6)
            assert sessions == (transport._in.live, other._in.live), "a session was lost"
            assert list(await transport.settle([ack(long)])) == [True]
            await other.close()  # a worker that dies after a long time: what was parked goes back
            (again,) = await take(transport, 1, kind)
            assert (again.message, again.count, again.starts) == (lost.message, 2, 0)
            assert await transport.settle([ack(again)]) == [True]
            assert (await transport.depth([kind]))[kind].ready == 0

    async def both() -> None:
        await asyncio.gather(live("quorum"), live("classic"))

    asyncio.run(both())
