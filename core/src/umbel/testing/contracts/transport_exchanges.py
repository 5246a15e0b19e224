"""Laws of the transport port: the capability ``exchanges``, with it and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pytest

from umbel.errors import PublishRefused
from umbel.model import Message, QueueSpec
from umbel.testing.contracts.bench import law
from umbel.testing.contracts.transport_bench import TransportBench, TransportLaws, ids

ROUTES: Final[Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]]] = {
    "direct": ({"a": "eu", "b": "eu", "c": "us", "d": "eu.it"}, {"eu": "ab", "us": "c"}),
    "topic": (
        {"a": "eu.*", "b": "eu.#", "c": "*.it", "d": "#", "e": "eu.*.it"},
        {"eu": "bd", "eu.it": "abcd", "eu.nord.it": "bde", "us": "d"},
    ),
    "fanout": ({"a": "", "b": "eu", "c": "us"}, {"eu": "abc", "": "abc"}),
}
"""By type: the binding keys of queues, and which queues each routing key reaches."""


class ExchangeLaws(TransportLaws):
    """Messages reach the queues that are bound, and are refused where there are none."""

    @pytest.mark.parametrize("kind", ROUTES)
    @law
    async def test_a_message_for_an_exchange_reaches_the_queues_bound_to_it(
        self, bench: TransportBench, kind: str
    ) -> None:
        if not bench.capabilities.exchanges:
            return  # test_an_exchange_is_refused_where_there_are_none is about that
        transport, (bindings, routes) = bench.transport(), ROUTES[kind]
        specs = [_spec(bench, name, key, kind) for name, key in bindings.items()]
        await transport.declare(specs)
        await bench.transport().declare(specs)  # again: that changes nothing
        await bench.publish(transport, *(_routed(bench, key) for key in routes))
        for name in bindings:
            queue, keys = f"{bench.queue}-{name}", [key for key, reached in routes.items() if name in reached]
            got = await bench.take(transport, len(keys), queues=[queue]) if keys else []
            assert ids(got) == keys, f"queue {name!r} bound by {bindings[name]!r}"
            for delivery in got:
                assert (delivery.queue, delivery.message.queue) == (queue, queue)
                told = delivery.message.properties
                assert (told.get("exchange"), told.get("routing_key")) == (_exchange(bench), delivery.message.id)
            await bench.take_nothing(transport, queues=[queue])

    @law
    async def test_a_queue_with_an_exchange_is_reached_by_its_name_too(self, bench: TransportBench) -> None:
        if not bench.capabilities.exchanges:
            return
        transport = bench.transport()
        await transport.declare([_spec(bench, "a", "key"), _spec(bench, "b")])
        await bench.send(transport, "by name", queue=f"{bench.queue}-a")
        assert ids(await bench.take(transport, queues=[f"{bench.queue}-a"])) == ["by name"]
        await bench.publish(transport, _routed(bench, f"{bench.queue}-b"))  # no key of its own: bound by its name
        assert len(await bench.take(transport, queues=[f"{bench.queue}-b"])) == 1

    @law
    async def test_a_message_that_reaches_no_queue_is_refused(self, bench: TransportBench) -> None:
        if not bench.capabilities.exchanges:
            return
        transport = bench.transport()
        with pytest.raises(PublishRefused):
            await bench.publish(transport, _routed(bench, "key"))
        await transport.declare([_spec(bench, "a", "key")])
        with pytest.raises(PublishRefused):
            await bench.publish(transport, _routed(bench, "other"))
        await bench.publish(transport, _routed(bench, "key"))
        assert ids(await bench.take(transport, queues=[f"{bench.queue}-a"])) == ["key"]

    @law
    async def test_an_exchange_of_another_type_is_refused(self, bench: TransportBench) -> None:
        if not bench.capabilities.exchanges:
            return
        transport = bench.transport()
        await transport.declare([_spec(bench, "a", "key")])
        with pytest.raises(PublishRefused) as refused:
            await bench.transport().declare([_spec(bench, "b", "key", "fanout")])
        assert f"{bench.queue}-b" in str(refused.value), "the error names the queue"
        await bench.publish(transport, _routed(bench, "key"))
        assert ids(await bench.take(transport, queues=[f"{bench.queue}-a"])) == ["key"]

    @law
    async def test_an_exchange_is_refused_where_there_are_none(self, bench: TransportBench) -> None:
        if bench.capabilities.exchanges:
            return
        transport = bench.transport()
        with pytest.raises(PublishRefused, match="exchange"):
            await transport.declare([_spec(bench, "a", "key")])
        await bench.send(transport, "1")
        assert ids(await bench.take(transport)) == ["1"]


def _exchange(bench: TransportBench) -> str:
    return f"{bench.queue}.exchange"


def _spec(bench: TransportBench, name: str, key: str | None = None, kind: str = "direct") -> QueueSpec:
    return QueueSpec(name=f"{bench.queue}-{name}", exchange=_exchange(bench), exchange_type=kind, routing_key=key)


def _routed(bench: TransportBench, key: str) -> Message:
    return bench.message(key, f"{bench.queue}-elsewhere", properties={"exchange": _exchange(bench), "routing_key": key})
