"""The way out of a process: one deadline, one session at a time, and the same operations for a child."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from umbel.errors import (
    BrokerUnavailable,
    NotSupported,
    PublishError,
    PublishRefused,
    ResultStoreUnavailable,
    ResultTimeout,
)
from umbel.gateway import Gateway, LocalGateway
from umbel.model import Message, QueueSpec, Result, evolve
from umbel.ports.clock import SystemClock
from umbel.runtime import LoopThread
from umbel.uplink import UplinkGateway

from .fakes import BlockingTransport, Broker, FakeStore, FakeTransport, Shelf, eventually

MESSAGE = Message(queue="q", headers={"id": "m-1", "task": "t"}, body=b"[]", properties={"correlation_id": "m-1"})
SLACK = 0.2 + 1.0
"""What a call may take beyond its deadline, and what a busy machine may add to that."""
RECORD = Result(task_id="m-1", state="SUCCESS", document=b"{}")


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def gateway(broker: Broker, shelf: Shelf) -> Iterator[LocalGateway]:
    clock = SystemClock()
    made = LocalGateway(LoopThread(), lambda: FakeTransport(broker, clock), lambda: FakeStore(shelf, clock), {})
    yield made
    broker.stall_close = False
    made.close()


@pytest.fixture
def child(gateway: LocalGateway) -> UplinkGateway:
    """A child's gateway whose upcalls the parent's gateway answers, over plain data."""

    def upcall(verb: str, payload: Any) -> Any:
        return gateway.runtime.call(gateway.answer(verb, payload), 5)

    return UplinkGateway(upcall)


# --- publishing -----------------------------------------------------------------------------------


def test_nothing_is_made_before_the_first_call(gateway: LocalGateway, broker: Broker) -> None:
    assert not gateway.runtime.running
    assert broker.sessions == 0
    gateway.publish([MESSAGE], 1)
    gateway.publish([MESSAGE], 1)
    assert broker.sessions == 1


def test_a_passing_fault_is_tried_again_on_a_new_session_within_the_deadline(
    gateway: LocalGateway, broker: Broker
) -> None:
    async def mend() -> None:
        await asyncio.sleep(0.08)
        broker.down = False

    broker.down = True
    gateway.runtime.submit(mend())
    gateway.publish([MESSAGE], 5)
    assert [m.id for m in broker.messages("q")] == ["m-1"]
    assert broker.sessions > 1
    assert broker.closed == broker.sessions - 1


def test_a_broker_that_stays_away_is_an_error_within_the_deadline(gateway: LocalGateway, broker: Broker) -> None:
    broker.down = True
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        gateway.publish([MESSAGE], 0.2)
    assert time.monotonic() - started < 0.2 + SLACK
    assert broker.sessions > 1


def test_a_driver_that_never_answers_is_an_error_within_the_deadline_naming_the_setting(
    gateway: LocalGateway, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeTransport, "publish", never)
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"0\.1 s \(\[broker\] publish_timeout\)"):
        gateway.publish([MESSAGE], 0.1)
    assert time.monotonic() - started < 0.1 + SLACK
    assert broker.closed == 1


def test_a_session_that_cannot_be_closed_holds_nobody_up(gateway: LocalGateway, broker: Broker) -> None:
    broker.down = broker.stall_close = True
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        gateway.publish([MESSAGE], 0.1)
    assert time.monotonic() - started < 0.1 + SLACK
    broker.down = False
    gateway.publish([MESSAGE], 1)


def test_a_refusal_is_raised_at_once_and_not_tried_again(gateway: LocalGateway, broker: Broker) -> None:
    asked: list[Message] = []
    broker.refuse = lambda message: not asked.append(message)  # type: ignore[func-returns-value]  # notes and refuses
    with pytest.raises(PublishRefused):
        gateway.publish([MESSAGE], 5)
    assert len(asked) == 1
    assert broker.sessions == 1


def test_an_answer_that_is_lost_is_asked_again_and_the_message_may_be_there_twice(
    gateway: LocalGateway, broker: Broker
) -> None:
    broker.lose_answers.append("publish")
    gateway.publish([MESSAGE], 5)
    assert [m.id for m in broker.messages("q")] == ["m-1", "m-1"]


def test_a_broken_session_is_replaced_once_however_many_ask(gateway: LocalGateway, broker: Broker) -> None:
    async def all_at_once() -> int:
        broken = gateway.transport
        await asyncio.gather(*(gateway.replace_transport(broken) for _ in range(20)))
        fresh = gateway.transport
        await gateway.replace_transport(broken)
        assert gateway.transport is fresh
        return broker.closed

    assert gateway.runtime.call(all_at_once(), 5) == 1
    assert broker.sessions == 2


def test_many_publishers_in_trouble_share_the_new_session(gateway: LocalGateway, broker: Broker) -> None:
    async def many() -> None:
        broker.down = True
        gateway.runtime.loop.call_later(0.03, setattr, broker, "down", False)
        await asyncio.gather(*(gateway.do_publish([MESSAGE], 5) for _ in range(20)))

    gateway.runtime.call(many(), 5)
    assert len(broker.messages("q")) == 20
    assert broker.sessions < 10


def test_a_driver_whose_close_fails_does_no_harm(
    gateway: LocalGateway, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: FakeTransport) -> None:
        raise OSError("already gone")

    monkeypatch.setattr(FakeTransport, "close", fail)
    broker.lose_answers.append("publish")
    gateway.publish([MESSAGE], 5)
    assert broker.sessions == 2
    monkeypatch.undo()


# --- publishing on the caller's own thread --------------------------------------------------------


@pytest.fixture
def blocking(broker: Broker) -> Iterator[LocalGateway]:
    made = LocalGateway(LoopThread(), lambda: BlockingTransport(broker, SystemClock()), None, {})
    yield made
    made.close()


def test_a_driver_that_can_publishes_on_the_callers_thread_with_no_loop(blocking: LocalGateway, broker: Broker) -> None:
    blocking.publish([MESSAGE], 1)
    assert broker.threads == [threading.current_thread().name]
    assert not blocking.runtime.running
    assert broker.messages("q") == [MESSAGE]


def test_a_blocking_publish_that_fails_is_tried_again_within_the_same_deadline(
    blocking: LocalGateway, broker: Broker
) -> None:
    broker.lose_answers.append("publish")
    blocking.publish([MESSAGE], 5)
    assert len(broker.messages("q")) == 2
    broker.down = True
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        blocking.publish([MESSAGE], 0.2)
    assert time.monotonic() - started < 0.2 + SLACK


def test_a_blocking_publish_that_is_refused_is_not_tried_again(blocking: LocalGateway, broker: Broker) -> None:
    broker.refuse = lambda _: True
    with pytest.raises(PublishRefused):
        blocking.publish([MESSAGE], 5)
    assert len(broker.threads) == 1


def test_a_session_that_never_needed_the_loop_is_closed_all_the_same(blocking: LocalGateway, broker: Broker) -> None:
    blocking.publish([MESSAGE], 1)
    blocking.close()
    assert broker.closed == 1


# --- queues as the settings describe them ---------------------------------------------------------

QUEUES = {
    "q": QueueSpec(name="q", type="quorum"),
    "mail": QueueSpec(name="mail", exchange="post"),
    "copy": QueueSpec(name="copy", exchange="post", exchange_type="fanout"),
    "other": QueueSpec(name="other", max_priority=5),
}


@pytest.mark.parametrize("cls", [FakeTransport, BlockingTransport])
def test_a_queue_is_declared_once_a_session_before_its_first_message(broker: Broker, cls: type[FakeTransport]) -> None:
    broker.capabilities = evolve(broker.capabilities, exchanges=True)
    gateway = LocalGateway(LoopThread(), lambda: cls(broker, SystemClock()), None, QUEUES)
    to_exchange = evolve(MESSAGE, queue="any", properties={"exchange": "post", "routing_key": "x"})
    try:
        for message in (MESSAGE, MESSAGE, to_exchange, to_exchange, evolve(MESSAGE, queue="unknown")):
            gateway.publish([message], 5)
        assert [spec.name for spec in broker.declared] == ["q", "mail", "copy"]
        assert [verb for verb, _ in broker.log][:4] == ["declare", "publish", "publish", "declare"]
        broker.fail += ["publish"] * 2  # a blocking publish is tried again on the same session first
        gateway.publish([MESSAGE], 5)
        assert {spec.name for spec in broker.declared[3:]} == {"q"}
    finally:
        gateway.close()


def test_a_queue_that_cannot_be_declared_refuses_its_own_messages_only(broker: Broker) -> None:
    class Strict(FakeTransport):
        async def declare(self, queues: Sequence[QueueSpec]) -> None:
            raise PublishRefused(f"queue {queues[0].name!r} exists with other properties")

    gateway = LocalGateway(LoopThread(), lambda: Strict(broker, SystemClock()), None, QUEUES)
    try:
        with pytest.raises(PublishRefused, match="queue 'q' exists with other properties"):
            gateway.publish([MESSAGE], 5)
        gateway.publish([evolve(MESSAGE, queue="unknown")], 5)
        assert broker.messages("q") == []
    finally:
        gateway.close()


@pytest.mark.parametrize("cls", [FakeTransport, BlockingTransport])
def test_a_broker_without_exchanges_is_sent_none(broker: Broker, cls: type[FakeTransport]) -> None:
    gateway = LocalGateway(LoopThread(), lambda: cls(broker, SystemClock()), None, {})
    try:
        with pytest.raises(NotSupported, match="task 't' is sent with exchange='post', and the broker"):
            gateway.publish([evolve(MESSAGE, properties={"exchange": "post"})], 5)
        assert broker.log == []
    finally:
        gateway.close()


# --- results --------------------------------------------------------------------------------------


def test_a_result_that_does_not_come_is_a_timeout_naming_the_task(gateway: LocalGateway) -> None:
    with pytest.raises(ResultTimeout, match=r"task m-1 has no result after 0\.02 s"):
        gateway.wait("m-1", 0.02)


def test_a_store_that_is_down_is_an_error(gateway: LocalGateway, shelf: Shelf) -> None:
    shelf.down = True
    with pytest.raises(ResultStoreUnavailable):
        gateway.get(["m-1"])


def test_without_a_result_store_every_look_says_so(broker: Broker) -> None:
    gateway = LocalGateway(LoopThread(), lambda: FakeTransport(broker, SystemClock()), None, {})
    assert not gateway.has_store
    try:
        for ask in (lambda: gateway.get(["x"]), lambda: gateway.wait("x", 1), lambda: gateway.forget(["x"])):
            with pytest.raises(NotSupported, match=r'\[results\] url is "disabled"'):
                ask()
    finally:
        gateway.close()


# --- both forms, and a child's form ---------------------------------------------------------------


def through(kind: str, gateway: LocalGateway, child: UplinkGateway) -> Gateway:
    return gateway if kind == "local" else child


@pytest.mark.parametrize("kind", ["local", "uplink"])
def test_every_operation_round_trips(
    kind: str, gateway: LocalGateway, child: UplinkGateway, broker: Broker, shelf: Shelf
) -> None:
    way = through(kind, gateway, child)
    way.publish([MESSAGE], 1)
    assert broker.messages("q") == [MESSAGE]
    assert way.get(["m-1"]) == {}
    way.put([RECORD])
    assert shelf.records == {"m-1": RECORD}
    assert way.get(["m-1", "m-2"]) == {"m-1": RECORD}
    assert way.wait("m-1", 1) == RECORD
    way.forget(["m-1"])
    assert shelf.records == {}


@pytest.mark.parametrize("kind", ["local", "uplink"])
def test_every_operation_can_be_awaited_on_any_loop(
    kind: str, gateway: LocalGateway, child: UplinkGateway, broker: Broker, shelf: Shelf
) -> None:
    way = through(kind, gateway, child)

    async def all_of_it() -> tuple[Mapping[str, Result], Result]:
        await way.apublish([MESSAGE], 1)
        shelf.records["m-1"] = RECORD
        found = await way.aget(["m-1"]), await way.await_("m-1", 1)
        await way.aforget(["m-1"])
        return found

    assert asyncio.run(all_of_it()) == ({"m-1": RECORD}, RECORD)
    assert broker.messages("q") == [MESSAGE]
    assert shelf.records == {}


@pytest.mark.parametrize("kind", ["local", "uplink"])
def test_errors_are_the_same_either_way(
    kind: str, gateway: LocalGateway, child: UplinkGateway, broker: Broker, shelf: Shelf
) -> None:
    way = through(kind, gateway, child)
    broker.refuse = lambda _: True
    shelf.down = True
    failing: list[tuple[type[Exception], Callable[[], Any]]] = [
        (PublishRefused, lambda: way.publish([MESSAGE], 1)),
        (ResultStoreUnavailable, lambda: way.put([RECORD])),
        (ResultStoreUnavailable, lambda: way.get(["m-1"])),
        (ResultStoreUnavailable, lambda: way.forget(["m-1"])),
        (ResultTimeout, lambda: way.wait("m-1", 0.01)),
    ]
    for error, call in failing:
        with pytest.raises(error):
            call()


def test_a_child_that_asks_for_something_else_is_refused_by_name(gateway: LocalGateway) -> None:
    with pytest.raises(PublishError, match="'reboot'"):
        gateway.runtime.call(gateway.answer("reboot", None))


def test_what_crosses_to_a_child_is_plain_data(gateway: LocalGateway, broker: Broker, shelf: Shelf) -> None:
    import marshal

    seen: list[Any] = []

    def upcall(verb: str, payload: Any) -> Any:
        seen.append(marshal.loads(marshal.dumps(payload)))
        reply = gateway.runtime.call(gateway.answer(verb, seen[-1]), 5)
        return marshal.loads(marshal.dumps(reply))

    child = UplinkGateway(upcall)
    child.publish([MESSAGE], 1)
    child.put([RECORD])
    assert child.wait("m-1", 1) == RECORD
    assert broker.messages("q") == [MESSAGE]


def test_closing_frees_the_session_and_the_next_use_builds_another(gateway: LocalGateway, broker: Broker) -> None:
    gateway.publish([MESSAGE], 1)
    gateway.close()
    assert broker.closed == 1
    assert not gateway.runtime.running
    gateway.publish([MESSAGE], 1)
    eventually(lambda: broker.sessions == 2)
