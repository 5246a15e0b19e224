"""The straight way of one job: every branch makes exactly one outcome, whatever user code does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest

from umbel import Umbel, hookimpl
from umbel.app import Middleware
from umbel.errors import (
    Ignore,
    MaxRetriesExceeded,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    TaskCancelled,
    TaskFailed,
    TimeLimitExceeded,
    UnknownTask,
    WorkerLost,
)
from umbel.model import Message, Outcome, Result, State, Verdict
from umbel.ports.clock import VirtualClock
from umbel.protocol import exception_from_plain
from umbel.task import Request, Task, current_request
from umbel.worker.execution import TaskExecutor, make_executor
from umbel.worker.outcomes import Records

from .conftest import MakeApp
from .fakes import Fakes, close_runner


class Bench:
    """Sends a task and runs its message here, as a child would."""

    def __init__(self, app: Umbel, fakes: Fakes) -> None:
        self.app, self.fakes = app, fakes
        self._executor: TaskExecutor | None = None

    @property
    def executor(self) -> TaskExecutor:
        if self._executor is None:
            self._executor = TaskExecutor(self.app, "w@here")
        return self._executor

    def message(self, task: Task[..., Any], *args: Any, **options: Any) -> Message:
        return self.app.client.message(task.name, args, {}, task.options, **options)

    def run(self, message: Message, mode: str = "run", count: int = 1, detail: str = "") -> Outcome:
        payload = self.executor.execute((mode, message.to_plain(), "default", count, detail))
        return Records(self.app, "w@here").from_plain(payload, message)

    def __call__(self, task: Task[..., Any], *args: Any, **options: Any) -> Outcome:
        return self.run(self.message(task, *args, **options))

    def close(self) -> None:
        if self._executor is not None:
            close_runner(self._executor)


@pytest.fixture
def app(make_app: MakeApp) -> Umbel:
    return make_app(clock=VirtualClock())


@pytest.fixture
def bench(app: Umbel, fakes: Fakes) -> Iterator[Bench]:
    made = Bench(app, fakes)
    yield made
    made.close()


def document(outcome: Outcome) -> dict[str, Any]:
    (result,) = outcome.results
    assert result.task_id == outcome.task_id
    found: dict[str, Any] = json.loads(result.document)
    assert found["status"] == result.state
    return found


def raised(outcome: Outcome) -> BaseException:
    found = document(outcome)
    return exception_from_plain(found["result"], found["traceback"])


def raiser(exc: BaseException | type[BaseException]) -> Callable[[], None]:
    def job() -> None:
        raise exc

    return job


ERRBACK: dict[str, Any] = {"task": "shop.errback", "args": ["ctx"], "kwargs": {}, "options": {}, "subtask_type": None}


# --- success --------------------------------------------------------------------------------------


def test_success_has_its_value_and_no_traceback(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.pair")(pair), 1, 2)
    assert (outcome.verdict, outcome.task, outcome.traceback) == (Verdict.SUCCESS, "shop.pair", None)
    found = document(outcome)
    assert found["result"] == [1, {"y": 2}]
    assert (found["traceback"], found["children"], found["date_done"]) == (None, [], "2023-11-14T22:13:20+00:00")
    assert outcome.runtime >= 0


def pair(x: Any, y: Any) -> Any:
    return [x, {"y": y}]


def test_a_result_that_nobody_wants_is_not_stored(app: Umbel, bench: Bench) -> None:
    quiet = app.task(name="shop.quiet", ignore_result=True)(raiser(ValueError("x")))
    loud = app.task(name="shop.loud")(lambda: 1)
    assert bench(quiet).results == ()
    assert bench(loud, ignore_result=True).results == ()
    message = bench.message(loud)
    unsaid = attrs.evolve(message, headers={**message.headers, "ignore_result": None})
    assert document(bench.run(unsaid))["result"] == 1
    assert document(bench(quiet, ignore_result=False))["status"] == "FAILURE"


def test_without_a_result_store_nothing_is_stored(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"results.url": "disabled"})
    outcome = Bench(app, fakes)(app.task(name="shop.pair")(pair), 1, 2)
    assert (outcome.verdict, outcome.results) == (Verdict.SUCCESS, ())


def test_what_the_task_sent_and_what_is_sent_because_of_it_are_its_children(app: Umbel, bench: Bench) -> None:
    other = app.task(name="shop.other")(lambda *_: None)

    @app.task
    def sender() -> str:
        return other.delay().id

    outcome = bench(sender, link=other.s().set(task_id="linked"))
    children = [child[0][0] for child in document(outcome)["children"]]
    assert children == [document(outcome)["result"], "linked"]
    assert [m.id for m in outcome.follow_ups] == ["linked"]


def test_the_task_sees_its_request_and_nobody_else_does(app: Umbel, bench: Bench) -> None:
    @app.task(bind=True)
    def look(self: Task[..., Any]) -> list[Any]:
        assert current_request() is self.request
        return [self.request.id, self.request.hostname, self.request.delivery_count, self.request.called_directly]

    message = bench.message(look, headers={"x-a": 1})
    outcome = bench.run(message, count=4)
    assert document(outcome)["result"] == [message.id, "w@here", 4, False]
    assert current_request() is None


def test_extended_results_tell_of_the_call(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"results.extended": True})
    task = app.task(name="shop.pair")(pair)
    found = document(Bench(app, fakes)(task, 1, 2, retries=2))
    assert {k: found[k] for k in ("name", "args", "kwargs", "worker", "retries", "queue")} == {
        "name": "shop.pair", "args": [1, 2], "kwargs": {}, "worker": "w@here", "retries": 2, "queue": "default",
    }  # fmt: skip


def test_extended_results_of_arguments_that_results_cannot_hold_show_them(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"results.extended": True, "codec.serializer": "repr", "codec.accept": ["repr"]})
    task = app.task(name="shop.pair")(lambda *_: 1)
    outcome = Bench(app, fakes)(task, b"\xff", 2)
    assert outcome.verdict is Verdict.SUCCESS
    assert "xff" in str(document(outcome)["args"])


def test_passing_states_are_stored_while_it_runs(app: Umbel, bench: Bench, fakes: Fakes) -> None:
    @app.task(bind=True, track_started=True)
    def job(self: Task[..., Any]) -> None:
        self.update_state("PROGRESS", {"done": 1})

    outcome = bench(job)
    assert [state for _, state in fakes.shelf.history] == ["STARTED", "PROGRESS"]
    assert outcome.verdict is Verdict.SUCCESS


def test_a_store_that_is_down_does_not_keep_a_task_from_starting(app: Umbel, bench: Bench, fakes: Fakes) -> None:
    fakes.shelf.down = True
    assert bench(app.task(name="shop.job", track_started=True)(lambda: 1)).verdict is Verdict.SUCCESS


# --- failure --------------------------------------------------------------------------------------


def test_failure_has_the_exception_and_a_traceback_from_the_tasks_own_frames_on(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(KeyError("k"))))
    assert (outcome.verdict, outcome.detail) == (Verdict.FAILURE, "KeyError: 'k'")
    assert isinstance(raised(outcome), KeyError)
    text = document(outcome)["traceback"]
    assert text == outcome.traceback
    assert "raise exc" in text
    assert "worker/execution.py" not in text
    assert "umbel/task.py" not in text


def test_an_expected_exception_has_no_traceback(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job", throws=(LookupError,))(raiser(KeyError("k"))))
    assert (outcome.verdict, outcome.traceback, document(outcome)["traceback"]) == (Verdict.FAILURE, None, None)


def test_failure_sends_errbacks_and_no_callbacks(app: Umbel, bench: Bench) -> None:
    task = app.task(name="shop.job")(raiser(KeyError("k")))
    outcome = bench(task, link=ERRBACK, link_error=ERRBACK, task_id="me")
    assert [(m.task, json.loads(m.body)[0]) for m in outcome.follow_ups] == [("shop.errback", ["me", "ctx"])]


def test_failure_of_a_chain_member_is_the_failure_of_all_after_it(app: Umbel, bench: Bench) -> None:
    task = app.task(name="shop.job")(raiser(KeyError("k")))
    rest = [{**ERRBACK, "options": {"task_id": name}} for name in ("last", "next")] + [{**ERRBACK}]
    outcome = bench(task, chain=rest, task_id="me")
    assert [(r.task_id, r.state) for r in outcome.results] == [
        ("me", "FAILURE"), ("last", "FAILURE"), ("next", "FAILURE"),
    ]  # fmt: skip
    assert outcome.follow_ups == ()


@pytest.mark.parametrize(
    "exc", [asyncio.CancelledError(), GeneratorExit(), BaseException("bare"), SoftTimeLimitExceeded()]
)
def test_exceptions_beyond_exception_are_failures_too(app: Umbel, bench: Bench, exc: BaseException) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(exc)))
    assert outcome.verdict is Verdict.FAILURE
    assert document(outcome)["result"]["exc_type"] == type(exc).__name__


@pytest.mark.parametrize("exc", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_process_is_left_to_the_pool(app: Umbel, bench: Bench, exc: BaseException) -> None:
    with pytest.raises(type(exc)):
        bench(app.task(name="shop.job")(raiser(exc)))
    assert current_request() is None


def test_a_callback_that_cannot_be_sent_fails_the_task(app: Umbel, bench: Bench) -> None:
    task = app.task(name="shop.job")(lambda: 1)
    outcome = bench(task, link={**ERRBACK, "options": {"serializer": "nobodys"}})
    assert outcome.verdict is Verdict.FAILURE
    assert "nobodys" in outcome.detail


def test_an_errback_that_cannot_be_sent_leaves_the_failure_as_it_is(
    app: Umbel, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    task = app.task(name="shop.job")(raiser(KeyError("k")))
    outcome = bench(task, link_error={**ERRBACK, "options": {"serializer": "nobodys"}})
    assert isinstance(raised(outcome), KeyError)
    assert "nobodys" in caplog.text


# --- nasty exceptions -----------------------------------------------------------------------------


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class OddArgs(Exception):
    args = None  # type: ignore[assignment]  # the point


class Bad:
    def __repr__(self) -> str:
        raise RuntimeError


def cyclic() -> Exception:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    return one


NASTY: Mapping[str, BaseException] = {
    "keyword-only": KeywordOnly(code=3),
    "mute": Mute("x"),
    "odd args": OddArgs(),
    "unserialisable": ValueError("x", object(), {1, 2}),
    "unprintable argument": ValueError(Bad()),
    "cyclic": cyclic(),
    "group": ExceptionGroup("several", [ValueError("a"), ExceptionGroup("deep", [KeyError("b")])]),
    "base group": BaseExceptionGroup("several", [GeneratorExit()]),
    "huge": ValueError("x" * 300_000),
    "hugely many": ValueError(*range(100_000)),
    "huge name": type("N" * 5_000, (Exception,), {})("x"),
}


@pytest.mark.parametrize("name", NASTY)
def test_no_exception_is_too_nasty_to_be_stored(make_app: MakeApp, fakes: Fakes, name: str) -> None:
    app = make_app({"codec.max_body_size": 50_000})
    outcome = Bench(app, fakes)(app.task(name="shop.job")(raiser(NASTY[name])), link_error=ERRBACK)
    assert outcome.verdict is Verdict.FAILURE
    assert len(outcome.detail) < 6_000
    assert isinstance(raised(outcome), BaseException)
    assert outcome.follow_ups
    assert len(outcome.results[0].document) <= 50_000


def test_arguments_of_an_exception_that_cannot_be_serialised_are_stored_as_their_repr(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(ValueError("kept", {1, 2}))))
    assert document(outcome)["result"]["exc_message"] == ["kept", "{1, 2}"]


def test_a_deep_recursion_is_a_failure_like_any_other(app: Umbel, bench: Bench) -> None:
    @app.task
    def endless(n: int = 0) -> int:
        return endless.run(n + 1)  # type: ignore[no-any-return]  # its own function

    outcome = bench(endless)
    assert isinstance(raised(outcome), RecursionError)


def test_a_result_that_cannot_be_serialised_is_a_failure_naming_the_task(app: Umbel, bench: Bench) -> None:
    task = app.task(name="shop.job")(object)
    outcome = bench(task)
    assert outcome.verdict is Verdict.FAILURE
    assert "the result of task 'shop.job' cannot be stored" in outcome.detail
    linked = bench(task, link=ERRBACK)
    assert (linked.verdict, linked.follow_ups) == (Verdict.FAILURE, ())


def test_a_result_too_large_is_a_failure_naming_the_setting(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"codec.max_body_size": 10_000})
    outcome = Bench(app, fakes)(app.task(name="shop.job")(lambda: "x" * 20_000))
    assert outcome.verdict is Verdict.FAILURE
    assert "[codec] max_body_size" in outcome.detail


# --- retries --------------------------------------------------------------------------------------


def test_a_retry_sends_the_same_task_again_and_stores_retry(app: Umbel, bench: Bench) -> None:
    @app.task(bind=True, retry_delay=30)
    def job(self: Task[..., Any]) -> None:
        self.retry(exc=OSError("down"))

    outcome = bench(job, task_id="me", link_error=ERRBACK)
    (again,) = outcome.follow_ups
    assert (again.id, again.headers["retries"], again.due) == ("me", 1, app.clock.time() + 30)
    found = document(outcome)
    assert (outcome.verdict, found["status"], found["date_done"]) == (Verdict.RETRY, "RETRY", None)
    assert isinstance(raised(outcome), OSError)
    assert outcome.detail == "retry in 30 s: OSError: down"


def test_a_retry_is_run_with_one_retry_more_until_they_are_spent(app: Umbel, bench: Bench) -> None:
    seen: list[int] = []

    @app.task(bind=True, max_retries=2, retry_delay=0)
    def job(self: Task[..., Any]) -> None:
        seen.append(self.request.retries)
        raise self.retry()

    outcome = bench(job)
    while outcome.verdict is Verdict.RETRY:
        outcome = bench.run(outcome.follow_ups[0])
    assert seen == [0, 1, 2]
    assert isinstance(raised(outcome), MaxRetriesExceeded)


def test_a_bare_retry_exception_is_a_retry(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(Retry(5))))
    assert (outcome.verdict, outcome.follow_ups[0].due) == (Verdict.RETRY, app.clock.time() + 5)


def test_exceptions_that_retry_by_themselves(app: Umbel, bench: Bench) -> None:
    task = app.task(
        name="shop.job", autoretry_for=(OSError,), dont_autoretry_for=(TimeoutError,), max_retries=1, retry_delay=9
    )(lambda kind: raiser({"os": OSError("a"), "timeout": TimeoutError("b"), "value": ValueError("c")}[kind])())
    outcome = bench(task, "os")
    assert (outcome.verdict, outcome.follow_ups[0].due) == (Verdict.RETRY, app.clock.time() + 9)
    assert bench(task, "timeout").verdict is Verdict.FAILURE
    assert bench(task, "value").verdict is Verdict.FAILURE
    spent = bench(task, "os", retries=1)
    assert spent.verdict is Verdict.FAILURE
    assert isinstance(raised(spent), OSError)


@pytest.mark.parametrize(("retries", "longest"), [(0, 2), (1, 4), (2, 8), (3, 10), (50, 10)])
def test_automatic_retries_back_off_within_their_bounds(app: Umbel, bench: Bench, retries: int, longest: float) -> None:
    options: dict[str, Any] = {
        "autoretry_for": (OSError,), "retry_backoff": 2, "retry_backoff_max": 10, "max_retries": None,
    }  # fmt: skip
    plain = app.task(name="shop.plain", retry_jitter=False, **options)(raiser(OSError()))
    assert bench(plain, retries=retries).follow_ups[0].due == app.clock.time() + longest
    spread = app.task(name="shop.spread", **options)(raiser(OSError()))
    dues = [bench(spread, retries=retries).follow_ups[0].due or app.clock.time() for _ in range(30)]
    assert all(app.clock.time() <= due <= app.clock.time() + longest for due in dues)
    assert len(set(dues)) > 10


# --- verdicts that tasks raise --------------------------------------------------------------------


def test_ignore_stores_and_sends_nothing(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(Ignore())), link=ERRBACK, link_error=ERRBACK)
    assert (outcome.verdict, outcome.results, outcome.follow_ups) == (Verdict.IGNORED, (), ())


def test_reject_is_a_failure_on_its_way_to_the_dead_letters(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(Reject("no stock"))), link_error=ERRBACK)
    assert outcome.verdict is Verdict.REJECTED
    assert document(outcome)["status"] == "FAILURE"
    assert isinstance(raised(outcome), Reject)
    assert len(outcome.follow_ups) == 1


def test_reject_with_requeue_stores_and_sends_nothing(app: Umbel, bench: Bench) -> None:
    outcome = bench(app.task(name="shop.job")(raiser(Reject(Mute("x"), requeue=True))), link_error=ERRBACK)
    assert (outcome.verdict, outcome.results, outcome.follow_ups) == (Verdict.REQUEUED, (), ())


# --- what is not called ---------------------------------------------------------------------------


def test_an_expired_task_is_not_called_and_its_errbacks_hear_of_it(app: Umbel, bench: Bench) -> None:
    task = app.task(name="shop.job")(raiser(AssertionError("called")))
    message = bench.message(task, expires=60, link_error=ERRBACK)
    assert isinstance(app.clock, VirtualClock)
    app.clock.advance(61)
    outcome = bench.run(message)
    assert (outcome.verdict, document(outcome)["status"]) == (Verdict.EXPIRED, "REVOKED")
    assert len(outcome.follow_ups) == 1


def test_an_unknown_task_is_told_with_the_nearest_name(app: Umbel, bench: Bench) -> None:
    app.task(name="shop.send_mail")(lambda: None)
    outcome = bench.run(app.client.message("shop.send_mial", (), {}, app.tasks["shop.send_mail"].options))
    assert outcome.verdict is Verdict.UNKNOWN_TASK
    assert "did you mean 'shop.send_mail'?" in outcome.detail
    assert isinstance(raised(outcome), UnknownTask)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"body": b"{"}, "not JSON"),
        ({"body": b"[1]"}, "args, kwargs, embed"),
        ({"content_type": "application/x-python-serialize"}, "not accepted"),
        ({"headers": {"timelimit": "x"}}, "timelimit"),
        ({"headers": {"compression": "application/x-gzip"}}, "accept_compression"),
        ({"headers": {"group": b"\xff"}}, "group must be text"),
        ({"body": b'[[], {}, {"chord": {"task": "t"}}]'}, "part of a chord"),
    ],
)
def test_what_cannot_be_read_is_told_and_stored(app: Umbel, bench: Bench, changes: Any, why: str) -> None:
    message = bench.message(app.task(name="shop.job")(raiser(AssertionError("called"))))
    headers = {**message.headers, **changes.pop("headers", {})}
    outcome = bench.run(attrs.evolve(message, headers=headers, **changes))
    assert outcome.verdict is Verdict.UNREADABLE
    assert why in outcome.detail
    assert document(outcome)["status"] == "FAILURE"


def test_what_has_no_id_is_told_and_not_stored(app: Umbel, bench: Bench) -> None:
    outcome = bench.run(Message(queue="default", body=b"nonsense"))
    assert (outcome.verdict, outcome.results) == (Verdict.UNREADABLE, ())


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"task": "shop.unknown"}, Verdict.UNKNOWN_TASK), ({"chord": {"task": "shop.job"}}, Verdict.UNREADABLE)],
)
def test_a_protocol_1_message_that_is_refused_leaves_a_result_for_who_waits(
    app: Umbel, bench: Bench, changes: dict[str, Any], verdict: Verdict
) -> None:
    app.task(name="shop.job")(raiser(AssertionError("called")))
    body = {"id": "old", "task": "shop.job", "args": [], "kwargs": {}, **changes}
    outcome = bench.run(Message(queue="default", body=json.dumps(body).encode()))
    assert (outcome.verdict, outcome.task_id, outcome.task) == (verdict, "old", body["task"])
    assert (document(outcome)["status"], document(outcome)["task_id"]) == ("FAILURE", "old")


def test_a_protocol_1_message_is_run(app: Umbel, bench: Bench) -> None:
    app.task(name="shop.pair")(pair)
    body = json.dumps({"task": "shop.pair", "id": "old", "args": [1, 2], "kwargs": {}}).encode()
    outcome = bench.run(Message(queue="default", body=body))
    assert (outcome.verdict, outcome.task_id, document(outcome)["result"]) == (Verdict.SUCCESS, "old", [1, {"y": 2}])


# --- handlers, middleware, observers --------------------------------------------------------------


def test_handlers_hear_of_the_end(app: Umbel, bench: Bench) -> None:
    heard: list[tuple[Any, ...]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args: heard.append((name, *args))

    declare = app.task(
        name="shop.job", bind=True, max_retries=1, on_success=note("success"), on_failure=note("failure"),
        on_retry=note("retry"),
    )  # fmt: skip

    @declare
    def job(self: Task[..., Any], what: str) -> int:
        if what == "retry":
            self.retry(exc=OSError("x"))
        return 1 if what == "ok" else 1 // 0

    for what in ("ok", "fail", "retry"):
        bench(job, what, task_id=what)
    assert heard[0] == ("success", 1, "ok", ["ok"], {})
    name, exc, task_id, args, kwargs, einfo = heard[1]
    assert (name, type(exc), task_id, args, kwargs) == ("failure", ZeroDivisionError, "fail", ["fail"], {})
    assert "1 // 0" in einfo
    assert heard[2][0] == "retry"
    assert isinstance(heard[2][1], OSError)
    assert len(heard) == 3


@pytest.mark.parametrize("exc", [RuntimeError("own trouble"), SoftTimeLimitExceeded()])
def test_a_handler_that_raises_is_logged_and_changes_nothing(
    app: Umbel, bench: Bench, caplog: pytest.LogCaptureFixture, exc: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise exc

    handlers = {"on_success": fail, "on_failure": fail, "on_retry": fail}
    for function, verdict in (
        (lambda: 1, Verdict.SUCCESS),
        (raiser(KeyError("k")), Verdict.FAILURE),
        (raiser(Retry(1)), Verdict.RETRY),
    ):
        task = app.task(name=f"shop.{verdict.value}", **handlers)(function)  # type: ignore[call-overload]  # a dict
        assert bench(task).verdict is verdict
    assert caplog.text.count("the task's outcome stands") == 3


def test_middleware_wraps_every_call_the_first_named_outermost(make_app: MakeApp, fakes: Fakes) -> None:
    seen: list[str] = []

    def layer(name: str) -> Middleware:
        def around(call_next: Callable[[Request], Any], request: Request) -> Any:
            seen.append(f"{name} in")
            try:
                return call_next(request)
            finally:
                seen.append(f"{name} out")

        return around

    class Plugin:
        @hookimpl
        def umbel_add_middleware(self) -> list[Middleware]:
            return [layer("plugin")]

    app = make_app(middleware=[layer("one"), layer("two")], plugins=[Plugin()])
    Bench(app, fakes)(app.task(name="shop.job")(lambda: seen.append("task")))
    assert seen == ["one in", "two in", "plugin in", "task", "plugin out", "two out", "one out"]


def test_middleware_may_answer_without_calling_change_the_answer_and_fail(make_app: MakeApp, fakes: Fakes) -> None:
    def gate(call_next: Callable[[Request], Any], request: Request) -> Any:
        if request.args == ["cached"]:
            return "from the cache"
        if request.args == ["never"]:
            raise PermissionError("never")
        return [call_next(request)]

    app = make_app(middleware=[gate])
    bench, task = Bench(app, fakes), app.task(name="shop.job")(lambda what: f"ran {what}")
    assert document(bench(task, "cached"))["result"] == "from the cache"
    assert document(bench(task, "x"))["result"] == ["ran x"]
    assert isinstance(raised(bench(task, "never")), PermissionError)


def test_observers_hear_of_every_call_and_one_that_raises_harms_nobody(make_app: MakeApp, fakes: Fakes) -> None:
    heard: list[Any] = []

    class Plugin:
        @hookimpl
        def umbel_child_started(self, app: Umbel) -> None:
            heard.append(app.name)
            raise RuntimeError

        @hookimpl
        def umbel_before_task(self, request: Request) -> None:
            heard.append(request.id)
            raise RuntimeError

        @hookimpl
        def umbel_after_task(self, request: Request, outcome: Outcome) -> None:
            heard.append(outcome.verdict)
            raise RuntimeError

    app = make_app(plugins=[Plugin()])
    outcome = Bench(app, fakes)(app.task(name="shop.job")(lambda: 1), task_id="me")
    assert outcome.verdict is Verdict.SUCCESS
    assert heard == ["shop", "me", Verdict.SUCCESS]


# --- async tasks ----------------------------------------------------------------------------------


def test_async_tasks_run_on_one_event_loop_that_lives_as_long_as_the_thread(app: Umbel, bench: Bench) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    @app.task(bind=True)
    async def job(self: Task[..., Any], x: int) -> list[Any]:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return [x, self.request.id]

    for n in (1, 2):
        assert document(bench(job, n, task_id="me"))["result"] == [n, "me"]
    assert loops[0] is loops[1]


def test_async_tasks_fail_retry_and_are_cancelled_like_others(app: Umbel, bench: Bench) -> None:
    @app.task
    async def job(what: str) -> None:
        await asyncio.sleep(0)
        match what:
            case "fail":
                raise KeyError("k")
            case "retry":
                raise Retry(1)
            case "cancelled":
                raise TaskCancelled
            case "inner":
                asyncio.current_task().cancel()  # type: ignore[union-attr]  # inside one
                await asyncio.sleep(1)

    verdicts = [bench(job, what).verdict for what in ("fail", "retry", "cancelled", "inner", "fine")]
    assert verdicts == [Verdict.FAILURE, Verdict.RETRY, Verdict.CANCELLED, Verdict.FAILURE, Verdict.SUCCESS]


@pytest.mark.parametrize("exc", [SoftTimeLimitExceeded, TaskCancelled])
def test_an_interruption_of_the_event_loop_leaves_nothing_of_it_behind(
    app: Umbel, bench: Bench, exc: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned: list[str] = []

    @app.task
    async def job(strike: bool) -> None:
        async def background() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.append("background")

        task = asyncio.create_task(background())
        await asyncio.sleep(0)
        if strike:
            loop = asyncio.get_running_loop()

            def struck() -> None:
                monkeypatch.delattr(loop, "_run_once")
                raise exc

            monkeypatch.setattr(loop, "_run_once", struck, raising=False)
            await asyncio.Event().wait()
        task.cancel()

    outcome = bench(job, True)
    assert outcome.verdict is (Verdict.CANCELLED if exc is TaskCancelled else Verdict.FAILURE)
    assert cleaned == ["background"]
    assert bench(job, False).verdict is Verdict.SUCCESS


@pytest.mark.parametrize("under_a_loop", [True, False])
def test_the_event_loop_is_closed_with_its_executor_wherever_that_is_collected(
    make_app: MakeApp, fakes: Fakes, under_a_loop: bool
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def look() -> None:
        loops.append(asyncio.get_running_loop())

    app = make_app()
    bench = Bench(app, fakes)
    bench(app.task(name="shop.look")(look))

    async def collect() -> None:
        bench.close()

    if under_a_loop:
        asyncio.run(collect())
    else:
        bench.close()
    assert loops[0].is_closed()


def test_a_function_that_returns_a_coroutine_is_awaited(app: Umbel, bench: Bench) -> None:
    async def later() -> int:
        return 7

    assert document(bench(app.task(name="shop.job")(lambda: later())))["result"] == 7


# --- interruptions at odd moments -----------------------------------------------------------------

MOMENTS = ["task", "middleware", "reading", "success", "before", "recording", "failing"]


def strike(moment: str, exc: type[BaseException], app: Umbel, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Run a task that is interrupted once, at that moment."""
    from umbel.worker import execution, followups, outcomes

    left = [1]

    def once(*_: Any, **__: Any) -> None:
        if left:
            left.pop()
            raise exc

    def before(target: Any, name: str) -> None:
        original = getattr(target, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            once()
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, struck)

    def job() -> int:
        if moment == "task":
            once()
        if moment == "failing":
            raise KeyError("k")
        return 1

    handler = once if moment == "success" else lambda *_: None
    task = app.task(name="shop.job", on_success=handler)(job)
    match moment:
        case "middleware":
            app.middleware.append(lambda call_next, request: once() or call_next(request))  # type: ignore[func-returns-value]  # called for its effect
        case "reading":
            before(execution.TaskExecutor, "_read")
        case "before":
            before(execution, "make_request")
        case "recording":
            before(outcomes.Records, "final")
        case "failing":
            before(followups, "on_failure")
    return bench(task, task_id="me")


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_soft_limit_makes_an_outcome_whenever_it_strikes(
    moment: str, app: Umbel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = strike(moment, SoftTimeLimitExceeded, app, bench, monkeypatch)
    assert outcome.task_id == "me"
    assert outcome.verdict is (Verdict.SUCCESS if moment == "success" else Verdict.FAILURE)
    assert document(outcome)["task_id"] == "me"
    assert current_request() is None


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_cancel_makes_an_outcome_whenever_it_strikes(
    moment: str, app: Umbel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = strike(moment, TaskCancelled, app, bench, monkeypatch)
    assert (outcome.verdict, outcome.task_id, outcome.results) == (Verdict.CANCELLED, "me", ())
    assert current_request() is None


def test_a_task_may_catch_its_soft_limit(app: Umbel, bench: Bench) -> None:
    @app.task
    def careful() -> str:
        try:
            raise SoftTimeLimitExceeded
        except SoftTimeLimitExceeded:
            return "cleaned up"

    assert document(bench(careful))["result"] == "cleaned up"


def test_a_task_that_swallows_exceptions_does_not_swallow_a_cancel(app: Umbel, bench: Bench) -> None:
    @app.task
    def stubborn() -> str:
        try:
            raise TaskCancelled
        except Exception:
            return "swallowed"

    assert bench(stubborn).verdict is Verdict.CANCELLED


# --- conclusions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "cls"), [(Verdict.LOST, WorkerLost), (Verdict.TIMED_OUT, TimeLimitExceeded)])
def test_the_end_of_a_task_that_was_killed_is_written_without_calling_it(
    app: Umbel, bench: Bench, verdict: Verdict, cls: type[Exception]
) -> None:
    heard: list[Any] = []
    task = app.task(name="shop.job", on_failure=lambda *args: heard.append(args[1]))(raiser(AssertionError("called")))
    rest = [{**ERRBACK, "options": {"task_id": "next"}}]
    message = bench.message(task, task_id="me", link_error=ERRBACK, chain=rest)
    outcome = bench.run(message, verdict.value, 3, "signal 9 (SIGKILL)")
    assert (outcome.verdict, outcome.detail) == (verdict, f"{cls.__name__}: signal 9 (SIGKILL)")
    assert [(r.task_id, r.state) for r in outcome.results] == [("me", State.FAILURE), ("next", State.FAILURE)]
    assert isinstance(exception_from_plain(json.loads(outcome.results[0].document)["result"]), cls)
    assert [m.task for m in outcome.follow_ups] == ["shop.errback"]
    assert heard == ["me"]


def test_the_end_of_what_cannot_be_read_or_found_is_written_as_far_as_it_is_known(app: Umbel, bench: Bench) -> None:
    message = bench.message(app.task(name="shop.job")(lambda: 1), task_id="me")
    for odd in (attrs.evolve(message, body=b"{"), attrs.evolve(message, headers={**message.headers, "task": "gone"})):
        outcome = bench.run(odd, Verdict.LOST.value, 3, "signal 9")
        assert outcome.verdict is Verdict.LOST
        assert isinstance(raised(outcome), WorkerLost)


# --- executors ------------------------------------------------------------------------------------


def test_an_executor_is_made_of_the_app_that_lives_here(app: Umbel) -> None:
    import os

    made = make_executor(
        lambda *_: None, app=None, token=id(app), pid=os.getpid(), hostname="h", command_line={}, file=None
    )
    assert made._app is app


def test_an_executor_in_a_child_is_tied_to_its_parent(app: Umbel, fakes: Fakes) -> None:
    asked: list[str] = []
    make_executor(
        lambda verb, _: asked.append(verb), app=None, token=id(app), pid=-1, hostname="h", command_line={}, file=None
    )
    app.task(name="shop.job")(lambda: 1).delay()
    assert asked == ["publish"]
    assert fakes.broker.empty
    app._gateway = None


def test_exceptions_that_a_worker_stored_are_raised_where_they_are_waited_for(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app()
    bench = Bench(app, fakes)
    for name, exc in NASTY.items():
        if name.startswith("huge") or name in ("odd args",):
            continue
        task = app.task(name=f"shop.{name}")(raiser(exc))
        outcome = bench(task)
        fakes.shelf.records[outcome.task_id] = outcome.results[0]
        with pytest.raises((type(exc), TaskFailed)):
            app.result(outcome.task_id).get(1)


# --- replies --------------------------------------------------------------------------------------


def test_every_result_says_who_asked(app: Umbel, bench: Bench, fakes: Fakes) -> None:
    @app.task(name="shop.ends", bind=True, track_started=True, retry_delay=0)
    def ends(self: Any, how: str) -> None:
        self.update_state("PROGRESS", 1)
        if how == "retry":
            raise self.retry()
        if how == "fail":
            raise ValueError

    for how, state in (("", "SUCCESS"), ("retry", "RETRY"), ("fail", "FAILURE")):
        message = bench.message(ends, how, reply_to="me")
        (result,) = bench.run(attrs.evolve(message, properties={**message.properties, "correlation_id": "c"})).results
        assert (result.state, result.reply_to, result.correlation_id) == (state, "me", "c")
        passing = fakes.shelf.records[message.id]
        assert (passing.state, passing.reply_to, passing.correlation_id) == ("PROGRESS", "me", "c")
    lost = bench.run(bench.message(ends, "", reply_to="me"), Verdict.LOST.value, 3, "signal 9")
    assert [r.reply_to for r in lost.results] == ["me"]
    unreadable = bench.run(attrs.evolve(bench.message(ends, "", reply_to="me"), body=b"{"))
    assert [r.reply_to for r in unreadable.results] == ["me"]
    assert Result.from_plain(lost.results[0].to_plain()).reply_to == "me"


def test_the_rest_of_a_chain_replies_to_who_sent_it(app: Umbel, bench: Bench) -> None:
    add = app.task(name="shop.add")(lambda *args: sum(args))
    fail = app.task(name="shop.fail")(raiser(ValueError()))
    own = add.s(2).set(task_id="own", reply_to="other").to_plain()
    rest = [add.s(1).set(task_id="rest").to_plain(), own]
    outcome = bench(add, 1, chain=rest, reply_to="me")
    assert [m.properties["reply_to"] for m in outcome.follow_ups] == ["other"]
    failed = bench(fail, chain=rest, reply_to="me")
    assert {r.task_id: r.reply_to for r in failed.results[1:]} == {"rest": "me", "own": "other"}
    assert [m.properties["reply_to"] for m in bench(add, 1, chain=rest[:1], reply_to="me").follow_ups] == ["me"]


def test_what_a_child_sends_replies_to_its_parents_store(app: Umbel) -> None:
    sent: list[Any] = []
    make_executor(
        lambda verb, payload: sent.extend(payload[0]), app=None, token=id(app), pid=-1, hostname="h", command_line={},
        file=None, reply_to="parent",
    )  # fmt: skip
    app.task(name="shop.job")(lambda: 1).delay()
    assert [Message.from_plain(plain).properties["reply_to"] for plain in sent] == ["parent"]
    app._gateway = None
