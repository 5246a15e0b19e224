"""A call becomes a message: every option of a call, the options' bounds, and nothing sent that cannot be read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from umbel import Umbel, hookimpl, unique
from umbel.errors import BrokerUnavailable, EncodeError, NotSupported, PublishRefused
from umbel.model import Message, evolve
from umbel.ports.clock import VirtualClock
from umbel.task import CallOptions

from .conftest import MakeApp
from .fakes import Fakes, FakeStore

NOW = 1_700_000_000.0


@pytest.fixture
def app(make_app: MakeApp) -> Umbel:
    app = make_app(clock=VirtualClock(NOW))
    app.task(name="shop.add")(add)
    return app


def add(x: Any, y: Any = 0) -> Any:
    return x + y


def send(app: Umbel, fakes: Fakes, *args: Any, **options: Any) -> Message:
    """The one message that a call has put into the broker."""
    before = len(fakes.broker.entries)
    handle = app.tasks["shop.add"].apply_async(args or (1, 2), **options)
    (entry,) = fakes.broker.entries[before:]
    assert entry.message.id == handle.id
    return entry.message


def body(message: Message) -> Any:
    return json.loads(message.body)


def test_a_plain_call(app: Umbel, fakes: Fakes) -> None:
    message = send(app, fakes, 2, 3)
    assert body(message) == [[2, 3], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    assert (message.queue, message.priority, message.due) == ("default", 0, None)
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    headers = message.headers
    assert (headers["task"], headers["argsrepr"], headers["kwargsrepr"]) == ("shop.add", "(2, 3)", "{}")
    assert (headers["root_id"], headers["parent_id"], headers["retries"]) == (message.id, None, 0)
    assert headers["timelimit"] == [None, None]
    assert headers["origin"].startswith("gen")
    assert message.properties == {
        "correlation_id": message.id, "reply_to": message.properties["reply_to"], "delivery_mode": 2,
    }  # fmt: skip


HEADERS = [
    ({"task_id": "php_1.2"}, {"id": "php_1.2", "root_id": "php_1.2"}),
    ({"countdown": 30}, {"eta": "2023-11-14T22:13:50+00:00"}),
    ({"eta": datetime(2030, 1, 2, 3, 4, 5, 6, UTC)}, {"eta": "2030-01-02T03:04:05.000006+00:00"}),
    ({"expires": 600}, {"expires": "2023-11-14T22:23:20+00:00"}),
    ({"headers": {"x-tenant": "acme", "task": "forged"}}, {"x-tenant": "acme", "task": "shop.add"}),
    ({"time_limit": 60, "soft_time_limit": 50}, {"timelimit": [60, 50]}),
    ({"ignore_result": True}, {"ignore_result": True}),
    ({"shadow": "pretty"}, {"shadow": "pretty", "task": "shop.add"}),
    ({"argsrepr": "(<hidden>)", "kwargsrepr": "{…}"}, {"argsrepr": "(<hidden>)", "kwargsrepr": "{…}"}),
    ({"root_id": "r", "parent_id": "p"}, {"root_id": "r", "parent_id": "p"}),
    ({"group_id": "g", "group_index": 3}, {"group": "g", "group_index": 3}),
    ({"retries": 2, "replaced_task_nesting": 1, "origin": "me"},
     {"retries": 2, "replaced_task_nesting": 1, "origin": "me"}),
    ({"stamped_headers": ["a"], "stamps": {"a": 1}}, {"stamped_headers": ["a"], "stamps": {"a": 1}}),
    ({"compression": "squeeze"}, {"compression": "application/x-squeeze"}),
    ({"key": "acme"}, {"umbel-key": "acme"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "headers"), HEADERS)
def test_options_that_are_headers(app: Umbel, fakes: Fakes, options: Any, headers: Any) -> None:
    message = send(app, fakes, **options)
    assert {name: message.headers[name] for name in headers} == headers


def test_options_that_are_not_headers(app: Umbel, fakes: Fakes) -> None:
    message = send(app, fakes, queue="mail", priority=9, serializer="repr", reply_to="my.replies", timeout=1)
    assert (message.queue, message.priority, message.content_type) == ("mail", 9, "application/x-repr")
    assert message.properties["reply_to"] == "my.replies"


def test_links_and_the_rest_of_a_chain_ride_in_the_body(app: Umbel, fakes: Fakes) -> None:
    link = app.tasks["shop.add"].s(10)
    plain = link.to_plain()
    message = send(app, fakes, link=link, link_error=[link, link], chain=[plain], chord={"task": "t"})
    assert body(message)[2] == {
        "callbacks": [plain], "errbacks": [plain, plain], "chain": [plain], "chord": {"task": "t"},
    }  # fmt: skip


def test_every_option_of_a_call_is_tested_here() -> None:
    tested = {name for options, _ in HEADERS for name in options}
    tested |= {"queue", "priority", "serializer", "reply_to", "timeout", "link", "link_error", "chain", "chord"}
    tested |= {"exchange", "routing_key"}
    tested |= unique.OPTIONS  # tests/unique
    assert tested == CallOptions.__annotations__.keys()


def test_an_option_that_does_not_exist_is_refused_before_anything_is_sent(app: Umbel, fakes: Fakes) -> None:
    with pytest.raises(TypeError, match="'prioritty'"):
        app.tasks["shop.add"].apply_async((1,), prioritty=9)  # type: ignore[call-arg]  # the point
    assert fakes.broker.empty


# --- times ----------------------------------------------------------------------------------------


def test_a_countdown_is_kept_by_the_broker_and_none_or_a_past_one_is_no_delay(app: Umbel, fakes: Fakes) -> None:
    assert send(app, fakes, countdown=30).due == NOW + 30
    assert send(app, fakes, countdown=0).due is None
    assert send(app, fakes, countdown=-5).due is None
    assert send(app, fakes, countdown=-5).headers["eta"] is None


def test_an_eta_without_an_offset_is_utc(app: Umbel, fakes: Fakes) -> None:
    moment = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=9)))
    assert send(app, fakes, eta=moment).due == moment.timestamp()
    naive = datetime(2030, 1, 2, 3, 4, 5)  # the point
    assert send(app, fakes, eta=naive).due == naive.replace(tzinfo=UTC).timestamp()


def test_countdown_and_eta_exclude_each_other(app: Umbel) -> None:
    with pytest.raises(ValueError, match="countdown or eta, not both"):
        app.tasks["shop.add"].apply_async((1,), countdown=1, eta=datetime.now(UTC))


def test_expiry_is_told_to_the_worker_and_to_the_broker(app: Umbel, fakes: Fakes) -> None:
    assert send(app, fakes, expires=1.5).properties["expiration"] == "1500"
    moment = datetime.fromtimestamp(NOW + 60, UTC)
    assert send(app, fakes, expires=moment).properties["expiration"] == "60000"
    past = send(app, fakes, expires=datetime.fromtimestamp(NOW - 60, UTC))
    assert past.properties["expiration"] == "0"
    assert "expiration" not in send(app, fakes).properties


@pytest.mark.parametrize("priority", [-1, 10, 100])
def test_a_priority_out_of_bounds_is_refused_before_anything_is_sent(app: Umbel, fakes: Fakes, priority: int) -> None:
    with pytest.raises(ValueError, match="0 to 9, higher is sooner"):
        app.tasks["shop.add"].apply_async((1,), priority=priority)
    assert fakes.broker.empty


# --- arguments ------------------------------------------------------------------------------------


def test_an_argument_that_cannot_be_serialised_raises_at_the_call_and_nothing_is_sent(app: Umbel, fakes: Fakes) -> None:
    with pytest.raises(EncodeError, match=r"task 'shop\.add' cannot be sent: object"):
        app.tasks["shop.add"].delay(object())
    with pytest.raises(EncodeError):
        app.tasks["shop.add"].map_delay([(1,), (object(),)])
    assert fakes.broker.empty


def test_an_argument_whose_repr_raises_is_sent(app: Umbel, fakes: Fakes) -> None:
    class Loud(dict[str, int]):
        def __repr__(self) -> str:
            raise RuntimeError

    assert "unprintable" in send(app, fakes, Loud(a=1)).headers["argsrepr"]


@pytest.mark.parametrize("args", ["ab", b"ab", {"a": 1}, 3])
def test_arguments_are_a_list_or_tuple(app: Umbel, args: Any) -> None:
    with pytest.raises(TypeError, match="a list or tuple"):
        app.tasks["shop.add"].apply_async(args)


# --- sending --------------------------------------------------------------------------------------


def test_a_task_that_is_not_here_is_sent_by_name(app: Umbel, fakes: Fakes) -> None:
    handle = app.send_task("elsewhere.do", (1,), {"a": 2}, queue="far", task_id="id-1")
    (message,) = fakes.broker.messages("far")
    assert (handle.id, message.task, body(message)[:2]) == ("id-1", "elsewhere.do", [[1], {"a": 2}])


def test_a_task_that_is_here_keeps_its_options_when_sent_by_name(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app()
    app.task(name="shop.add")(add)
    app.task(name="shop.mail", queue="mail")(lambda: None)
    app.send_task("shop.mail")
    assert [m.task for m in fakes.broker.messages("mail")] == ["shop.mail"]


def test_the_settings_route_tasks_that_are_not_here(make_app: MakeApp, fakes: Fakes) -> None:
    make_app({"tasks": {"far.*": {"queue": "far"}}}).send_task("far.do")
    assert len(fakes.broker.messages("far")) == 1


def test_many_calls_travel_in_batches(app: Umbel, fakes: Fakes) -> None:
    handles = app.tasks["shop.add"].map_delay(((i, 1) for i in range(25)), batch=10, queue="bulk")
    assert [len(ids) for ids in fakes.broker.calls("publish")] == [10, 10, 5]
    assert [m.id for m in fakes.broker.messages("bulk")] == [h.id for h in handles]
    assert app.tasks["shop.add"].map_delay([]) == []


def test_every_way_to_send_has_its_awaitable_twin(app: Umbel, fakes: Fakes) -> None:
    task = app.tasks["shop.add"]

    async def all_three() -> Sequence[str]:
        one = await task.adelay(1)
        two = await task.aapply_async((2,), queue="default")
        more = await task.amap_delay([(3,), (4,)], batch=1)
        return [h.id for h in (one, two, *more)]

    ids = asyncio.run(all_three())
    assert [m.id for m in fakes.broker.messages()] == ids
    assert [body(m)[0] for m in fakes.broker.messages()] == [[1], [2], [3], [4]]


def test_a_synchronous_send_inside_a_running_event_loop_works(app: Umbel, fakes: Fakes) -> None:
    async def inside() -> None:
        app.tasks["shop.add"].delay(1)

    asyncio.run(inside())
    assert len(fakes.broker.messages()) == 1


def test_the_deadline_is_the_settings_or_the_calls(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"broker.publish_timeout": 0.05})
    task = app.task(add)
    fakes.broker.down = True
    for options in ({}, {"timeout": 0.05}):
        with pytest.raises(BrokerUnavailable):
            task.apply_async((1,), **options)


def test_a_refusal_is_raised_to_the_caller(app: Umbel, fakes: Fakes) -> None:
    fakes.broker.refuse = lambda _: True
    with pytest.raises(PublishRefused):
        app.tasks["shop.add"].delay(1)


# --- listeners ------------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    @hookimpl
    def umbel_before_publish(self, messages: Sequence[Message]) -> None:
        self.heard.append(("before", len(messages)))

    @hookimpl
    def umbel_after_publish(self, messages: Sequence[Message]) -> None:
        self.heard.append(("after", len(messages)))
        raise RuntimeError("a listener's own trouble")


def test_listeners_hear_of_a_publish_before_it_and_after_it_and_one_that_raises_harms_nobody(
    make_app: MakeApp, fakes: Fakes
) -> None:
    listener = Listener()
    task = make_app(plugins=[listener]).task(add)
    task.delay(1)
    asyncio.run(task.adelay(1))
    assert listener.heard == [("before", 1), ("after", 1)] * 2
    fakes.broker.refuse = lambda _: True
    with pytest.raises(PublishRefused):
        task.delay(1)
    assert listener.heard[4:] == [("before", 1)]


def test_a_call_may_go_to_an_exchange(make_app: MakeApp, fakes: Fakes) -> None:
    fakes.broker.capabilities = evolve(fakes.broker.capabilities, exchanges=True)
    app = make_app({"queues.mail.exchange": "post"}, clock=VirtualClock(NOW))
    app.task(name="shop.add")(add)
    properties = send(app, fakes, exchange="post", routing_key="a.b").properties
    assert (properties["exchange"], properties["routing_key"]) == ("post", "a.b")
    assert send(app, fakes, exchange="post").properties["routing_key"] == ""
    assert not send(app, fakes, queue="mail").properties.keys() & {"exchange", "routing_key"}
    with pytest.raises(ValueError, match="routing_key says nothing without exchange"):
        send(app, fakes, routing_key="a.b")


def test_what_a_broker_without_exchanges_is_asked_for_is_refused_by_name(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"queues.mail.exchange": "post"})
    task = app.task(name="shop.add")(add)
    with pytest.raises(
        NotSupported, match=r"\[queues.mail\] exchange = 'post', and the broker of \[broker\] url has no exch"
    ):
        task.delay(1)
    with pytest.raises(NotSupported, match=r"\[queues.mail\] exchange"):
        app.worker()
    with pytest.raises(NotSupported, match="exchange='post'"):
        make_app().send_task("shop.add", exchange="post")


def test_a_store_that_wants_replies_names_where(app: Umbel, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [send(app, fakes).properties["reply_to"] for _ in range(2)]
    assert first[0] == first[1]
    app.close()
    monkeypatch.setattr(FakeStore, "reply_to", "inbox")
    assert send(app, fakes).properties["reply_to"] == "inbox"
    assert send(app, fakes, reply_to="elsewhere").properties["reply_to"] == "elsewhere"


def test_without_a_store_a_reply_has_an_address_all_the_same(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"results.url": "disabled"})
    app.task(name="shop.add")(add)
    assert send(app, fakes).properties["reply_to"]
