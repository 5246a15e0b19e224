"""Handles on what became of a task."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from umbel import Umbel
from umbel.errors import DecodeError, NotSupported, ResultTimeout, TaskFailed, TaskRevoked
from umbel.model import Result
from umbel.protocol import exception_to_plain, result_document
from umbel.result import AsyncResult

from .conftest import MakeApp
from .fakes import Fakes


def store(app: Umbel, fakes: Fakes, state: str, value: Any = None, traceback: str | None = None) -> AsyncResult[Any]:
    """A handle on a task that is in that state."""
    if isinstance(value, BaseException):
        value = exception_to_plain(value)
    document = result_document("id-1", state, value, traceback=traceback)
    fakes.shelf.records["id-1"] = Result(task_id="id-1", state=state, document=app.result_codec.encode(document).body)
    return app.result("id-1")


class Local(Exception):
    """A class that this process has imported."""


def test_making_a_handle_does_no_io(app: Umbel, fakes: Fakes) -> None:
    handle = app.result("id-1")
    assert (str(handle), handle.id) == ("id-1", "id-1")
    assert fakes.made == []


def test_handles_on_one_task_are_equal(app: Umbel) -> None:
    assert app.result("a") == app.result("a")
    assert app.result("a") != app.result("b")
    assert app.result("a") != "a"
    assert len({app.result("a"), app.result("a"), app.result("b")}) == 2


def test_get_returns_the_value(app: Umbel, fakes: Fakes) -> None:
    assert store(app, fakes, "SUCCESS", [1, {"a": None}]).get(1) == [1, {"a": None}]
    assert store(app, fakes, "SUCCESS", None).get(1) is None


def test_get_waits_for_the_end_through_passing_states(app: Umbel, fakes: Fakes) -> None:
    handle = store(app, fakes, "STARTED")
    timer = threading.Timer(0.05, store, (app, fakes, "SUCCESS", 7))
    timer.start()
    assert handle.get(5) == 7
    timer.join(30)


def test_get_raises_what_the_task_raised_with_its_traceback_as_a_note(app: Umbel, fakes: Fakes) -> None:
    handle = store(app, fakes, "FAILURE", Local("why", 3), "Traceback: line 1")
    with pytest.raises(Local) as caught:
        handle.get(1)
    assert caught.value.args == ("why", 3)
    assert caught.value.__notes__ == ["\nIn the worker:\nTraceback: line 1"]


def test_without_propagate_the_exception_is_returned(app: Umbel, fakes: Fakes) -> None:
    got = store(app, fakes, "FAILURE", Local("why")).get(1, propagate=False)
    assert isinstance(got, Local)
    assert store(app, fakes, "SUCCESS", 3).get(1, propagate=False) == 3


def test_what_cannot_be_rebuilt_here_is_told_by_name(app: Umbel, fakes: Fakes) -> None:
    plain = {"exc_type": "Strange", "exc_message": ["why"], "exc_module": "far.away"}
    with pytest.raises(TaskFailed, match=r"far\.away\.Strange: why"):
        store(app, fakes, "FAILURE", plain).get(1)


@pytest.mark.parametrize("value", [TaskRevoked("expired"), None, "text", ValueError("odd")])
def test_a_revoked_task_raises_task_revoked_whatever_was_stored(app: Umbel, fakes: Fakes, value: Any) -> None:
    handle = store(app, fakes, "REVOKED", value)
    with pytest.raises(TaskRevoked):
        handle.get(1)
    assert isinstance(handle.get(1, propagate=False), TaskRevoked)


def test_a_timeout_names_the_task_and_does_not_touch_it(app: Umbel, fakes: Fakes) -> None:
    handle = store(app, fakes, "STARTED")
    with pytest.raises(ResultTimeout, match=r"task id-1 has no result after 0\.01 s"):
        handle.get(0.01)
    with pytest.raises(TimeoutError):
        app.result("unknown").get(0.01)
    assert handle.state == "STARTED"


def test_a_handle_can_be_awaited(app: Umbel, fakes: Fakes) -> None:
    handle = store(app, fakes, "SUCCESS", 7)

    async def all_ways() -> tuple[Any, Any, Any]:
        record = await handle.arecord()
        assert record is not None
        return await handle, await handle.aget(1), record["status"]

    assert asyncio.run(all_ways()) == (7, 7, "SUCCESS")

    async def failing() -> None:
        await store(app, fakes, "FAILURE", Local("why"))

    with pytest.raises(Local):
        asyncio.run(failing())


def test_an_awaited_handle_times_out_too(app: Umbel) -> None:
    async def wait() -> None:
        assert await app.result("id-1").arecord() is None
        await app.result("id-1").aget(0.01)

    with pytest.raises(ResultTimeout):
        asyncio.run(wait())


def test_looking_does_not_wait(app: Umbel, fakes: Fakes) -> None:
    handle = app.result("id-1")
    assert (handle.state, handle.status, handle.record(), handle.result, handle.traceback) == (
        "PENDING", "PENDING", None, None, None,
    )  # fmt: skip
    assert (handle.ready(), handle.successful(), handle.failed()) == (False, False, False)
    store(app, fakes, "PROGRESS", {"done": 3})
    assert (handle.state, handle.info, handle.ready()) == ("PROGRESS", {"done": 3}, False)
    store(app, fakes, "SUCCESS", 5)
    assert (handle.state, handle.result, handle.ready(), handle.successful()) == ("SUCCESS", 5, True, True)
    store(app, fakes, "FAILURE", Local("why"), "the traceback")
    assert (handle.failed(), handle.ready(), handle.traceback) == (True, True, "the traceback")
    assert isinstance(handle.result, Local)
    store(app, fakes, "RETRY", Local("again"))
    assert isinstance(handle.info, Local)


def test_forgetting_deletes_the_record(app: Umbel, fakes: Fakes) -> None:
    handle = store(app, fakes, "SUCCESS", 7)
    handle.forget()
    assert handle.state == "PENDING"


def test_a_record_that_is_no_result_document_is_a_decode_error(app: Umbel, fakes: Fakes) -> None:
    fakes.shelf.records["id-1"] = Result(task_id="id-1", state="SUCCESS", document=b"[1]")
    with pytest.raises(DecodeError, match="record of task id-1 is not a result document"):
        app.result("id-1").get(1)


def test_a_record_of_another_serializer_is_refused(app: Umbel, fakes: Fakes) -> None:
    fakes.shelf.records["id-1"] = Result(
        task_id="id-1", state="SUCCESS", document=b"x", content_type="application/x-python-serialize"
    )
    with pytest.raises(DecodeError, match="not accepted"):
        app.result("id-1").get(1)


def test_without_a_result_store_a_handle_says_which_setting_keeps_none(make_app: MakeApp) -> None:
    handle = make_app({"results.url": "disabled"}).result("id-1")
    with pytest.raises(NotSupported, match=r'\[results\] url is "disabled"'):
        handle.get(1)


def test_many_threads_wait_on_one_handle(app: Umbel, fakes: Fakes) -> None:
    handle, got = app.result("id-1"), []
    threads = [threading.Thread(target=lambda: got.append(handle.get(5))) for _ in range(16)]
    for thread in threads:
        thread.start()
    store(app, fakes, "SUCCESS", 7)
    for thread in threads:
        thread.join(60)
    assert got == [7] * 16
