"""Claiming: how much, what is refused before it runs, and sessions that are lost and built again."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
import pytest

from umbel import Umbel, hookimpl
from umbel.errors import TaskRevoked, UnknownTask, WorkerLost
from umbel.model import Action, Delivery, Ending, Message
from umbel.protocol import exception_from_plain, format_time, make_headers
from umbel.task import Task

from .conftest import MakeApp
from .fakes import Fakes, eventually, never, running

MANUAL = {"worker.pool": "manual"}
ERRBACK: dict[str, Any] = {
    "task": "shop.errback",
    "args": [],
    "kwargs": {},
    "options": {"queue": "errors"},
    "subtask_type": None,
}


def raised(fakes: Fakes, task_id: str) -> BaseException:
    return exception_from_plain(fakes.shelf.document(task_id)["result"])


def redelivered(
    fakes: Fakes, task: Task[..., Any], task_id: str, *, count: int, starts: int = 0, **options: Any
) -> None:
    """Put a message into the broker that was handed out ``count`` times before."""
    message = task.message((), **{"task_id": task_id, **options})
    entry = fakes.broker.add(message)
    entry.count, entry.starts = count, starts


@pytest.fixture
def job(make_app: MakeApp) -> Task[..., Any]:
    return make_app({**MANUAL, "worker.concurrency": 2}).task(name="shop.job")(lambda *_: 1)


# --- how much -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [0, 3])
def test_no_more_is_claimed_than_the_pool_asks_for(job: Task[..., Any], fakes: Fakes, reserve: int) -> None:
    fakes.reserve = reserve
    job.map_delay([()] * 30)
    with running(job.app, fakes) as run:
        for number in range(1, 31):
            fakes.pool.run(eventually(lambda: next(iter(fakes.pool.busy.values()), None)))
            eventually(lambda settled=number: len(fakes.broker.settlements) == settled)
        eventually(lambda: run.worker.intake.credit.out == 0)
    assert not fakes.pool.overfilled
    assert fakes.broker.most_out <= 2 + reserve + 1  # one that has ended is still being settled


@pytest.mark.parametrize("ack", ["early", "late"])
def test_a_pool_is_never_given_more_than_it_asked_for_however_quickly_it_works(
    make_app: MakeApp, fakes: Fakes, ack: str
) -> None:
    fakes.reserve = 3
    app = make_app({"worker.concurrency": 1})
    task = app.task(name="shop.job", ack=ack)(lambda: 1)
    task.map_delay([()] * 300)
    with running(app, fakes):
        eventually(lambda: len(fakes.shelf.records) == 300, 10)
    assert not fakes.pool.overfilled


def test_the_settings_bound_what_is_claimed(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.concurrency": 5, "worker.prefetch": 2})
    task = app.task(name="shop.job")(lambda: 1)
    task.map_delay([()] * 10)
    with running(app, fakes):
        eventually(lambda: len(fakes.pool.busy) == 2)
        assert never(lambda: len(fakes.pool.busy) > 2)
    assert fakes.broker.most_out == 2


def test_higher_priorities_are_claimed_first(make_app: MakeApp, fakes: Fakes) -> None:
    seen: list[int] = []
    app = make_app({"worker.concurrency": 1})
    task = app.task(name="shop.job")(seen.append)
    for priority in (0, 9, 5):
        task.apply_async((priority,), priority=priority)
    with running(app, fakes):
        eventually(lambda: len(seen) == 3)
    assert seen == [9, 5, 0]


def test_listeners_hear_of_every_delivery_before_anything_is_decided(make_app: MakeApp, fakes: Fakes) -> None:
    heard: list[tuple[str, int]] = []

    class Listener:
        @hookimpl
        def umbel_task_received(self, delivery: Delivery) -> None:
            heard.append((delivery.message.id, delivery.count))

    app = make_app(plugins=[Listener()])
    app.task(name="shop.job")(lambda: 1).apply_async(task_id="a")
    with running(app, fakes):
        eventually(lambda: heard == [("a", 1)])


# --- early acknowledgement ------------------------------------------------------------------------


@pytest.fixture
def early(make_app: MakeApp) -> Task[..., Any]:
    return make_app(MANUAL).task(name="shop.early", ack="early")(lambda: 1)


def test_ack_early_settles_before_the_start_and_stores_after(early: Task[..., Any], fakes: Fakes) -> None:
    late = early.app.task(name="shop.late")(lambda: 1)
    with running(early.app, fakes):
        early.apply_async(task_id="e")
        late.apply_async(task_id="l")
        job = fakes.pool.job("e")
        assert [m.id for m in fakes.broker.messages()] == ["l"]
        fakes.pool.run(job)
        eventually(lambda: fakes.shelf.state("e") == "SUCCESS")
        fakes.pool.run(fakes.pool.job("l"))
        eventually(lambda: fakes.broker.empty)
    assert [(s.delivery.message.id, s.action) for s in fakes.broker.settlements] == [
        ("e", Action.ACK), ("l", Action.ACK),
    ]  # fmt: skip


def test_ack_early_of_what_has_passed_to_another_does_not_start_it(early: Task[..., Any], fakes: Fakes) -> None:
    class Thief:
        @hookimpl
        def umbel_task_received(self, delivery: Delivery) -> None:
            fakes.broker.steal(delivery.message.id, hide=60)

    early.app.plugins.register(Thief())
    with running(early.app, fakes) as run:
        early.apply_async(task_id="e")
        eventually(lambda: run.worker.settlement.stale == 1)
        assert never(lambda: fakes.pool.submitted)
        assert run.worker.intake.credit.out == 0


def test_ack_early_that_cannot_be_told_is_tried_on_a_new_session_and_started_once(
    early: Task[..., Any], fakes: Fakes
) -> None:
    with running(early.app, fakes) as run:
        fakes.broker.fail.append("settle")
        early.apply_async(task_id="e")
        fakes.pool.run(fakes.pool.job("e"))
        eventually(lambda: fakes.shelf.state("e") == "SUCCESS")
        eventually(lambda: run.worker.settlement.held == {})
        assert run.worker.intake.credit.out == 0
    assert len(fakes.pool.submitted) == 1
    assert fakes.broker.empty
    assert fakes.broker.sessions == 2


@pytest.mark.parametrize("lost", [1, 2])
def test_ack_early_whose_answer_is_lost_starts_it_at_most_once(early: Task[..., Any], fakes: Fakes, lost: int) -> None:
    with running(early.app, fakes) as run:
        fakes.broker.lose_answers += ["settle"] * lost
        early.apply_async(task_id="e")
        eventually(lambda: not fakes.broker.lose_answers and fakes.broker.empty)
        assert never(lambda: len(fakes.pool.submitted) > 1)
        eventually(lambda: run.worker.settlement.held.keys() <= {job.id for job in fakes.pool.submitted})
        eventually(lambda: run.worker.intake.credit.out == len(run.worker.settlement.held))


# --- redelivered messages -------------------------------------------------------------------------


def test_redelivered_messages_trickle_each_start_recorded_before_it(job: Task[..., Any], fakes: Fakes) -> None:
    for n in range(6):
        redelivered(fakes, job, f"r{n}", count=1)
    fakes.reserve = 10
    with running(job.app, fakes):
        eventually(lambda: len(fakes.pool.submitted) == 2)
        assert never(lambda: len(fakes.pool.submitted) > 2)
        assert sum(entry.starts for entry in fakes.broker.entries) == 2
        started = {ids for call in fakes.broker.calls("start") for ids in call}
        assert started == {Message.from_plain(j.payload[1]).id for j in fakes.pool.submitted}
        for number in range(1, 7):
            fakes.pool.run(eventually(lambda: next(iter(fakes.pool.busy.values()), None)))
            assert len(fakes.pool.busy) + len(fakes.pool.waiting) <= 2
            eventually(lambda settled=number: len(fakes.broker.settlements) == settled)
    assert len(fakes.pool.submitted) == 6


def test_fresh_messages_are_not_held_up_by_redelivered_ones(job: Task[..., Any], fakes: Fakes) -> None:
    for n in range(4):
        redelivered(fakes, job, f"r{n}", count=1)
    job.apply_async(task_id="fresh")
    fakes.reserve = 10
    with running(job.app, fakes):
        assert fakes.pool.job("fresh")
        assert "fresh" not in {ids for call in fakes.broker.calls("start") for ids in call}


def test_a_redelivered_message_that_has_passed_to_another_is_dropped_and_the_next_is_started(
    job: Task[..., Any], fakes: Fakes
) -> None:
    for n in range(5):
        redelivered(fakes, job, f"r{n}", count=1)

    class Thief:
        @hookimpl
        def umbel_task_received(self, delivery: Delivery) -> None:
            if delivery.message.id in ("r0", "r1", "r2") and delivery.count == 2:
                fakes.broker.steal(delivery.message.id, hide=60)

    job.app.plugins.register(Thief())
    fakes.reserve = 10
    with running(job.app, fakes) as run:
        assert fakes.pool.job("r3")
        assert fakes.pool.job("r4")
        assert run.worker.settlement.stale == 3
        assert run.worker.intake.credit.out == 2


def test_a_broker_that_goes_away_while_a_start_is_recorded_gives_everything_back(
    job: Task[..., Any], fakes: Fakes
) -> None:
    redelivered(fakes, job, "r", count=1)
    fakes.broker.lose_answers.append("start")
    with running(job.app, fakes) as run:
        fakes.pool.run(fakes.pool.job("r"))
        eventually(lambda: fakes.broker.empty)
        eventually(lambda: run.worker.intake.credit.out == 0)
    assert len(fakes.pool.submitted) == 1
    assert fakes.shelf.state("r") == "SUCCESS"


@pytest.mark.parametrize("marks", [True, False])
def test_a_task_that_kills_its_process_goes_to_the_dead_letters_after_so_many_starts(
    make_app: MakeApp, fakes: Fakes, marks: bool
) -> None:
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, start_marks=marks)
    fakes.broker.pace = 0
    app = make_app()
    killer = app.task(name="shop.killer")(lambda: 1)
    fakes.fates["shop.killer"] = [Ending.LOST] * 10
    with running(app, fakes):
        killer.apply_async(task_id="k", link_error=ERRBACK)
        eventually(lambda: fakes.broker.messages("default.dead"))
        eventually(lambda: fakes.shelf.state("k") == "FAILURE")
    (dead,) = fakes.broker.messages("default.dead")
    assert dead.headers["umbel-dead-cause"] == "lost: WorkerLost: signal 9 (SIGKILL)"
    assert isinstance(raised(fakes, "k"), WorkerLost)
    assert [m.task for m in fakes.broker.messages("errors")] == ["shop.errback"]
    runs = [job for job in fakes.pool.submitted if job.payload[0] == "run"]
    assert len(runs) == 3
    assert [s.delay for s in fakes.broker.settlements if s.action is Action.REQUEUE] == [1, 2]


@pytest.mark.parametrize(("declared", "setting", "starts"), [(1, None, 1), (None, 2, 2), (4, 2, 4)])
def test_how_many_starts_is_the_tasks_or_the_workers(
    make_app: MakeApp, fakes: Fakes, declared: int | None, setting: int | None, starts: int
) -> None:
    fakes.broker.pace = 0
    app = make_app({"worker.max_deliveries": setting} if setting else {})
    killer = app.task(name="shop.killer", max_deliveries=declared)(lambda: 1)
    fakes.fates["shop.killer"] = [Ending.LOST] * 10
    with running(app, fakes):
        killer.apply_async(task_id="k")
        eventually(lambda: fakes.broker.messages("default.dead"))
    runs = [job for job in fakes.pool.submitted if job.payload[0] == "run"]
    assert [job.alone for job in runs] == [False] * (starts - 1) + [starts > 1], (
        "the last start, if it is not the first"
    )


def test_a_message_that_has_used_up_its_starts_elsewhere_is_not_started_again(
    job: Task[..., Any], fakes: Fakes
) -> None:
    redelivered(fakes, job, "k", count=3, starts=2, link_error=ERRBACK)
    with running(job.app, fakes):
        last = fakes.pool.job("k")
        assert last.payload[0] == "lost"
        fakes.pool.run(last)
        eventually(lambda: fakes.broker.messages("default.dead"))
    assert isinstance(raised(fakes, "k"), WorkerLost)
    assert len(fakes.broker.messages("errors")) == 1


def test_a_second_message_on_its_last_start_is_left_to_other_workers(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.concurrency": 3})
    job = app.task(name="shop.job")(lambda: 1)
    for name in ("k1", "k2"):
        redelivered(fakes, job, name, count=2, starts=1)
    redelivered(fakes, job, "other", count=1)
    with running(app, fakes):
        first = eventually(lambda: next((j for j in fakes.pool.busy.values() if "k" in j.payload[1][1]["id"]), None))
        fakes.pool.job("other")
        eventually(lambda: fakes.broker.settlements)
        (back,) = fakes.broker.settlements
        assert (back.action, back.counted, back.delay) == (Action.REQUEUE, False, 1.0)
        assert {back.delivery.message.id, first.payload[1][1]["id"]} == {"k1", "k2"}
        assert len(fakes.pool.busy) == 2
        fakes.pool.run(first)
        fakes.pool.run(fakes.pool.job(back.delivery.message.id))
    assert fakes.shelf.state("k1") == fakes.shelf.state("k2") == "SUCCESS"


def test_what_a_killed_worker_merely_held_is_not_blamed(job: Task[..., Any], fakes: Fakes) -> None:
    redelivered(fakes, job, "held", count=9, starts=0)
    with running(job.app, fakes):
        assert fakes.pool.job("held").payload[0] == "run"


# --- what is not run ------------------------------------------------------------------------------


def test_an_unknown_task_comes_back_with_growing_pauses_and_dies_in_the_end(app: Umbel, fakes: Fakes) -> None:
    fakes.broker.pace = 0
    with running(app, fakes):
        app.send_task("shop.nowhere", task_id="u")
        eventually(lambda: fakes.broker.messages("default.dead"))
    assert [(s.action, s.delay) for s in fakes.broker.settlements] == [
        (Action.REQUEUE, 1), (Action.REQUEUE, 2), (Action.REQUEUE, 4), (Action.REQUEUE, 8), (Action.REQUEUE, 16),
        (Action.DEAD, 0),
    ]  # fmt: skip
    assert isinstance(raised(fakes, "u"), UnknownTask)
    (dead,) = fakes.broker.messages("default.dead")
    assert dead.headers["umbel-dead-cause"].startswith("unknown task: no task is named 'shop.nowhere'")


def test_an_unknown_task_has_no_result_while_another_worker_may_know_it(make_app: MakeApp, fakes: Fakes) -> None:
    old, new = make_app(), make_app()
    new.task(name="shop.new")(lambda: "done")
    with running(old, fakes):
        handle = old.send_task("shop.new")
        eventually(lambda: fakes.broker.settlements)
        assert fakes.shelf.records == {}
    fakes.broker.find(handle.id).hidden_until = 0
    with running(new, fakes):
        assert handle.get(5) == "done"


def test_an_expired_task_is_revoked_and_told_to_its_errbacks(app: Umbel, fakes: Fakes) -> None:
    ran: list[int] = []
    task = app.task(name="shop.job")(lambda: ran.append(1))
    task.apply_async(task_id="x", expires=-1, link_error=ERRBACK)
    with running(app, fakes):
        with pytest.raises(TaskRevoked, match="expired"):
            app.result("x").get(5)
        eventually(lambda: fakes.broker.messages() == [])
    assert ran == []
    assert len(fakes.broker.messages("errors")) == 1


def test_a_revoked_task_is_not_run(job: Task[..., Any], fakes: Fakes) -> None:
    with running(job.app, fakes) as run:
        run.worker.app.runtime.loop.call_soon_threadsafe(run.worker.operations.revoke, ["r"])
        job.apply_async(task_id="r")
        with pytest.raises(TaskRevoked):
            job.app.result("r").get(5)
        eventually(lambda: fakes.broker.empty)
    assert fakes.pool.submitted == []
    assert fakes.shelf.state("r") == "REVOKED"


@pytest.mark.parametrize("started", [True, False])
def test_revoking_with_terminate_ends_what_runs_and_what_waits(
    job: Task[..., Any], fakes: Fakes, started: bool
) -> None:
    fakes.reserve = 5
    with running(job.app, fakes) as run:
        for name in ("a", "b", "c"):
            job.apply_async(task_id=name)
            fakes.pool.job(name)
        chosen = "a" if started else "c"
        run.worker.app.runtime.loop.call_soon_threadsafe(lambda: run.worker.operations.revoke([chosen], terminate=True))
        with pytest.raises(TaskRevoked):
            job.app.result(chosen).get(5)
        eventually(lambda: [m.id for m in fakes.broker.messages()] == [n for n in "abc" if n != chosen])


def test_revoked_ids_are_remembered_within_a_bound(
    job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from umbel.worker import revocations

    monkeypatch.setattr(revocations, "_MOST_TOLD", 3)
    with running(job.app, fakes) as run:
        run.worker.operations.revoke([str(n) for n in range(10)])
        assert list(run.worker.operations.revoked) == ["7", "8", "9"]


def test_a_rate_limit_returns_what_comes_too_soon_until_its_slot(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app()
    task = app.task(name="shop.job", rate_limit="10/s")(lambda: 1)
    for n in range(13):
        task.apply_async(task_id=f"t{n}")
    with running(app, fakes):
        eventually(lambda: len(fakes.shelf.records) == 13)
        eventually(lambda: fakes.broker.empty)
    back = [s for s in fakes.broker.settlements if s.action is Action.REQUEUE]
    assert {s.delivery.message.id for s in back} == {"t10", "t11", "t12"}
    assert all(not s.counted and 0 < s.delay < 0.4 for s in back)
    assert len(back) < 8


def eta_message(fakes: Fakes, seconds: float, *, protocol_1: bool) -> Message:
    """What another program sends that leaves it to the worker to keep the time."""
    eta = format_time(time.time() + seconds)
    if protocol_1:
        body = json.dumps({"task": "shop.job", "id": "t", "args": [], "kwargs": {}, "eta": eta, "utc": True}).encode()
        return Message(queue="default", headers={}, body=body)
    headers = {**make_headers("shop.job", "t"), "eta": eta}
    return Message(queue="default", headers=headers, body=b"[[], {}, {}]")


@pytest.mark.parametrize("protocol_1", [False, True])
def test_an_eta_is_kept_by_the_broker_whoever_sent_it(app: Umbel, fakes: Fakes, protocol_1: bool) -> None:
    app.task(name="shop.job")(time.time)
    message = eta_message(fakes, 1.5, protocol_1=protocol_1)
    sent = time.time()
    fakes.broker.add(message)
    with running(app, fakes):
        assert app.result("t").get(30) >= sent + 1.4
        eventually(lambda: fakes.broker.empty)
    back, end = fakes.broker.settlements
    assert (back.action, back.counted, end.action) == (Action.REQUEUE, False, Action.ACK)
    assert 0.0 < back.delay <= 1.5
    assert end.delivery.count == 1


@pytest.mark.parametrize("protocol_1", [False, True])
def test_an_eta_that_is_as_good_as_reached_costs_no_way_back(app: Umbel, fakes: Fakes, protocol_1: bool) -> None:
    app.task(name="shop.job")(lambda: 1)
    message = eta_message(fakes, 0.0, protocol_1=protocol_1)
    fakes.broker.add(message)
    with running(app, fakes):
        assert app.result("t").get(5) == 1
    assert [s.action for s in fakes.broker.settlements] == [Action.ACK]


def test_a_delay_is_never_longer_than_the_broker_keeps(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, max_delay=100.0)
    app = make_app()
    app.task(name="shop.job")(lambda: 1)
    fakes.broker.add(eta_message(fakes, 1000, protocol_1=False))
    with running(app, fakes):
        eventually(lambda: fakes.broker.settlements)
    assert fakes.broker.settlements[0].delay == 100.0


@pytest.mark.parametrize(
    "headers",
    [{"eta": "soon"}, {"eta": [1]}, {"timelimit": ["x", 1]}, {"timelimit": [-1, None]},
     {"timelimit": "xx"}, {"timelimit": [float("nan"), True]},
     {"expires": "soon"}, {"expires": [1]}, {"group": b"\xff"}, {"parent_id": {}}, {"retries": "x"},
     {"ignore_result": "x"}, {"root_id": b"\xff", "group": b"\xff", "expires": "soon"}, {"compression": ["x"]}],
)  # fmt: skip
def test_no_header_of_a_stranger_can_stop_a_worker(app: Umbel, fakes: Fakes, headers: dict[str, Any]) -> None:
    task = app.task(name="shop.job")(lambda: 1)
    body = task.message(()).body
    fakes.broker.add(Message(queue="default", headers={**make_headers("shop.job", "odd"), **headers}, body=body))
    with running(app, fakes) as run:
        assert task.delay().get(5) == 1
        eventually(lambda: fakes.broker.empty)
    assert run.status == 0
    if headers != {"ignore_result": "x"}:
        assert fakes.shelf.state("odd") == "FAILURE"
        assert [m.id for m in fakes.broker.messages("default.dead")] == ["odd"]


def test_what_is_no_task_message_at_all_goes_to_the_dead_letters(app: Umbel, fakes: Fakes) -> None:
    for headers, body in (({}, b"nonsense"), ({"x": 1}, b"[]"), ({}, b'{"task": "t"}')):
        fakes.broker.add(Message(queue="default", headers=headers, body=body))
    with running(app, fakes) as run:
        eventually(lambda: len(fakes.broker.messages("default.dead")) == 3)
    assert run.status == 0
    assert all("unreadable" in m.headers["umbel-dead-cause"] for m in fakes.broker.messages("default.dead"))


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_that_is_lost_is_built_again_from_the_desired_state(job: Task[..., Any], fakes: Fakes) -> None:
    with running(job.app, fakes) as run:
        eventually(lambda: run.worker.intake.last_poll)
        fakes.broker.down = True
        eventually(lambda: fakes.broker.closed >= 2)
        fakes.broker.down = False
        job.apply_async(task_id="after", timeout=5)
        fakes.pool.run(fakes.pool.job("after"))
        eventually(lambda: fakes.broker.empty)
        assert run.worker.intake.credit.limit == 2
    assert run.status == 0
    assert len(fakes.broker.declared) >= 2
    assert fakes.broker.closed == fakes.broker.sessions


def test_a_session_that_falls_silent_is_built_again(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"worker.watchdog": 0.05})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        fakes.broker.silent = True
        eventually(lambda: fakes.broker.sessions == 2)
        fakes.broker.silent = False
        assert task.delay().get(5) == 1


def test_a_session_that_is_busy_is_not_silent(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.watchdog": 0.03, "worker.concurrency": 1})
    app.task(name="shop.job")(lambda: 1).apply_async(task_id="long")
    with running(app, fakes):
        fakes.pool.job("long")
        assert never(lambda: fakes.broker.sessions > 1, 0.15)


def test_the_worker_knows_when_the_broker_last_answered(job: Task[..., Any], fakes: Fakes) -> None:
    with running(job.app, fakes) as run:
        first = eventually(lambda: run.worker.intake.last_poll)
        eventually(lambda: (run.worker.intake.last_poll or 0) > first)
        assert (run.worker.intake.last_poll or 0) <= time.monotonic()


# --- leases ---------------------------------------------------------------------------------------


def leased(make_app: MakeApp) -> Task[..., Any]:
    return make_app({**MANUAL, "broker.lease": 0.15}).task(name="shop.job")(lambda *_: 1)


def test_leases_of_all_that_is_held_are_renewed_until_it_is_settled(make_app: MakeApp, fakes: Fakes) -> None:
    task = leased(make_app)
    with running(task.app, fakes):
        task.apply_async(task_id="long")
        job = fakes.pool.job("long")
        eventually(lambda: len(fakes.broker.calls("renew")) >= 4)
        assert fakes.broker.find("long").count == 1
        fakes.pool.run(job)
        eventually(lambda: fakes.broker.empty)
        renewals = len(fakes.broker.calls("renew"))
        assert never(lambda: len(fakes.broker.calls("renew")) > renewals + 1, 0.12)
    assert fakes.broker.settlements[-1].action is Action.ACK


def test_a_lease_that_has_passed_to_another_drops_what_is_done_here(
    make_app: MakeApp, fakes: Fakes, caplog: pytest.LogCaptureFixture
) -> None:
    task = leased(make_app)
    with running(task.app, fakes) as run:
        task.apply_async(task_id="stolen", link=ERRBACK)
        job = fakes.pool.job("stolen")
        fakes.broker.steal("stolen", hide=60)
        eventually(lambda: any(held.lost for held in run.worker.settlement.held.values()))
        fakes.pool.run(job)
        eventually(lambda: run.worker.settlement.held == {})
        assert run.worker.intake.credit.out == 0
    assert fakes.shelf.records == {}
    assert fakes.broker.messages("errors") == []
    assert fakes.broker.settlements == []
    assert "its lease had passed to another worker" in caplog.text


def test_a_renewal_that_fails_is_tried_again(make_app: MakeApp, fakes: Fakes) -> None:
    task = leased(make_app)
    with running(task.app, fakes):
        task.apply_async(task_id="long")
        job = fakes.pool.job("long")
        fakes.broker.lose_answers.append("renew")
        eventually(lambda: len(fakes.broker.calls("renew")) >= 3)
        fakes.pool.run(job)
        eventually(lambda: fakes.broker.empty)
    assert fakes.shelf.state("long") == "SUCCESS"


def test_leases_that_cannot_be_renewed_are_left_alone(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, renewable_lease=False)
    app = make_app({**MANUAL, "broker.lease": 0.02})
    fakes.broker.add(app.task(name="shop.job")(lambda: 1).message((), task_id="a"))
    with running(app, fakes):
        fakes.pool.job("a")
        assert never(lambda: fakes.broker.calls("renew"))
