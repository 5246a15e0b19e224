"""Heads of entries: what goes in comes out, whatever the headers are, and what is no head is an unreadable message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]  # msgpack's gap
import pytest
from attrs import evolve

from umbel.errors import PublishRefused
from umbel.model import Message
from umbel_redis import heads
from umbel_redis.streams import decode_message

ID, REPLY = "0b9a6a4e-77cc-4b2c-8df4-0e5b1c1a9f01", "5d6b5a86-1b0e-4b6c-9f0f-3cf2d1a0b002"
HEADERS: Mapping[str, Any] = {
    "lang": "py",
    "task": "shop.add",
    "id": ID,
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "root_id": ID,
    "parent_id": None,
    "argsrepr": "(1, 2)",
    "kwargsrepr": "{}",
    "origin": "gen1@host",
    "ignore_result": False,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}
PROPERTIES: Mapping[str, Any] = {"correlation_id": ID, "reply_to": REPLY, "delivery_mode": 2}
USUAL = Message(queue="q", headers=HEADERS, body=b"body", priority=3, properties=PROPERTIES)

CHANGES: list[dict[str, Any]] = [
    {},
    {"id": "another", "root_id": None},
    {"root_id": "root", "parent_id": "parent"},
    {"eta": "2026-01-01T00:00:00+00:00", "expires": "2026-01-02T00:00:00+00:00"},
    {"group": "g", "group_index": 0},
    {"group": "g", "group_index": 999},
    {"retries": 2},
    {"retries": True},
    {"ignore_result": True},
    {"ignore_result": 0},
    {"ignore_result": None},
    {"timelimit": [30, 20.5]},
    {"timelimit": None},
    {"timelimit": []},
    {"timelimit": [1, 2, 3]},
    {"timelimit": [[1], {}]},
    {"stamps": {"tenant": "acme"}, "stamped_headers": ["tenant"]},
    {"stamps": {"tenant": "acme"}},
    {"argsrepr": None, "kwargsrepr": "…"},
    {"origin": None, "lang": b"bytes", "shadow": {"a": 1}},
    {"task": ""},
    {"id": None, "root_id": None},
    {"own": "header"},
]


def same(message: Message) -> Message:
    return decode_message(message.queue, message.priority, heads.encode(message), message.body)


def exactly(value: object) -> str:
    """With types: 0, 0.0 and False are equal."""
    return repr(value)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_headers_come_as_they_went(change: dict[str, Any], times: int) -> None:
    message = evolve(USUAL, headers={**HEADERS, **change})
    for _ in range(times):  # the second time its template is known
        assert same(message) == message
        assert exactly(same(message).headers) == exactly(message.headers)


@pytest.mark.parametrize(
    "change",
    [
        {"correlation_id": "other"},
        {"correlation_id": None},
        {"reply_to": None},
        {"delivery_mode": 1},
        {"delivery_mode": True},
        {"expiration": "1000"},
    ],
    ids=str,
)
def test_properties_come_as_they_went(change: dict[str, Any]) -> None:
    message = evolve(USUAL, properties={**PROPERTIES, **change})
    assert exactly(same(message)) == exactly(message)


def test_other_orders_and_fewer_headers_come_as_they_went() -> None:
    turned = dict(reversed(HEADERS.items()))
    for headers in (turned, {}, {"id": ID}, {k: v for k, v in HEADERS.items() if k != "stamps"}):
        message = evolve(USUAL, headers=headers, properties={})
        assert exactly(same(message)) == exactly(message)


def test_other_contents_and_due_times_come_as_they_went() -> None:
    for change in ({"content_type": "application/x-msgpack", "content_encoding": "binary"}, {"due": 12.5}):
        message = evolve(USUAL, **change)
        assert exactly(same(message)) == exactly(message)


def test_messages_share_nothing_that_could_be_changed() -> None:
    one, other = same(USUAL), same(evolve(USUAL, headers={**HEADERS, "id": "other"}))
    for name in ("timelimit", "stamps"):
        assert one.headers[name] is not other.headers[name]
    one.headers["stamps"]["a"] = 1
    one.headers["timelimit"][0] = 1
    one.properties["reply_to"] = "x"  # type: ignore[index]  # a dict, in this driver
    assert same(USUAL) == USUAL


def test_the_usual_head_is_small_and_takes_little_room_for_more() -> None:
    assert len(heads.encode(USUAL)) < 200
    assert heads.encode(USUAL).count(ID.encode()) == 1


def test_templates_do_not_fill_the_memory() -> None:
    for number in range(heads._MOST + 10):
        message = evolve(USUAL, headers={**HEADERS, "task": f"shop.task{number}"})
        assert same(message) == message
    assert len(heads._written) <= heads._MOST
    assert len(heads._read) <= heads._MOST


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xc1",
        msgpack.packb(1),
        msgpack.packb([]),
        msgpack.packb({"a": 1}),
        msgpack.packb([1, 2]),
        msgpack.packb([b"", "id", None, "", "", None]),
        msgpack.packb([b"\xc1", "id", None, "", "", None]),
        msgpack.packb([msgpack.packb([1]), "id", None, "", "", None]),
        msgpack.packb([msgpack.packb(list(range(12))), "id", None, "", "", None]),
        msgpack.packb([msgpack.packb(["py", "t", None, 0, [None, None], "", 0, 0, "", 2, "j", "u"]), "id"]),
        heads.encode(USUAL)[:-5],
        heads.encode(USUAL) + b"x",
    ],
)
def test_what_is_no_head_is_an_unreadable_message(head: bytes) -> None:
    message = decode_message("q", 0, head, b"body")
    assert (message.content_type, message.headers, message.body) == ("application/x-unreadable", {}, b"body")


def test_what_is_no_plain_data_is_refused_and_spoils_nothing() -> None:
    for headers in ({**HEADERS, "origin": object()}, {**HEADERS, "argsrepr": object()}, {"own": object()}):
        with pytest.raises(PublishRefused, match="no plain data"):
            heads.encode(evolve(USUAL, headers=headers))
        assert same(USUAL) == USUAL
