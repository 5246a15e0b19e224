"""A worker's life: from start to stop, with steps, signals and faults on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from umbel import Umbel, hookimpl
from umbel.capabilities import PoolCapabilities
from umbel.errors import BrokerUnavailable, NotSupported, PluginError, SettingsError, UmbelError
from umbel.model import Action, Delivery, Settlement
from umbel.ports.step import Step
from umbel.uplink import UplinkGateway
from umbel.worker import intake as intake_module
from umbel.worker.worker import Worker

from .conftest import MakeApp
from .fakes import FakePool, Fakes, FakeTransport, Running, eventually, never, running

MANUAL = {"worker.pool": "manual"}


# --- the straight way -----------------------------------------------------------------------------


def test_what_is_sent_is_run_stored_and_settled(app: Umbel, fakes: Fakes) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    with running(app, fakes) as run:
        handles = [add.delay(n, 1) for n in range(50)]
        assert [handle.get(5) for handle in handles] == list(range(1, 51))
        eventually(lambda: fakes.broker.empty)
    assert run.status == 0
    assert len(fakes.broker.settlements) == 50
    assert {s.action for s in fakes.broker.settlements} == {Action.ACK}
    assert run.worker.settlement.totals == {add.name: 50}
    assert run.worker.settlement.held == {}


def test_results_are_stored_before_the_message_is_settled(app: Umbel, fakes: Fakes) -> None:
    stored_first: list[bool] = []

    class Watch:
        @hookimpl
        def umbel_task_settled(self, outcome: Any) -> None:
            stored_first.append(outcome.task_id in fakes.shelf.records)

    app.plugins.register(Watch())
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        task.delay().get(5)
        eventually(lambda: stored_first == [True])


def test_a_chain_is_run_to_its_end(app: Umbel, fakes: Fakes) -> None:
    add = app.task(name="shop.add")(lambda *args: sum(args))
    rest = [add.s(n).set(task_id=f"step-{n}").to_plain() for n in (100, 10)]
    with running(app, fakes):
        add.apply_async((1, 2), chain=rest)
        assert app.result("step-100").get(5) == 113


def test_a_task_retries_until_it_succeeds(app: Umbel, fakes: Fakes) -> None:
    @app.task(bind=True, max_retries=5, retry_delay=0)
    def job(self: Any) -> int:
        if self.request.retries < 3:
            raise self.retry()
        return int(self.request.retries)

    with running(app, fakes):
        assert job.delay().get(5) == 3
        eventually(lambda: fakes.broker.empty)
    assert [state for _, state in fakes.shelf.history] == ["RETRY"] * 3 + ["SUCCESS"]


def test_tasks_send_tasks_and_tell_progress_from_inside(app: Umbel, fakes: Fakes) -> None:
    child = app.task(name="shop.child")(lambda: "child")

    @app.task(bind=True, track_started=True)
    def parent(self: Any) -> str:
        self.update_state("PROGRESS", 1)
        return child.delay().id

    with running(app, fakes):
        handle = parent.delay()
        assert app.result(handle.get(5)).get(5) == "child"
    assert [state for task_id, state in fakes.shelf.history if task_id == handle.id] == [
        "STARTED", "PROGRESS", "SUCCESS",
    ]  # fmt: skip


def test_queues_are_declared_as_the_settings_want_them_and_only_they_are_consumed(
    make_app: MakeApp, fakes: Fakes
) -> None:
    app = make_app(
        {
            "worker.queues": ["mail", "plain"],
            "queues": {"mail": {"max_priority": 5, "arguments": {"a": 1}}, "other": {}},
        }
    )
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        eventually(lambda: fakes.broker.declared)
        task.apply_async(queue="other")
        task.apply_async(queue="plain").get(5)
    assert [spec.name for spec in fakes.broker.declared] == [
        "mail",
        "plain",
        "other",
    ]  # the last one at its first message
    declared = {spec.name: spec for spec in fakes.broker.declared}
    assert (declared["mail"].max_priority, declared["mail"].arguments) == (5, {"a": 1})
    assert len(fakes.broker.messages("other")) == 1


# --- start ----------------------------------------------------------------------------------------


def test_a_pool_that_fails_at_start_makes_run_raise_with_everything_stopped(make_app: MakeApp, fakes: Fakes) -> None:
    for pool in ("manual", "inline"):
        app = make_app({"worker.pool": pool})
        fakes.pool_error = UmbelError("the application cannot be imported")
        with pytest.raises(UmbelError, match="cannot be imported"):
            app.worker().run()
        assert fakes.broker.closed == fakes.broker.sessions
        assert fakes.heard == []


@pytest.mark.parametrize("pool", ["manual", "inline"])
def test_a_worker_that_is_stopped_while_its_pool_starts_does_not_wait_for_it(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def start(self: FakePool, context: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(FakePool, "start", start)
    run = Running(make_app({"worker.pool": pool}))
    run.thread.start()
    assert begun.wait(5)
    run.stop()
    run.join()
    assert (run.status, run.error, ended.is_set()) == (0, None, True)
    assert fakes.heard == ["stopping", "stopped"]
    assert fakes.broker.closed == fakes.broker.sessions


def test_a_consumer_that_does_not_close_is_left_behind(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def consume(self: FakeTransport, queues: Any, *, credit: Any, lease: float) -> AsyncIterator[Any]:
        try:
            yield ()
            await asyncio.Event().wait()
        finally:
            await stuck.wait()

    monkeypatch.setattr(FakeTransport, "consume", consume)
    monkeypatch.setattr(intake_module, "_CLOSING", 0.05)
    stuck = asyncio.Event()
    with running(make_app(MANUAL), fakes) as run:
        eventually(lambda: run.worker.intake.last_poll)
        run.stop()
        run.join()
        assert run.status == 0


def test_a_broker_that_cannot_be_reached_at_start_makes_run_raise_at_once(app: Umbel, fakes: Fakes) -> None:
    fakes.broker.down = True
    with pytest.raises(BrokerUnavailable):
        app.worker().run()


def test_modules_that_the_settings_import_are_imported_or_explained(make_app: MakeApp) -> None:
    with pytest.raises(UmbelError, match=r"no module 'not_there' \(imports\)"):
        make_app({"imports": ["not_there"]}).worker()


@pytest.mark.parametrize("option", ["time_limit", "soft_time_limit"])
def test_a_limit_that_the_pool_cannot_keep_is_refused_naming_task_pool_and_remedy(
    app: Umbel, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(FakePool, "capabilities", PoolCapabilities(), raising=False)
    monkeypatch.setattr(FakePool, "__setattr__", skip_capabilities, raising=False)
    app.task(name="shop.job", **{option: 5})(lambda: 1)  # type: ignore[call-overload]  # a dict
    with pytest.raises(NotSupported, match=rf"'shop\.job' has a {option}, which pool 'inline'.*\[worker\] pool"):
        app.worker()


def skip_capabilities(self: FakePool, name: str, value: Any) -> None:
    if name != "capabilities":
        object.__setattr__(self, name, value)


@pytest.mark.parametrize("option", ["max_tasks_per_child", "max_memory_per_child"])
def test_recycling_that_the_pool_cannot_do_is_refused(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(FakePool, "capabilities", PoolCapabilities(), raising=False)
    monkeypatch.setattr(FakePool, "__setattr__", skip_capabilities, raising=False)
    with pytest.raises(NotSupported, match=rf"\[worker\] {option} needs a pool of processes"):
        make_app({f"worker.{option}": 5}).worker()


def test_a_rate_limit_that_is_none_is_refused_at_start_naming_the_task(app: Umbel) -> None:
    app.task(name="shop.job", rate_limit="often")(lambda: 1)
    with pytest.raises(SettingsError, match=r"'shop\.job'.*'often'"):
        app.worker()


def test_a_worker_whose_own_messages_it_would_refuse_is_refused(make_app: MakeApp) -> None:
    with pytest.raises(SettingsError, match=r"\[codec\] serializer is 'repr'"):
        make_app({"codec.serializer": "repr"}).worker()


@pytest.mark.parametrize("setting", ["codec.accept", "codec.accept_compression"])
def test_a_plugin_that_the_settings_accept_and_nobody_offers_is_missed_at_start(
    make_app: MakeApp, setting: str
) -> None:
    with pytest.raises(PluginError, match="'jsno'"):
        make_app({setting: ["json", "jsno"] if setting == "codec.accept" else ["jsno"]}).worker()


def test_a_worker_cannot_be_started_inside_a_child(app: Umbel) -> None:
    app.use_gateway(UplinkGateway(lambda *_: None))
    with pytest.raises(UmbelError, match="inside a worker's child"):
        app.worker()


def test_a_worker_is_named_as_it_is_told_or_after_its_process(make_app: MakeApp) -> None:
    assert make_app({"worker.name": "w1"}).worker().name == "w1"
    assert str(os.getpid()) in make_app().worker().name


# --- stop -----------------------------------------------------------------------------------------


def test_a_stop_gives_back_what_has_not_started_and_lets_what_runs_end(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app(MANUAL)
    task = app.task(name="shop.job")(lambda: 1)
    fakes.reserve = 2
    with running(app, fakes) as run:
        for task_id in ("a", "b", "c", "d"):
            task.apply_async(task_id=task_id)
        job = fakes.pool.job("a")
        fakes.pool.job("b")
        eventually(lambda: len(fakes.pool.waiting) == 2)
        run.stop()
        eventually(lambda: "stopping" in fakes.heard)
        eventually(lambda: not fakes.pool.waiting)
        assert never(lambda: not run.thread.is_alive())
        fakes.pool.run(job)
        fakes.pool.run(fakes.pool.job("b"))
        run.join()
    assert run.status == 0
    assert fakes.heard == ["ready", "stopping", "stopped"]
    assert (fakes.shelf.state("a"), fakes.shelf.state("b")) == ("SUCCESS", "SUCCESS")
    back = {s.delivery.message.id: (s.action, s.counted) for s in fakes.broker.settlements}
    assert back["c"] == back["d"] == (Action.REQUEUE, False)
    assert [fakes.broker.find(i).count for i in ("c", "d")] == [0, 0]


def test_nothing_is_claimed_after_a_stop_was_asked_for(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app(MANUAL)
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        task.apply_async(task_id="a")
        job = fakes.pool.job("a")
        run.stop()
        eventually(lambda: "stopping" in fakes.heard)
        eventually(lambda: fakes.pool._deadline < float("inf"))
        task.apply_async(task_id="late")
        fakes.pool.run(job)
        run.join()
    assert fakes.broker.find("late").count == 0


def test_a_second_stop_drops_what_runs_and_it_is_not_counted(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.grace": 60})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        task.apply_async(task_id="a")
        fakes.pool.job("a")
        run.stop()
        eventually(lambda: "stopping" in fakes.heard)
        assert never(lambda: not run.thread.is_alive())
        run.stop()
        run.join()
    assert run.status == 0
    entry = fakes.broker.find("a")
    assert (entry.leased, entry.count) == (False, 0)
    assert fakes.shelf.records == {}


def test_after_the_grace_period_what_still_runs_is_dropped(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.grace": 0.02})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        task.apply_async(task_id="a")
        fakes.pool.job("a")
        run.stop()
        run.join()
    assert (run.status, fakes.broker.find("a").count) == (0, 0)


def test_a_stop_asked_for_before_the_worker_is_ready_is_not_lost(app: Umbel, fakes: Fakes) -> None:
    run = Running(app)
    run.stop()
    run.thread.start()
    run.join()
    assert run.status == 0


def test_a_worker_frees_everything_it_has_opened(app: Umbel, fakes: Fakes) -> None:
    with running(app, fakes):
        assert fakes.broker.sessions == 1
    assert fakes.broker.closed == 1
    assert not [t for t in threading.enumerate() if t.name == "worker"]


def test_no_signal_is_taken_before_the_loop_runs_that_its_handler_asks_for(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came amid the start of the loop waited in its handler for a lock that the main thread held, for ever."""
    app, install, seen = make_app(MANUAL), signal.signal, []

    def installed(number: int, handler: Any) -> Any:
        seen.append(app.runtime.running)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return install(number, handler)

    monkeypatch.setattr(signal, "signal", installed)
    assert app.worker().run() == 0
    assert all(seen)


