"""A cluster of RabbitMQ, one of whose nodes dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, cast

import pytest
from servers.rabbitmq import RabbitServer

from umbel.errors import BrokerUnavailable
from umbel.model import Action, Message, Settlement
from umbel.ports.transport import Credit
from umbel_amqp.options import TransportOptions
from umbel_amqp.transport import AmqpTransport

MakeRabbit = Callable[..., RabbitServer]


def messages(first: int) -> list[Message]:
    return [Message(queue="q", headers={"id": str(n), "task": "t"}) for n in range(first, first + 20)]


@pytest.mark.slow
def test_a_queue_whose_leader_dies_takes_and_gives_at_once(make_rabbitmq: MakeRabbit) -> None:
    """The node stays dead: another leads the queue by then, and is found."""
    one = make_rabbitmq()
    with ThreadPoolExecutor() as threads:
        two, three = threads.map(lambda _: make_rabbitmq(beside=one), range(2))
    two.join()
    three.join()

    async def publish(transport: AmqpTransport, batch: list[Message]) -> None:
        while True:
            try:
                return await transport.publish(batch, timeout=30)
            except BrokerUnavailable as lost:  # once, with the connection
                if "does not take it" in str(lost):
                    raise

    async def consume(transport: AmqpTransport) -> None:
        stream = transport.consume(["q"], credit=Credit(40), lease=60)
        async with aclosing(cast("Any", stream)):
            async for batch in stream:
                await transport.settle([Settlement(delivery=delivery, action=Action.ACK) for delivery in batch])
                done.update(delivery.message.id for delivery in batch)
                if len(done) == 40:
                    return

    async def live() -> None:
        others = TransportOptions(hosts=(f"127.0.0.1:{one.port}", f"127.0.0.1:{three.port}"))
        transport = AmqpTransport(two.url, options=others)  # which declares the queue there: its leader is at hand
        try:
            await transport.publish(messages(0), timeout=60)
            two.kill()
            async with asyncio.timeout(90):
                await publish(transport, messages(20))
                await consume(transport)
        finally:
            await transport.close()

    done: set[str] = set()
    asyncio.run(live())
    assert done == {str(n) for n in range(40)}
