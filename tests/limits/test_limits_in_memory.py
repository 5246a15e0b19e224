"""Fleet-wide rates and concurrency keys on a whole worker in memory, with time in the test's hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from cluster import until

from umbel import Umbel
from umbel.errors import NotSupported
from umbel.model import Message
from umbel.ports.clock import VirtualClock
from umbel.protocol import make_headers
from umbel.testing.harness import Harness, in_memory

NOON = 1_800_000_000.0


@contextmanager
def working(app: Umbel, **settings: Any) -> Iterator[Harness]:
    with in_memory(app, clock=VirtualClock(NOON), settings=settings) as harness, harness.worker():
        yield harness


class Together:
    """Counts what runs at once, by key."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.ran: list[str] = []
        self.gate = threading.Event()
        self._lock = threading.Lock()

    def run(self, key: str, seconds: float = 0.01) -> None:
        with self._lock:
            self.ran.append(key)
            self.now[key] = self.now.get(key, 0) + 1
            self.most[key] = max(self.most.get(key, 0), self.now[key])
        self.gate.wait(seconds)
        with self._lock:
            self.now[key] -= 1


def claimed(app: Umbel) -> list[str]:
    """The slots that are held."""
    gateway: Any = app.gateway
    return [lease.name for lease in gateway.runtime.call(gateway.store.claims("limit:"))]


def test_a_rate_of_the_fleet_spreads_starts_over_virtual_time() -> None:
    app = Umbel("shop")
    hours: list[float] = []

    @app.task(rate_limit="1/h", rate_limit_scope="fleet")
    def slow() -> None:
        hours.append(round((app.clock.time() - NOON) / 3600, 2))

    with working(app) as harness:
        for _ in range(8):
            slow.delay()
        harness.run_until_idle()
        assert hours == [0]
        harness.advance(hours=7.01)
    assert hours == list(range(8))


def test_a_rate_of_the_fleet_outlives_the_worker() -> None:
    """A restarted worker begins with what its predecessor has left of the rate: nothing."""
    app = Umbel("shop")
    started: list[float] = []

    @app.task(rate_limit="2/h", rate_limit_scope="fleet")
    def slow() -> None:
        started.append(app.clock.time() - NOON)

    with in_memory(app, clock=VirtualClock(NOON)) as harness:
        with harness.worker():
            slow.delay()
            harness.run_until_idle()
        harness._worker = None
        harness._ready.clear()
        harness._thread = threading.Thread(target=harness._run)
        slow.delay()
        with harness.worker():
            harness.run_until_idle()
            assert started == [0]
            harness.advance(minutes=31)
    assert started == pytest.approx([0, 1800], abs=1)


def test_no_more_calls_of_a_key_run_at_once_than_its_limit_and_other_keys_do_not_wait() -> None:
    app, together = Umbel("shop"), Together()

    @app.task(concurrency_limit=2, concurrency_key="{tenant}")
    def work(tenant: str, number: int) -> None:
        together.run(tenant)

    with working(app, **{"worker.concurrency": 8}) as harness:
        for number in range(20):
            work.delay("a", number)
        for number in range(3):
            work.delay(tenant="b", number=number)
        harness.advance(minutes=2)
    assert sorted(together.ran) == ["a"] * 20 + ["b"] * 3
    assert together.most == {"a": 2, "b": 2}
    assert together.ran.index("b") < 8


def test_a_limit_without_a_key_is_for_the_task_as_a_whole() -> None:
    app, together = Umbel("shop"), Together()

    @app.task(concurrency_limit=1)
    def work(number: int) -> None:
        together.run("all")

    with working(app, **{"worker.concurrency": 4}) as harness:
        for number in range(6):
            work.delay(number)
        harness.advance(minutes=2)
    assert together.most == {"all": 1}
    assert len(together.ran) == 6


def test_a_key_can_be_given_with_the_call() -> None:
    app = Umbel("shop")
    work = app.task(concurrency_limit=1, concurrency_key="{tenant}", name="work")(lambda tenant: tenant)
    with working(app) as harness:
        work.apply_async(["a"], key="given")
        work.delay("a")
        work.s("b").apply_async(key=7)
        harness.run_until_idle()
        assert [message.headers["umbel-key"] for message in harness.published] == ["given", "a", "7"]


