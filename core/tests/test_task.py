"""Tasks: what the decorator makes, how settings and calls override it, and what a task can do from inside."""

from __future__ import annotations

import asyncio
import os
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest

from umbel import Umbel
from umbel.errors import MaxRetriesExceeded, Retry
from umbel.model import Message, TaskOptions
from umbel.ports.clock import VirtualClock
from umbel.protocol import Invocation
from umbel.task import AsyncTask, Request, Task, _current, current_request

from .conftest import MakeApp
from .fakes import Fakes
from .test_runtime import in_child


def add(x: int, y: int = 0) -> int:
    """Sum."""
    return x + y


class Inside:
    """The caller is inside an execution of ``task``."""

    def __init__(self, task: Task[..., Any], **invocation: Any) -> None:
        self.request = Request(
            task=task, invocation=Invocation(id="id-1", task=task.name, **invocation), message=Message(queue="q")
        )

    def __enter__(self) -> Request:
        self._token = _current.set(self.request)
        return self.request

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


# --- declaring ------------------------------------------------------------------------------------


def test_a_task_is_named_after_its_module_and_function_or_as_it_is_told(app: Umbel) -> None:
    assert app.task(add).name == f"{__name__}.add"
    assert app.task(name="shop.add")(add).name == "shop.add"

    def nested() -> None: ...

    assert app.task(nested).name.endswith(".test_a_task_is_named_after_its_module_and_function_or_as_it_is_told.nested")


@pytest.mark.parametrize("module", ["__main__", "__umbel_main__"])
def test_a_scripts_tasks_are_named_after_the_app(app: Umbel, module: str) -> None:
    scope: dict[str, Any] = {"__name__": module}
    exec("def job(): ...", scope)
    assert app.task(scope["job"]).name == "shop.job"


def test_a_task_looks_like_its_function_and_calling_it_runs_it_here(app: Umbel, fakes: Fakes) -> None:
    task = app.task(add)
    assert (task.__name__, task.__doc__, task(1, y=2)) == ("add", "Sum.", 3)
    assert fakes.made == []


def test_an_option_that_does_not_exist_is_a_type_error_that_lists_those_that_do(app: Umbel) -> None:
    with pytest.raises(TypeError, match=r"no option \['retires'\]; its options are: name, bind, base, queue.*throws"):
        app.task(retires=3)(add)  # type: ignore[call-overload]  # the point
    assert len(app.tasks) == 0


def test_every_option_of_the_decorator_is_kept(app: Umbel) -> None:
    given = TaskOptions(
        queue="q", serializer="repr", compression="squeeze", max_retries=None, retry_delay=1, autoretry_for=(OSError,),
        dont_autoretry_for=(TimeoutError,), retry_backoff=2, retry_backoff_max=3, retry_jitter=False, ack="early",
        ignore_result=True, time_limit=4, soft_time_limit=3, rate_limit="1/s", expires=5, priority=6, max_deliveries=7,
        track_started=True, cancel="flag", typed=True, throws=(KeyError,), dead_letter=not TaskOptions().dead_letter,
        unique="until_done", unique_key="{x}", on_conflict="raise", rate_limit_scope="fleet", concurrency_limit=2,
        concurrency_key="{x}",
    )  # fmt: skip
    options = attrs.asdict(given, recurse=False)
    others = {"debounce", "debounce_max", "throttle", "throttle_edge"}  # instead of unique: tests/unique
    assert {name for name, value in options.items() if value == getattr(TaskOptions(), name)} == others
    assert app.task(**options)(add).options == given


def test_the_settings_override_the_decorator_and_a_call_overrides_both(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"tasks": {"shop.add": {"queue": "operators", "time_limit": 9, "soft_time_limit": 8}}})
    task = app.task(name="shop.add", queue="own", priority=3, expires=60)(add)
    task.delay(1)
    (message,) = fakes.broker.messages("operators")
    assert (message.priority, message.headers["timelimit"]) == (3, [9, 8])
    task.apply_async((1,), queue="callers", priority=0, time_limit=1)
    (message,) = fakes.broker.messages("callers")
    assert (message.priority, message.headers["timelimit"]) == (0, [1, 8])


