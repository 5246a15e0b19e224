"""The transport beside kombu's own, on one server: each reads, restores and settles what the other wrote."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue
from kombu.transport.redis import Channel
from servers.process import free_port
from servers.redis import RedisServer

from umbel.errors import BrokerUnavailable, PublishRefused, SettingsError
from umbel.model import HEADER_DEAD_CAUSE, Action, Delivery, Message, QueueSpec, Settlement
from umbel.ports.transport import Credit
from umbel_celery.options import TransportOptions
from umbel_celery.transport import CeleryRedisTransport

CORPUS = Path(__file__).parents[3] / "tests/wire/corpus"
Work = Callable[[CeleryRedisTransport], Coroutine[Any, Any, Any]]


def on(url: str, work: Work, **options: Any) -> Any:
    """Run ``work`` with a transport, and close it."""

    async def run() -> Any:
        transport = CeleryRedisTransport(f"celery+{url}", options=TransportOptions(**options))
        try:
            async with asyncio.timeout(20):
                return await work(transport)
        finally:
            await transport.close()

    return asyncio.run(run())


async def take(
    transport: CeleryRedisTransport, number: int = 1, *, queue: str = "q", lease: float = 60
) -> list[Delivery]:
    got: list[Delivery] = []
    stream = transport.consume([queue], credit=Credit(number), lease=lease)
    async for batch in stream:
        got += batch
        if len(got) >= number:
            break
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator
    return got


async def leave(transport: CeleryRedisTransport, *, lease: float = 60) -> None:
    """Take one message and forget about it, as a killed worker does."""
    await take(transport, lease=lease)


def send(url: str, *messages: Message, **options: Any) -> None:
    on(url, lambda transport: transport.publish(messages, timeout=5), **options)


def message(name: str = "1", **fields: Any) -> Message:
    return Message(**{"queue": "q", "headers": {"id": name, "task": "t"}, "body": b"[[], {}, {}]", **fields})


@pytest.fixture
def kombu(redis_url: str) -> Iterator[Connection]:
    with Connection(redis_url, transport_options={"visibility_timeout": 1}) as connection:
        yield connection


@pytest.fixture
def channel(kombu: Connection) -> Channel:
    channel: Channel = kombu.default_channel
    return channel


@pytest.fixture
def keys(redis_server: RedisServer, redis_url: str) -> Callable[[], set[str]]:
    database = int(redis_url.rpartition("/")[2])
    return lambda: {key.decode() for key in redis_server.command("KEYS", "*", database=database)}


# --- envelopes ------------------------------------------------------------------------------------


def entries(*files: str) -> list[Any]:
    found = [entry for file in files for entry in json.loads((CORPUS / file).read_text())]
    return [pytest.param(entry, id=entry["name"]) for entry in found if entry.get("envelope")]


@pytest.mark.parametrize("entry", entries("01-tasks-redis.json", "05-third-party.json"))
def test_a_captured_envelope_is_read(entry: dict[str, Any], redis_url: str, channel: Channel) -> None:
    channel.client.lpush(entry["redis_key"], json.dumps(entry["envelope"]))
    queue = entry["redis_key"].partition("\x06\x16")[0]
    (delivery,) = on(redis_url, lambda transport: take(transport, queue=queue))
    read = delivery.message
    assert read.body == base64.b64decode(entry["body_base64"])
    assert read.headers == (entry["headers"] or {})
    assert (read.queue, read.content_type) == (queue, entry["content_type"])
    assert read.priority == (entry["properties"].get("priority") or 0)
    assert read.properties.get("correlation_id") == entry["properties"].get("correlation_id")


@pytest.mark.parametrize(
    "raw", ["no json", "[]", '{"body": 1}', '{"body": "/", "properties": {"body_encoding": "base64"}}', "{}"]
)
def test_what_is_no_envelope_goes_to_the_dead_letters(raw: str, redis_url: str, channel: Channel) -> None:
    channel.client.lpush("q", raw)
    send(redis_url, message("good"))

    async def work(transport: CeleryRedisTransport) -> None:
        (delivery,) = await take(transport)
        assert delivery.message.id == "good"
        (letter,) = await transport.peek("q.dead")
        assert letter.body == raw.encode()
        assert letter.headers[HEADER_DEAD_CAUSE].startswith("unreadable: ")

    on(redis_url, work)


def test_messages_of_one_delivery_tag_are_both_kept(redis_url: str, channel: Channel) -> None:
    for body in ("a", "b"):
        channel.client.lpush("q", json.dumps({"body": body, "properties": {"delivery_tag": "same"}}))

    async def work(transport: CeleryRedisTransport) -> None:
        first, second = await take(transport, 2)
        assert channel.client.hlen("unacked") == 2
        ends = [Settlement(delivery=each, action=Action.ACK) for each in (first, second)]
        assert list(await transport.settle(ends)) == [True, True]

    on(redis_url, work)


# --- kombu beside us ------------------------------------------------------------------------------


def test_kombu_reads_what_is_published_here(redis_url: str, kombu: Connection) -> None:
    headers = {"id": "1", "task": "t", "blob": b"\xff", "n": 2**70}
    send(redis_url, message(headers=headers, priority=7, properties={"correlation_id": "c", "reply_to": "r"}))
    with kombu.SimpleQueue(Queue("q", Exchange("q"), "q")) as queue:
        got = queue.get(timeout=30)
        assert (got.headers, got.body, got.payload) == (headers, b"[[], {}, {}]", [[], {}, {}])
        assert (got.properties["correlation_id"], got.properties["reply_to"], got.properties["priority"]) == (
            "c",
            "r",
            7,
        )
        assert got.delivery_info == {"exchange": "", "routing_key": "q"}
        got.ack()


def test_what_kombu_publishes_is_read_here(redis_url: str, kombu: Connection) -> None:
    kombu.Producer().publish(
        {"a": 1}, routing_key="q", headers={"h": "ü", "blob": b"\xff"}, priority=3, correlation_id="c"
    )
    (delivery,) = on(redis_url, take)
    got = delivery.message
    assert (got.body, got.headers, got.priority) == (b'{"a": 1}', {"h": "ü", "blob": b"\xff"}, 3)
    assert got.properties["correlation_id"] == "c"
    assert "exchange" not in got.properties


def test_a_message_of_kombu_is_handed_out_at_once(redis_url: str, kombu: Connection) -> None:
    async def work(transport: CeleryRedisTransport) -> float:
        waiting = asyncio.ensure_future(take(transport, queue="other"))
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await asyncio.to_thread(kombu.Producer().publish, {}, routing_key="other")
        await waiting
        return time.monotonic() - begun

    assert on(redis_url, work, poll_interval=60) < 3


def test_kombu_restores_what_was_taken_here(redis_url: str, channel: Channel) -> None:
    """A worker of ours has died, and only Celery workers are left."""
    send(redis_url, message(), message("2"))
    on(redis_url, lambda transport: leave(transport, lease=4), visibility_timeout=1)
    channel.qos.restore_visible(interval=1)
    assert channel.client.llen("q") == 1
    time.sleep(4.1)
    channel.qos.restore_visible(interval=1)
    assert (channel.client.llen("q"), channel.client.hlen("unacked")) == (2, 0)
    got = [json.loads(channel.client.rpop("q")) for _ in range(2)]
    assert [envelope["headers"]["id"] for envelope in got] == ["1", "2"]
    assert got[0]["headers"]["redelivered"] is True


def test_a_late_worker_of_ours_is_fenced_off_from_what_celery_took_over(redis_url: str, kombu: Connection) -> None:
    send(redis_url, message())
    channel = kombu.default_channel

    async def work(transport: CeleryRedisTransport) -> None:
        (late,) = await take(transport, lease=0.5)
        await asyncio.sleep(1.1)
        channel.qos.restore_visible(interval=1)
        with kombu.SimpleQueue(Queue("q", Exchange("q"), "q")) as queue:
            got = queue.get(timeout=30)
            assert list(await transport.renew([late], lease=60)) == [False]
            assert list(await transport.settle([Settlement(delivery=late, action=Action.ACK)])) == [False]
            assert channel.client.hlen("unacked") == 1, "Celery's entry is gone"
            got.ack()
        waiting = asyncio.ensure_future(take(transport))
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not channel.client.hlen("_umbel.claims"), "records of what Celery has finished are kept"

    on(redis_url, work, visibility_timeout=1)


def test_what_a_celery_worker_took_is_restored_here(redis_url: str) -> None:
    """Direct, topic and anonymous: to every queue that the binding names, to the front, with its priority."""
    exchange = Exchange("topic.x", "topic")
    connection = Connection(redis_url)
    bound = [Queue(name, exchange, key) for name, key in (("a", "mail.#"), ("b", "mail.*"), ("c", "sms.*"))]
    for queue in bound:
        queue(connection.default_channel).declare()
    producer = connection.Producer()
    producer.publish({}, routing_key="q", priority=9, headers={"id": "plain"})
    simple = connection.SimpleQueue(Queue("q", Exchange("q"), "q"))
    simple.get(timeout=30)
    producer.publish({}, exchange=exchange, routing_key="mail.out", headers={"id": "topic"})
    from_a = connection.SimpleQueue(bound[0])
    from_a.get(timeout=30)
    connection.default_channel.client.delete("b")
    connection.default_channel.client.lpush(
        "a", json.dumps({"body": "", "headers": {"id": "younger"}, "properties": {}})
    )

    async def work(transport: CeleryRedisTransport) -> None:
        await asyncio.sleep(0.6)  # what restores the one restores the other too
        (plain,) = await take(transport)
        assert (plain.message.id, plain.message.priority, plain.count) == ("plain", 9, 2)
        assert "redelivered" not in plain.message.headers
        assert [each.message.id for each in await take(transport, 2, queue="a")] == ["topic", "younger"]
        (copy,) = await take(transport, queue="b")
        assert (copy.message.id, copy.message.properties["exchange"]) == ("topic", "topic.x")
        assert (await transport.depth(["c"]))["c"].ready == 0

    on(redis_url, work, visibility_timeout=0.5)
    for held in (simple, from_a):
        held.channel.qos._delivered.clear()  # it has died, so it gives nothing back
    connection.release()


def test_depth_counts_what_celery_workers_hold(redis_url: str, kombu: Connection) -> None:
    kombu.Producer().publish({}, routing_key="q")
    with kombu.SimpleQueue(Queue("q", Exchange("q"), "q")) as queue:
        held = queue.get(timeout=30)
        depth = on(redis_url, lambda transport: transport.depth(["q"]))["q"]
        assert (depth.ready, depth.leased) == (0, 1)
        held.ack()


def test_a_declared_queue_is_found_by_exchange(redis_url: str, channel: Channel) -> None:
    on(redis_url, lambda transport: transport.declare([QueueSpec(name="mail")]))
    for table in ("_kombu.binding.mail", "_kombu.binding_permanent.mail"):
        assert channel.client.smembers(table) == {b"mail\x06\x16\x06\x16mail"}
    channel.connection.client.Producer().publish({}, exchange="mail", routing_key="mail")
    assert len(on(redis_url, lambda transport: take(transport, queue="mail"))) == 1


# --- priorities, delays, broadcasts ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "lists"),
    [("same", {0: "q", 3: "q\x06\x163", 9: "q\x06\x169"}), ("inverted", {0: "q\x06\x169", 3: "q\x06\x166", 9: "q"})],
)
def test_where_a_priority_lies_and_what_is_served_first(
    how: str, lists: dict[int, str], redis_url: str, keys: Callable[[], set[str]]
) -> None:
    for priority, name in lists.items():
        before = keys()
        send(redis_url, message(str(priority), priority=priority), priority=how)
        assert keys() - before - {"_umbel.queues"} == {name}
    got = on(redis_url, lambda transport: take(transport, 3), priority=how)
    assert [(each.message.id, each.message.priority) for each in got] == [("9", 9), ("3", 3), ("0", 0)]


def test_an_inverted_priority_is_served_in_the_same_order_by_kombu(redis_url: str, kombu: Connection) -> None:
    send(redis_url, *(message(str(each), priority=each) for each in (0, 9, 4)), priority="inverted")
    with kombu.SimpleQueue(Queue("q", Exchange("q"), "q")) as queue:
        got = [queue.get(timeout=30) for _ in range(3)]
        assert [each.headers["id"] for each in got] == ["9", "4", "0"]
        for each in got:
            each.ack()


def test_a_delayed_message_lies_in_no_list_unless_only_celery_consumes(redis_url: str, channel: Channel) -> None:
    due = time.time() + 3600
    send(redis_url, message(due=due), message(queue="theirs", due=due), eta_queues=("theirs",))
    assert (channel.client.llen("q"), channel.client.llen("theirs")) == (0, 1)
    assert channel.client.zcard("_umbel.delayed.q") == 1
    (waiting,) = on(redis_url, lambda transport: transport.peek("q"))
    assert waiting.due == pytest.approx(due)


def test_broadcasts_are_celerys_fanout(redis_url: str, kombu: Connection) -> None:
    exchange = Exchange("kit.x", "fanout", durable=False)

    async def work(transport: CeleryRedisTransport) -> None:
        stream = transport.subscribe("kit.x")
        hearing = asyncio.ensure_future(anext(stream))
        producer = kombu.Producer()
        while not hearing.done():
            await asyncio.to_thread(
                partial(producer.publish, {"method": "ping"}, exchange=exchange, routing_key="a.b", declare=[exchange])
            )
            await asyncio.wait([hearing], timeout=0.05)
        assert await hearing == ("a.b", b'{"method": "ping"}')
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
        queue = Queue("kit.q", exchange, "#", durable=False)
        said: list[Any] = []
        with kombu.Consumer(queue, callbacks=[lambda body, each: said.append(body)], no_ack=True):
            while not said:
                await transport.broadcast("kit.x", b'{"ok": 1}', key="c")
                with contextlib.suppress(TimeoutError):
                    await asyncio.to_thread(kombu.drain_events, timeout=0.1)
        assert said[0] == {"ok": 1}

    on(redis_url, work)


# --- refusals -------------------------------------------------------------------------------------


def test_a_wrong_password_is_told_at_once(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis(password="open sesame")
    url = server.url.replace("open%20sesame", "guess").replace("open sesame", "guess")
    assert "guess" in url
    with pytest.raises(PublishRefused, match="password") as refused:
        send(url, message())
    assert "guess" not in str(refused.value)


def test_tls(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis(tls=True)
    ca = str(server.certificates.ca)
    send(server.tls_url, message(), ssl_ca_certs=ca)
    assert len(on(server.tls_url, take, ssl_ca_certs=ca)) == 1
    with pytest.raises(BrokerUnavailable, match="certificate"):
        send(server.tls_url, message())


def test_a_cluster_is_refused_by_name(make_redis: Callable[..., RedisServer]) -> None:
    node = make_redis("cluster-enabled yes", f"cluster-port {free_port()}")
    with pytest.raises(PublishRefused, match="Redis Cluster"):
        send(node.url, message())


def test_nobody_there(redis_url: str) -> None:
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
        send("redis://127.0.0.1:1/0", message())
    with pytest.raises(SettingsError, match="celery\\+redis"):
        CeleryRedisTransport("redis://localhost/0")


def test_a_full_server_refuses_and_says_so(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis("maxmemory 3mb", "maxmemory-policy noeviction")
    with pytest.raises(PublishRefused, match="maxmemory"):
        send(server.url, *(message(str(n), body=bytes(500_000)) for n in range(12)))
    assert int(server.command("DBSIZE")) == 0, "half of a refused publish is there"


@pytest.mark.parametrize("wrong", [{"priority": "high"}, {"priority_steps": (3, 6)}, {"visibility_timeout": 0}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransportOptions(**wrong)
