"""What is quick on a task's way gives what the plain way gives: values by position, usual headers, plain successes."""

from __future__ import annotations

import json
import marshal
from typing import Any

import attrs
import pytest
from attrs.exceptions import FrozenInstanceError

from umbel import Umbel, model, protocol
from umbel.errors import DecodeError, EncodeError
from umbel.model import Message, Outcome, Result, State, Verdict, by_position, make_message, make_result
from umbel.ports.clock import VirtualClock
from umbel.protocol import make_headers
from umbel.task import Request, make_request
from umbel.worker.outcomes import Plain, Records

MAKERS = [
    (model.Completion, model.make_completion),
    (model.Delivery, model.make_delivery),
    (model.Job, model.make_job),
    (model.Message, model.make_message),
    (model.Outcome, model.make_outcome),
    (model.Result, model.make_result),
    (model.Settlement, model.make_settlement),
    (protocol.Invocation, protocol.make_invocation),
    (Request, make_request),
]


# --- by position ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "make"), MAKERS, ids=[cls.__name__ for cls, _ in MAKERS])
def test_a_value_by_position_is_the_value_by_name(cls: Any, make: Any) -> None:
    fields = attrs.fields(cls)
    given = [object() for _ in fields]
    quick, plain = make(*given), cls(**{field.name: value for field, value in zip(fields, given, strict=True)})
    assert type(quick) is cls
    assert [getattr(quick, field.name) for field in fields] == given
    assert cls is Request or quick == plain  # which is compared by identity
    with pytest.raises(FrozenInstanceError):
        setattr(quick, fields[0].name, 1)
    assert type(attrs.evolve(quick)) is cls


@pytest.mark.parametrize(("cls", "make"), MAKERS, ids=[cls.__name__ for cls, _ in MAKERS])
def test_what_is_left_out_has_its_default(cls: Any, make: Any) -> None:
    needed = [object() for field in attrs.fields(cls) if field.default is attrs.NOTHING]
    names = [field.name for field in attrs.fields(cls) if field.default is attrs.NOTHING]
    plain = cls(**dict(zip(names, needed, strict=True)))
    for field in attrs.fields(cls):
        assert getattr(make(*needed), field.name) == getattr(plain, field.name)


def test_a_default_that_is_made_is_made_for_each() -> None:
    assert make_message("q").headers is not make_message("q").headers


def test_too_many_and_too_few_values_are_errors() -> None:
    with pytest.raises(TypeError):
        make_message()
    with pytest.raises(TypeError):
        make_message(*range(20))


def test_a_class_that_can_be_referred_to_weakly_cannot_be_made_so() -> None:
    @attrs.frozen
    class Weak:
        field: int

    with pytest.raises(TypeError, match="layout"):
        by_position(Weak)(1)


def test_results_in_a_pipe_are_whole() -> None:
    result = Result(
        task_id="id", state="STARTED", document=b"{}", expires=1.0, reply_to="r", correlation_id="c", order=3
    )
    again = Result.from_plain(marshal.loads(marshal.dumps(result.to_plain())))
    assert [getattr(again, field.name) for field in attrs.fields(Result)] == [
        getattr(result, field.name) for field in attrs.fields(Result)
    ]


# --- usual headers -------------------------------------------------------------------------------

USUAL = make_headers("shop.add", "id-1", args=(1,), kwargs={"b": 2}, origin="gen1@host")
CHANGES: list[dict[str, Any]] = [
    {},
    {"eta": "2026-01-01T00:00:00+02:00", "expires": "2026-01-02T00:00:00"},
    {"eta": "", "expires": ""},
    {"group": "g", "group_index": 3},
    {"group": "", "group_index": 0},
    {"root_id": "root", "parent_id": "parent"},
    {"root_id": "", "parent_id": "", "origin": "", "shadow": ""},
    {"shadow": "other"},
    {"retries": 2, "replaced_task_nesting": 1},
    {"retries": None},
    {"timelimit": [10, None]},
    {"timelimit": [None, 2.5]},
    {"timelimit": None},
    {"timelimit": []},
    {"ignore_result": True},
    {"ignore_result": None},
    {"ignore_result": 1},
    {"stamps": {"tenant": "acme"}, "stamped_headers": ["tenant"]},
    {"stamps": None},
    {"own": "header", "compression": "application/x-gzip"},
    {"args": [5], "callbacks": None},
    {"task": "shop.other"},
]
WRONG: list[dict[str, Any]] = [
    {"id": ""},
    {"id": 5},
    {"eta": "no time"},
    {"timelimit": [-1, None]},
    {"timelimit": ["1", None]},
    {"retries": True},
    {"group": 7},
    {"root_id": 7},
]


def read_plainly(headers: dict[str, Any], args: Any, kwargs: Any) -> protocol.Invocation:
    return protocol._read(headers, {"args": args, "kwargs": kwargs}, protocol.NO_EMBED, protocol.UTC)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_usual_headers_are_read_as_all_are(change: dict[str, Any]) -> None:
    headers = {**USUAL, **change}
    read = protocol.read_invocation(headers, [[1], {"b": 2}, {"callbacks": None, "chord": None}])
    assert read == read_plainly(headers, [1], {"b": 2})
    assert repr(read) == repr(read_plainly(headers, [1], {"b": 2}))


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_wrong_headers_are_refused_as_all_are(change: dict[str, Any]) -> None:
    headers = {**USUAL, **change}
    with pytest.raises(DecodeError) as plainly:
        read_plainly(headers, [1], {})
    with pytest.raises(DecodeError) as quickly:
        protocol.read_invocation(headers, [[1], {}, None])
    assert str(quickly.value) == str(plainly.value)


REST = ', {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


