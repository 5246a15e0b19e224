"""What may be asked of a worker while it runs, and how it tells that work has begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from umbel import Umbel, hookimpl
from umbel.errors import BrokerUnavailable, NotSupported, PublishRefused, SettingsError, UnknownTask
from umbel.model import Delivery, Ending, QueueSpec
from umbel.task import Task

from .conftest import MakeApp
from .fakes import Fakes, FakeTransport, Running, eventually, never, running


class Starts:
    """Hears of starts."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, float, int | None]] = []
        self.threads: set[str] = set()

    @hookimpl
    def umbel_task_started(self, delivery: Delivery, started: float, pid: int | None) -> None:
        self.heard.append((delivery.message.id, started, pid))
        self.threads.add(threading.current_thread().name)


@pytest.fixture
def starts() -> Starts:
    return Starts()


@pytest.fixture
def app(make_app: MakeApp, starts: Starts, fakes: Fakes) -> Umbel:
    fakes.reserve = 2
    app = make_app({"worker.pool": "manual", "worker.concurrency": 1}, plugins=[starts])
    app.task(name="shop.job")(lambda: 1)
    return app


@pytest.fixture
def job(app: Umbel) -> Task[..., Any]:
    return app.tasks["shop.job"]


@pytest.fixture
def run(app: Umbel, fakes: Fakes) -> Iterator[Running]:
    with running(app, fakes) as run:
        eventually(lambda: fakes.broker.declared)
        yield run


def on_loop(run: Running, call: Callable[[], Any]) -> Any:
    """What a call of ``operations`` returns, made where it belongs."""

    async def main() -> Any:
        made = call()
        return await made if isinstance(made, Coroutine) else made

    return run.worker.app.runtime.call(main(), 10)


# --- starts ---------------------------------------------------------------------------------------


def test_a_start_is_told_once_while_the_task_runs_and_not_before(
    run: Running, fakes: Fakes, job: Task[..., Any], starts: Starts
) -> None:
    before = time.time()
    for name in ("a", "b"):
        job.apply_async(task_id=name)
    eventually(lambda: starts.heard)
    assert never(lambda: len(starts.heard) > 1)
    assert [(name, pid) for name, _, pid in starts.heard] == [("a", 4711)]
    assert before - 0.01 <= starts.heard[0][1] <= time.time()
    assert starts.threads == {"umbel-io"}
    fakes.pool.run(fakes.pool.job("a"))
    eventually(lambda: len(starts.heard) == 2)
    fakes.pool.run(fakes.pool.job("b"))
    eventually(lambda: fakes.broker.empty)
    assert [name for name, _, _ in starts.heard] == ["a", "b"]


def test_a_start_that_nobody_saw_is_told_before_the_end(
    run: Running, fakes: Fakes, job: Task[..., Any], starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.pool, "running", dict)
    order: list[str] = []
    starts.heard = order  # type: ignore[assignment]  # what is heard and what is settled, in one order
    fakes.settled = order  # type: ignore[assignment]  # the same
    job.apply_async(task_id="a")
    fakes.pool.run(fakes.pool.job("a"))
    eventually(lambda: len(order) == 2)
    assert order[0][0] == "a"
    assert order[0][2] is None


@pytest.mark.parametrize("ending", [Ending.RETURNED, Ending.LOST])
def test_what_was_not_started_is_not_told(
    run: Running, fakes: Fakes, job: Task[..., Any], starts: Starts, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.pool, "running", dict)
    job.apply_async(task_id="a")
    fakes.pool.end(fakes.pool.job("a"), ending)
    eventually(lambda: fakes.broker.settlements)
    assert [name for name, _, _ in starts.heard] == ["a"] * (ending is Ending.LOST)


def test_nothing_is_looked_at_if_nobody_listens(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"worker.pool": "manual"})
    job = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        job.apply_async(task_id="a")
        fakes.pool.job("a")
        assert run.worker.starts._looking is None


# --- looking --------------------------------------------------------------------------------------


