"""The laws of the transport port, in the official test double."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest

import umbel_memory
from umbel.errors import BrokerUnavailable, PublishRefused
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement, evolve
from umbel.ports.clock import VirtualClock
from umbel.ports.transport import Credit
from umbel_memory import transport as transport_module
from umbel_memory.transport import MemoryTransport

DAY = 86_400.0


QUIET = transport_module.QUIET


@pytest.fixture(autouse=True)
def no_rescue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that misses its wake-up must not be saved by the next empty batch."""
    monkeypatch.setattr(transport_module, "QUIET", 3600.0)


class Bench:
    """One broker of its own, one virtual clock, and as many instances as a test asks for."""

    def __init__(self) -> None:
        self.url = f"memory://{uuid.uuid4().hex}"
        self.clock = VirtualClock()
        self.made: list[MemoryTransport] = []

    def transport(self) -> MemoryTransport:
        self.made.append(MemoryTransport(self.url, clock=self.clock))
        return self.made[-1]


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        bench = Bench()
        try:
            async with asyncio.timeout(20):
                await test(bench)
        finally:
            for transport in bench.made:
                await transport.close()

    asyncio.run(main())


def message(name: str, queue: str = "q", **fields: Any) -> Message:
    return Message(queue=queue, headers={"id": name, "task": "t"}, body=name.encode(), **fields)


async def publish(transport: MemoryTransport, *messages: Message) -> None:
    await transport.publish(messages, timeout=5)


async def take(transport: MemoryTransport, *queues: str, limit: int = 100, lease: float = 60) -> Sequence[Delivery]:
    """The first batch, which may be empty only after a quiet time."""
    async with aclosing(transport.consume(queues or ("q",), credit=Credit(limit), lease=lease)) as batches:
        return await anext(batches)


async def take_none(transport: MemoryTransport, monkeypatch: pytest.MonkeyPatch, *queues: str) -> None:
    monkeypatch.setattr(transport_module, "QUIET", 0.0)
    assert ids(await take(transport, *queues)) == []


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


def settled(delivery: Delivery, action: Action = Action.ACK, **fields: Any) -> Settlement:
    return Settlement(delivery=delivery, action=action, **fields)


def test_capabilities_are_those_of_a_full_double() -> None:
    declared = MemoryTransport.capabilities
    assert (declared.durable, declared.confirm, declared.broadcast) == (False, True, True)
    assert (declared.renewable_lease, declared.delivery_count, declared.start_marks) == (True, True, True)
    assert (declared.max_delay, declared.priority_levels) == (float("inf"), 10)


def test_a_message_arrives_as_it_was_sent_and_is_gone_when_acknowledged() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        sent = Message(
            queue="q",
            headers={"id": "1", "task": "t", "unknown": [1, {"deep": b"x"}]},
            body=b"\x00body",
            content_type="application/x-y",
            content_encoding="binary",
            priority=3,
            properties={"correlation_id": "c"},
        )
        await publish(transport, sent)
        (delivery,) = await take(transport)
        assert delivery.message == sent
        assert (delivery.queue, delivery.count, delivery.starts) == ("q", 1, 0)
        assert delivery.leased_until == bench.clock.time() + 60
        assert await transport.settle([settled(delivery)]) == [True]
        assert await transport.settle([settled(delivery)]) == [False]
        depth = (await transport.depth())["q"]
        assert (depth.ready, depth.delayed, depth.leased, depth.oldest) == (0, 0, 0, None)

    run(test)


def test_sender_and_receivers_share_no_dictionary() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        headers: dict[str, Any] = {"id": "1", "list": [1]}
        await publish(transport, Message(queue="q", headers=headers))
        headers["list"].append(2)
        (first,) = await take(transport)
        first.message.headers["list"].append(3)
        await transport.settle([settled(first, Action.REQUEUE)])
        (second,) = await take(transport)
        assert second.message.headers == {"id": "1", "list": [1]}

    run(test)


def test_what_no_wire_carries_is_refused_and_nothing_of_the_batch_is_accepted() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        with pytest.raises(PublishRefused, match="plain data"):
            await publish(transport, message("1"), Message(queue="q", headers={"id": "2", "x": object()}))
        assert (await transport.depth(["q"]))["q"].ready == 0

    run(test)


