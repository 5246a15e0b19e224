"""An app in memory: what runs is what would run in production, at times that the test decides."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from umbel import Umbel, hookimpl
from umbel.errors import NotSupported, PluginNotFound, TaskRevoked, UmbelError
from umbel.model import State, dead_letter_queue
from umbel.plugins import loader
from umbel.ports.clock import SystemClock, VirtualClock
from umbel.testing.harness import Harness, in_memory

DAY = 86_400.0
NOON = 1_750_000_000.0


@contextmanager
def working(app: Umbel, **settings: Any) -> Iterator[Harness]:
    with in_memory(app, clock=VirtualClock(NOON), settings=settings) as harness, harness.worker():
        yield harness


# --- virtual time ---------------------------------------------------------------------------------


def test_a_month_of_daily_retries_runs_at_its_own_times() -> None:
    app = Umbel("shop")
    days: list[float] = []

    @app.task(bind=True, max_retries=None, retry_delay=DAY)
    def until_paid(self: Any) -> str:
        days.append((app.clock.time() - NOON) / DAY)
        if len(days) <= 30:
            raise self.retry()
        return f"paid after {self.request.retries} reminders"

    with working(app) as harness:
        handle = until_paid.delay()
        harness.run_until_idle()
        assert (days, handle.state) == ([0], State.RETRY)
        harness.advance(days=29.5)
        assert (days, handle.state) == (list(range(30)), State.RETRY)
        harness.advance(days=0.5)
        assert handle.get(1) == "paid after 30 reminders"
    assert days == list(range(31))
    assert [call.retries for call in harness.calls(until_paid)] == list(range(31))


def test_a_month_of_hourly_retries_stops_at_every_hour() -> None:
    app = Umbel("shop")
    hours: list[float] = []

    @app.task(bind=True, max_retries=None, retry_delay=3600)
    def until_there(self: Any) -> None:
        hours.append((app.clock.time() - NOON) / 3600)
        raise self.retry()

    with working(app) as harness:
        until_there.delay()
        harness.advance(days=30)
    assert hours == list(range(721))


def test_an_exponential_backoff_takes_its_whole_length() -> None:
    app = Umbel("shop")
    hours: list[float] = []
    backoff = {"retry_backoff": 3600, "retry_backoff_max": 10 * DAY, "retry_jitter": False}

    @app.task(autoretry_for=(ValueError,), max_retries=8, **backoff)
    def fail() -> None:
        hours.append((app.clock.time() - NOON) / 3600)
        raise ValueError("not yet")

    with working(app) as harness:
        handle = fail.delay()
        harness.advance(days=31)
        assert isinstance(handle.get(1, propagate=False), ValueError)
    assert hours == [2**n - 1 for n in range(8)] + [127 + 128]


def test_countdowns_and_etas_of_a_month_come_in_order_and_not_before() -> None:
    app = Umbel("shop")
    ran: list[tuple[str, float]] = []

    @app.task
    def note(name: str) -> None:
        ran.append((name, (app.clock.time() - NOON) / DAY))

    with working(app) as harness:
        note.apply_async(["eta"], eta=datetime.fromtimestamp(NOON, UTC) + timedelta(days=30))
        note.apply_async(["countdown"], countdown=20 * DAY)
        note.apply_async(["later"], countdown=40 * DAY)
        note.delay("now")
        harness.advance(days=19)
        assert ran == [("now", 0)]
        harness.advance(days=12)
    assert ran == [("now", 0), ("countdown", 20), ("eta", 30)]


def test_a_message_expires_on_the_virtual_clock() -> None:
    app = Umbel("shop")
    ran: list[str] = []

    @app.task
    def offer(name: str) -> None:
        ran.append(name)

    with working(app) as harness:
        late = offer.apply_async(["late"], countdown=30 * DAY, expires=7 * DAY)
        early = offer.apply_async(["early"], countdown=6 * DAY, expires=7 * DAY)
        harness.advance(days=31)
        assert ran == ["early"]
        with pytest.raises(TaskRevoked, match="expired"):
            late.get(1)
    assert early.id != late.id


def test_a_result_expires_on_the_virtual_clock_where_the_test_says_so() -> None:
    app = Umbel("shop")
    task = app.task(name="shop.one")(lambda: 1)
    with working(app, **{"results.expires": "2d"}) as harness:
        handle = task.delay()
        harness.advance(days=1)
        assert handle.get(1) == 1
        harness.advance(days=2)
        assert handle.record() is None


def test_a_rate_limit_spreads_starts_over_virtual_time() -> None:
    app = Umbel("shop")
    hours: list[float] = []

    @app.task(rate_limit="1/h")
    def slow() -> None:
        hours.append(round((app.clock.time() - NOON) / 3600, 3))

    with working(app) as harness:
        for _ in range(24):
            slow.delay()
        harness.run_until_idle()
        assert hours == [0]
        harness.advance(hours=23)
    assert hours == list(range(24))


def test_a_task_under_way_keeps_its_lease_however_far_the_clock_moves() -> None:
    app = Umbel("shop")
    entered, leave, runs = threading.Event(), threading.Event(), []

    @app.task
    def long() -> str:
        runs.append(1)
        entered.set()
        leave.wait(10)
        return "done"

    with working(app) as harness:
        handle = long.delay()
        assert entered.wait(10)
        harness.clock.advance(365 * DAY)
        leave.set()
        harness.run_until_idle()
        assert handle.get(1) == "done"
        assert harness._worker is not None
        assert harness._worker.settlement.stale == 0
    assert runs == [1]


def test_an_unknown_task_is_offered_again_over_virtual_time_until_it_is_a_dead_letter() -> None:
    app = Umbel("shop")
    with working(app) as harness:
        app.send_task("shop.nobody")
        harness.advance(minutes=1)
        depth = app.gateway.runtime.call(app.gateway.transport.depth())  # type: ignore[attr-defined]  # a LocalGateway
        assert depth[dead_letter_queue("default")].ready == 1


def test_by_default_the_clock_stands_at_the_present() -> None:
    before = time.time()
    with in_memory(Umbel("shop")) as harness:
        assert before - 1 < harness.clock.time() <= time.time()


# --- until idle -----------------------------------------------------------------------------------


def test_idle_means_that_what_follows_is_done_too() -> None:
    heard: list[str] = []

    class Ear:
        @hookimpl
        def umbel_task_settled(self, outcome: Any) -> None:
            heard.append(outcome.task)

    app = Umbel("shop", plugins=[Ear()])
    add = app.task(name="shop.add")(lambda *numbers: sum(numbers))
    early = app.task(name="shop.early", ack="early")(lambda total: time.sleep(0.02))
    with working(app) as harness:
        add.apply_async((1, 2), chain=[early.s().to_plain(), add.s(10).to_plain()])
        harness.run_until_idle()
        assert heard == ["shop.add", "shop.add", "shop.early"]
    assert [message.task for message in harness.published] == ["shop.add", "shop.add", "shop.early"]
    assert [call.args for call in harness.calls("shop.early")] == [[13]]


def test_what_does_not_end_is_named() -> None:
    app = Umbel("shop")
    leave = threading.Event()
    stuck = app.task(name="shop.stuck")(lambda: leave.wait(10) and None)
    with working(app) as harness:
        handle = stuck.delay()
        with pytest.raises(AssertionError, match=rf"not idle after 0.05 s: shop.stuck\[{handle.id}\]"):
            harness.run_until_idle(0.05)
        leave.set()
        harness.run_until_idle()


def test_without_a_worker_nothing_runs_and_one_is_told_how() -> None:
    app = Umbel("shop")
    task = app.task(name="shop.one")(lambda: 1)
    with in_memory(app) as harness:
        handle = task.delay()
        with pytest.raises(UmbelError, match=r"use the fixture umbel_worker, or `with harness.worker\(\):`"):
            harness.run_until_idle()
        assert [message.id for message in harness.published] == [handle.id]
        with harness.worker():
            harness.run_until_idle()
            assert handle.get(1) == 1
        with pytest.raises(AssertionError, match="the worker has ended"):
            harness.run_until_idle()
        with pytest.raises(UmbelError, match="has its worker already"), harness.worker():
            pass


def test_every_queue_that_is_named_anywhere_is_consumed() -> None:
    app = Umbel("shop", settings={"worker.queues": ["urgent"], "queues": {"declared": {}}, "default_queue": "plain"})
    task = app.task(name="shop.one", queue="own")(lambda: 1)
    with in_memory(app) as harness, harness.worker(queues=["more"]) as worker:
        assert worker.queues == ["plain", "urgent", "declared", "own", "more"]
        handles = [task.apply_async(queue=queue) for queue in worker.queues]
        elsewhere = task.apply_async(queue="elsewhere")
        harness.run_until_idle()
        assert [handle.get(1) for handle in handles] == [1] * 5
        assert elsewhere.state == State.PENDING


# --- the record -----------------------------------------------------------------------------------


def test_what_was_sent_is_on_record_and_decoded() -> None:
    app = Umbel("shop", settings={"codec.compression": "zlib"})
    mail = app.task(name="shop.mail")(lambda *a, **k: None)
    with in_memory(app, clock=VirtualClock(NOON)) as harness:
        mail.delay("ann", subject="hello")
        mail.apply_async(["bob"], countdown=60, priority=5, headers={"tenant": "x"})
        app.send_task("other.task")
        asyncio.run(mail.adelay("eve"))
    assert [(list(c.args), dict(c.kwargs)) for c in harness.calls(mail)] == [
        (["ann"], {"subject": "hello"}), (["bob"], {}), (["eve"], {}),
    ]  # fmt: skip
    later = harness.published[1]
    assert (later.due, later.priority, later.queue) == (NOON + 60, 5, "default")
    assert harness.calls("shop.mail")[1].headers["tenant"] == "x"
    assert [message.task for message in harness.published] == ["shop.mail", "shop.mail", "other.task", "shop.mail"]


# --- any app --------------------------------------------------------------------------------------


def test_an_app_is_put_in_memory_whatever_its_settings_name_and_is_as_before_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "umbel.toml").write_text(
        """
        default_queue = "main"
        [broker]
        url = "far://nowhere"
        options = { pool_size = 5 }
        [results]
        url = "far://nowhere"
        [worker]
        pool = "prefork"
        max_tasks_per_child = 10
        [tasks."shop.*"]
        time_limit = 60
        queue = "from-file"
        """
    )
    app = Umbel("shop")
    add = app.task(name="shop.add", soft_time_limit=30)(lambda x, y: x + y)
    client, options, clock = app.client, add.options, app.clock
    for _ in range(2):
        with in_memory(app, settings={'tasks."shop.add".queue': "for-test"}) as harness, harness.worker():
            assert add.options.queue == "for-test"
            assert add.delay(2, 3).get(10) == 5
            assert len(harness.published) == 1
        assert (app.client, app.clock, app.settings.broker.url) == (client, clock, "far://nowhere")
        assert add.options == options
        with pytest.raises(PluginNotFound, match="far"):
            add.delay(2, 3)


def test_two_apps_in_memory_know_nothing_of_each_other() -> None:
    one, two = Umbel("one"), Umbel("two")
    with in_memory(one) as first, in_memory(two) as second, first.worker(), second.worker():
        one.task(name="shop.who")(lambda: "one")
        two.task(name="shop.who")(lambda: "two")
        assert one.send_task("shop.who").get(10) == "one"
        assert two.send_task("shop.who").get(10) == "two"
        assert (len(first.published), len(second.published)) == (1, 1)


def test_a_disabled_result_store_stays_disabled() -> None:
    app = Umbel("shop", results="disabled")
    task = app.task(name="shop.one")(lambda: 1)
    with working(app) as harness:
        handle = task.delay()
        harness.run_until_idle()
        with pytest.raises(NotSupported, match="no result store"):
            handle.get(1)


def test_async_tasks_and_middleware_run_as_in_production() -> None:
    seen: list[str] = []

    def watch(call_next: Any, request: Any) -> Any:
        seen.append(request.task.name)
        return call_next(request)

    app = Umbel("shop", middleware=[watch])
    loops: list[asyncio.AbstractEventLoop] = []

    @app.task(name="shop.aadd")
    async def aadd(x: int, y: int) -> int:
        loops.append(asyncio.get_running_loop())
        return x + y

    with working(app):
        assert aadd.delay(2, 3).get(10) == 5
    assert seen == ["shop.aadd"]
    assert [loop.is_closed() for loop in loops] == [True]


# --- the worker's start and end -------------------------------------------------------------------


def test_what_keeps_the_worker_from_starting_is_raised() -> None:
    app = Umbel("shop", settings={"codec": {"serializer": "pickle"}})
    with in_memory(app) as harness, pytest.raises(UmbelError, match="accept"), harness.worker():
        pass

    class Broken:
        @hookimpl
        def umbel_add_steps(self) -> Any:
            raise RuntimeError("no step today")

    with (
        in_memory(Umbel("shop", plugins=[Broken()])) as harness,
        pytest.raises(UmbelError, match="no step today"),
        harness.worker(),
    ):
        pass


def test_a_worker_that_fails_fails_the_test() -> None:
    class Frail:
        @hookimpl
        def umbel_worker_ready(self, worker: Any) -> None:
            worker.fail(RuntimeError("the floor gives way"))

    app = Umbel("shop", plugins=[Frail()])
    with (
        in_memory(app) as harness,
        pytest.raises(AssertionError, match=r"failed: .*the floor gives way"),
        harness.worker(),
    ):
        harness._thread.join(10)


def test_what_the_test_raises_comes_first() -> None:
    with in_memory(Umbel("shop")) as harness, pytest.raises(ZeroDivisionError), harness.worker():
        raise ZeroDivisionError
    assert not harness._thread.is_alive()


def test_a_task_that_does_not_end_is_cancelled_at_the_end_of_the_grace() -> None:
    app = Umbel("shop")
    entered = threading.Event()

    @app.task(name="shop.deaf")
    def deaf() -> None:
        entered.set()
        while True:
            time.sleep(0.01)

    with working(app, **{"worker.grace": 0.05}) as harness:
        deaf.delay()
        assert entered.wait(10)
    assert not harness._thread.is_alive()


def test_missing_plugins_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "installed", lambda kind: ())
    with pytest.raises(PluginNotFound, match=r'pip install "umbel\[memory,threads\]"'), in_memory(Umbel("shop")):
        pass


def test_nothing_is_left_behind() -> None:
    before = set(threading.enumerate())
    with working(Umbel("shop")) as harness:
        harness.run_until_idle()
    assert set(threading.enumerate()) == before
    assert isinstance(harness.app.clock, SystemClock)
