"""What the laws of the transport port work with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from uuid import uuid4

import pytest

from umbel.capabilities import TransportCapabilities
from umbel.model import Action, Delivery, Message, QueueSpec, Settlement, evolve, without_route
from umbel.ports.clock import Clock
from umbel.ports.transport import Credit, QueueDepth, Transport
from umbel.testing.contracts.bench import Bench, closing

LONG: Final = 3600.0
"""A lease that does not end while a law lasts."""


class TransportBench(Bench):
    """Instances over one backend, one queue of the law's own, and short words for what every law does."""

    def __init__(
        self,
        make: Callable[[], Transport],
        *,
        clock: Clock | None,
        time_limit: float,
        patience: float,
        quiet: float,
        lease: float,
    ) -> None:
        super().__init__(clock=clock, time_limit=time_limit, patience=patience)
        self._make = make
        self.quiet = quiet
        self.lease = lease
        self.queue = f"kit-{uuid4().hex[:12]}"

    def transport(self) -> Transport:
        """One more machine."""
        made = self._make()
        self.close_after(made.close)
        return made

    @property
    def capabilities(self) -> TransportCapabilities:
        return self._make().capabilities

    def message(self, name: str, queue: str | None = None, **fields: Any) -> Message:
        fields.setdefault("body", name.encode())
        return Message(queue=queue or self.queue, headers={"id": name, "task": "kit.task"}, **fields)

    async def publish(self, transport: Transport, *messages: Message) -> None:
        await transport.publish(messages, timeout=self.patience)

    async def send(self, transport: Transport, *names: str, **fields: Any) -> None:
        """Publish messages of these ids, in this order."""
        await self.publish(transport, *(self.message(name, **fields) for name in names))

    async def take(
        self,
        transport: Transport,
        number: int = 1,
        *,
        queues: Sequence[str] = (),
        lease: float = LONG,
        credit: Credit | None = None,
    ) -> list[Delivery]:
        """The next ``number`` deliveries of one consumer, which is closed then. They stay leased."""
        got: list[Delivery] = []
        limit = asyncio.timeout(self.patience)
        stream = transport.consume(queues or [self.queue], credit=credit or Credit(number), lease=lease)
        try:
            async with limit, closing(stream):
                while len(got) < number:
                    got += await anext(stream)
        except TimeoutError:
            if limit.expired():
                pytest.fail(f"{len(got)} of {number} messages were handed out within {self.patience:g} s: {ids(got)}")
            raise
        assert len(got) == number, f"more deliveries than the credit of {number} allows: {ids(got)}"
        return got

    async def take_nothing(self, transport: Transport, *, queues: Sequence[str] = (), lease: float = LONG) -> None:
        """Fail if anything is handed out in the next moment."""
        limit = asyncio.timeout(self.quiet)
        stream = transport.consume(queues or [self.queue], credit=Credit(100), lease=lease)
        try:
            async with limit, closing(stream):
                while True:
                    batch = await anext(stream)
                    assert not batch, f"nothing was to be handed out now, but {ids(batch)} came"
        except TimeoutError:
            if not limit.expired():
                raise

    async def depth(self, transport: Transport, queue: str | None = None) -> QueueDepth:
        name = queue or self.queue
        return (await transport.depth([name]))[name]

    async def lease_ends(self, times: int = 1) -> None:
        """Let leases of ``self.lease`` seconds, or ``times`` as many, that were taken before this call end."""
        await self.elapse(self.lease * times * 1.05 + 0.02)

    async def sole_settled(self, transport: Transport, settlement: Settlement) -> bool:
        (done,) = await transport.settle([settlement])
        return done


class TransportLaws:
    """How the kit is fitted to a broker, and the fixtures that the laws use. Override what does not suit yours."""

    lease: float = 0.5
    """Seconds, in the drivers' time: the leases that laws let end. The shortest that the broker keeps exactly."""
    patience: float = 10.0
    """Seconds within which what must happen does happen."""
    quiet: float = 0.15
    """Seconds for which laws watch that nothing happens: longer than the way to the broker and back."""
    slack: float = 2.0
    """Seconds, in the drivers' time, by which a delayed message may be late."""
    silence: float = 5.0
    """Seconds after which a consumer yields an empty batch at the latest."""
    time_limit: float = 60.0
    """Seconds that one law may take."""
    many: int = 3000
    """Messages in the law about thousands."""
    queue_names: Sequence[str] = ("q", "Q", "_", "with space", "ümlaut-名前-🌸", "a.b/c:d*e#{f}%20", "n" * 120)
    """Names of queues that are all different; put behind a prefix of the test's own."""
    other_arguments: QueueSpec = QueueSpec(name="", arguments={"umbel-kit-unknown": 1})
    """A description of a queue (whatever its name) that differs from the default one."""

    @pytest.fixture
    def clock(self) -> Clock | None:
        """The clock that the factory gives to the drivers, if it does; a ``VirtualClock`` makes the laws wait in no time."""
        return None

    @pytest.fixture
    def unreachable(self) -> Callable[[], Transport] | None:
        """Makes a transport whose broker does not answer. None: there is no way to have such a one."""
        return None

    @pytest.fixture
    def sever(self) -> Callable[[Transport], Awaitable[None]] | None:
        """Cuts the connection of a transport as a failing network would. None: it has none that could be cut."""
        return None

    @pytest.fixture
    def restart(self) -> Callable[[], Awaitable[None]] | None:
        """Kills the broker and starts it again with what it has kept. None: there is no way to, or it is declared not durable."""
        return None

    @pytest.fixture
    def bench(self, make_transport: Callable[[], Transport], clock: Clock | None) -> TransportBench:
        return TransportBench(
            make_transport,
            clock=clock,
            time_limit=self.time_limit,
            patience=self.patience,
            quiet=self.quiet,
            lease=self.lease,
        )


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


def unrouted(message: Message) -> Message:
    """``message`` without the way it came, which a broker may tell in its properties."""
    return evolve(message, properties=without_route(message.properties))


def ack(delivery: Delivery) -> Settlement:
    return Settlement(delivery=delivery, action=Action.ACK)


def requeue(delivery: Delivery, *, counted: bool = True, delay: float = 0.0) -> Settlement:
    return Settlement(delivery=delivery, action=Action.REQUEUE, counted=counted, delay=delay)


def dead(delivery: Delivery, cause: str = "no") -> Settlement:
    return Settlement(delivery=delivery, action=Action.DEAD, cause=cause)


def in_threads(*calls: Callable[[], object]) -> list[BaseException]:
    """Run ``calls`` at once, each in a thread of its own; what they raised."""
    raised: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not [thread for thread in threads if thread.is_alive()], "a blocking call does not return"
    return raised