def test_what_runs_and_what_waits_are_told_apart(run: Running, fakes: Fakes, job: Task[..., Any]) -> None:
    operations = run.worker.operations
    for name in ("a", "b"):
        job.apply_async(task_id=name)
    fakes.pool.job("b")
    (active,), (reserved,) = on_loop(run, operations.active), on_loop(run, operations.reserved)
    assert (active.delivery.message.id, active.pid, active.acknowledged) == ("a", 4711, False)
    assert abs(active.started - time.time()) < 5
    assert (reserved.delivery.message.id, reserved.pid, reserved.started) == ("b", None, None)


# --- tasks ----------------------------------------------------------------------------------------


def test_a_rate_limit_holds_from_now_on_and_can_be_taken_away(run: Running, fakes: Fakes, job: Task[..., Any]) -> None:
    operations = run.worker.operations
    on_loop(run, lambda: operations.rate_limit("shop.job", "1/h"))
    for name in ("a", "b"):
        job.apply_async(task_id=name)
    fakes.pool.run(fakes.pool.job("a"))
    eventually(lambda: any(s.delay > 1000 for s in fakes.broker.settlements))
    on_loop(run, lambda: operations.rate_limit("shop.job", None))
    job.apply_async(task_id="c")
    fakes.pool.run(fakes.pool.job("c"))
    with pytest.raises(SettingsError, match="'often' must be a rate"):
        on_loop(run, lambda: operations.rate_limit("shop.job", "often"))
    with pytest.raises(UnknownTask):
        on_loop(run, lambda: operations.rate_limit("shop.jib", "1/h"))


def test_time_limits_hold_for_what_is_claimed_from_now_on(run: Running, fakes: Fakes, job: Task[..., Any]) -> None:
    message = job.message()
    on_loop(run, lambda: run.worker.operations.time_limits("shop.job", 7, 5))
    run.worker.app.client.send([message])
    handed = fakes.pool.job(message.id)
    assert (handed.time_limit, handed.soft_time_limit) == (7, 5)
    with pytest.raises(ValueError, match="soft_time_limit is longer"):
        on_loop(run, lambda: run.worker.operations.time_limits("shop.job", 5, 7))


