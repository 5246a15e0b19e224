"""The end of a subscription, apart from any broker."""

from __future__ import annotations

import asyncio

import pytest
from pamqp import commands

from umbel_amqp import channel, frames
from umbel_amqp.channel import Channel
from umbel_amqp.connection import Connection
from umbel_amqp.consuming import Subscription
from umbel_amqp.options import ConnectionOptions, address_of

ANSWERS = {
    commands.Basic.Qos: commands.Basic.QosOk(),
    commands.Basic.Consume: commands.Basic.ConsumeOk("0"),
    commands.Basic.Cancel: commands.Basic.CancelOk("0"),
    commands.Channel.Close: commands.Channel.CloseOk(),
}


class Broker:
    """Answers what is asked on one channel, and remembers it."""

    def __init__(self) -> None:
        options = ConnectionOptions()
        connection = Connection(address_of("amqp://localhost", options), options, "here")
        connection.write = self._written  # type: ignore[method-assign]  # nothing is connected
        self.channel = Channel(connection, 1)
        self.heard: list[str] = []

    def _written(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            _, _, length = frames.FRAME.unpack_from(data, at)
            method = frames.read_method(data[at + 7 : at + 7 + length])
            at += length + frames.OVERHEAD
            self.heard.append(method.name)
            for kind, answer in ANSWERS.items():
                if isinstance(method, kind):
                    payload = frames.write_method(answer, 1)[7:-1]
                    asyncio.get_running_loop().call_soon(self.channel.frame, frames.METHOD, payload)

    async def closed(self) -> None:
        async with asyncio.timeout(10):
            while self.channel.dead is None:  # noqa: ASYNC110  # it has no event of its own
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LINGER", 0.01)


async def subscribed() -> tuple[Broker, Subscription]:
    broker = Broker()
    subscription = Subscription(broker.channel, ["q"], 10)
    subscription.begin(lambda taken: None)
    await subscription.begun()
    subscription.tags.add([1, 2], "0")
    broker.heard.clear()
    return broker, subscription


def test_the_last_acknowledgement_as_a_subscription_ends_leaves_it_its_channel() -> None:
    """It closed the channel on which the end was still to be asked for: the session was lost, and what it held ran twice."""

    async def main() -> None:
        for steps in range(8):
            broker, subscription = await subscribed()
            ending = asyncio.create_task(subscription.end())
            for _ in range(steps):
                await asyncio.sleep(0)
            subscription.tags.ack([1, 2])
            await ending
            assert broker.channel.dead is None
            assert broker.heard.count("Basic.Ack") == 1
            subscription.release()
            await broker.closed()
            assert broker.heard[-1] == "Channel.Close"

    asyncio.run(main())


def test_what_is_unsettled_at_the_end_of_a_subscription_keeps_its_channel() -> None:
    async def main() -> None:
        broker, subscription = await subscribed()
        await subscription.end()
        subscription.release()
        assert broker.channel.dead is None
        subscription.tags.ack([1])
        assert broker.channel.dead is None
        subscription.tags.ack([2])
        assert broker.channel.dead is None, "the broker may not have passed them on yet"
        await broker.closed()
        assert broker.heard == ["Basic.Qos", "Basic.Cancel", "Basic.Qos", "Basic.Ack", "Basic.Ack", "Channel.Close"]

    asyncio.run(main())
