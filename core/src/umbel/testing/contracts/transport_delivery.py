"""Laws of the transport port: what is published arrives, is held under a lease, and is settled once."""

from __future__ import annotations

import asyncio

import pytest

from umbel.errors import PublishRefused
from umbel.model import (
    HEADER_DEAD_AT,
    HEADER_DEAD_CAUSE,
    HEADER_DEAD_COUNT,
    HEADER_DEAD_QUEUE,
    Message,
    dead_letter_queue,
    evolve,
)
from umbel.ports.transport import Credit, Transport
from umbel.testing.contracts.bench import AMPLE, closing, law
from umbel.testing.contracts.transport_bench import (
    LONG,
    TransportBench,
    TransportLaws,
    ack,
    dead,
    ids,
    requeue,
    unrouted,
)

HEADERS = {
    "id": "6f4d",
    "task": "kit.task",
    "lang": "py",
    "retries": 0,
    "eta": None,
    "timelimit": [None, 2.5],
    "ignore_result": False,
    "x-unknown": {"deep": [1, -(2**62), "ü名🌸", {"": b"\x00\xff", "list": []}], "none": None},
    "": "",
    "ünï 🌸": True,
    "blob": b"\x00\x01\xfe\xff",
}
PROPERTIES = {"correlation_id": "6f4d", "reply_to": "ü", "delivery_mode": 2}


