"""Unique calls with a real worker in memory, at times that the test decides; a process may die between any two steps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from umbel import AsyncResult, Umbel, unique
from umbel.claiming import UNIQUE
from umbel.errors import (
    BrokerUnavailable,
    DuplicateTask,
    EncodeError,
    NotSupported,
    PublishRefused,
    ResultStoreUnavailable,
    TaskRevoked,
)
from umbel.model import Message
from umbel.ports.clock import VirtualClock
from umbel.result import NotSent
from umbel.task import Task
from umbel.testing.harness import Harness, in_memory

NOON = 1_750_000_000.0
SENDING = 10.0
"""Seconds that a claim lasts whose message is being sent: the publish timeout and a margin."""


class Shop:
    """An app whose one task notes what it is called with, and stands where the test wants it to."""

    def __init__(self, **options: Any) -> None:
        self.app = Umbel("shop")
        self.ran: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Semaphore(0)
        self.failures = 0

        @self.app.task(name="shop.order", max_retries=5, retry_delay=60, **options)
        def order(item: Any = None, amount: int = 1) -> Any:
            self.inside.release()
            assert self.gate.wait(10)
            self.ran.append(item)
            if self.failures:
                self.failures -= 1
                order.retry()
            return item

        self.order: Task[..., Any] = order

    @contextmanager
    def open(self, *, work: bool = True, **settings: Any) -> Iterator[Harness]:
        with in_memory(self.app, clock=VirtualClock(NOON), settings=settings) as harness:
            if not work:
                yield harness
                return
            with harness.worker():
                try:
                    yield harness
                finally:
                    self.gate.set()

    def held(self) -> list[str]:
        """Ids of the calls that hold a key."""
        return [lease["owner"] for lease in self.app.gateway.ask("claims", UNIQUE)]

    def start(self, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Send a call and wait until it stands inside."""
        self.gate.clear()
        sent = self.order.apply_async(args, **options)
        assert self.inside.acquire(timeout=10)
        return sent


# --- what is a duplicate --------------------------------------------------------------------------


def test_while_one_waits_or_runs_no_other_of_its_key_is_sent() -> None:
    shop = Shop(unique="until_done")
    with shop.open() as harness:
        first = shop.start("tea")
        second, other = shop.order.delay("tea"), shop.order.delay("milk")
        assert (first.sent, second.sent, other.sent) == (True, False, True)
        shop.gate.set()
        harness.run_until_idle()
        assert sorted(shop.ran) == ["milk", "tea"]
        assert shop.held() == []
        assert shop.order.delay("tea").sent
        harness.run_until_idle()
        assert len(harness.published) == 3


def test_a_dropped_call_says_so() -> None:
    shop = Shop(unique="until_done")
    with shop.open() as harness:
        first = shop.start("tea")
        second = shop.order.delay("tea")
        assert isinstance(second, NotSent)
        assert (second.state, second.ready(), second.successful()) == ("REVOKED", True, False)
        assert second.existing == first
        assert isinstance(second.result, TaskRevoked)
        with pytest.raises(DuplicateTask, match=rf"{second.id}\] was not sent: {first.id} has the same unique key"):
            second.get(timeout=30)
        assert isinstance(second.get(propagate=False), DuplicateTask)
        with pytest.raises(DuplicateTask):
            asyncio.run(second.aget())
        second.forget()
        assert len(harness.published) == 1


def test_what_is_unique_until_its_start_may_wait_once_beside_one_that_runs() -> None:
    shop = Shop(unique="until_start")
    with shop.open(**{"worker.concurrency": 1}) as harness:
        shop.start("tea")
        assert [shop.order.delay("tea").sent for _ in range(3)] == [True, False, False]
        shop.gate.set()
        harness.run_until_idle()
        assert shop.ran == ["tea", "tea"]
        assert shop.held() == []