def test_signals_stop_a_worker_on_the_main_thread_and_are_given_back(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.grace": 60})
    task = app.task(name="shop.job")(lambda: 1)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    task.apply_async(task_id="a")

    def tell() -> None:
        eventually(lambda: "ready" in fakes.heard)
        fakes.pool.job("a")
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: "stopping" in fakes.heard)
        os.kill(os.getpid(), signal.SIGINT)

    teller = threading.Thread(target=tell)
    teller.start()
    started = time.monotonic()
    assert app.worker().run() == 0
    teller.join(30)
    assert time.monotonic() - started < 30
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert fakes.broker.find("a").count == 0


# --- faults ---------------------------------------------------------------------------------------


def test_a_component_that_cannot_go_on_stops_the_worker_with_status_1(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from .fakes import FakeTransport

    faults: dict[str, Any] = {}

    async def broken(self: FakeTransport, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("starting"), "its lease ran out unnoticed"
        raise RuntimeError("a bug of the driver")

    for verb in ("settle", "renew", "declare"):
        caplog.clear()
        app = make_app({"broker.lease": 0.3, "worker.grace": 0, **({} if verb == "settle" else MANUAL)})
        app.task(name="shop.job")(lambda: 1).delay()
        with monkeypatch.context() as patch:
            patch.setattr(FakeTransport, verb, broken)
            run = Running(app)
            run.thread.start()
            run.join()
        faults[verb] = run.status
        assert "a bug of the driver" in caplog.text
        fakes.broker.entries.clear()
    assert faults == {"settle": 1, "renew": 1, "declare": 1}


def test_a_component_that_a_driver_cancels_from_within_stops_the_worker_instead_of_leaving_it_deaf(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from .fakes import FakeTransport

    async def cancelled(self: FakeTransport, *args: Any, **kwargs: Any) -> Any:
        inner = asyncio.ensure_future(asyncio.Event().wait())
        inner.cancel()
        await inner

    app = make_app({"worker.grace": 0, **MANUAL})
    monkeypatch.setattr(FakeTransport, "declare", cancelled)
    run = Running(app)
    run.thread.start()
    run.join()
    assert run.status == 1
    assert "umbel-intake was cancelled from within" in caplog.text


class Loud:
    """A listener that raises at everything it hears."""

    def __init__(self) -> None:
        self.heard: set[str] = set()

    def _raise(self, name: str) -> None:
        self.heard.add(name)
        raise RuntimeError(name)

    @hookimpl
    def umbel_worker_ready(self, worker: Worker) -> None:
        self._raise("ready")

    @hookimpl
    def umbel_worker_stopping(self, worker: Worker) -> None:
        self._raise("stopping")

    @hookimpl
    def umbel_worker_stopped(self, worker: Worker) -> None:
        self._raise("stopped")

    @hookimpl
    def umbel_task_received(self, delivery: Delivery) -> None:
        self._raise("received")

    @hookimpl
    def umbel_task_settled(self, settlement: Settlement) -> None:
        self._raise("settled")

    @hookimpl
    def umbel_before_task(self) -> None:
        self._raise("before")

    @hookimpl
    def umbel_after_task(self) -> None:
        self._raise("after")


def test_listeners_that_raise_harm_nobody(make_app: MakeApp, fakes: Fakes) -> None:
    loud = Loud()
    app = make_app(plugins=[loud])
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        assert task.delay().get(5) == 1
        eventually(lambda: fakes.broker.empty)
    assert run.status == 0
    assert loud.heard == {"ready", "stopping", "stopped", "received", "settled", "before", "after"}
    assert fakes.heard == ["ready", "stopping", "stopped"]


# --- steps of plugins -----------------------------------------------------------------------------


class Contributor:
    """A plugin with two steps of its own."""

    def __init__(self, fail: str = "") -> None:
        self.seen: list[str] = []
        self.fail = fail

    def step(self, name: str, *requires: str) -> Step:
        seen, fail = self.seen, self.fail

        class Mine(Step):
            async def start(self, worker: Worker) -> None:
                seen.append(f"{name} starts")
                if fail == f"{name} start":
                    raise UmbelError(fail)

            async def stop(self, worker: Worker) -> None:
                seen.append(f"{name} stops")
                if fail == f"{name} stop":
                    raise UmbelError(fail)

        Mine.name, Mine.requires = name, requires
        return Mine()

    @hookimpl
    def umbel_add_steps(self, worker: Worker) -> list[Step]:
        return [self.step("second", "first", "intake"), self.step("first", "pool")]


def test_steps_of_plugins_start_in_order_and_stop_in_reverse(make_app: MakeApp, fakes: Fakes) -> None:
    plugin = Contributor()
    app = make_app(plugins=[plugin])
    with running(app, fakes) as run:
        assert plugin.seen == ["first starts", "second starts"]
        names = [step.name for step in run.worker.steps]
        assert names.index("pool") < names.index("first") < names.index("second")
        assert names.index("renewal") < names.index("settlement") < names.index("pool") < names.index("intake")
    assert plugin.seen[2:] == ["second stops", "first stops"]


def test_a_step_that_fails_at_start_stops_those_before_it_and_makes_run_raise(make_app: MakeApp, fakes: Fakes) -> None:
    plugin = Contributor("second start")
    with pytest.raises(UmbelError, match="second start"):
        make_app({"worker.pool": "manual"}, plugins=[plugin]).worker().run()
    assert plugin.seen == ["first starts", "second starts", "first stops"]
    assert fakes.broker.closed == fakes.broker.sessions


def test_a_step_that_fails_at_stop_does_not_keep_others_from_stopping(make_app: MakeApp, fakes: Fakes) -> None:
    plugin = Contributor("second stop")
    with running(make_app(plugins=[plugin]), fakes) as run:
        run.stop()
        run.join()
    assert isinstance(run.error, UmbelError)
    assert plugin.seen[-1] == "first stops"
    assert fakes.broker.closed == fakes.broker.sessions


def test_a_step_with_a_name_that_is_taken_is_refused(make_app: MakeApp) -> None:
    class Thief:
        @hookimpl
        def umbel_add_steps(self) -> list[Step]:
            return [Contributor().step("intake")]

    with pytest.raises(UmbelError, match="two worker steps are named 'intake'"):
        make_app(MANUAL, plugins=[Thief()]).worker().run()