@pytest.mark.parametrize("args", [[], [1, "é", None], [[[]], {"a": REST}], [REST], ["[", "]"]])
def test_a_body_of_arguments_alone_is_the_whole_body(args: list[Any]) -> None:
    whole = json.dumps(protocol.make_body(args, {})).encode()
    alone = protocol.args_alone(whole, "application/json")
    assert alone is not None
    assert [json.loads(alone), {}, protocol.NO_EMBED_PLAIN] == json.loads(whole)


@pytest.mark.parametrize("before", ["", "x[1]", "[1], [2", '["a', "[1]]", "[", " [1", "[[1]"])
def test_what_is_no_document_by_itself_is_left_to_the_whole(before: str) -> None:
    whole = f"{before}{REST}".encode()
    alone = protocol.args_alone(whole, "application/json")
    try:
        expected: Any = json.loads(whole)
    except ValueError:
        expected = DecodeError
    try:
        found: Any = None if alone is None else [json.loads(alone), {}, protocol.NO_EMBED_PLAIN]
    except ValueError:
        found = None
    assert found is None or found == expected


def test_a_body_with_more_or_of_another_kind_is_read_whole() -> None:
    assert protocol.args_alone(json.dumps(protocol.make_body([1], {"a": 1})).encode(), "application/json") is None
    assert protocol.args_alone(json.dumps(protocol.make_body([1], {})).encode(), "application/x-yaml") is None


def test_most_messages_go_the_quick_way() -> None:
    assert protocol._read_usual(USUAL, [1], {}, protocol.NO_EMBED, protocol.UTC) is not None
    assert protocol._read_usual({**USUAL, "retries": "1"}, [1], {}, protocol.NO_EMBED, protocol.UTC) is None


# --- plain successes -----------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    0,
    1.5,
    "",
    'quote " and é',
    [1, [2]],
    {"a": None},
    float("inf"),
    "result mark",
    "id mark",
]


@pytest.fixture
def records(app: Umbel, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.setattr(app, "clock", VirtualClock())
    return Records(app, "here")


def plainly(app: Umbel, task_id: str, value: Any) -> bytes:
    document = protocol.result_document(task_id, State.SUCCESS, value, done=app.clock.time())
    return app.result_codec.encode(document).body


def quickly(records: Records, task_id: str, value: Any, **headers: Any) -> tuple[Result, ...]:
    properties = {"reply_to": "r", "correlation_id": "c"}
    return records.final(task_id, State.SUCCESS, value, headers=headers, properties=properties)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_the_document_of_a_plain_success_is_what_the_serializer_writes(
    app: Umbel, records: Records, value: Any
) -> None:
    results = quickly(records, "id-1", value)
    assert type(results) is Plain
    assert results[0].document == plainly(app, "id-1", value)


@pytest.mark.parametrize("task_id", ['"', "é", "a\\b", "\n", " ", "x" * 600])
def test_an_odd_id_is_written_with_the_whole_document(app: Umbel, records: Records, task_id: str) -> None:
    (result,) = quickly(records, task_id, 1)
    assert result.document == plainly(app, task_id, 1)
    assert json.loads(result.document)["task_id"] == task_id


def test_a_success_with_more_to_tell_is_not_plain(records: Records) -> None:
    assert type(quickly(records, "id-1", 1, group="g")) is tuple
    assert type(quickly(records, "id-1", 1, parent_id="p")) is tuple
    results = records.final("id-1", State.SUCCESS, 1, headers={}, properties={}, children=("c",))
    assert type(results) is tuple


def test_what_has_no_form_is_refused(records: Records) -> None:
    with pytest.raises(EncodeError):
        quickly(records, "id-1", object())


def test_the_outcome_of_a_plain_success_crosses_as_its_document(app: Umbel, records: Records) -> None:
    message = Message(
        queue="q", headers={"id": "id-1", "task": "shop.add"}, properties={"reply_to": "r", "correlation_id": "c"}
    )
    outcome = Outcome(
        verdict=Verdict.SUCCESS, task_id="id-1", task="shop.add", results=quickly(records, "id-1", 5), runtime=0.5
    )
    plain = marshal.loads(marshal.dumps(records.to_plain(outcome, message)))
    assert plain == (plainly(app, "id-1", 5), 0.5)
    again = records.from_plain(plain, message)
    assert attrs.evolve(again, results=tuple(again.results)) == attrs.evolve(outcome, results=tuple(outcome.results))
    assert (again.results[0].reply_to, again.results[0].correlation_id) == ("r", "c")
    nothing = attrs.evolve(outcome, results=())
    assert records.from_plain(records.to_plain(nothing, message), message) == nothing


def test_any_other_outcome_crosses_whole(records: Records) -> None:
    message = Message(queue="q", headers={"id": "id-1", "task": "shop.add"})
    results = quickly(records, "id-1", 5)
    for outcome in (
        Outcome(verdict=Verdict.SUCCESS, task_id="id-1", task="shop.add", results=(*results, *results)),
        Outcome(verdict=Verdict.SUCCESS, task_id="id-1", task="shop.add", results=results, follow_ups=(message,)),
        Outcome(verdict=Verdict.SUCCESS, task_id="other", task="shop.add", results=results),
        Outcome(verdict=Verdict.FAILURE, task_id="id-1", task="shop.add", detail="KeyError", traceback="…"),
        Outcome(verdict=Verdict.IGNORED, task_id="id-1", task="shop.add"),
        Outcome(
            verdict=Verdict.SUCCESS,
            task_id="id-1",
            task="shop.add",
            results=(make_result("id-1", "SUCCESS", b"{}", "application/x-msgpack", "binary"),),
        ),
    ):
        assert records.from_plain(records.to_plain(outcome, message), message) == outcome
