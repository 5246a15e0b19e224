"""Laws of the transport port: calls that are cut short, sessions that end, brokers that die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from umbel.errors import BrokerUnavailable
from umbel.model import QueueSpec
from umbel.ports.transport import Credit, Transport
from umbel.testing.contracts.bench import TURNS, closing, interrupt, law
from umbel.testing.contracts.transport_bench import LONG, TransportBench, TransportLaws, ack, ids

T = TypeVar("T")


class SessionLaws(TransportLaws):
    """Deadlines, cancellation, and what is left when something is lost."""

    # --- deadlines and cancellation -------------------------------------------------------------

    @law
    async def test_publish_past_its_deadline_raises(
        self, bench: TransportBench, unreachable: Callable[[], Transport] | None
    ) -> None:
        transport = bench.transport() if unreachable is None else unreachable()
        bench.close_after(transport.close)
        begun = time.monotonic()
        try:
            await transport.publish([bench.message("1")], timeout=0.0 if unreachable is None else 0.3)
        except BrokerUnavailable:
            pass
        else:
            assert unreachable is None, "publish returned although no broker has taken the message"
        assert time.monotonic() - begun < 2.0, "publish outlasts its deadline"

    @law
    async def test_a_cancelled_publish_harms_nobody(self, bench: TransportBench) -> None:
        transport = bench.transport()
        for turn in TURNS:
            await interrupt(transport.publish([bench.message(f"cut{turn}")], timeout=bench.patience), turn)
            await bench.send(transport, f"whole{turn}")
        await asyncio.sleep(bench.quiet)
        ready = (await bench.depth(transport)).ready
        got = ids(await bench.take(transport, ready))
        assert len(set(got)) == len(got), "a cancelled publish arrived twice"
        assert [name for name in got if name.startswith("whole")] == [f"whole{turn}" for turn in TURNS]

    @law
    async def test_a_cancelled_consumer_keeps_nothing(self, bench: TransportBench) -> None:
        transport, other = bench.transport(), bench.transport()
        acked: list[str] = []
        for turn in TURNS:
            await bench.send(transport, f"{turn}")
            credit = Credit(1)
            async with closing(transport.consume([bench.queue], credit=credit, lease=LONG)) as stream:
                batch = await interrupt(next_of(stream), turn) or []
                assert credit.out == len(batch), "credit was taken for what was not handed out"
            assert all(await transport.settle([ack(delivery) for delivery in batch]))
            acked += ids(batch)
        rest = await bench.take(other, len(TURNS) - len(acked))
        assert sorted(acked + ids(rest), key=int) == [str(turn) for turn in TURNS]
        if bench.capabilities.delivery_count:
            assert {delivery.count for delivery in rest} <= {1}, "what was never yielded was counted"

    @law
    async def test_a_cancelled_settlement_can_be_repeated(self, bench: TransportBench) -> None:
        transport = bench.transport()
        await bench.send(transport, *(str(turn) for turn in TURNS))
        for turn, delivery in enumerate(await bench.take(transport, len(TURNS))):
            await interrupt(transport.settle([ack(delivery)]), turn)
            await transport.settle([ack(delivery)])
        depth = await bench.depth(transport)
        assert (depth.ready, depth.leased) == (0, 0)

    @law
    async def test_a_consumer_that_is_closed_gives_back_what_it_had_not_handed_out(self, bench: TransportBench) -> None:
        transport, other = bench.transport(), bench.transport()
        names = [str(n) for n in range(50)]
        await bench.send(transport, *names)
        credit = Credit(50)
        async with closing(transport.consume([bench.queue], credit=credit, lease=LONG)) as stream:
            batch = await anext(stream)
        assert credit.out == len(batch)
        rest = await bench.take(other, 50 - len(batch)) if len(batch) < 50 else []
        assert sorted(ids([*batch, *rest]), key=int) == names
        if bench.capabilities.delivery_count:
            assert {delivery.count for delivery in rest} <= {1}, "what was never yielded was counted"

    @law
    async def test_a_cancelled_call_disturbs_no_later_one(self, bench: TransportBench) -> None:
        """The answer that nobody waited for must not be given to whoever asks next."""
        transport, other = bench.transport(), f"{bench.queue}-other"
        await transport.declare([QueueSpec(name=other)])
        await bench.send(transport, "held", "2", "3")
        (held,) = await bench.take(transport)
        for turn in TURNS:
            await interrupt(transport.declare([QueueSpec(name=other)]), turn)
            await interrupt(transport.depth([other]), turn)
            assert (await bench.depth(transport)).ready == 2
            await interrupt(transport.purge(other), turn)
            await interrupt(transport.peek(other), turn)
            assert [message.id for message in await transport.peek(bench.queue)] == ["2", "3"]
            await interrupt(transport.renew([held], lease=LONG), turn)
            assert list(await transport.renew([held], lease=LONG)) == [True]
        assert await bench.sole_settled(transport, ack(held))

    # --- what is lost ---------------------------------------------------------------------------

    @law
    async def test_what_was_accepted_outlives_its_connection(self, bench: TransportBench) -> None:
        sender = bench.transport()
        await bench.send(sender, "1", "2")
        await sender.close()
        assert ids(await bench.take(bench.transport(), 2)) == ["1", "2"]

    @law
    async def test_what_was_accepted_outlives_the_broker(
        self, bench: TransportBench, restart: Callable[[], Awaitable[None]] | None
    ) -> None:
        if restart is None or not bench.capabilities.durable:
            return
        sender, delays = bench.transport(), bool(bench.capabilities.max_delay)
        await bench.send(sender, "held", "ready")
        await bench.take(sender, lease=bench.lease)
        if delays:
            await bench.send(sender, "later", due=bench.now() + bench.lease)
        await restart()
        await bench.lease_ends()
        expected = ["held", "ready", *(["later"] if delays else [])]
        assert sorted(ids(await bench.take(bench.transport(), len(expected)))) == sorted(expected)

    @law
    async def test_what_a_closed_transport_held_is_delivered_to_another(self, bench: TransportBench) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1", "2")
        await bench.take(first, 2, lease=bench.lease)
        await first.close()
        if bench.capabilities.renewable_lease:
            await bench.lease_ends()
        assert sorted(ids(await bench.take(second, 2))) == ["1", "2"]

    @law
    async def test_the_leases_of_a_closed_transport_pass_to_another(self, bench: TransportBench) -> None:
        if not bench.capabilities.renewable_lease:
            return  # its deliveries ended with its session
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        held = await bench.take(first)
        await first.close()
        await bench.take_nothing(second)
        assert list(await second.renew(held, lease=LONG)) == [True]
        assert await bench.sole_settled(second, ack(held[0]))
        depth = await bench.depth(second)
        assert (depth.ready, depth.leased) == (0, 0)

    @law
    async def test_a_lost_connection_loses_no_message(
        self, bench: TransportBench, sever: Callable[[Transport], Awaitable[None]] | None
    ) -> None:
        first, second = bench.transport(), bench.transport()
        await bench.send(first, "1")
        await bench.take(first, lease=bench.lease)
        if sever is None:
            await bench.take_nothing(second)
        else:
            await sever(first)
        await bench.lease_ends()
        if sever is None and not bench.capabilities.renewable_lease:
            await first.close()
        assert ids(await bench.take(second)) == ["1"]

    @law
    async def test_a_consumer_whose_connection_is_lost_is_told_or_goes_on(
        self, bench: TransportBench, sever: Callable[[Transport], Awaitable[None]] | None
    ) -> None:
        if sever is None:
            return
        transport, other = bench.transport(), bench.transport()
        queues = [bench.queue, f"{bench.queue}-none"]
        credits, got = [Credit(5), Credit(0)], [list[str](), list[str]()]

        async def consume(number: int) -> None:
            async with closing(transport.consume([queues[number]], credit=credits[number], lease=LONG)) as stream:
                async for batch in stream:
                    got[number] += ids(batch)

        await bench.send(transport, "before")
        consuming = [asyncio.ensure_future(consume(number)) for number in range(2)]
        await bench.until(lambda: got[0] == ["before"], "a delivery")
        await sever(transport)
        credits[1].resize(5)
        await bench.publish(other, *(bench.message("after", queue) for queue in queues))
        for task, mine in zip(consuming, got, strict=True):
            await bench.until(lambda task=task, mine=mine: task.done() or "after" in mine, "told, or served again")  # type: ignore[misc]  # no lambda has a type
            told = task.done() and isinstance(task.exception(), BrokerUnavailable)
            # What a session held without a lease is lost with it: then its consumer has to know.
            assert told or (bench.capabilities.renewable_lease and not task.done()), f"it ended so: {task}"
            task.cancel()
        await asyncio.wait(consuming)


async def next_of(stream: AsyncIterator[T]) -> T:
    return await anext(stream)
