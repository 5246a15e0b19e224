"""What is sent because a task ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from attrs import evolve

from umbel import Umbel
from umbel.errors import DecodeError, NotSupported
from umbel.model import Message
from umbel.ports.clock import VirtualClock
from umbel.protocol import Embed, Invocation, make_body, read_invocation
from umbel.task import Request
from umbel.worker import followups

from .conftest import MakeApp

Plain = Mapping[str, Any]


@pytest.fixture
def app(make_app: MakeApp) -> Umbel:
    app = make_app(clock=VirtualClock())
    app.task(name="shop.add")(lambda *args: sum(args))
    app.task(name="shop.mail", queue="mail", priority=7, compression="squeeze")(lambda *_: None)
    return app


def call(task: str, *args: Any, immutable: bool = False, **options: Any) -> Plain:
    return {
        "task": task, "args": list(args), "kwargs": {}, "options": options, "subtask_type": None,
        "immutable": immutable,
    }  # fmt: skip


def composed(kind: str, *tasks: Plain, **options: Any) -> Plain:
    return {
        "task": f"celery.{kind}", "args": [], "kwargs": {"tasks": list(tasks)}, "options": options,
        "subtask_type": kind, "immutable": False,
    }  # fmt: skip


def request(app: Umbel, **embed: Any) -> Request:
    invocation = Invocation(id="me", task="shop.add", root_id="root", embed=Embed(**embed))
    return Request(task=app.tasks["shop.add"], invocation=invocation, message=Message(queue="default"))


def after(app: Umbel, result: Any = 5, **embed: Any) -> list[Message]:
    return followups.on_success(app, request(app, **embed), result)


def body(message: Message) -> tuple[list[Any], Any, Any]:
    args, kwargs, embed = json.loads(message.body)
    return args, kwargs, embed


def calls(messages: Sequence[Message]) -> list[tuple[str, list[Any]]]:
    return [(m.task, body(m)[0]) for m in messages]


# --- callbacks ------------------------------------------------------------------------------------


def test_without_callbacks_nothing_is_sent(app: Umbel) -> None:
    assert after(app) == []
    assert followups.on_failure(app, request(app)) == []


def test_a_callback_gets_the_result_in_front(app: Umbel) -> None:
    messages = after(app, callbacks=[call("shop.add", 10), call("shop.add", 1, immutable=True)])
    assert calls(messages) == [("shop.add", [5, 10]), ("shop.add", [1])]


def test_a_callback_belongs_to_the_workflow(app: Umbel) -> None:
    (message,) = after(app, callbacks=[call("shop.add", task_id="frozen")])
    assert (message.id, message.headers["root_id"], message.headers["parent_id"]) == ("frozen", "root", "me")
    (message,) = after(app, callbacks=[call("shop.add", root_id="r", parent_id="p")])
    assert (message.headers["root_id"], message.headers["parent_id"]) == ("r", "p")


def test_a_callback_keeps_the_options_of_its_signature_over_those_of_its_task(app: Umbel) -> None:
    (message,) = after(app, callbacks=[call("shop.mail", queue="other", headers={"x-a": 1}, priority=None)])
    assert (message.queue, message.priority, message.headers["x-a"]) == ("other", 7, 1)
    assert message.headers["compression"] == "application/x-squeeze"
    (message,) = after(app, callbacks=[call("shop.mail")])
    assert message.queue == "mail"


def test_a_callback_may_expire_and_wait(app: Umbel) -> None:
    now = app.clock.time()
    (message,) = after(app, callbacks=[call("shop.add", expires=60, countdown=30)])
    assert message.due == now + 30
    assert message.headers["expires"] == "2023-11-14T22:14:20+00:00"
    moments = {"expires": "2030-01-02T03:04:05+00:00", "eta": "2030-01-02T03:04:00+00:00"}
    (message,) = after(app, callbacks=[call("shop.add", **moments)])
    assert {name: message.headers[name] for name in moments} == moments


def test_a_callback_to_a_task_that_is_not_here_is_sent_by_name(app: Umbel) -> None:
    (message,) = after(app, callbacks=[call("elsewhere.task")])
    assert (message.task, message.queue) == ("elsewhere.task", "default")


def test_a_callbacks_own_links_travel_with_it(app: Umbel) -> None:
    (message,) = after(app, callbacks=[call("shop.add", link=[call("a")], link_error=[call("b")])])
    assert body(message)[2]["callbacks"] == [call("a")]
    assert body(message)[2]["errbacks"] == [call("b")]


def test_options_that_only_peers_know_are_left_out(app: Umbel) -> None:
    (message,) = after(app, callbacks=[call("shop.add", tenant="acme", subtask_id=3, exchange="x")])
    assert "tenant" not in message.headers


def test_a_group_of_callbacks_is_one_message_each_with_the_result_in_front(app: Umbel) -> None:
    group = composed("group", call("shop.add", 1, group_id="g", group_index=0), call("shop.mail", 2))
    messages = after(app, callbacks=[group])
    assert calls(messages[:1]) == [("shop.add", [5, 1])]
    assert (messages[0].headers["group"], messages[0].headers["group_index"]) == ("g", 0)
    assert (messages[1].task, messages[1].queue) == ("shop.mail", "mail")


def test_a_chain_as_callback_sends_its_first_with_the_rest_in_reverse(app: Umbel) -> None:
    (message,) = after(app, callbacks=[composed("chain", call("a", 1), call("b"), call("c"))])
    args, _, embed = body(message)
    assert (message.task, args) == ("a", [5, 1])
    assert [each["task"] for each in embed["chain"]] == ["c", "b"]


def test_an_empty_chain_or_group_sends_nothing(app: Umbel) -> None:
    assert after(app, callbacks=[composed("chain"), composed("group")]) == []


# --- chains ---------------------------------------------------------------------------------------


def test_the_next_of_a_chain_is_the_last_of_the_list_and_takes_the_rest_along(app: Umbel) -> None:
    chain = [call("c"), call("b", 1, immutable=True), call("a", 1, task_id="frozen")]
    (first,) = after(app, chain=chain)
    args, _, embed = body(first)
    assert (first.task, first.id, args) == ("a", "frozen", [5, 1])
    assert embed["chain"] == chain[:2]
    got = read_invocation(first.headers, json.loads(first.body))
    (second,) = followups.on_success(app, evolve(request(app), invocation=got), 6)
    assert (second.task, body(second)[0]) == ("b", [1])
    assert [each["task"] for each in body(second)[2]["chain"]] == ["c"]


def test_the_last_of_a_chain_has_nothing_after_it(app: Umbel) -> None:
    (message,) = after(app, chain=[call("a")])
    assert not body(message)[2]["chain"]
    assert read_invocation(message.headers, json.loads(message.body)).embed.chain == ()


@pytest.mark.parametrize("rest", [[], None])
def test_an_empty_rest_reads_as_no_chain_however_a_peer_writes_it(app: Umbel, rest: Any) -> None:
    payload = make_body([], {})
    payload[2] = {"callbacks": None, "errbacks": None, "chain": rest, "chord": None}
    got = read_invocation({"task": "shop.add", "id": "me"}, payload)
    assert followups.on_success(app, evolve(request(app), invocation=got), 1) == []


def test_a_chain_inside_a_chain_comes_before_the_rest_of_the_outer(app: Umbel) -> None:
    inner = composed("chain", call("a"), call("b"))
    (message,) = after(app, chain=[call("d"), call("c"), inner])
    assert message.task == "a"
    assert [each["task"] for each in body(message)[2]["chain"]] == ["d", "c", "b"]


def test_a_group_at_the_end_of_a_chain_is_sent_whole(app: Umbel) -> None:
    messages = after(app, chain=[composed("group", call("a"), call("b", 1))])
    assert calls(messages) == [("a", [5]), ("b", [5, 1])]


def test_callbacks_and_the_next_of_the_chain_are_both_sent(app: Umbel) -> None:
    assert calls(after(app, callbacks=[call("cb")], chain=[call("next")])) == [("cb", [5]), ("next", [5])]


# --- errbacks -------------------------------------------------------------------------------------


def test_errbacks_get_the_failed_tasks_id_in_front(app: Umbel) -> None:
    messages = followups.on_failure(app, request(app, errbacks=[call("shop.mail", "ctx"), call("b", immutable=True)]))
    assert calls(messages[1:]) == [("b", [])]
    assert messages[0].headers["argsrepr"] == "('me', 'ctx')"
    assert (messages[0].headers["parent_id"], messages[0].headers["root_id"]) == ("me", "root")


# --- what this kernel cannot carry through --------------------------------------------------------


@pytest.mark.parametrize("embed", [Embed(chord=call("body")), Embed(chain=[call("a", chord=call("body"))])])
def test_a_chord_of_a_peers_is_refused_and_named_where_nobody_keeps_its_account(embed: Embed) -> None:
    with pytest.raises(DecodeError, match=r"part of a chord that a peer has sent.*hooks"):
        followups.check_supported(embed, chords_kept=False)
    followups.check_supported(embed, chords_kept=True)


@pytest.mark.parametrize("kind", ["chord", "chunks"])
@pytest.mark.parametrize("where", ["callbacks", "errbacks", "chain"])
@pytest.mark.parametrize("deep", [False, True])
def test_callbacks_that_lack_what_they_are_made_of_are_refused_however_deep(kind: str, where: str, deep: bool) -> None:
    plain = composed(kind)
    if deep:
        plain = composed("chain", call("a"), composed("group", call("b"), plain))
    with pytest.raises(DecodeError, match="need"):
        followups.check_supported(Embed(**{where: [plain, call("a")]}), chords_kept=True)


def test_a_group_before_the_end_of_a_chain_needs_a_store_that_joins(app: Umbel) -> None:
    group = composed("group", call("a"), call("b"))
    with pytest.raises(NotSupported, match=r"store that joins.*redis://"):
        after(app, chain=[call("next"), group])
    assert calls(after(app, chain=[group])) == [("a", [5]), ("b", [5])]


@pytest.mark.parametrize("kwargs", [{"tasks": 3}, {"tasks": ["x"]}, {"tasks": [{"no": "task"}]}, [1]])
def test_a_composition_that_is_malformed_is_a_decode_error(kwargs: Any) -> None:
    with pytest.raises(DecodeError):
        followups.check_supported(Embed(callbacks=[{**composed("group"), "kwargs": kwargs}]), chords_kept=True)


# --- retries --------------------------------------------------------------------------------------

HEADERS = {
    "task": "shop.add", "id": "me", "retries": 1, "root_id": "root", "parent_id": "p", "x-tenant": "acme",
    "group": "g", "group_index": 2, "timelimit": [60, 50], "expires": "2030-01-02T03:04:05+00:00", "origin": "gen1@far",
    "stamps": {"a": 1}, "stamped_headers": ["a"], "eta": "2020-01-01T00:00:00+00:00", "compression": None,
}  # fmt: skip


def test_a_retry_is_the_same_message_with_one_retry_more(app: Umbel) -> None:
    came_by = {"exchange": "post", "routing_key": "letters.eu"}
    message = Message(
        queue="default",
        headers=HEADERS,
        body=b"[[1], {}, {}]",
        priority=4,
        properties={"correlation_id": "me", **came_by},
    )
    invocation = read_invocation(HEADERS, [[1], {}, {}])
    again = followups.retry_message(message, invocation, "came.from", 1.7e9, app)
    assert (again.queue, again.due, again.body, again.priority) == ("came.from", 1.7e9, message.body, 4)
    changed = {"retries": 2, "eta": "2023-11-14T22:13:20+00:00", "parent_id": "me"}
    assert again.headers == {**HEADERS, **changed}
    assert again.properties == {"correlation_id": "me"}, "not to every queue of the exchange"
    assert followups.retry_message(message, invocation, "q", None, app).headers["eta"] is None


@pytest.mark.parametrize(
    "name",
    ["redelivered", "x-death", "x-first-death-queue", "x-last-death-reason", "x-delivery-count", "umbel-dead-at"],
)
def test_what_brokers_have_added_is_not_sent_again(app: Umbel, name: str) -> None:
    message = Message(queue="q", headers={**HEADERS, name: "x"})
    again = followups.retry_message(message, read_invocation(HEADERS, [[], {}, {}]), "q", None, app)
    assert name not in again.headers


def test_a_protocol_1_message_is_retried_as_protocol_2_and_loses_nothing(app: Umbel) -> None:
    payload = {
        "task": "shop.add", "id": "old", "args": [1, 2], "kwargs": {"z": 3}, "retries": 1, "taskset": "g",
        "expires": "2030-01-02T03:04:05+00:00", "timelimit": [60, 50], "callbacks": [call("cb")],
        "errbacks": [call("eb")], "utc": True,
    }  # fmt: skip
    message = Message(queue="q", headers={"x-tenant": "acme"}, body=json.dumps(payload).encode(), priority=3)
    invocation = read_invocation(message.headers, payload)
    again = followups.retry_message(message, invocation, "came.from", None, app)
    assert (again.queue, again.id, again.task, again.priority) == ("came.from", "old", "shop.add", 3)
    got = read_invocation(again.headers, json.loads(again.body))
    assert (list(got.args), got.kwargs, got.retries, got.group) == ([1, 2], {"z": 3}, 2, "g")
    assert (got.time_limit, got.soft_time_limit, got.expires) == (60, 50, invocation.expires)
    assert (got.embed.callbacks, got.embed.errbacks) == ([call("cb")], [call("eb")])
    assert got.headers == {"x-tenant": "acme"}
