"""``umbel call`` and ``umbel result``."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from umbel.cli.parsing import value_of


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("2.5", 2.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('"2"', "2"),
        ("Ada", "Ada"),
        ("", ""),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("01", "01"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments_are_json_where_they_are(text: str, value: Any) -> None:
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def sent(doubles: ModuleType, queue: str = "default") -> tuple[Any, Any]:
    """The one message of a queue, and its arguments."""
    (message,) = doubles.FakeTransport.queues[queue]
    return message, json.loads(message.body)[:2]


def test_the_id_is_printed(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "call", "tasks.add", "2", "[3]", "--kw", "z=text", "--kw", "n=1")
    message, call = sent(doubles)
    assert result.stdout == message.id + "\n"
    assert call == [[2, [3]], {"z": "text", "n": 1}]


def test_the_id_as_json(umbel: Any, doubles: ModuleType) -> None:
    assert json.loads(umbel("call", "any.thing", "--id", "x", "--json").stdout) == {"task_id": "x"}


def test_negative_numbers_stand_after_the_dashes(umbel: Any, doubles: ModuleType) -> None:
    umbel("-A", "tasks", "call", "tasks.add", "--", "-2", "3")
    assert sent(doubles)[1] == [[-2, 3], {}]


def test_options_reach_the_message(umbel: Any, doubles: ModuleType) -> None:
    options = ["--queue", "mail", "--countdown", "5m", "--expires", "600", "--priority", "7", "--id", "x"]
    umbel("-A", "tasks", "call", "tasks.add", "1", "2", *options)
    message, _ = sent(doubles, "mail")
    assert (message.id, message.priority) == ("x", 7)
    assert message.due is not None
    assert message.headers["eta"] < message.headers["expires"]


def test_arguments_as_json(umbel: Any, doubles: ModuleType) -> None:
    umbel("call", "any", "--args-json", "[1, null]", "--kwargs-json", '{"a": 1}', "--kw", "b=2")
    assert sent(doubles)[1] == [[1, None], {"a": 1, "b": 2}]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["1", "--args-json", "[1]"], "not both"),
        (["--args-json", "{}"], "must be a JSON list"),
        (["--args-json", "["], "is not JSON"),
        (["--kwargs-json", "[]"], "must be a JSON object"),
        (["--kw", "x"], "'x' is not KEY=VALUE"),
        (["--kw", "x=1", "--kw", "x=2"], "'x' is given twice"),
        (["--countdown", "soon"], "must be a duration"),
        (["--countdown", "-1"], "must not be negative"),
        (["--priority", "10"], "0<=x<=9"),
        (["--timeout", "1s"], "--timeout is for --wait"),
    ],
)
def test_wrong_usage_sends_nothing(umbel: Any, doubles: ModuleType, arguments: list[str], complaint: str) -> None:
    result = umbel("call", "any", *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not doubles.FakeTransport.queues


def test_an_unknown_task_is_not_sent(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "call", "tasks.ad", "1")
    assert result.exit_code == 1
    assert "did you mean 'tasks.add'?" in result.stderr
    assert not doubles.FakeTransport.queues
    assert umbel("-A", "tasks", "call", "tasks.ad", "1", "--unchecked").exit_code == 0
    assert doubles.waiting("default")


def test_the_result_is_waited_for(umbel: Any, doubles: ModuleType) -> None:
    doubles.FakeTransport.on_publish = lambda message: doubles.store(message.id, "SUCCESS", 5)
    assert umbel("-A", "tasks", "call", "tasks.add", "2", "3", "--wait").stdout == "5\n"
    document = json.loads(umbel("-A", "tasks", "call", "tasks.add", "2", "3", "--wait", "--json").stdout)
    assert (document["status"], document["result"]) == ("SUCCESS", 5)


def test_a_failure_is_told_with_its_traceback(umbel: Any, doubles: ModuleType) -> None:
    failure = {"exc_type": "ZeroDivisionError", "exc_message": ["division by zero"], "exc_module": "builtins"}
    text = "Traceback (most recent call last):\n  \x1b[31mbad"
    doubles.FakeTransport.on_publish = lambda message: doubles.store(message.id, "FAILURE", failure, text)
    result = umbel("-A", "tasks", "call", "tasks.add", "1", "0", "--wait", "--id", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: task x failed: ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback (most recent call last):\n" in result.stderr
    assert "\x1b" not in result.stderr


def test_waiting_ends(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("-A", "tasks", "call", "tasks.add", "1", "0", "--wait", "--timeout", "10ms", "--id", "x")
    assert result.exit_code == 1
    assert result.stderr == "Error: task x has no result after 0.01 s\n"


@pytest.mark.parametrize("arguments", [["tasks.quiet"], ["tasks.add", "-o", "results.url=disabled"]])
def test_what_never_comes_is_not_waited_for(umbel: Any, doubles: ModuleType, arguments: list[str]) -> None:
    result = umbel("-A", "tasks", "call", *arguments, "--wait")
    assert result.exit_code == 1
    assert "wait for" in result.stderr
    assert not doubles.FakeTransport.queues


# --- result ---


def test_a_result_is_shown(umbel: Any, doubles: ModuleType) -> None:
    doubles.store("x", "SUCCESS", {"n": [1]})
    result = umbel("result", "x")
    assert result.exit_code == 0
    assert result.stdout == "state  SUCCESS\nvalue  {'n': [1]}\n"
    assert json.loads(umbel("result", "x", "--json").stdout)["result"] == {"n": [1]}


def test_a_failed_task_exits_with_1(umbel: Any, doubles: ModuleType) -> None:
    doubles.store(
        "x", "FAILURE", {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"}, "Trace\nback"
    )
    result = umbel("result", "x")
    assert result.exit_code == 1
    assert "value  ValueError: no\n\nTrace\nback\n" in result.stdout
    assert umbel("result", "x", "--json").exit_code == 1


def test_a_state_on_the_way_is_no_failure(umbel: Any, doubles: ModuleType) -> None:
    doubles.store("x", "PROGRESS", {"done": 3})
    assert umbel("result", "x").exit_code == 0


def test_no_record_exits_with_3(umbel: Any, doubles: ModuleType) -> None:
    result = umbel("result", "x")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "nothing is stored of task x" in result.stderr
    result = umbel("result", "x", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {"task_id": "x", "status": None}


def test_waiting_for_a_result(umbel: Any, doubles: ModuleType) -> None:
    assert "no result after" in umbel("result", "x", "--wait", "--timeout", "10ms").stderr
    doubles.store("x", "SUCCESS", "text")
    assert "value  text" in umbel("result", "x", "--wait").stdout
    assert umbel("result", "x", "--timeout", "1").exit_code == 2


def test_no_store_is_an_error(umbel: Any, empty: Path) -> None:
    result = umbel("result", "x", "--results", "disabled")
    assert result.exit_code == 1
    assert '[results] url is "disabled"' in result.stderr