def test_higher_priority_first_then_oldest_over_all_queues() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        for priority in (0, 9, 4):
            for queue in ("a", "b"):
                await publish(transport, message(f"{queue}{priority}", queue, priority=priority))
        for level in range(10):
            await publish(transport, message(f"c{level}", "c", priority=level))
        assert ids(await take(transport, "a", "b")) == ["a9", "b9", "a4", "b4", "a0", "b0"]
        assert ids(await take(transport, "c")) == [f"c{level}" for level in reversed(range(10))]

    run(test)


def test_credit_bounds_what_is_out_and_settling_lets_more_through(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, *(message(str(n)) for n in range(5)))
        credit = Credit(2)
        async with aclosing(transport.consume(["q"], credit=credit, lease=60)) as batches:
            first = await anext(batches)
            assert (ids(first), credit.out) == (["0", "1"], 2)
            waiting = asyncio.ensure_future(anext(batches))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            await transport.settle([settled(first[0])])
            credit.give(1)
            assert ids(await waiting) == ["2"]
            credit.resize(4)
            assert ids(await anext(batches)) == ["3", "4"]
            monkeypatch.setattr(transport_module, "QUIET", 0.01)
            assert await anext(batches) == []

    run(test)


def test_competing_consumers_never_share_a_message() -> None:
    async def test(bench: Bench) -> None:
        sender, seen = bench.transport(), []
        total = 200

        async def consume(transport: MemoryTransport) -> None:
            credit = Credit(3)
            async for batch in transport.consume(["q"], credit=credit, lease=60):
                seen.extend(ids(batch))
                await transport.settle([settled(delivery) for delivery in batch])
                credit.give(len(batch))
                if len(seen) == total:
                    return

        consumers = [asyncio.ensure_future(consume(bench.transport())) for _ in range(3)]
        await publish(sender, *(message(str(n)) for n in range(total)))
        await asyncio.wait(consumers, return_when=asyncio.FIRST_COMPLETED)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        assert sorted(map(int, seen)) == list(range(total))

    run(test)


def test_an_ended_lease_passes_to_another_and_fences_the_first_off() -> None:
    async def test(bench: Bench) -> None:
        slow, quick = bench.transport(), bench.transport()
        await publish(slow, message("1"))
        (old,) = await take(slow, lease=10)
        waiting = asyncio.ensure_future(take(quick, lease=10))
        await asyncio.sleep(0)
        bench.clock.advance(9.9)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        bench.clock.advance(0.2)
        (new,) = await waiting
        assert (new.count, new.message) == (2, old.message)
        assert await slow.renew([old], lease=10) == [False]
        assert await slow.settle([settled(old)]) == [False]
        assert await quick.renew([new], lease=10) == [True]
        assert await quick.settle([settled(new)]) == [True]

    run(test)


def test_an_ended_lease_that_nobody_took_can_still_be_settled_or_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, message("1"), message("2"))
        first, second = await take(transport, lease=10)
        bench.clock.advance(11)
        assert (await transport.depth(["q"]))["q"].ready == 2
        assert await transport.settle([settled(first)]) == [True]
        assert await transport.renew([second], lease=10) == [True]
        await take_none(transport, monkeypatch)

    run(test)


def test_renewal_moves_the_end_of_the_lease_and_counts_starts() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, message("1"))
        (delivery,) = await take(transport, lease=10)
        bench.clock.advance(9)
        assert await transport.renew([delivery], lease=10, starting=True) == [True]
        bench.clock.advance(9)
        assert (await transport.depth(["q"]))["q"].leased == 1
        bench.clock.advance(2)
        (again,) = await take(transport)
        assert (again.count, again.starts) == (2, 1)

    run(test)


@pytest.mark.parametrize(("counted", "count"), [(True, 2), (False, 1)])
def test_requeue_goes_to_the_front_among_equals(counted: bool, count: int) -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, *(message(str(n)) for n in range(4)))
        batch = await take(transport, limit=2)
        await transport.settle([settled(d, Action.REQUEUE, counted=counted) for d in batch])
        again = await take(transport)
        assert ids(again) == ["0", "1", "2", "3"]
        assert [d.count for d in again] == [count, count, 1, 1]
        assert await transport.settle([settled(batch[0])]) == [False]

    run(test)