def test_bound_tasks_get_themselves_as_first_argument(app: Umbel) -> None:
    @app.task(bind=True)
    def whoami(self: Task[..., Any], x: int) -> tuple[Any, int]:
        return self, x

    assert whoami(3) == (whoami, 3)


def test_an_async_function_makes_a_task_whose_call_gives_a_coroutine(app: Umbel) -> None:
    @app.task
    async def double(x: int) -> int:
        return 2 * x

    assert isinstance(double, AsyncTask)
    assert asyncio.run(double(4)) == 8

    @app.task(bind=True)
    async def named(self: Task[..., Any]) -> str:
        return self.name

    assert asyncio.run(named()).endswith("named")


def test_a_base_of_ones_own_handles_ends(app: Umbel) -> None:
    class Mine(Task[..., Any]):
        def on_success(self, *args: Any) -> None: ...

    task = app.task(base=Mine)(add)
    assert isinstance(task, Mine)
    assert task(1) == 1


def test_handlers_may_be_given_to_the_decorator_and_it_may_be_used_again(app: Umbel) -> None:
    def handler(*_: Any) -> None: ...

    declare = app.task(on_failure=handler, queue="q")

    def other() -> None: ...

    for task in (declare(add), declare(other)):
        assert task.on_failure is handler
        assert task.options.queue == "q"


def test_two_apps_in_one_process_know_nothing_of_each_other(make_app: MakeApp, fakes: Fakes) -> None:
    one, two = make_app(name="one"), make_app({"default_queue": "second"}, name="two")
    first, second = one.task(add), two.task(add)
    assert first is not second
    assert one.tasks[first.name] is first
    assert two.tasks[second.name] is second
    first.delay(1)
    second.delay(1)
    assert len(fakes.broker.messages("default")) == len(fakes.broker.messages("second")) == 1
    assert one.gateway is not two.gateway
    assert one.runtime is not two.runtime


def test_an_app_that_was_closed_can_be_used_again(app: Umbel, fakes: Fakes) -> None:
    task = app.task(add)
    task.delay(1)
    app.close()
    assert fakes.broker.closed == 1
    task.delay(1)
    assert len(fakes.broker.messages()) == 2


# --- inside ---------------------------------------------------------------------------------------


def test_outside_a_worker_the_request_is_empty_and_says_so(app: Umbel) -> None:
    request = app.task(add).request
    assert request.called_directly
    assert request.id == ""
    assert current_request() is None


def test_inside_the_request_tells_of_this_execution(app: Umbel) -> None:
    task = app.task(add)
    with Inside(task, retries=2, root_id="r", parent_id="p", group="g", headers={"x": 1}, args=[1]) as request:
        assert task.request is current_request() is request
        assert (request.id, request.retries, request.root_id, request.parent_id) == ("id-1", 2, "r", "p")
        assert (request.group, request.headers, request.args, request.kwargs) == ("g", {"x": 1}, [1], {})
        assert request.delivery_info == {"exchange": "", "routing_key": "q", "priority": 0, "redelivered": False}


def test_what_a_task_sends_belongs_to_its_workflow_and_is_its_child(app: Umbel, fakes: Fakes) -> None:
    task = app.task(add)
    with Inside(task, root_id="root") as request:
        handle = task.delay(1)
    (message,) = fakes.broker.messages()
    assert (message.headers["root_id"], message.headers["parent_id"]) == ("root", "id-1")
    assert request.children == [handle.id]


def test_retry_says_when_and_why(app: Umbel) -> None:
    task = app.task(retry_delay=7)(add)
    cause = OSError("down")
    with Inside(task), pytest.raises(Retry) as caught:
        task.retry(exc=cause)
    assert (caught.value.delay, caught.value.cause) == (7, cause)
    with Inside(task), pytest.raises(Retry) as caught:
        task.retry(countdown=0.5)
    assert (caught.value.delay, caught.value.cause) == (0.5, None)
    with Inside(task), pytest.raises(Retry) as caught:
        task.retry(countdown=-3)
    assert caught.value.delay == 0


@pytest.mark.parametrize("aware", [True, False])
def test_retry_at_a_moment_reads_the_apps_clock_and_a_naive_moment_as_utc(make_app: MakeApp, aware: bool) -> None:
    clock = VirtualClock()
    task = make_app(clock=clock).task(add)
    moment = datetime.fromtimestamp(clock.time(), UTC) + timedelta(seconds=90)
    with Inside(task), pytest.raises(Retry) as caught:
        task.retry(eta=moment if aware else moment.replace(tzinfo=None))
    assert caught.value.delay == pytest.approx(90)


