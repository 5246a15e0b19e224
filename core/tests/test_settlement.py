"""From completion to settlement: follow-ups, results, settlement, in that order, through every fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from umbel import Umbel, hookimpl
from umbel.errors import PublishRefused, Reject, TimeLimitExceeded, WorkerLost
from umbel.model import Action, Ending, Verdict
from umbel.protocol import exception_from_plain
from umbel.task import Task
from umbel.worker import settlement as settlement_module

from .conftest import MakeApp
from .fakes import Fakes, FakeTransport, eventually, running

MANUAL = {"worker.pool": "manual"}


def link(queue: str = "links") -> dict[str, Any]:
    return {"task": "shop.link", "args": [], "kwargs": {}, "options": {"queue": queue}, "subtask_type": None}


def raised(fakes: Fakes, task_id: str) -> BaseException:
    return exception_from_plain(fakes.shelf.document(task_id)["result"])


@pytest.fixture
def job(make_app: MakeApp) -> Task[..., Any]:
    return make_app(MANUAL).task(name="shop.job", retry_delay=0)(lambda *_: 1)


def actions(fakes: Fakes, task_id: str) -> list[Action]:
    return [s.action for s in list(fakes.broker.settlements) if s.delivery.message.id == task_id]


# --- the order ------------------------------------------------------------------------------------


def test_follow_ups_are_published_then_results_stored_then_the_delivery_settled(
    job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Watch:
        @hookimpl
        def umbel_task_settled(self) -> None:
            order.append("told")

    def note(target: Any, name: str, word: str) -> None:
        original = getattr(target, name)

        async def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = await original(self, *args, **kwargs)
            order.append(word)
            return answer

        monkeypatch.setattr(target, name, noted)

    from .fakes import FakeStore, FakeTransport

    job.app.plugins.register(Watch())
    with running(job.app, fakes):
        job.apply_async(task_id="a", link=link())
        one = fakes.pool.job("a")
        note(FakeTransport, "publish", "published")
        note(FakeStore, "put", "stored")
        note(FakeTransport, "settle", "settled")
        fakes.pool.run(one)
        eventually(lambda: "told" in order)
    assert order[:4] == ["published", "stored", "settled", "told"]


def test_ends_are_settled_in_batches(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.concurrency": 20})
    task = app.task(name="shop.job")(lambda: 1)
    task.map_delay([()] * 20)
    with running(app, fakes):
        eventually(lambda: len(fakes.pool.busy) == 20)
        fakes.shelf.down = True
        for one in list(fakes.pool.busy.values()):
            fakes.pool.run(one)
        eventually(lambda: fakes.shelf.tries >= 2)
        fakes.shelf.down = False
        eventually(lambda: fakes.broker.empty)
    assert len(fakes.broker.calls("settle")) < 5


# --- a store that is down -------------------------------------------------------------------------


def test_while_the_store_is_down_nothing_is_run_again_and_results_are_stored_afterwards(
    app: Umbel, fakes: Fakes
) -> None:
    ran: list[int] = []
    task = app.task(name="shop.job")(ran.append)
    with running(app, fakes):
        fakes.shelf.down = True
        handles = task.map_delay([(n,) for n in range(3)])
        eventually(lambda: fakes.shelf.tries >= 3)
        assert fakes.broker.settlements == []
        fakes.shelf.down = False
        assert [handle.get(5) for handle in handles] == [None] * 3
        eventually(lambda: fakes.broker.empty)
    assert sorted(ran) == [0, 1, 2]


def test_leases_are_renewed_while_the_store_is_down(make_app: MakeApp, fakes: Fakes) -> None:
    ran: list[int] = []
    app = make_app({"broker.lease": 0.1})
    task = app.task(name="shop.job")(ran.append)
    with running(app, fakes):
        fakes.shelf.down = True
        task.apply_async((1,), task_id="a")
        eventually(lambda: len(fakes.broker.calls("renew")) >= 5)
        fakes.shelf.down = False
        eventually(lambda: fakes.shelf.state("a") == "SUCCESS")
        eventually(lambda: fakes.broker.empty)
    assert ran == [1]


def test_a_result_that_cannot_be_stored_before_the_end_is_not_acknowledged(
    app: Umbel, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement_module, "LAST_WORDS", 0.2)
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        fakes.shelf.down = True
        task.apply_async(task_id="a")
        eventually(lambda: fakes.shelf.tries >= 1)
        run.stop()
        run.join()
    assert fakes.broker.settlements == []
    assert fakes.broker.find("a").count == 1


# --- a broker that is down ------------------------------------------------------------------------


def test_while_the_broker_is_down_finished_work_is_kept_and_settled_afterwards(app: Umbel, fakes: Fakes) -> None:
    ran: list[int] = []

    def work(number: int) -> int:
        fakes.broker.down = True
        ran.append(number)
        return number

    task = app.task(name="shop.job")(work)
    with running(app, fakes):
        handle = task.delay(1)
        eventually(lambda: fakes.broker.down)
        eventually(lambda: fakes.broker.sessions >= 3)
        fakes.broker.down = False
        assert handle.get(5) == 1
        eventually(lambda: fakes.broker.empty)
    assert ran == [1]


def test_finished_work_whose_lease_ended_while_the_broker_was_down_is_not_run_again_here(
    job: Task[..., Any], fakes: Fakes
) -> None:
    with running(job.app, fakes) as run:
        job.apply_async(task_id="a")
        one = fakes.pool.job("a")
        fakes.broker.down = True
        fakes.broker.steal("a")
        fakes.pool.run(one)
        eventually(lambda: fakes.shelf.state("a") == "SUCCESS")
        fakes.broker.down = False
        eventually(lambda: fakes.broker.empty)
        assert run.worker.settlement.stale == 1
        eventually(lambda: run.worker.settlement.held == {})
        assert run.worker.settlement.unsettled == {}
        assert run.worker.intake.credit.out == 0
    assert len(fakes.pool.submitted) == 1


def test_a_settlement_whose_answer_is_lost_is_told_again_and_harmless(app: Umbel, fakes: Fakes) -> None:
    ran: list[int] = []
    task = app.task(name="shop.job")(lambda: ran.append(1))
    with running(app, fakes) as run:
        fakes.broker.lose_answers.append("settle")
        task.delay().get(5)
        eventually(lambda: not fakes.broker.lose_answers and run.worker.settlement.held == {})
        assert run.worker.intake.credit.out == 0
        assert task.delay().get(5) is None
    assert len(ran) == 2


def test_a_retry_is_not_mistaken_for_the_delivery_before_it_whose_settlement_was_in_doubt(
    app: Umbel, fakes: Fakes
) -> None:
    @app.task(bind=True, retry_delay=0, max_retries=1)
    def job(self: Any) -> int:
        if self.request.retries == 0:
            fakes.broker.lose_answers.append("settle")
            raise self.retry(countdown=0.05)
        return int(self.request.retries)

    with running(app, fakes):
        assert job.apply_async(task_id="a").get(5) == 1
        eventually(lambda: fakes.broker.empty)


def test_follow_ups_are_sent_when_the_broker_is_back(job: Task[..., Any], fakes: Fakes) -> None:
    with running(job.app, fakes):
        job.apply_async(task_id="a", link=link())
        one = fakes.pool.job("a")
        fakes.broker.down = True
        fakes.pool.run(one)
        eventually(lambda: fakes.broker.sessions >= 2)
        assert fakes.broker.messages("links") == []
        assert fakes.shelf.records == {}
        fakes.broker.down = False
        eventually(lambda: fakes.broker.messages("links"))
        eventually(lambda: fakes.shelf.state("a") == "SUCCESS")


# --- stale settlements ----------------------------------------------------------------------------


def test_a_settlement_that_comes_too_late_is_counted_and_harmless(
    job: Task[..., Any], fakes: Fakes, caplog: pytest.LogCaptureFixture
) -> None:
    with running(job.app, fakes) as run:
        job.apply_async(task_id="a")
        one = fakes.pool.job("a")
        fakes.broker.steal("a", hide=60)
        fakes.pool.run(one)
        eventually(lambda: run.worker.settlement.stale == 1)
        eventually(lambda: run.worker.settlement.held == {})
        assert run.worker.intake.credit.out == 0
        job.apply_async(task_id="b")
        fakes.pool.run(fakes.pool.job("b"))
        eventually(lambda: fakes.shelf.state("b") == "SUCCESS")
    assert fakes.broker.find("a").leased
    assert "does not count" in caplog.text


def test_work_that_outlived_its_lease_asks_first_whether_it_still_counts(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, renewable_lease=False)
    app = make_app({**MANUAL, "broker.lease": 0.05, "worker.concurrency": 1})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        task.apply_async(task_id="mine", link=link())
        one = fakes.pool.job("mine")
        fakes.broker.silent = True
        eventually(lambda: fakes.broker.find("mine").hidden_until < app.clock.time())
        fakes.pool.run(one)
        eventually(lambda: fakes.shelf.state("mine") == "SUCCESS")
        fakes.broker.silent = False
        task.apply_async(task_id="gone", link=link("never"))
        one = fakes.pool.job("gone")
        fakes.broker.steal("gone", hide=60)
        ended = app.clock.time() + 0.05
        eventually(lambda: app.clock.time() > ended)
        fakes.pool.run(one)
        eventually(lambda: run.worker.settlement.held == {})
    assert fakes.shelf.state("gone") is None
    assert fakes.broker.messages("never") == []


def test_outcomes_that_could_not_be_told_are_remembered_within_a_bound(
    make_app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement_module, "_UNSETTLED_KEPT", 2)
    app = make_app({**MANUAL, "worker.concurrency": 5})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        for n in range(5):
            task.apply_async(task_id=f"t{n}")
        for n in range(5):
            one = fakes.pool.job(f"t{n}")
            fakes.broker.steal(f"t{n}", hide=60)
            fakes.pool.run(one)
            eventually(lambda stale=n + 1: run.worker.settlement.stale == stale)
        assert list(run.worker.settlement.unsettled) == ["t3", "t4"]


# --- follow-ups that are refused ------------------------------------------------------------------


def test_a_follow_up_that_is_refused_makes_a_dead_letter_of_its_own_task_only(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.broker.refuse = lambda message: message.queue == "forbidden"
    app = make_app({**MANUAL, "worker.concurrency": 3})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes) as run:
        for name, queue in (("a", "links"), ("bad", "forbidden"), ("c", "links")):
            task.apply_async(task_id=name, link=link(queue))
        fakes.shelf.down = True
        task.apply_async(task_id="plug")
        for name in ("a", "bad", "c"):
            fakes.pool.run(fakes.pool.job(name))
        fakes.shelf.down = False
        fakes.pool.run(fakes.pool.job("plug"))
        eventually(lambda: run.worker.settlement.held == {})
    assert actions(fakes, "bad") == [Action.DEAD]
    assert actions(fakes, "a") == actions(fakes, "c") == [Action.ACK]
    (dead,) = fakes.broker.messages("default.dead")
    assert "a follow-up was refused by the broker: message" in dead.headers["umbel-dead-cause"]
    assert len(fakes.broker.messages("links")) >= 2


def test_who_waits_for_a_task_whose_follow_up_was_refused_is_told(job: Task[..., Any], fakes: Fakes) -> None:
    fakes.broker.refuse = lambda message: message.queue == "forbidden"
    with running(job.app, fakes):
        handle = job.apply_async(link=link("forbidden"))
        fakes.pool.run(fakes.pool.job(handle.id))
        with pytest.raises(PublishRefused, match="is refused"):
            handle.get(5)
    assert fakes.shelf.state(handle.id) == "FAILURE"


def test_a_retry_later_than_the_broker_can_keep_is_a_dead_letter_and_stops_nobody(
    make_app: MakeApp, fakes: Fakes
) -> None:
    fakes.broker.capabilities = attrs.evolve(fakes.broker.capabilities, max_delay=1.0)
    app = make_app()

    @app.task(bind=True)
    def job(self: Any, countdown: float) -> str:
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)
        return "done"

    with running(app, fakes) as run:
        job.apply_async((3600,), task_id="far")
        assert job.apply_async((0.01,), task_id="near").get(5) == "done"
        eventually(lambda: fakes.broker.messages("default.dead"))
        eventually(lambda: fakes.shelf.state("far") == "FAILURE")
    assert run.status == 0


# --- ends without an executor's word --------------------------------------------------------------


def test_work_that_was_given_back_is_not_counted(job: Task[..., Any], fakes: Fakes) -> None:
    with running(job.app, fakes):
        job.apply_async(task_id="a")
        fakes.pool.end(fakes.pool.job("a"), Ending.RETURNED)
        eventually(lambda: len(fakes.pool.submitted) == 2)
        assert fakes.broker.find("a").count == 1
        fakes.pool.run(fakes.pool.job("a"))
        eventually(lambda: fakes.broker.empty)
    assert "start" not in [verb for verb, _ in fakes.broker.log]


def test_a_lost_process_sends_its_task_back_after_a_pause_and_stores_nothing(job: Task[..., Any], fakes: Fakes) -> None:
    with running(job.app, fakes):
        job.apply_async(task_id="a")
        fakes.pool.end(fakes.pool.job("a"), Ending.LOST, "exit code 1")
        (settled,) = eventually(lambda: list(fakes.broker.settlements))
    assert (settled.action, settled.delay, settled.counted) == (Action.REQUEUE, 1, True)
    assert fakes.shelf.records == {}


def test_a_task_over_its_time_limit_fails_with_the_limit_that_held(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app(MANUAL)
    task = app.task(name="shop.job", time_limit=60)(lambda: 1)
    errback = link("errors")
    with running(app, fakes):
        for name, options, text in (("own", {}, "60"), ("call", {"time_limit": 5}, "5")):
            task.apply_async(task_id=name, link_error=errback, **options)  # type: ignore[arg-type]  # a dict
            one = fakes.pool.job(name)
            assert one.time_limit == float(text)
            fakes.pool.end(one, Ending.TIMED_OUT)
            last = fakes.pool.job(name)
            assert last.payload[0] == "timed out"
            assert last.id != one.id
            fakes.pool.run(last)
            eventually(lambda task_id=name: fakes.shelf.state(task_id) == "FAILURE")
            exc = raised(fakes, name)
            assert (type(exc), exc.args) == (TimeLimitExceeded, (text,))
        eventually(lambda: fakes.broker.messages() == [])
    assert len(fakes.broker.messages("errors")) == 2
    assert actions(fakes, "own") == [Action.ACK]


@pytest.mark.parametrize("ending", [Ending.LOST, Ending.CANCELLED, Ending.TIMED_OUT])
def test_when_even_the_conclusion_is_lost_the_failure_is_stored_all_the_same(
    make_app: MakeApp, fakes: Fakes, ending: Ending
) -> None:
    app = make_app({**MANUAL, "worker.max_deliveries": 1})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        task.apply_async(task_id="a")
        fakes.pool.end(fakes.pool.job("a"), Ending.LOST, "signal 11")
        eventually(lambda: [j for j in fakes.pool.busy.values() if j.payload[0] == "lost"])
        fakes.pool.end(fakes.pool.job("a"), ending, "signal 9")
        eventually(lambda: fakes.broker.messages("default.dead"))
    assert isinstance(raised(fakes, "a"), WorkerLost)


def test_a_conclusion_that_is_given_back_is_written_by_the_next_worker(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({**MANUAL, "worker.max_deliveries": 1, "worker.concurrency": 1})
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        task.apply_async(task_id="a")
        fakes.pool.end(fakes.pool.job("a"), Ending.LOST, "signal 11")
        eventually(lambda: [j for j in fakes.pool.busy.values() if j.payload[0] == "lost"])
        fakes.pool.end(fakes.pool.job("a"), Ending.RETURNED)
        eventually(lambda: actions(fakes, "a") == [Action.REQUEUE])
        assert fakes.broker.settlements[0].counted, "the start that ended in the loss stays in the counts"
        if fakes.shelf.records:
            raise AssertionError("a result was stored of a task that goes back to its queue")
        fakes.pool.run(fakes.pool.job("a"))
        eventually(lambda: fakes.broker.messages("default.dead"))
    assert [job.payload[0] for job in fakes.pool.submitted] == ["run", "lost", "lost"]


def test_an_early_task_whose_process_is_lost_fails_and_is_not_run_again(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app(MANUAL)
    task = app.task(name="shop.job", ack="early")(lambda: 1)
    with running(app, fakes):
        task.apply_async(task_id="a", link_error=link("errors"))
        fakes.pool.end(fakes.pool.job("a"), Ending.LOST, "signal 9")
        fakes.pool.run(fakes.pool.job("a"))
        eventually(lambda: fakes.shelf.state("a") == "FAILURE")
    assert isinstance(raised(fakes, "a"), WorkerLost)
    assert len([j for j in fakes.pool.submitted if j.payload[0] == "run"]) == 1


def test_an_early_task_that_was_not_started_before_the_stop_is_not_lost(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.reserve = 1
    app = make_app({**MANUAL, "worker.concurrency": 1, "worker.grace": 0.01})
    task = app.task(name="shop.job", ack="early")(lambda: 1)
    with running(app, fakes) as run:
        task.apply_async(task_id="runs")
        fakes.pool.job("runs")
        task.apply_async(task_id="waits")
        fakes.pool.job("waits")
        eventually(lambda: fakes.broker.messages() == [])
        run.stop()
        run.join()
    assert [m.id for m in fakes.broker.messages()] == ["waits"]


# --- what the store refuses -----------------------------------------------------------------------


@pytest.mark.parametrize("dead_letter", [False, True])
def test_a_result_that_the_store_never_takes_fails_its_own_task_only(
    make_app: MakeApp, fakes: Fakes, dead_letter: bool
) -> None:
    fakes.shelf.refuse = lambda result: b"large" in result.document and result.state == "SUCCESS"
    app = make_app({**MANUAL, "worker.concurrency": 20})
    task = app.task(name="shop.job", dead_letter=dead_letter)(lambda value: value)
    with running(app, fakes):
        for name, value in (("a", 1), ("b", "large"), ("c", 3)):
            task.apply_async((value,), task_id=name, link=link())
        eventually(lambda: len(fakes.pool.busy) == 3)
        for job in list(fakes.pool.busy.values()):
            fakes.pool.run(job)
        eventually(lambda: not fakes.broker.messages())
    assert [fakes.shelf.state(name) for name in "abc"] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert "the result store" not in str(raised(fakes, "b"))
    assert re.search(r"a document of \d+ bytes is too large", str(raised(fakes, "b")))
    assert len(fakes.broker.messages("links")) == 3
    assert actions(fakes, "b") == [Action.DEAD if dead_letter else Action.ACK]
    (outcome,) = (outcome for settlement, outcome in fakes.settled if settlement.delivery.message.id == "b")
    assert outcome.verdict is Verdict.FAILURE
    assert outcome.detail.startswith("the result store refused the record SUCCESS: a document of")


def test_a_store_that_takes_nothing_stops_nobody(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.shelf.refuse = lambda _: True
    app = make_app()
    task = app.task(name="shop.job")(lambda: 1)
    with running(app, fakes):
        for _ in range(3):
            task.delay()
        eventually(lambda: fakes.broker.empty)
    assert fakes.shelf.records == {}
    assert {s.action for s in fakes.broker.settlements} == {Action.ACK}


def test_a_passing_state_that_is_refused_does_not_end_the_task(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.shelf.refuse = lambda result: result.state == "RETRY"
    app = make_app()

    @app.task(name="shop.job", bind=True, retry_delay=0)
    def job(self: Any) -> int:
        if not self.request.retries:
            raise self.retry()
        return 7

    with running(app, fakes):
        assert job.delay().get(5) == 7
    assert [state for _, state in fakes.shelf.history] == ["SUCCESS"]


# --- verdicts, as the broker sees them ------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "action", "state"),
    [
        (lambda: 1, Action.ACK, "SUCCESS"),
        (lambda: 1 // 0, Action.ACK, "FAILURE"),
        (lambda: exec("raise __import__('umbel.errors').errors.Ignore"), Action.ACK, None),
        (lambda: exec("raise __import__('umbel.errors').errors.Reject('x')"), Action.DEAD, "FAILURE"),
    ],
)
def test_what_becomes_of_a_message(
    app: Umbel, fakes: Fakes, function: Callable[[], Any], action: Action, state: str | None
) -> None:
    task = app.task(name="shop.job")(function)
    with running(app, fakes):
        task.apply_async(task_id="a")
        eventually(lambda: fakes.broker.messages() == [])
    assert actions(fakes, "a") == [action]
    assert fakes.shelf.state("a") == state


def test_a_task_that_wants_its_failures_kept_leaves_a_dead_letter_and_its_result(app: Umbel, fakes: Fakes) -> None:
    task = app.task(name="shop.job", dead_letter=True)(lambda: 1 // 0)
    with running(app, fakes):
        with pytest.raises(ZeroDivisionError):
            task.apply_async(task_id="a").get(5)
        eventually(lambda: fakes.broker.messages("default.dead"))
    (dead,) = fakes.broker.messages("default.dead")
    assert dead.headers["umbel-dead-cause"].startswith("failure: ZeroDivisionError")


def test_a_task_that_is_put_back_is_run_again_after_a_pause_and_not_blamed(app: Umbel, fakes: Fakes) -> None:
    ran: list[int] = []
    fakes.broker.pace = 0

    @app.task
    def job() -> int:
        ran.append(1)
        if len(ran) < 10:
            raise Reject("not now", requeue=True)
        return len(ran)

    with running(app, fakes):
        assert job.apply_async(task_id="a").get(5) == 10
        eventually(lambda: fakes.broker.empty)
    back = [s for s in fakes.broker.settlements if s.action is Action.REQUEUE]
    assert [(s.counted, s.delay > 0) for s in back] == [(False, True)] * 9


def test_listeners_hear_of_every_settlement_with_its_outcome(app: Umbel, fakes: Fakes) -> None:
    with running(app, fakes):
        app.task(name="shop.job")(lambda: 1).apply_async(task_id="a")
        ((settlement, outcome),) = eventually(lambda: list(fakes.settled))
    assert (settlement.action, settlement.delivery.message.id) == (Action.ACK, "a")
    assert (outcome.verdict, outcome.task_id, outcome.task) == (Verdict.SUCCESS, "a", "shop.job")


def test_a_renewal_that_finds_a_delivery_settled_by_us_takes_nothing_away(
    job: Task[..., Any], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(job.app, fakes) as run:
        settle = FakeTransport.settle

        async def settle_with_a_renewal_in_between(self: FakeTransport, settlements: Any) -> Any:
            told = await settle(self, settlements)
            for held in run.worker.settlement.held.values():
                held.lost = True  # what the renewal does where the broker knows the lease no more
            return told

        monkeypatch.setattr(FakeTransport, "settle", settle_with_a_renewal_in_between)
        job.apply_async(task_id="a")
        fakes.pool.run(fakes.pool.job("a"))
        ((_, outcome),) = eventually(lambda: list(fakes.settled))
        assert (outcome.verdict, outcome.task_id) == (Verdict.SUCCESS, "a")
        assert (run.worker.settlement.totals, run.worker.settlement.stale) == ({"shop.job": 1}, 0)


def test_without_a_result_store_work_is_settled_all_the_same(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"results.url": "disabled"})
    with running(app, fakes) as run:
        app.task(name="shop.job")(lambda: 1).delay()
        app.task(name="shop.fails")(lambda: 1 // 0).delay()
        eventually(lambda: len(fakes.broker.settlements) == 2)
    assert run.status == 0
    assert json.dumps(run.worker.settlement.totals) == '{"shop.job": 1, "shop.fails": 1}'