def test_requeue_with_delay_waits_and_comes_back_to_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, message("1"))
        (delivery,) = await take(transport)
        await transport.settle([settled(delivery, Action.REQUEUE, delay=30)])
        await publish(transport, message("2"))
        depth = (await transport.depth(["q"]))["q"]
        assert (depth.ready, depth.delayed, depth.leased) == (1, 1, 0)
        bench.clock.advance(30)
        assert ids(await take(transport)) == ["1", "2"]
        await take_none(transport, monkeypatch)

    run(test)


def test_dead_letters_carry_their_cause_and_can_be_consumed() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, message("1", priority=5))
        (first,) = await take(transport)
        await transport.settle([settled(first, Action.REQUEUE)])
        (delivery,) = await take(transport)
        bench.clock.advance(5)
        waiting = asyncio.ensure_future(take(transport, "q.dead"))
        await asyncio.sleep(0)
        assert await transport.settle([settled(delivery, Action.DEAD, cause="ValueError: no")]) == [True]
        (dead,) = await waiting
        assert dead.message.headers == {
            "id": "1",
            "task": "t",
            "umbel-dead-cause": "ValueError: no",
            "umbel-dead-queue": "q",
            "umbel-dead-at": bench.clock.time(),
            "umbel-dead-count": 2,
        }
        assert (dead.message.queue, dead.message.priority, dead.message.body) == ("q.dead", 5, b"1")
        assert (dead.queue, dead.count) == ("q.dead", 1)
        assert (await transport.depth(["q"]))["q"].leased == 0

    run(test)


def test_a_month_of_delays_in_due_order_on_the_virtual_clock() -> None:
    async def test(bench: Bench) -> None:
        sender, receiver = bench.transport(), bench.transport()
        start, seen = bench.clock.time(), []
        await publish(sender, *(message(str(day), due=start + day * DAY) for day in range(30, 0, -1)))

        async def receive() -> None:
            async for batch in receiver.consume(["q"], credit=Credit(1000), lease=60):
                for delivery in batch:
                    assert delivery.message.due is not None
                    assert bench.clock.time() >= delivery.message.due
                    seen.append((delivery.message.id, (bench.clock.time() - start) / DAY))
                await receiver.settle([settled(delivery) for delivery in batch])
                if len(seen) == 30:
                    return

        receiving = asyncio.ensure_future(receive())
        while not receiving.done():
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            bench.clock.advance(DAY / 4)
        assert [name for name, _ in seen] == [str(day) for day in range(1, 31)]

    run(test)


def test_a_step_of_the_clock_in_another_thread_wakes_a_consumer() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, message("1", due=bench.clock.time() + DAY))
        waiting = asyncio.ensure_future(take(transport))
        await asyncio.sleep(0.01)
        stepping = threading.Thread(target=bench.clock.advance, args=(DAY,))
        stepping.start()
        assert ids(await waiting) == ["1"]
        stepping.join(30)

    run(test)


def test_the_system_clock_wakes_for_due_times_and_for_leases_of_others() -> None:
    async def main() -> None:
        url = f"memory://{uuid.uuid4().hex}"
        one, other = MemoryTransport(url), MemoryTransport(url)
        await publish(one, message("1", due=time.time() + 0.05))
        waiting = asyncio.ensure_future(take(other, lease=0.05))
        async with asyncio.timeout(3):
            assert ids(await waiting) == ["1"]
            assert [d.count for d in await take(one, lease=60)] == [2]
        await one.close()
        await other.close()

    asyncio.run(main())


def test_a_shorter_lease_of_another_wakes_a_sleeping_consumer_in_time() -> None:
    async def main() -> None:
        url = f"memory://{uuid.uuid4().hex}"
        one, other = MemoryTransport(url), MemoryTransport(url)
        await publish(one, message("far", due=time.time() + 3600), message("now"))
        (delivery,) = await take(one, lease=3600)
        waiting = asyncio.ensure_future(take(other))
        await asyncio.sleep(0.01)
        await one.renew([delivery], lease=0.05)
        async with asyncio.timeout(3):
            assert ids(await waiting) == ["now"]
        await one.close()
        await other.close()

    asyncio.run(main())