class DeliveryLaws(TransportLaws):
    """From the sender to the one settlement."""

    # --- what arrives ---------------------------------------------------------------------------

    @law
    async def test_what_is_published_is_delivered_whole(self, bench: TransportBench) -> None:
        transport = bench.transport()
        sent = Message(
            queue=bench.queue,
            headers=HEADERS,
            body=b"\x00\xffbody\r\n",
            content_type="application/x-kit",
            content_encoding="binary",
            priority=3,
            properties={**PROPERTIES, "exchange": ""},
        )
        await bench.publish(transport, sent)
        (delivery,) = await bench.take(bench.transport())
        assert unrouted(delivery.message) == unrouted(sent)
        assert (delivery.queue, delivery.count, delivery.starts) == (bench.queue, 1, 0)

    @law
    async def test_a_message_without_headers_is_delivered(self, bench: TransportBench) -> None:
        transport, sent = bench.transport(), Message(queue=bench.queue, body=b"protocol 1")
        await bench.publish(transport, sent)
        (delivery,) = await bench.take(transport)
        assert unrouted(delivery.message) == sent

    @pytest.mark.parametrize("size", [0, 1, 65_537, 10_000_000])
    @law
    async def test_a_body_of_any_size_arrives_whole(self, bench: TransportBench, size: int) -> None:
        transport, most = bench.transport(), bench.capabilities.max_message_size
        body = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
        if most is not None and size > most:
            with pytest.raises(PublishRefused):
                await bench.send(transport, "large", body=body)
            return
        await bench.send(transport, "large", body=body)
        (delivery,) = await bench.take(transport)
        assert delivery.message.body == body
        assert await bench.sole_settled(transport, ack(delivery))

    @law
    async def test_a_body_beyond_the_declared_size_is_refused(self, bench: TransportBench) -> None:
        transport, most = bench.transport(), bench.capabilities.max_message_size
        if most is not None:
            with pytest.raises(PublishRefused):
                await bench.send(transport, "too-large", body=bytes(most + 1))
        await bench.send(transport, "other")
        assert ids(await bench.take(transport)) == ["other"]

    @law
    async def test_names_of_queues_are_told_apart(self, bench: TransportBench) -> None:
        transport = bench.transport()
        names = [f"{bench.queue}{name}" for name in self.queue_names]
        await bench.publish(transport, *(bench.message(str(n), name) for n, name in enumerate(names)))
        for number, name in enumerate(names):
            assert (await bench.depth(transport, name)).ready == 1, name
            (delivery,) = await bench.take(transport, queues=[name])
            assert (delivery.queue, delivery.message.queue, delivery.message.id) == (name, name, str(number))
            assert await bench.sole_settled(transport, ack(delivery))

    @law
    async def test_a_publish_to_an_unknown_queue_creates_it(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1")
        listed = await transport.depth()
        assert not listed or bench.queue in listed, "a broker that can list its queues lists this one"
        assert ids(await bench.take(transport)) == ["1"]

    @law
    async def test_an_empty_name_of_a_queue_is_kept_or_refused(self, bench: TransportBench) -> None:
        transport, name = bench.transport(), bench.queue
        try:
            await bench.publish(transport, evolve(bench.message(name), queue=""))
        except PublishRefused:
            await bench.send(transport, name)
            assert ids(await bench.take(transport)) == [name], "goes on after what it refused"
            return
        (delivery,) = await bench.take(transport, queues=[""])
        assert (delivery.queue, delivery.message.id) == ("", name)
        assert await bench.sole_settled(transport, ack(delivery))

    @law
    async def test_nothing_published_is_nothing_done(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await transport.publish([], timeout=bench.patience)
        assert list(await transport.settle([])) == []
        assert list(await transport.renew([], lease=1)) == []
        await transport.declare([])

    @law
    async def test_sender_and_receiver_share_nothing(self, bench: TransportBench) -> None:
        transport, headers = bench.transport(), {"id": "1", "task": "t", "list": [1]}
        await bench.publish(transport, Message(queue=bench.queue, headers=headers))
        headers["list"] = headers["id"] = "changed"
        (delivery,) = await bench.take(transport)
        assert delivery.message.headers == {"id": "1", "task": "t", "list": [1]}

    @law
    async def test_publish_returns_when_the_broker_has_it(self, bench: TransportBench) -> None:
        sender, other = bench.transport(), bench.transport()
        for number in range(1, 6):
            await bench.send(sender, str(number))
            if bench.capabilities.confirm:
                assert (await bench.depth(other)).ready == number
        assert ids(await bench.take(other, 5)) == ["1", "2", "3", "4", "5"]

    @law
    async def test_thousands_of_messages_are_delivered_once_each(self, bench: TransportBench) -> None:
        number, size = self.many, self.many // 12
        sender, machines = bench.transport(), [bench.transport(), bench.transport()]
        seen: list[str] = []
        done = asyncio.Event()

        async def work(transport: Transport) -> None:
            credit = Credit(100)
            async with closing(transport.consume([bench.queue], credit=credit, lease=LONG)) as stream:
                async for batch in stream:
                    seen.extend(ids(batch))
                    assert all(await transport.settle([ack(delivery) for delivery in batch]))
                    credit.give(len(batch))
                    if len(seen) >= number:
                        done.set()

        working = [asyncio.ensure_future(work(machine)) for machine in machines]
        names = [str(n) for n in range(number)]
        await asyncio.gather(*(bench.send(sender, *names[at : at + size]) for at in range(0, number, size)))
        over = asyncio.ensure_future(done.wait())
        await asyncio.wait([over, *working], timeout=self.time_limit / 2, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(bench.quiet)
        for task in [over, *working]:
            task.cancel()
        ends = await asyncio.gather(*working, return_exceptions=True)
        assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == []
        assert len(seen) == number, f"{len(seen)} deliveries of {number} messages"
        assert sorted(seen, key=int) == names
        depth = await bench.depth(sender)
        assert (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)

    # --- leases ---------------------------------------------------------------------------------

    @law
    async def test_a_delivery_not_settled_is_delivered_again(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        (delivery,) = await bench.take(first, lease=bench.lease)
        await bench.lease_ends()
        if not bench.capabilities.renewable_lease:
            await bench.take_nothing(second)
            await first.close()
        (again,) = await bench.take(second)
        assert unrouted(again.message) == unrouted(delivery.message)

    @law
    async def test_a_consumer_that_waits_gets_what_anothers_lease_gives_up(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        await bench.take(first, lease=bench.lease)
        waiting = asyncio.ensure_future(bench.take(second))
        await asyncio.sleep(min(bench.quiet, bench.lease / 2))
        assert not waiting.done(), "handed out again while its lease holds"
        await bench.lease_ends()
        if not bench.capabilities.renewable_lease:
            await first.close()
        assert ids(await waiting) == ["1"]

    @law
    async def test_an_acknowledged_delivery_never_comes_again(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        (delivery,) = await bench.take(first, lease=bench.lease * AMPLE)
        assert await bench.sole_settled(first, ack(delivery))
        await bench.lease_ends(AMPLE)
        await bench.take_nothing(second)
        await first.close()
        await bench.take_nothing(second)
        depth = await bench.depth(second)
        assert (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)

    @law
    async def test_settling_twice_is_refused(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "acked", "dead", "returned", "twice")
        acked, buried, returned, twice = await bench.take(transport, 4)
        first = [ack(acked), dead(buried), requeue(returned), ack(twice), requeue(twice)]
        assert list(await transport.settle(first)) == [True, True, True, True, False]
        again = [settle(delivery) for settle in (ack, requeue, dead) for delivery in (acked, buried, returned, twice)]
        assert list(await transport.settle(again)) == [False] * 12
        assert ids(await bench.take(transport)) == ["returned"]

    @law
    async def test_a_late_settlement_is_fenced_off(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1", "2", "3")
        late = await bench.take(first, 3, lease=bench.lease)
        await bench.lease_ends()
        if not bench.capabilities.renewable_lease:  # then the session holds it, whatever the time
            assert list(await first.settle([ack(delivery) for delivery in late])) == [True] * 3
            return
        new = await bench.take(second, 3)
        settlements = [ack(late[0]), requeue(late[1]), dead(late[2])]
        assert list(await first.settle(settlements)) == [False] * 3
        assert list(await second.settle([ack(delivery) for delivery in new])) == [True] * 3

    @law
    async def test_a_renewed_lease_holds_on(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        (delivery,) = await bench.take(first, lease=bench.lease * AMPLE)
        assert list(await first.renew([delivery], lease=LONG)) == [True]
        await bench.lease_ends(AMPLE)
        await bench.take_nothing(second)
        assert await bench.sole_settled(first, ack(delivery))

    @law
    async def test_a_renewed_lease_ends_too(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        (delivery,) = await bench.take(first)
        assert list(await first.renew([delivery], lease=bench.lease)) == [True]
        await bench.lease_ends()
        if bench.capabilities.renewable_lease:
            assert ids(await bench.take(second)) == ["1"]
        else:
            await bench.take_nothing(second)

    @law
    async def test_a_lost_lease_cannot_be_renewed(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1", "2")
        lost, kept = await bench.take(first, 2, lease=bench.lease * AMPLE)
        if not bench.capabilities.renewable_lease:  # neutral: held while the session lives
            assert list(await first.renew([lost, kept], lease=LONG)) == [True, True]
            return
        assert list(await first.renew([kept], lease=LONG)) == [True]
        await bench.lease_ends(AMPLE)
        assert ids(await bench.take(second)) == ["1"]
        assert list(await first.renew([lost, kept], lease=LONG)) == [False, True]
        assert await bench.sole_settled(first, ack(kept))
        assert list(await first.renew([kept], lease=LONG)) == [False]

    @law
    async def test_a_delivery_tells_the_end_of_its_lease(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1")
        earliest = bench.now() + 100
        (delivery,) = await bench.take(transport, lease=100)
        if bench.capabilities.renewable_lease:
            assert delivery.leased_until is not None
            assert earliest - 1 <= delivery.leased_until <= bench.now() + 101
        else:
            assert delivery.leased_until is None

    @law
    async def test_competing_consumers_never_share_a_message(self, bench: TransportBench) -> None:
        machines = [bench.transport() for _ in range(4)]
        names = [str(n) for n in range(200)]
        await bench.send(machines[0], *names)
        shares = await asyncio.gather(*(bench.take(machine, 50) for machine in machines))
        assert sorted((name for share in shares for name in ids(share)), key=int) == names
        await bench.take_nothing(machines[0])

    # --- counting -------------------------------------------------------------------------------

    @law
    async def test_the_count_grows_with_each_handing_out(self, bench: TransportBench) -> None:
        transport, counts = bench.transport(), []
        await bench.send(transport, "1")
        for _ in range(4):
            (delivery,) = await bench.take(transport)
            counts.append(delivery.count)
            assert await bench.sole_settled(transport, requeue(delivery))
        assert counts == ([1, 2, 3, 4] if bench.capabilities.delivery_count else [1, 2, 2, 2])

    @law
    async def test_an_ended_lease_counts(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1")
        await bench.take(transport, lease=bench.lease)
        await bench.lease_ends()
        if not bench.capabilities.renewable_lease:
            await transport.close()
            transport = bench.transport()
        (delivery,) = await bench.take(transport)
        assert delivery.count == 2

    @law
    async def test_what_is_given_back_uncounted_does_not_count(self, bench: TransportBench) -> None:
        transport, counts = bench.transport(), []
        await bench.send(transport, "1")
        for counted in (False, False, True, False):
            (delivery,) = await bench.take(transport)
            counts.append(delivery.count)
            assert await bench.sole_settled(transport, requeue(delivery, counted=counted))
        (delivery,) = await bench.take(transport)
        if bench.capabilities.delivery_count:
            assert [*counts, delivery.count] == [1, 1, 1, 2, 2]
        else:
            assert set(counts) | {delivery.count} <= {1, 2}

    @law
    async def test_starts_of_work_are_recorded(self, bench: TransportBench) -> None:
        transport, starts = bench.transport(), []
        await bench.send(transport, "1")
        for _ in range(3):
            (delivery,) = await bench.take(transport)
            starts.append(delivery.starts)
            assert list(await transport.renew([delivery], lease=LONG)) == [True]
            assert list(await transport.renew([delivery], lease=LONG, starting=True)) == [True]
            assert await bench.sole_settled(transport, requeue(delivery))
        assert starts == ([0, 1, 2] if bench.capabilities.start_marks else [0, 0, 0])

    # --- dead letters ---------------------------------------------------------------------------

    @law
    async def test_dead_letters_keep_the_message_and_tell_its_cause(self, bench: TransportBench) -> None:
        transport = bench.transport()
        headers = {"id": "1", "task": "kit.task", "x-unknown": [b"\x00", {"a": None}]}
        await bench.publish(transport, Message(queue=bench.queue, headers=headers, body=b"\xff", priority=4))
        (first,) = await bench.take(transport)
        assert await bench.sole_settled(transport, requeue(first))
        (delivery,) = await bench.take(transport)
        earliest = bench.now()
        assert await bench.sole_settled(transport, dead(delivery, "ValueError: ü is no number"))
        graveyard = dead_letter_queue(bench.queue)
        (letter,) = await bench.take(bench.transport(), queues=[graveyard])
        told = dict(letter.message.headers)
        assert earliest - 1 <= told.pop(HEADER_DEAD_AT) <= bench.now() + 1
        assert told == {
            **headers,
            HEADER_DEAD_CAUSE: "ValueError: ü is no number",
            HEADER_DEAD_QUEUE: bench.queue,
            HEADER_DEAD_COUNT: 2,
        }
        assert (letter.message.queue, letter.message.body, letter.count) == (graveyard, b"\xff", 1)
        depth = await bench.depth(transport)
        assert (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)