def test_time_limits_hold_for_what_runs_and_waits_here_too_but_for_limits_of_a_call_s_own(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Senders write the task's limits, as they know them, into every call: those are not the call's own."""
    fakes.reserve = 3
    app = make_app({"worker.pool": "manual", "worker.concurrency": 1})
    job = app.task(name="shop.job", time_limit=60)(lambda: 1)
    other = app.task(name="shop.other", time_limit=60)(lambda: 1)
    told: dict[str, tuple[float | None, float | None]] = {}
    with running(app, fakes) as run:
        for task, name, options in (
            (job, "runs", {}),
            (job, "waits", {}),
            (job, "own", {"time_limit": 9}),
            (other, "other", {}),
        ):
            task.apply_async(task_id=name, **options)
        ids = {fakes.pool.job(name).id: name for name in ("runs", "waits", "own", "other")}

        def limit(job_id: int, *, time_limit: float | None, soft_time_limit: float | None) -> bool:
            told[ids[job_id]] = time_limit, soft_time_limit
            return True

        monkeypatch.setattr(fakes.pool, "limit", limit)
        on_loop(run, lambda: run.worker.operations.time_limits("shop.job", 30, 20))
        assert told == {"runs": (30, 20), "waits": (30, 20), "own": (9, 20)}
        on_loop(run, lambda: run.worker.operations.time_limits("shop.job", None))
        assert told == {"runs": (None, None), "waits": (None, None), "own": (9, None)}
        for name in ids.values():
            fakes.pool.run(fakes.pool.job(name))
        job.apply_async(task_id="later")
        handed = fakes.pool.job("later")
        assert (handed.time_limit, handed.soft_time_limit) == (None, None)


def test_several_limits_change_at_once_or_none(run: Running, fakes: Fakes, job: Task[..., Any]) -> None:
    operations = run.worker.operations
    on_loop(run, lambda: operations.change_limits("shop.job", {"rate_limit": "10/s", "time_limit": 5}))
    limits = on_loop(run, operations.limits)["shop.job"]
    assert (limits["rate_limit"], limits["time_limit"], limits["rate_limit_scope"]) == ("10/s", 5, "worker")
    for wrong, error in (({"queue": "mail"}, ValueError), ({"rate_limit": "often", "time_limit": 9}, SettingsError)):
        with pytest.raises(error):
            on_loop(run, lambda wrong=wrong: operations.change_limits("shop.job", wrong))
    assert on_loop(run, operations.limits)["shop.job"] == limits
    on_loop(run, lambda: operations.change_limits("shop.job", {"rate_limit": None, "time_limit": None}))
    assert on_loop(run, operations.limits) == {}
    assert on_loop(run, lambda: operations.limits(["shop.job"]))["shop.job"]["rate_limit"] is None


# --- the worker itself ----------------------------------------------------------------------------


def test_the_pool_grows_and_shrinks(run: Running, fakes: Fakes, job: Task[..., Any]) -> None:
    operations = run.worker.operations
    on_loop(run, lambda: operations.resize_pool(3))
    assert run.worker.concurrency == 3
    for name in ("a", "b", "c"):
        job.apply_async(task_id=name)
    eventually(lambda: len(fakes.pool.busy) == 3)
    on_loop(run, lambda: operations.resize_pool(1))
    assert run.worker.concurrency == 1
    with pytest.raises(ValueError, match="1 slot at least, not 0"):
        on_loop(run, lambda: operations.resize_pool(0))


def test_a_pool_of_one_size_says_so(make_app: MakeApp, fakes: Fakes) -> None:
    with running(make_app(), fakes) as run, pytest.raises(NotSupported, match="pool 'inline' cannot change its size"):
        on_loop(run, lambda: run.worker.operations.resize_pool(3))


def test_a_queue_is_added_and_cancelled_in_the_same_session(run: Running, fakes: Fakes, job: Task[..., Any]) -> None:
    operations, sessions = run.worker.operations, fakes.broker.sessions
    job.apply_async(task_id="a", queue="mail")
    spec = QueueSpec(name="mail", max_priority=5)
    assert on_loop(run, lambda: operations.add_queue(spec)) is True
    fakes.pool.run(fakes.pool.job("a"))
    assert on_loop(run, lambda: operations.add_queue("mail")) is False
    assert [queue.name for queue in on_loop(run, operations.queues)] == ["default", "mail"]
    assert on_loop(run, operations.queues)[1] == spec
    for name, known in (("mail", True), ("mail", False), ("default", True)):
        assert on_loop(run, lambda name=name: operations.cancel_queue(name)) is known
    for queue in ("mail", "default"):
        job.apply_async(queue=queue)
    assert never(lambda: fakes.pool.busy)
    assert on_loop(run, lambda: operations.add_queue("default")) is True
    eventually(lambda: fakes.pool.busy)
    assert fakes.broker.sessions == sessions


@pytest.mark.parametrize("error", [PublishRefused, BrokerUnavailable])
def test_a_queue_that_cannot_be_declared_is_not_added(
    run: Running, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    async def refuse(self: FakeTransport, queues: Any) -> None:
        raise error("no")

    monkeypatch.setattr(FakeTransport, "declare", refuse)
    with pytest.raises(error):
        on_loop(run, lambda: run.worker.operations.add_queue("mail"))
    assert [queue.name for queue in on_loop(run, run.worker.operations.queues)] == ["default"]
    assert run.worker.failure is None


def test_a_worker_without_queues_stops_as_any_other(run: Running) -> None:
    on_loop(run, lambda: run.worker.operations.cancel_queue("default"))
    on_loop(run, run.worker.operations.shutdown)
    run.join()
    assert run.status == 0