def test_instances_in_different_loops_and_threads_share_one_broker() -> None:
    url, total = f"memory://{uuid.uuid4().hex}", 500
    seen: list[str] = []

    async def worker() -> None:
        transport, credit = MemoryTransport(url), Credit(7)
        async for batch in transport.consume(["q"], credit=credit, lease=60):
            seen.extend(ids(batch))
            await transport.settle([settled(delivery) for delivery in batch])
            credit.give(len(batch))
            if len(seen) == total:
                break
        await transport.close()

    async def client() -> None:
        transport = MemoryTransport(url)
        for n in range(total):
            await publish(transport, message(str(n)))
        await transport.close()

    working = threading.Thread(target=lambda: asyncio.run(worker()), daemon=True)
    working.start()
    asyncio.run(client())
    working.join(10)
    assert seen == [str(n) for n in range(total)]


def test_an_instance_is_bound_to_one_loop_and_says_so() -> None:
    transport = MemoryTransport(f"memory://{uuid.uuid4().hex}")
    asyncio.run(publish(transport, message("1")))
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(publish(transport, message("2")))
    asyncio.run(transport.close())


def test_names_share_and_separate() -> None:
    async def main() -> None:
        name = uuid.uuid4().hex
        await publish(MemoryTransport(f"memory://{name}?x=1"), message("1"))
        assert (await MemoryTransport(f"memory://{name}").depth(["q"]))["q"].ready == 1
        assert (await MemoryTransport(f"memory://{name}2").depth(["q"]))["q"].ready == 0
        umbel_memory.forget_all()
        assert (await MemoryTransport(f"memory://{name}").depth(["q"]))["q"].ready == 0

    asyncio.run(main())


def test_quiet_consumers_yield_empty_batches_with_and_without_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert QUIET < 5
    monkeypatch.setattr(transport_module, "QUIET", 0.01)

    async def test(bench: Bench) -> None:
        transport = bench.transport()
        for credit in (Credit(1), Credit(0)):
            async with aclosing(transport.consume(["q"], credit=credit, lease=60)) as batches:
                assert [await anext(batches) for _ in range(2)] == [[], []]

    run(test)


def test_purge_spares_what_is_handed_out_and_takes_delayed_ones() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await publish(transport, message("1"), message("2"), message("3", due=bench.clock.time() + DAY))
        (held,) = await take(transport, limit=1)
        assert await transport.purge("q") == 2
        assert await transport.purge("unknown") == 0
        assert await transport.settle([settled(held, Action.REQUEUE)]) == [True]
        assert ids(await take(transport)) == ["1"]

    run(test)


def test_depth_and_peek() -> None:
    async def test(bench: Bench) -> None:
        transport, start = bench.transport(), bench.clock.time()
        await publish(transport, message("later", due=start + 20), message("soon", due=start + 10), message("taken"))
        await take(transport, lease=60)
        bench.clock.advance(1)
        await publish(transport, message("low"), message("high", priority=1), message("x", "r"))
        depth = await transport.depth()
        assert set(depth) == {"q", "r"}
        assert (depth["q"].ready, depth["q"].delayed, depth["q"].leased) == (2, 2, 1)
        assert depth["q"].oldest == start + 1
        assert (await transport.depth(["none"]))["none"].ready == 0
        assert [m.id for m in await transport.peek("q")] == ["high", "low", "soon", "later"]
        assert [m.id for m in await transport.peek("q", limit=2, offset=1)] == ["low", "soon"]
        assert await transport.peek("none") == []
        bench.clock.advance(10)
        assert [m.id for m in await transport.peek("q")] == ["high", "low", "soon", "later"]
        assert (await transport.depth(["q"]))["q"].ready == 3

    run(test)


def test_declare_names_the_property_that_differs() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        await transport.declare([QueueSpec(name="q", max_priority=5)])
        await transport.declare([QueueSpec(name="q", max_priority=5)])
        assert "q" in await transport.depth()
        with pytest.raises(PublishRefused, match="max_priority is 5, not 7"):
            await transport.declare([QueueSpec(name="q", max_priority=7)])

    run(test)


