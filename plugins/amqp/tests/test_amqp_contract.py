"""The laws of the transport port, against a real RabbitMQ, with queues of either kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import pytest

from umbel.model import QueueSpec
from umbel.ports.result_store import ResultStore
from umbel.ports.transport import Transport
from umbel.testing.contracts import ResultStoreContract, TransportContract
from umbel_amqp.options import TransportOptions
from umbel_amqp.result_store import RpcResultStore
from umbel_amqp.transport import AmqpTransport


class AmqpLaws(TransportContract):
    options = TransportOptions()
    quiet = 0.25
    patience = 20.0
    other_arguments = QueueSpec(name="", arguments={"x-max-length": 10})

    @pytest.fixture
    def make_transport(self, rabbitmq_url: str) -> Callable[[], AmqpTransport]:
        return lambda: AmqpTransport(rabbitmq_url, options=self.options)

    @pytest.fixture
    def unreachable(
        self, make_proxy: Callable[[int], object], rabbitmq: object
    ) -> Iterator[Callable[[], AmqpTransport]]:
        """A broker that takes connections and never says a word."""
        proxy = make_proxy(rabbitmq.port)
        proxy.stall()
        yield lambda: AmqpTransport(f"amqp://guest:guest@127.0.0.1:{proxy.port}", options=self.options)
        proxy.heal()

    @pytest.fixture
    def sever(self) -> Callable[[Transport], Awaitable[None]]:
        async def cut(transport: Transport) -> None:
            assert isinstance(transport, AmqpTransport)
            for slot in (transport._in, transport._out):
                if slot.session is not None:
                    slot.session.connection._transport.abort()

        return cut


class TestQuorumQueues(AmqpLaws):
    pass


class TestClassicQueues(AmqpLaws):
    options = TransportOptions(queue_type="classic", max_priority=9)


class TestRpcResultStore(ResultStoreContract):
    patience = 20.0
    quiet = 0.25

    @pytest.fixture
    def make_store(self, rabbitmq_url: str) -> Callable[[], RpcResultStore]:
        return lambda: RpcResultStore(rabbitmq_url)

    @pytest.fixture
    def sever(self) -> Callable[[ResultStore], Awaitable[None]]:
        async def cut(store: ResultStore) -> None:
            assert isinstance(store, RpcResultStore)
            for slot in (store._in, store._out):
                if slot.session is not None:
                    slot.session.connection._transport.abort()

        return cut