def test_a_window_lets_one_call_through_whatever_becomes_of_it() -> None:
    shop = Shop(unique=3600)
    with shop.open() as harness:
        assert [shop.order.delay("tea").sent for _ in range(2)] == [True, False]
        harness.advance(3590)
        assert not shop.order.delay("tea").sent
        harness.advance(11)
        assert shop.order.delay("tea").sent


def test_the_settings_can_make_a_task_unique() -> None:
    shop = Shop()
    with shop.open(tasks={"shop.order": {"unique": "10m"}}) as harness:
        assert [shop.order.delay("tea").sent for _ in range(2)] == [True, False]
        harness.advance(minutes=11)
        assert shop.order.delay("tea").sent
        assert not shop.app.send_task("shop.order", ["tea"]).sent


def test_a_call_has_the_last_word() -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False):
        assert shop.order.delay("tea").sent
        assert shop.order.apply_async(("tea",), unique=None).sent
        assert shop.order.apply_async(("milk",), unique_key="mine").sent
        assert not shop.order.apply_async(("bread",), unique_key="mine").sent
        with pytest.raises(DuplicateTask):
            shop.order.apply_async(("tea",), on_conflict="raise")


def test_calls_of_several_are_unique_each() -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False) as harness:
        assert [handle.sent for handle in shop.order.map_delay([("tea",), ("milk",), ("tea",)])] == [True, True, False]
        assert [handle.sent for handle in asyncio.run(shop.order.amap_delay([("tea",), ("jam",)]))] == [False, True]
        assert len(harness.published) == 3


def test_a_hundred_callers_at_once_send_one() -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False) as harness, ThreadPoolExecutor(20) as pool:
        handles = list(pool.map(lambda _: shop.order.delay("tea"), range(100)))
        assert sum(handle.sent for handle in handles) == 1
        assert len(harness.published) == 1


# --- the key --------------------------------------------------------------------------------------


def same(shop: Shop, one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    with shop.open(work=False):
        assert shop.order.apply_async(*one).sent
        return not shop.order.apply_async(*other).sent


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ((("tea",), {}), ((), {"item": "tea"}), True),
        ((("tea",), {}), (("tea", 1), {}), True),
        ((("tea",), {}), (("tea", 2), {}), False),
        (((1,), {}), (("1",), {}), False),
        ((({"a": 1, "b": [2]},), {}), (({"b": [2], "a": 1},), {}), True),
        (((None,), {}), ((), {}), True),
    ],
)
def test_by_default_all_arguments_are_the_key(one: Any, other: Any, equal: bool) -> None:
    assert same(Shop(unique="until_done"), one, other) is equal


@pytest.mark.parametrize("key", ["{item}", lambda item, amount=1: item, lambda item, *_: [item, "x"]])
def test_the_key_is_made_of_some_of_them(key: Any) -> None:
    shop = Shop(unique="until_done", unique_key=key)
    assert same(shop, (("tea", 1), {}), (("tea", 2), {}))
    assert not same(shop, (("tea", 1), {}), (("milk", 1), {}))


def test_a_bound_task_is_not_part_of_its_key() -> None:
    app = Umbel("shop")

    @app.task(bind=True, unique="until_done", unique_key="{x}")
    def bound(self: Any, x: int, y: int = 0) -> None:
        raise AssertionError("nothing runs here")

    with in_memory(app):
        assert bound.delay(1).sent
        assert not bound.delay(1, y=5).sent


