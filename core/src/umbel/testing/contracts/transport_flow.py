"""Laws of the transport port: how much is handed out, in which order, when; and the look into queues."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import pytest

from umbel.errors import NotSupported, PublishRefused
from umbel.model import Delivery, QueueSpec, evolve
from umbel.ports.transport import Credit
from umbel.testing.contracts.bench import AMPLE, closing, law
from umbel.testing.contracts.transport_bench import LONG, TransportBench, TransportLaws, ack, ids, requeue, unrouted

YEAR = 365 * 86_400.0


class FlowLaws(TransportLaws):
    """Credit, order, due times, queues."""

    # --- credit ---------------------------------------------------------------------------------

    @law
    async def test_credit_is_respected(self, bench: TransportBench) -> None:
        transport, credit = bench.transport(), Credit(3)
        await bench.send(transport, *(str(n) for n in range(10)))
        async with closing(transport.consume([bench.queue], credit=credit, lease=LONG)) as stream:
            held = [delivery for _ in range(3) if credit.out < 3 for delivery in await anext(stream)]
            assert (ids(held), credit.out) == (["0", "1", "2"], 3)
            more = asyncio.ensure_future(anext(stream))
            await asyncio.wait([more], timeout=bench.quiet)
            assert not more.done() or not more.result(), "handed out beyond the credit"
            await transport.settle([ack(delivery) for delivery in held[:2]])
            credit.give(2)
            batch = list(await bench.soon(more, "more after credit was given"))
            while len(batch) < 2:
                batch += await bench.soon(anext(stream), "as much as the credit allows")
            assert (ids(batch), credit.out) == (["3", "4"], 3)

    @law
    async def test_a_growing_credit_is_noticed(self, bench: TransportBench) -> None:
        transport, credit = bench.transport(), Credit(0)
        await bench.send(transport, "1", "2", "3")
        async with closing(transport.consume([bench.queue], credit=credit, lease=LONG)) as stream:
            first = asyncio.ensure_future(anext(stream))
            await asyncio.wait([first], timeout=bench.quiet)
            assert not first.done() or not first.result(), "handed out without any credit"
            credit.resize(2)
            batch = list(await bench.soon(first, "a delivery after the credit has grown"))
            while len(batch) < 2:
                batch += await bench.soon(anext(stream), "as much as the credit allows")
            assert ids(batch) == ["1", "2"]

    @law
    async def test_a_quiet_consumer_yields_empty_batches(self, bench: TransportBench) -> None:
        transport, full = bench.transport(), f"{bench.queue}-full"
        await bench.send(transport, "1", queue=full)

        async def first_batch(queue: str, credit: Credit) -> Sequence[Delivery]:
            async with closing(transport.consume([queue], credit=credit, lease=LONG)) as stream:
                return await anext(stream)

        try:
            async with asyncio.timeout(self.silence + 2):
                batches = await asyncio.gather(first_batch(bench.queue, Credit(5)), first_batch(full, Credit(0)))
        except TimeoutError:
            pytest.fail(f"a consumer with nothing to hand out, or no credit, yields nothing within {self.silence:g} s")
        assert [list(batch) for batch in batches] == [[], []]

    @law
    async def test_a_waiting_consumer_leaves_the_loop_to_others(self, bench: TransportBench) -> None:
        transport = bench.transport()
        waiting = asyncio.ensure_future(bench.take(transport))
        begun = time.monotonic()
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert time.monotonic() - begun < 1.0, "a call blocks the event loop"
        await bench.send(transport, "1")
        assert ids(await waiting) == ["1"]

    # --- order ----------------------------------------------------------------------------------

    @law
    async def test_the_oldest_message_comes_first(self, bench: TransportBench) -> None:
        transport = bench.transport()
        names = [str(n) for n in range(60)]
        for at in range(0, 60, 15):
            await bench.send(transport, *names[at : at + 15])
        assert ids(await bench.take(transport, 60)) == names

    @law
    async def test_priority_is_respected_within_one_consumer(self, bench: TransportBench) -> None:
        transport, levels = bench.transport(), bench.capabilities.priority_levels
        priorities = [0, 9, 0, 9] if levels < 10 else [4, 0, 9, 1, 5, 9, 2, 8, 3, 7, 6, 0]
        messages = [bench.message(f"{n}", priority=priority) for n, priority in enumerate(priorities)]
        await bench.publish(transport, *messages)
        got = ids(await bench.take(transport, len(messages)))
        if levels > 1:
            messages.sort(key=lambda message: -message.priority)
            assert got == [message.id for message in messages]
        else:  # there are brokers that know priorities from some version on: one that promises none may keep some
            assert sorted(got) == [message.id for message in messages]

    @law
    async def test_what_is_given_back_comes_first_among_equals(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1", "2", "3")
        (first,) = await bench.take(transport)
        assert await bench.sole_settled(transport, requeue(first))
        assert ids(await bench.take(transport, 3)) == ["1", "2", "3"]

    @law
    async def test_one_consumer_serves_several_queues(self, bench: TransportBench) -> None:
        transport = bench.transport()
        queues = [f"{bench.queue}-{n}" for n in range(3)]
        waiting = asyncio.ensure_future(bench.take(transport, 6, queues=queues))
        await bench.publish(transport, *(bench.message(f"{n}{q[-1]}", q) for n in range(2) for q in queues))
        got = await waiting
        assert sorted((d.queue, d.message.id) for d in got) == sorted(
            (q, f"{n}{q[-1]}") for n in range(2) for q in queues
        )

    # --- due times ------------------------------------------------------------------------------

    @law
    async def test_nothing_is_handed_out_before_its_due_time_nor_long_after(self, bench: TransportBench) -> None:
        transport = bench.transport()
        due = bench.now() + 0.6
        if not bench.capabilities.max_delay:
            with pytest.raises(NotSupported):
                await bench.send(transport, "delayed", due=due)
            return
        waiting = asyncio.ensure_future(bench.take(transport))
        await bench.send(transport, "delayed", due=due)
        await bench.elapse(0.3)
        await asyncio.sleep(0.02)
        assert not waiting.done() or bench.now() >= due, "handed out half a way to its due time"
        await bench.elapse(0.28)
        assert not waiting.done() or bench.now() >= due, "handed out before its due time"
        await bench.elapse(0.05)
        assert ids(await waiting) == ["delayed"]
        assert due <= bench.now() <= due + self.slack

    @law
    async def test_delayed_messages_come_in_the_order_of_their_due_times(self, bench: TransportBench) -> None:
        transport, start = bench.transport(), bench.now()
        delays = {"c": 0.6, "a": 0.2, "b": 0.4}
        if not bench.capabilities.max_delay:
            return
        await bench.publish(transport, *(bench.message(name, due=start + delay) for name, delay in delays.items()))
        await bench.send(transport, "now")
        got = asyncio.ensure_future(bench.take(transport, 4))
        for _ in range(7):
            await asyncio.sleep(0.02)
            await bench.elapse(0.1)
        assert ids(await got) == ["now", "a", "b", "c"]

    @law
    async def test_a_due_time_that_has_passed_means_at_once(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1", due=bench.now() - 3600)
        assert ids(await bench.take(transport)) == ["1"]

    @law
    async def test_the_longest_delay_is_kept_and_a_longer_one_refused(self, bench: TransportBench) -> None:
        transport, longest = bench.transport(), bench.capabilities.max_delay
        if longest < math.inf:
            with pytest.raises(NotSupported):
                await bench.send(transport, "longer", due=bench.now() + longest + 3600)
        if longest:
            await bench.send(transport, "longest", due=bench.now() + min(longest, 10 * YEAR) - 60)
        await bench.take_nothing(transport)
        await bench.send(transport, "now")
        assert ids(await bench.take(transport)) == ["now"]

    @law
    async def test_a_delayed_requeue_waits(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, "1")
        (delivery,) = await bench.take(transport)
        if not bench.capabilities.max_delay:
            with pytest.raises(NotSupported):
                await transport.settle([requeue(delivery, delay=bench.lease * AMPLE)])
            return
        assert await bench.sole_settled(transport, requeue(delivery, delay=bench.lease * AMPLE))
        await bench.take_nothing(transport)
        depth = await bench.depth(transport)
        assert (depth.ready, depth.delayed, depth.leased) == (0, 1, 0)
        await bench.lease_ends(AMPLE)
        (again,) = await bench.take(transport)
        assert (unrouted(again.message), again.count) == (unrouted(delivery.message), 2)

    # --- queues ---------------------------------------------------------------------------------

    @law
    async def test_depth_tells_ready_delayed_and_leased(self, bench: TransportBench) -> None:
        transport, delays = bench.transport(), bool(bench.capabilities.max_delay)
        await bench.send(transport, "1", "2", "3")
        held = await bench.take(transport)
        if delays:
            await bench.send(transport, "4", due=bench.now() + LONG)
        depth = await bench.depth(transport)
        assert (depth.ready, depth.delayed, depth.leased) == (2, int(delays), 1)
        assert depth.oldest is None or bench.now() - 60 <= depth.oldest <= bench.now()
        await transport.settle([ack(delivery) for delivery in held])
        depth = await bench.depth(transport)
        assert (depth.ready, depth.delayed, depth.leased) == (2, int(delays), 0)

    @law
    async def test_an_unknown_queue_is_empty(self, bench: TransportBench) -> None:
        transport = bench.transport()
        depth = await bench.depth(transport)
        assert (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)
        assert list(await transport.peek(bench.queue)) == []
        assert await transport.purge(bench.queue) == 0

    @law
    async def test_peek_takes_nothing(self, bench: TransportBench) -> None:
        transport = bench.transport()
        sent = [bench.message(str(n), properties={"correlation_id": str(n)}) for n in range(5)]
        await bench.publish(transport, *sent)
        assert list(map(unrouted, await transport.peek(bench.queue))) == sent
        assert list(map(unrouted, await transport.peek(bench.queue, limit=2))) == sent[:2]
        assert list(map(unrouted, await transport.peek(bench.queue, limit=2, offset=4))) == sent[4:]
        assert (await bench.depth(transport)).ready == 5
        got = await bench.take(transport, 5)
        assert [unrouted(delivery.message) for delivery in got] == sent
        if bench.capabilities.delivery_count:
            assert {delivery.count for delivery in got} == {1}, "a look counts as a handing-out"
        assert list(await transport.peek(bench.queue)) == []

    @law
    async def test_purge_deletes_and_counts_what_is_not_handed_out(self, bench: TransportBench) -> None:
        transport, delays = bench.transport(), bool(bench.capabilities.max_delay)
        await bench.send(transport, "held", "2", "3")
        (held,) = await bench.take(transport)
        if delays:
            await bench.send(transport, "4", due=bench.now() + LONG)
        await bench.send(transport, "other", queue=f"{bench.queue}-other")
        assert await transport.purge(bench.queue) == 2 + delays
        assert await transport.purge(bench.queue) == 0
        assert await bench.sole_settled(transport, requeue(held))
        assert ids(await bench.take(transport)) == ["held"]
        assert (await bench.depth(transport, f"{bench.queue}-other")).ready == 1

    @law
    async def test_declaring_a_queue_again_changes_nothing(self, bench: TransportBench) -> None:
        transport, spec = bench.transport(), QueueSpec(name=bench.queue)
        await transport.declare([spec])
        await bench.send(transport, "1")
        await transport.declare([spec])
        await bench.transport().declare([spec, QueueSpec(name=f"{bench.queue}-other")])
        assert ids(await bench.take(transport)) == ["1"]

    @law
    async def test_declaring_a_queue_differently_is_refused(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await transport.declare([QueueSpec(name=bench.queue)])
        with pytest.raises(PublishRefused) as refused:
            await bench.transport().declare([evolve(self.other_arguments, name=bench.queue)])
        assert bench.queue in str(refused.value), "the error names the queue"
        await bench.send(transport, "1")
        assert ids(await bench.take(transport)) == ["1"]
