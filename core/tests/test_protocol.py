"""The wire format, read and written: every trap of it, and no input that raises anything but ``DecodeError``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel import errors, protocol
from umbel.errors import DecodeError, TaskFailed
from umbel.protocol import Embed, exception_from_plain, exception_to_plain, make_body, make_headers, read_invocation

SIGNATURE = {"task": "t.next", "args": [1], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False}


def test_a_message_has_all_nineteen_headers() -> None:
    headers = make_headers("t.add", "id-1", args=[2, 3])
    assert headers.keys() == protocol.STANDARD_HEADERS - {"compression"}
    assert headers["argsrepr"] == "(2, 3)"
    assert headers["root_id"] == "id-1"
    assert headers["timelimit"] == [None, None]


def test_user_headers_lie_flat_beside_the_standard_ones_and_cannot_replace_them() -> None:
    headers = make_headers("t.add", "id-1", headers={"x-tenant": "acme", "id": "forged"})
    assert headers["x-tenant"] == "acme"
    assert headers["id"] == "id-1"
    assert read_invocation(headers, make_body([], {})).headers == {"x-tenant": "acme"}


def test_what_is_written_reads_back() -> None:
    embed = Embed(callbacks=[SIGNATURE], errbacks=[SIGNATURE], chain=[SIGNATURE])
    headers = make_headers(
        "t.add", "id-1", eta=1e9, expires=2e9, retries=2, time_limit=60, soft_time_limit=50, group="g", group_index=3,
        parent_id="p", shadow="s", ignore_result=True, stamped_headers=["a"], stamps={"a": 1},
    )  # fmt: skip
    got = read_invocation(headers, make_body((1, "x"), {"k": None}, embed))
    assert (got.id, got.task, list(got.args), got.kwargs) == ("id-1", "t.add", [1, "x"], {"k": None})
    assert (got.eta, got.expires, got.retries, got.time_limit, got.soft_time_limit) == (1e9, 2e9, 2, 60, 50)
    assert (got.group, got.group_index, got.parent_id, got.shadow, got.ignore_result) == ("g", 3, "p", "s", True)
    assert (got.stamped_headers, got.stamps) == (["a"], {"a": 1})
    assert got.embed == embed


def test_timelimit_is_hard_then_soft() -> None:
    got = read_invocation({"task": "t", "id": "1", "timelimit": [60, 50]}, [[], {}, {}])
    assert (got.time_limit, got.soft_time_limit) == (60, 50)


@pytest.mark.parametrize("embed", [{}, None, [], {"callbacks": None}])
def test_an_embed_may_be_missing_in_every_way_that_clients_do_it(embed: Any) -> None:
    assert read_invocation({"task": "t", "id": "php_6741bd0a3c1e94.12345678"}, [[1], {}, embed]).embed == Embed()


def test_protocol_1_is_read_from_the_body() -> None:
    body = {
        "task": "wire.add", "id": "efe8", "args": [2, 3], "kwargs": {"z": 1}, "retries": 1, "taskset": "g-1",
        "eta": "2026-11-22T11:09:30.804972+00:00", "expires": None, "utc": True, "callbacks": [SIGNATURE],
        "errbacks": None, "timelimit": [9, None], "chord": None,
    }  # fmt: skip
    got = read_invocation({}, body)
    assert (got.task, got.id, list(got.args), got.kwargs, got.retries) == ("wire.add", "efe8", [2, 3], {"z": 1}, 1)
    assert (got.group, got.time_limit, got.headers) == ("g-1", 9, {})
    assert got.embed.callbacks == [SIGNATURE]


def test_minimal_protocol_1() -> None:
    assert read_invocation({}, {"task": "t", "id": "1", "args": [], "kwargs": {}}).task == "t"


def test_the_mixed_form_lets_headers_win() -> None:
    got = read_invocation({"task": "h", "id": "1"}, {"task": "b", "id": "2", "args": [7], "kwargs": {}})
    assert (got.task, got.id, list(got.args)) == ("h", "1", [7])


@pytest.mark.parametrize(
    ("headers", "payload", "what"),
    [
        ({}, [], "neither the headers nor the body"),
        ({"task": "t"}, [[], {}, {}], "no task id"),
        ({"task": "t", "id": "1"}, [[], {}], r"\[args, kwargs, embed\]"),
        ({"task": "t", "id": "1"}, "text", r"\[args, kwargs, embed\]"),
        ({"task": "t", "id": "1"}, ["ab", {}, {}], "args must be a list"),
        ({"task": "t", "id": "1"}, [[], [1], {}], "kwargs must be an object"),
        ({"task": "t", "id": "1"}, [[], {1: 2}, {}], "kwargs must be an object"),
        ({"task": "t", "id": "1"}, [[], {}, {"callbacks": [{"no": "task"}]}], "callbacks must be a list of signatures"),
        ({"task": "t", "id": "1"}, [[], {}, {"chord": 1}], "chord must be a signature"),
        ({"task": "t", "id": "1", "eta": "soon"}, [[], {}, {}], "not an ISO 8601"),
        ({"task": "t", "id": "1", "retries": "2"}, [[], {}, {}], "retries must be a whole number"),
        ({"task": "t", "id": "1", "timelimit": ["x", 1]}, [[], {}, {}], "timelimit must hold seconds"),
        ({"task": "t", "id": "1", "timelimit": 4}, [[], {}, {}], "timelimit must be"),
        ({"task": "t", "id": "1", "root_id": 4}, [[], {}, {}], "root_id must be text"),
    ],
)
def test_what_cannot_be_read_says_why(headers: Any, payload: Any, what: str) -> None:
    with pytest.raises(DecodeError, match=what):
        read_invocation(headers, payload)


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T11:09:55.680743+00:00",
        "2026-11-22T11:09:55.680743Z",
        "2026-11-22T13:09:55.680743+02:00",
        "2026-11-22T11:09:55.680743+0000",
        "2026-11-22 11:09:55.680743",
        "2026-11-22T11:09:55.680743000Z",
    ],
)
def test_every_spelling_of_a_time_that_peers_send(text: str) -> None:
    assert protocol.parse_time(text) == datetime(2026, 11, 22, 11, 9, 55, 680743, UTC).timestamp()


def test_a_naive_time_is_in_the_zone_of_the_settings() -> None:
    seoul = protocol.parse_time("2031-02-03T04:05:06", ZoneInfo("Asia/Seoul"))
    assert seoul == datetime(2031, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=9))).timestamp()


def test_ids_are_uuid4_and_distinct() -> None:
    import uuid

    made = {protocol.new_id() for _ in range(10_000)}
    assert len(made) == 10_000
    assert all(uuid.UUID(i).version == 4 and uuid.UUID(i).variant == uuid.RFC_4122 for i in list(made)[:100])


def test_reprs_are_bounded_and_survive_any_object() -> None:
    class Nasty:
        def __repr__(self) -> str:
            raise RuntimeError

    assert len(protocol.short_repr(["x" * 5000] * 50)) <= protocol.REPR_LIMIT
    assert "Nasty" in protocol.short_repr(Nasty(), small=True)


# --- exceptions ----------------------------------------------------------------------------------


class Awkward(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


def test_a_builtin_exception_comes_back_as_itself() -> None:
    back = exception_from_plain(exception_to_plain(KeyError("k")), "Traceback …")
    assert type(back) is KeyError
    assert back.args == ("k",)
    assert "Traceback" in back.__notes__[0]


@pytest.mark.parametrize(
    ("exc", "module", "name"),
    [
        (errors.TaskRevoked("expired"), "celery.exceptions", "TaskRevokedError"),
        (errors.UnknownTask("t"), "celery.exceptions", "NotRegistered"),
        (errors.WorkerLost("signal 9"), "billiard.exceptions", "WorkerLostError"),
        (errors.TimeLimitExceeded(1), "billiard.exceptions", "TimeLimitExceeded"),
        (errors.SoftTimeLimitExceeded(), "billiard.exceptions", "SoftTimeLimitExceeded"),
        (errors.EncodeError("x"), "kombu.exceptions", "EncodeError"),
    ],
)
def test_our_errors_travel_under_the_names_that_peers_raise(exc: Exception, module: str, name: str) -> None:
    plain = exception_to_plain(exc)
    assert (plain["exc_module"], plain["exc_type"]) == (module, name)
    assert type(exception_from_plain(plain)) is type(exc)


def test_a_constructor_that_does_not_fit_becomes_task_failed_with_the_name_kept() -> None:
    back = exception_from_plain(exception_to_plain(Awkward(code=3)))
    assert isinstance(back, TaskFailed)
    assert back.type_name.endswith("Awkward")
    assert "code 3" in str(back)
    assert exception_to_plain(back)["exc_type"] == "Awkward"


def test_rebuilding_imports_nothing_and_calls_no_other_class() -> None:
    before = set(sys.modules)
    for module, name in [("antigravity", "Anything"), ("os", "system"), ("subprocess", "Popen"), ("builtins", "exit")]:
        back = exception_from_plain({"exc_type": name, "exc_module": module, "exc_message": ["echo x"]})
        assert isinstance(back, TaskFailed)
    assert "antigravity" not in set(sys.modules) - before


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_a_remote_message_cannot_end_this_process(name: str) -> None:
    back = exception_from_plain({"exc_type": name, "exc_module": "builtins", "exc_message": [1]})
    assert isinstance(back, TaskFailed)


@pytest.mark.parametrize("data", [None, "just text", 7, {}, {"exc_type": None, "exc_message": "plain"}])
def test_odd_exception_data_is_still_an_exception(data: Any) -> None:
    assert isinstance(exception_from_plain(data, {}), BaseException)


# --- fuzz ----------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
names = st.sampled_from([*protocol.STANDARD_HEADERS, "args", "taskset", "x-user", "callbacks", "chord", "chain"])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, plain, max_size=8), plain)
def test_random_messages_raise_nothing_but_the_decode_error(headers: dict[str, Any], payload: Any) -> None:
    try:
        got = read_invocation(headers, payload)
    except DecodeError:
        return
    assert got.task
    assert got.id


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(names, plain, st.integers(0, 2), plain)
def test_mutated_messages_raise_nothing_but_the_decode_error(name: str, value: Any, position: int, part: Any) -> None:
    headers = make_headers("t.add", "id-1", args=[2, 3]) | {name: value}
    body = make_body([2, 3], {}, Embed(callbacks=[SIGNATURE]))
    body[position] = part
    try:
        read_invocation(headers, body)
    except DecodeError:
        return


@settings(max_examples=200, deadline=None)
@given(plain, plain)
def test_random_exception_data_never_raises(data: Any, traceback: Any) -> None:
    assert isinstance(exception_from_plain(data, traceback), BaseException)