def test_what_makes_no_key_is_refused_before_anything_is_sent() -> None:
    shop = Shop(unique="until_done", unique_key="{user.id}")
    with shop.open(work=False) as harness:
        with pytest.raises(ValueError, match=r"unique_key '{user.id}' of task 'shop.order' cannot be made of these"):
            shop.order.delay("tea")
        with pytest.raises(EncodeError, match=r"no unique key can be made of its arguments .a object."):
            Shop(unique="until_done").order.delay(object())
        assert harness.published == []


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"unique": "for ever"}, "until_start"),
        ({"unique": 0}, "greater than 0"),
        ({"unique": True}, "greater than 0"),
        ({"unique": 5, "throttle": 5}, "different ways"),
        ({"unique": 5, "on_conflict": "replace"}, "a window may have run"),
        ({"on_conflict": "explode"}, "on_conflict is"),
        ({"throttle": 5, "throttle_edge": "middle"}, "throttle_edge is"),
    ],
)
def test_options_that_cannot_be_are_refused_where_they_are_written(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Shop(**options)


def test_options_of_a_call_that_is_not_unique_are_refused() -> None:
    shop = Shop()
    with shop.open(work=False), pytest.raises(ValueError, match=r"'shop.order' is not unique: give unique"):
        shop.order.apply_async(("tea",), on_conflict="raise")


# --- what becomes of the other --------------------------------------------------------------------


def test_the_handle_of_the_other_is_returned() -> None:
    shop = Shop(unique="until_done", on_conflict="return")
    with shop.open():
        first = shop.start("tea")
        second = shop.order.delay("tea")
        assert (second.id, second.sent) == (first.id, False)
        shop.gate.set()
        assert second.get(timeout=30) == "tea"


def test_the_other_is_named_by_the_error() -> None:
    shop = Shop(unique="until_done", on_conflict="raise")
    with shop.open(work=False):
        first = shop.order.delay("tea")
        with pytest.raises(DuplicateTask) as raised:
            shop.order.apply_async(("tea",), task_id="mine")
        assert (raised.value.existing, raised.value.task_id, raised.value.task) == (first.id, "mine", "shop.order")


@pytest.mark.parametrize("until", ["until_start", "until_done"])
def test_one_that_waits_is_replaced(until: str) -> None:
    shop = Shop(unique=until, unique_key="tea", on_conflict="replace")
    with shop.open() as harness:
        handles = [shop.order.apply_async((n,), countdown=60) for n in range(3)]
        assert all(handle.sent for handle in handles)
        for old in handles[:2]:
            with pytest.raises(TaskRevoked, match="replaced by task"):
                old.get(timeout=30)
        harness.advance(61)
        assert (shop.ran, shop.held()) == ([2], [])
        assert handles[2].get(timeout=30) == 2


def test_one_that_runs_is_not_replaced() -> None:
    shop = Shop(unique="until_done", on_conflict="replace")
    with shop.open():
        first = shop.start("tea")
        second = shop.order.delay("tea")
        assert isinstance(second, NotSent)
        assert second.existing == first


# --- how it ends ----------------------------------------------------------------------------------


def test_a_retry_keeps_the_key() -> None:
    shop = Shop(unique="until_done")
    shop.failures = 2
    with shop.open() as harness:
        first = shop.order.delay("tea")
        harness.run_until_idle()
        assert (first.state, shop.held()) == ("RETRY", [first.id])
        assert not shop.order.delay("tea").sent
        harness.advance(60)
        assert not shop.order.delay("tea").sent
        harness.advance(60)
        assert (first.get(timeout=30), shop.held(), shop.ran) == ("tea", [], ["tea"] * 3)


def test_a_retry_of_what_is_unique_until_its_start_is_nobodys_duplicate() -> None:
    shop = Shop(unique="until_start")
    shop.failures = 1
    with shop.open() as harness:
        first = shop.order.delay("tea")
        harness.run_until_idle()
        second = shop.order.apply_async(("tea",), countdown=100)
        assert second.sent
        harness.advance(60)
        assert (first.get(timeout=30), shop.held()) == ("tea", [second.id])
        harness.advance(60)
        assert (second.get(timeout=30), shop.held()) == ("tea", [])


def test_a_failure_frees_the_key() -> None:
    shop = Shop(unique="until_done")
    shop.failures = 6
    with shop.open() as harness:
        first = shop.order.delay("tea")
        harness.advance(600)
        assert (first.state, shop.held()) == ("FAILURE", [])


def test_what_expires_frees_the_key_whether_its_message_comes_or_not() -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False) as harness:
        assert shop.order.apply_async(("tea",), expires=30).sent
        harness.clock.advance(29)
        assert not shop.order.delay("tea").sent
        harness.clock.advance(2)
        assert shop.order.delay("tea").sent