def test_when_the_retries_are_spent_the_cause_is_raised_or_max_retries_exceeded(app: Umbel) -> None:
    task = app.task(max_retries=2)(add)
    with Inside(task, retries=2):
        with pytest.raises(OSError, match="down"):
            task.retry(exc=OSError("down"))
        with pytest.raises(MaxRetriesExceeded, match=r"add \(id-1\) has been retried 2 times"):
            task.retry()
        with pytest.raises(Retry):
            task.retry(max_retries=3)


def test_without_a_maximum_a_task_is_retried_for_ever(app: Umbel) -> None:
    task = app.task(max_retries=None)(add)
    with Inside(task, retries=10**6), pytest.raises(Retry):
        task.retry()


def test_retrying_a_direct_call_raises_the_cause_and_sends_nothing(app: Umbel, fakes: Fakes) -> None:
    task = app.task(add)
    with pytest.raises(OSError, match="down"):
        task.retry(exc=OSError("down"))
    with pytest.raises(Retry):
        task.retry()
    assert fakes.broker.empty


def test_backoff_doubles_up_to_its_longest_and_jitter_stays_below(app: Umbel) -> None:
    plain = app.task(name="a", retry_backoff=2, retry_backoff_max=20, retry_jitter=False)(add)
    assert [plain.backoff(n) for n in range(5)] == [2, 4, 8, 16, 20]
    assert plain.backoff(10**6) == 20
    spread = app.task(name="b", retry_backoff=2, retry_backoff_max=20)(add)
    drawn = [spread.backoff(2) for _ in range(200)]
    assert all(0 <= delay <= 8 for delay in drawn)
    assert max(drawn) - min(drawn) > 1
    assert app.task(name="c", retry_delay=5)(add).backoff(9) == 5


def test_progress_is_stored_under_the_tasks_id(app: Umbel, fakes: Fakes) -> None:
    task = app.task(add)
    with Inside(task):
        task.update_state("PROGRESS", {"done": 3})
    document = fakes.shelf.document("id-1")
    assert (document["status"], document["result"], document["task_id"]) == ("PROGRESS", {"done": 3}, "id-1")
    assert app.result("id-1").state == "PROGRESS"
    assert app.result("id-1").info == {"done": 3}


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_progress_cannot_be_a_final_state(app: Umbel, fakes: Fakes, state: str) -> None:
    task = app.task(add)
    with Inside(task), pytest.raises(ValueError, match="is how a task ends"):
        task.update_state(state)
    assert fakes.shelf.records == {}


def test_progress_of_a_direct_call_or_without_a_store_is_told_to_nobody(make_app: MakeApp, fakes: Fakes) -> None:
    task = make_app().task(add)
    task.update_state("PROGRESS")
    quiet = make_app({"results.url": "disabled"}).task(add)
    with Inside(quiet):
        quiet.update_state("PROGRESS")
    assert fakes.shelf.records == {}


# --- threads and forks ----------------------------------------------------------------------------


@pytest.mark.slow
def test_many_threads_send_at_once_and_each_gets_its_own_ids_back(make_app: MakeApp, fakes: Fakes) -> None:
    task = make_app().task(add)
    sent: dict[int, list[str]] = {}
    start = threading.Barrier(32)

    def work(thread: int) -> None:
        start.wait(60)
        sent[thread] = [task.delay(thread, i).id for i in range(200)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    by_id = {m.id: m.headers["argsrepr"] for m in fakes.broker.messages()}
    assert len(by_id) == 32 * 200
    for thread_number, ids in sent.items():
        assert [by_id[i] for i in ids] == [f"({thread_number}, {n})" for n in range(200)]
    assert fakes.broker.sessions == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_child_of_a_fork_sends_through_a_session_of_its_own(app: Umbel, fakes: Fakes) -> None:
    task = app.task(add)
    task.delay(1)
    parents = app.gateway

    def check() -> bool:
        task.delay(2)
        return fakes.broker.sessions == 2 and app.gateway is not parents

    assert in_child(check)
    task.delay(3)
    assert app.gateway is parents
    assert fakes.broker.sessions == 1