def test_arguments_that_do_not_give_the_key_are_told_to_the_caller() -> None:
    app = Umbel("shop")
    work = app.task(concurrency_limit=1, concurrency_key="{tenant[id]}", name="work")(lambda tenant: tenant)
    with in_memory(app):
        with pytest.raises(ValueError, match=r"concurrency_key '\{tenant\[id\]\}' cannot be filled in"):
            work.delay({"name": "a"})
        with pytest.raises(ValueError, match="missing a required argument"):
            work.delay()
        app.send_task("work", [{"id": 3}])


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_message_without_a_key_gets_it_from_its_body_and_keeps_its_id_and_retries(protocol: int) -> None:
    """As producers send it that know nothing of keys."""
    app, together = Umbel("shop"), Together()

    @app.task(bind=True, name="work", concurrency_limit=1, concurrency_key="{tenant}")
    def work(self: Any, tenant: str) -> str:
        together.run(tenant)
        return f"{self.request.id} {self.request.retries} {self.request.headers['umbel-key']}"

    with working(app, **{"worker.concurrency": 4}) as harness:
        codec = app.codec
        messages = []
        for n in range(4):
            if protocol == 2:
                headers = {**make_headers("work", f"t{n}", retries=2)}
                body: Any = [["acme"], {}, {}]
            else:
                headers = {}
                body = {"task": "work", "id": f"t{n}", "args": ["acme"], "kwargs": {}, "retries": 2}
            messages.append(Message(queue="default", headers=headers, body=codec.encode(body).body))
        app.client.send(messages)
        harness.advance(minutes=1)
        assert [app.result(f"t{n}").get(1) for n in range(4)] == [f"t{n} 2 acme" for n in range(4)]
    assert together.most == {"acme": 1}


def test_a_slot_is_given_back_whatever_the_end() -> None:
    app = Umbel("shop")
    ends: list[str] = []

    @app.task(concurrency_limit=1, concurrency_key="{end}-", max_retries=2, retry_delay=1, bind=True)
    def work(self: Any, end: str) -> None:
        ends.append(end)
        if end == "fail":
            raise ValueError(end)
        if end == "retry":
            raise self.retry(countdown=1)

    with working(app) as harness:
        for _ in range(2):
            for end in ("fail", "retry", "end"):
                work.delay(end)
        harness.advance(minutes=2)
        worker = harness._worker
        assert worker is not None
        assert worker.slots.held == {}
        until(lambda: not claimed(app), "every slot is free")
    assert sorted(ends) == ["end"] * 2 + ["fail"] * 2 + ["retry"] * 6


def test_a_rate_and_a_key_together_are_both_kept() -> None:
    app, together = Umbel("shop"), Together()
    at: list[float] = []

    @app.task(concurrency_limit=1, rate_limit="1/m", rate_limit_scope="fleet")
    def work() -> None:
        at.append(app.clock.time() - NOON)
        together.run("all")

    with working(app, **{"worker.concurrency": 4}) as harness:
        for _ in range(4):
            work.delay()
        harness.advance(minutes=10)
    assert len(at) == 4
    assert all(later - earlier >= 59.9 for earlier, later in pairwise(at))


def test_a_limit_changed_while_the_worker_runs_holds_from_then_on() -> None:
    app, together = Umbel("shop"), Together()

    @app.task(name="work", concurrency_limit=1)
    def work() -> None:
        together.run("all", 0.05)

    with working(app, **{"worker.concurrency": 6}) as harness:
        worker = harness._worker
        assert worker is not None

        async def change() -> None:
            worker.operations.concurrency_limit("work", 3)

        app.runtime.call(change())
        for _ in range(12):
            work.delay()
        harness.advance(minutes=2)
    assert together.most == {"all": 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate_limit": "1/s", "rate_limit_scope": "fleet"}, 'rate_limit_scope = "fleet"'),
        ({"concurrency_limit": 3}, "concurrency_limit = 3"),
    ],
)
def test_without_a_store_a_limit_of_the_fleet_is_refused_in_a_sentence(options: Any, words: str) -> None:
    app = Umbel("shop", settings={"broker.url": "memory://x", "results.url": "disabled", "worker.pool": "threads"})
    app.task(name="work", **options)(lambda: None)
    with pytest.raises(NotSupported, match=r"task 'work' has .*\[results\] url") as caught:
        app.worker()
    assert words in str(caught.value)
    app.close()