def test_what_is_revoked_frees_the_key_at_once() -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False):
        first = shop.order.delay("tea")
        shop.app.control.revoke(first.id)
        assert shop.order.delay("tea").sent
        shop.app.control.revoke("someone else")
        assert not shop.order.delay("tea").sent


def test_what_could_not_be_sent_holds_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False):

        def refuse(messages: Any, timeout: float) -> None:
            raise errors.pop()

        for error in (PublishRefused("no"), BrokerUnavailable("gone")):
            errors = [error]
            with monkeypatch.context() as patch:
                patch.setattr(shop.app.gateway, "publish", refuse)
                with pytest.raises(type(error)):
                    shop.order.delay("tea")
            assert shop.held() == []
        assert shop.order.delay("tea").sent


def test_a_conflict_and_what_is_behind_it_block_nothing_else() -> None:
    shop = Shop(unique="until_done", unique_key="{item}")
    with shop.open(**{"worker.concurrency": 2}) as harness:
        shop.start("tea")
        before = shop.order.delay("tea", 2)
        rest = [shop.order.apply_async((n,), unique=None) for n in range(20)]
        shop.gate.set()
        assert [handle.get(timeout=30) for handle in rest] == list(range(20))
        assert not before.sent
        harness.run_until_idle()


# --- a process may die between any two steps ------------------------------------------------------


def dying(shop: Shop, steps_taken: int, *args: Any, **options: Any) -> Message:
    """A sender that dies after so many steps: claim, publish, extend."""
    plan = shop.order.unique_plan(args, None, options)
    message = shop.order.message(args, None, **options)
    assert plan is not None
    steps = unique._steps(shop.app, plan, message, 5.0)
    answer: Any = None
    for _ in range(steps_taken):
        kind, payload = steps.send(answer)
        answer = None
        if kind == "ask":
            answer = unique._read(payload, shop.app.gateway.ask(*payload))
        else:
            shop.app.client.send(payload)
    return message


def test_who_dies_before_sending_frees_the_key_in_seconds() -> None:
    shop = Shop(unique="until_done")
    with shop.open() as harness:
        dying(shop, 1, "tea")
        assert not shop.order.delay("tea").sent
        harness.advance(SENDING + 0.1)
        assert shop.order.delay("tea").sent
        harness.run_until_idle()
        assert shop.ran == ["tea"]


@pytest.mark.parametrize("until", ["until_start", "until_done"])
def test_who_dies_after_sending_has_sent(until: str) -> None:
    """Its claim ends in seconds, and the worker takes it anew."""
    shop = Shop(unique=until)
    with shop.open() as harness:
        message = dying(shop, 2, "tea", countdown=60)
        harness.advance(59)
        harness.advance(2)
        assert (shop.app.result(message.id).get(timeout=30), shop.held()) == ("tea", [])


@pytest.mark.parametrize("until", ["until_start", "until_done"])
def test_a_message_whose_key_has_passed_to_another_gives_way_to_that_one(until: str) -> None:
    shop = Shop(unique=until)
    with shop.open() as harness:
        message = dying(shop, 2, "tea", countdown=60)
        harness.advance(SENDING + 0.1)
        second = shop.order.apply_async(("tea",), countdown=120)
        assert second.sent
        harness.advance(300)
        with pytest.raises(TaskRevoked, match=f"gives way to task {second.id}"):
            shop.app.result(message.id).get(timeout=30)
        assert (second.get(timeout=30), shop.ran, shop.held()) == ("tea", ["tea"], [])