@pytest.mark.parametrize(
    ("kind", "bindings", "key", "reached"),
    [
        ("direct", {"a": "x", "b": "x", "c": "y"}, "x", ["a", "b"]),
        ("direct", {"a": None, "b": None}, "b", ["b"]),
        ("topic", {"a": "eu.*", "b": "eu.#", "c": "#.late", "d": "us.*"}, "eu.mail.late", ["b", "c"]),
        ("topic", {"a": "eu.*", "b": "#"}, "eu", ["b"]),
        ("fanout", {"a": "x", "b": None}, "whatever", ["a", "b"]),
    ],
)
def test_an_exchange_gives_each_bound_queue_a_copy(
    kind: str, bindings: dict[str, str | None], key: str, reached: list[str]
) -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        specs = [QueueSpec(name=q, exchange="e", exchange_type=kind, routing_key=k) for q, k in bindings.items()]
        await transport.declare(specs)
        await transport.declare(specs)
        await publish(transport, evolve(message("1"), queue="z", properties={"exchange": "e", "routing_key": key}))
        depth = await transport.depth([*bindings, "z"])
        assert [name for name in depth if depth[name].ready] == reached
        (copy,) = await take(transport, reached[0])
        assert copy.message.properties == {"exchange": "e", "routing_key": key}
        assert copy.message.queue == reached[0]

    run(test)


def test_what_an_exchange_can_deliver_to_nobody_is_refused_whole() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        lost = evolve(message("2"), properties={"exchange": "e", "routing_key": "k"})
        with pytest.raises(PublishRefused, match="exchange 'e': there is no such exchange"):
            await publish(transport, message("1"), lost)
        await transport.declare([QueueSpec(name="a", exchange="e")])
        with pytest.raises(PublishRefused, match="exchange 'e': no queue is bound there under 'k'"):
            await publish(transport, message("1"), lost)
        assert await transport.peek("q") == []
        with pytest.raises(PublishRefused, match="exchange_type 'direct', not 'topic'"):
            await transport.declare([QueueSpec(name="b", exchange="e", exchange_type="topic")])

    run(test)


def test_close_ends_the_instance_and_leaves_what_is_held_to_another_session() -> None:
    async def test(bench: Bench) -> None:
        first, second = bench.transport(), bench.transport()
        await publish(first, message("1"))
        (held,) = await take(first)
        reading = asyncio.ensure_future(take(first, "empty"))
        starved = asyncio.ensure_future(take(first, "empty", limit=0))
        hearing = asyncio.ensure_future(anext(first.subscribe("topic")))
        await asyncio.sleep(0)
        await first.close()
        await first.close()
        assert await second.renew([held], lease=5) == [True]
        assert await second.settle([settled(held)]) == [True]
        for pending in (reading, starved, hearing):
            with pytest.raises(BrokerUnavailable, match="closed"):
                await pending
        with pytest.raises(BrokerUnavailable, match="closed"):
            await first.settle([settled(held)])

    run(test)


def test_an_abandoned_wait_claims_nothing() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        credit = Credit(5)
        batches = transport.consume(["q"], credit=credit, lease=60)
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await publish(transport, message("1"))
        assert credit.out == 0
        assert [d.count for d in await take(transport)] == [1]

    run(test)


def test_broadcast_reaches_all_who_listen_now_and_nobody_later() -> None:
    async def test(bench: Bench) -> None:
        speaker, hearer = bench.transport(), bench.transport()
        await speaker.broadcast("events", b"early", key="k")
        async with aclosing(speaker.subscribe("events")) as one, aclosing(hearer.subscribe("events")) as two:
            firsts = [asyncio.ensure_future(anext(one)), asyncio.ensure_future(anext(two))]
            await asyncio.sleep(0)
            await speaker.broadcast("other", b"elsewhere")
            await speaker.broadcast("events", b"a", key="worker.heartbeat")
            await speaker.broadcast("events", b"b")
            assert await asyncio.gather(*firsts) == [("worker.heartbeat", b"a")] * 2
            assert [await anext(one), await anext(two)] == [("", b"b")] * 2

    run(test)


def test_no_trace_is_left_of_consumers_nor_of_settled_messages() -> None:
    async def test(bench: Bench) -> None:
        transport = bench.transport()
        for _ in range(20):
            await publish(transport, *(message(str(n)) for n in range(50)))
            await transport.settle([settled(delivery) for delivery in await take(transport, lease=DAY)])
        queue = transport._broker._queue("q")
        assert not queue.entries
        assert not queue.bells
        assert len(queue._timers) <= 64
        assert not bench.clock._listeners

    run(test)