def test_a_message_waits_for_one_that_is_only_being_sent() -> None:
    """Who sends that one may die: then nobody is left to give way to."""
    shop = Shop(unique="until_done")
    with shop.open() as harness:
        message = dying(shop, 2, "tea", countdown=SENDING + 1)
        harness.clock.advance(SENDING + 0.1)
        dying(shop, 1, "tea")
        harness.advance(2)
        assert shop.ran == []
        harness.advance(SENDING)
        assert shop.app.result(message.id).get(timeout=30) == "tea"


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_who_dies_while_replacing_loses_nothing(steps: int) -> None:
    shop = Shop(unique="until_done", unique_key="tea", on_conflict="replace")
    with shop.open() as harness:
        old = shop.order.apply_async(("old",), countdown=60)
        # 1: sees the other; 2: takes its key away; 3: claims it; 4: sends.
        message = dying(shop, steps, "new", countdown=60)
        harness.advance(200)
        assert shop.ran == ["old"], "its key was free again, and it was first in its queue"
        assert (old.state, shop.held()) == ("SUCCESS", [])
        assert steps < 4 or shop.app.result(message.id).state == "REVOKED"


# --- stores ---------------------------------------------------------------------------------------


def test_a_store_without_claims_refuses_at_the_call(tmp_path: Any) -> None:
    app = Umbel("shop", broker=f"sqlite:///{tmp_path}/broker.db", results="disabled")

    @app.task(unique="until_done")
    def order() -> None:
        raise AssertionError("nothing runs here")

    with app, pytest.raises(NotSupported, match=r"\[results\] url"):
        order.delay()


def test_a_store_that_is_down_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False) as harness:

        async def down(*_: Any, **__: Any) -> None:
            raise ResultStoreUnavailable("down")

        monkeypatch.setattr(harness._store, "claim", down)
        with pytest.raises(ResultStoreUnavailable):
            shop.order.delay("tea")
        assert harness.published == []


def test_a_store_that_fails_in_the_worker_delays_unique_tasks_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(unique="until_done")
    with shop.open(work=False) as harness:
        first = shop.order.delay("tea")
        plain = shop.order.apply_async(("milk",), unique=None)

        async def down(*_: Any, **__: Any) -> None:
            raise ResultStoreUnavailable("down")

        with monkeypatch.context() as patch:
            patch.setattr(harness._store, "claim", down)
            with harness.worker():
                assert plain.get(timeout=30) == "milk"
                assert shop.ran == ["milk"]
                patch.undo()
                harness.advance(2)
                assert first.get(timeout=30) == "tea"


# --- debounce and throttle ------------------------------------------------------------------------


def test_of_a_burst_the_last_call_runs_after_a_quiet_time() -> None:
    shop = Shop(debounce=2, unique_key="tea")
    with shop.open() as harness:
        for n in range(100):
            assert shop.order.delay(n).sent
            harness.advance(0.5)
        assert shop.ran == []
        harness.advance(1.4)
        assert shop.ran == []
        harness.advance(0.2)
        assert shop.ran == [99]
        shop.order.delay("next")
        harness.advance(2.1)
        assert (shop.ran, shop.held()) == ([99, "next"], [])


def test_a_burst_that_never_ends_runs_now_and_then() -> None:
    shop = Shop(debounce=2, debounce_max=5, unique_key="tea")
    with shop.open() as harness:
        for n in range(20):
            shop.order.delay(n)
            harness.advance(1)
        assert shop.ran == [4, 9, 14, 19]


def test_a_throttle_lets_the_first_through_at_once() -> None:
    shop = Shop(throttle=10, unique_key="tea")
    with shop.open() as harness:
        for n in range(25):
            shop.order.delay(n)
            harness.advance(1)
        assert shop.ran == [0, 10, 20]


def test_a_throttle_lets_the_last_through_at_the_end() -> None:
    shop = Shop(throttle=10, throttle_edge="trailing", unique_key="tea")
    with shop.open() as harness:
        for n in range(25):
            shop.order.delay(n)
            harness.advance(1)
        harness.advance(10)
        assert shop.ran == [9, 19, 24]


def test_a_debounced_call_has_no_time_of_its_own() -> None:
    shop = Shop(debounce=2)
    with shop.open(work=False), pytest.raises(ValueError, match="give no countdown or eta"):
        shop.order.apply_async(("tea",), countdown=5)
