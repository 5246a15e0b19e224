"""The codec, against Celery's own, and what a message is on the wire and back."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.serialization import dumps, loads
from attrs import asdict
from pamqp import commands

from umbel.errors import PublishRefused
from umbel.model import Message
from umbel_amqp import delays, frames
from umbel_amqp.connection import _major_version
from umbel_amqp.fields import read_table, short_string, write_table
from umbel_amqp.messages import Marks, read_message, write_message

TABLE: dict[str, Any] = {
    "lang": "py",
    "task": "shop.mail",
    "eta": None,
    "retries": 0,
    "timelimit": [None, 2.5],
    "ignore_result": False,
    "stamps": {"tenant": "acme", "req": ["r1", "r2"]},
    "ünï 🌸": "ü🌸",
    "": "",
    "large": 2**62,
    "small": -(2**62),
    "edge": 2**31,
    "list": [1, [2, [{}]], True],
}


def test_tables_are_written_as_celery_writes_them() -> None:
    assert write_table(TABLE) == dumps("F", [TABLE])


def test_tables_of_celery_are_read() -> None:
    data = dumps("F", [TABLE])
    assert read_table(data, 0) == (TABLE, len(data))
    assert loads("F", write_table(TABLE), 0)[0] == [TABLE]


def test_bytes_stay_bytes() -> None:
    table = {"blob": b"\x00\xff", "list": [b"\x01"]}
    assert read_table(write_table(table), 0)[0] == table


@pytest.mark.parametrize(
    ("kind", "data", "value"),
    [
        ("t", b"\x01", True),
        ("b", b"\xff", -1),
        ("B", b"\xff", 255),
        ("s", b"\xff\xfe", -2),
        ("U", b"\xff\xfe", -2),
        ("u", b"\xff\xfe", 65534),
        ("I", b"\xff\xff\xff\xff", -1),
        ("i", b"\xff\xff\xff\xff", 2**32 - 1),
        ("l", struct.pack(">q", -5), -5),
        ("L", struct.pack(">q", 2**60), 2**60),
        ("f", struct.pack(">f", 0.5), 0.5),
        ("d", struct.pack(">d", 0.1), 0.1),
        ("D", b"\x02" + struct.pack(">i", -150), -1.5),
        ("T", struct.pack(">Q", 1_700_000_000), 1_700_000_000),
        ("V", b"", None),
        ("S", struct.pack(">I", 2) + b"ab", "ab"),
        ("S", struct.pack(">I", 2) + b"\xff\xfe", b"\xff\xfe"),
        ("x", struct.pack(">I", 2) + b"ab", b"ab"),
        ("F", struct.pack(">I", 0), {}),
        ("A", struct.pack(">I", 1) + b"V", [None]),
    ],
)
def test_every_type_is_read(kind: str, data: bytes, value: object) -> None:
    payload = b"\x01k" + kind.encode() + data
    table, end = read_table(struct.pack(">I", len(payload)) + payload + b"rest", 0)
    assert table == {"k": value}
    assert type(table["k"]) is type(value)
    assert end == 4 + len(payload)


@pytest.mark.parametrize("data", [b"\x00\x00\x00\x03\x01k?", b"\x00\x00\x00\x04\x01kSx", b"\x00\x00\x00\x09\x01k"])
def test_what_is_no_table_is_told(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError, struct.error)):  # a connection ends on any of them
        read_table(data, 0)


@pytest.mark.parametrize("value", [2**63, {1, 2}, object(), [object()]])
def test_a_header_that_amqp_cannot_carry_is_named(value: object) -> None:
    with pytest.raises(PublishRefused, match="header 'odd'"):
        write_table({"odd": value})


def test_a_name_that_is_too_long_is_refused() -> None:
    assert short_string("ü" * 127) == bytes((254,)) + "ü".encode() * 127
    with pytest.raises(PublishRefused, match="255"):
        short_string("ü" * 128)


# --- messages ---------------------------------------------------------------------------------------


def back(
    data: bytes, *, exchange: str = "", key: str = "q", before: bool = False, body: bytes = b"b", inherits: bool = False
) -> Any:
    """The message, with what is told of its past."""
    message, past = read_message((1, before, exchange, key, data, body), "q", inherits)
    return SimpleNamespace(message=message, **asdict(past))


def test_a_producers_message_has_nothing_of_ours() -> None:
    message = Message(
        queue="q",
        headers={"id": "1", "task": "t"},
        body=b"b",
        priority=7,
        properties={"correlation_id": "1", "reply_to": "r", "delivery_mode": 2},
    )
    data = write_message(message, "")
    assert back(data).message == message
    flags, rest = struct.unpack(">H", data[:2])[0], data[2:]
    properties = loads("ssFooss", rest, 0)[0]
    assert flags == 0xFE00
    assert properties == ["application/json", "utf-8", {"id": "1", "task": "t"}, 2, 7, "1", "r"]


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"delivery_mode": 1},
        {"expiration": "600000", "delivery_mode": 2},
        {"correlation_id": None, "delivery_mode": 2},
        {"exchange": "", "routing_key": "x", "delivery_mode": 2},
        {"n": 1, "nested": {"a": [b"\xff"]}},
    ],
)
def test_properties_come_back_as_they_were(properties: dict[str, Any]) -> None:
    message = Message(queue="q", body=b"b", properties=properties)
    assert back(write_message(message, "")).message == message


def test_the_way_it_came_is_told() -> None:
    message = Message(queue="q", body=b"b", properties={"delivery_mode": 2, "exchange": "e", "routing_key": "a.b"})
    assert back(write_message(message, "e"), exchange="e", key="a.b").message == message
    again = back(write_message(message, "", Marks(deliveries=1)))
    assert (again.message, again.count) == (message, 2)


def test_the_marks_of_the_way_are_taken_off() -> None:
    message = Message(queue="q", headers={"id": "1"}, body=b"b", properties={"delivery_mode": 2})
    marks = Marks(deliveries=2, starts=1, due=1.5, parked=4)
    headers = {**message.headers, "x-death": [{"count": 1}], "x-first-death-queue": "d", "x-delivery-count": 3}
    on_the_way = Message(queue="q", headers=headers, body=b"b", properties=message.properties)
    received = back(write_message(on_the_way, delays.ENTRY, marks), exchange="umbel.delay.10", key="k")
    assert received.message == message
    assert (received.count, received.starts, received.due, received.parked) == (6, 1, 1.5, 4)
    assert not received.inexact


@pytest.mark.parametrize(
    ("inherits", "told", "count"),
    [
        (False, {}, 3),
        (False, {"x-delivery-count": 1}, 4),
        (True, {"x-delivery-count": 1}, 3),
        (True, {"x-delivery-count": 1, "x-acquired-count": 2}, 4),
        (True, {}, 3),
    ],
)
def test_what_was_lost_while_parked_is_counted_once(inherits: bool, told: dict[str, int], count: int) -> None:
    """From RabbitMQ 4 on a parked copy brings along that the parking session lost it."""
    message = Message(queue="q", headers=told, body=b"b", properties={"delivery_mode": 2})
    data = write_message(message, "", Marks(deliveries=2, starts=1, parked=4))
    received = back(data, before=bool(told), inherits=inherits)
    assert (received.count, received.starts, received.message.headers) == (count, 1, {})


def test_what_was_given_back_counts_where_two_counts_are_told() -> None:
    headers = {"x-delivery-count": 1, "x-acquired-count": 3}
    data = write_message(Message(queue="q", headers=headers, properties={"delivery_mode": 2}), "")
    assert back(data, before=True, inherits=True).count == 4


@pytest.mark.parametrize(("version", "major"), [("4.0.5", 4), ("3.10.8", 3), ("", 0), ("next", 0), (None, 0)])
def test_the_version_of_the_broker_is_read(version: str | None, major: int) -> None:
    told = {} if version is None else {"version": version}
    assert _major_version(commands.Connection.Start(server_properties=told)) == major


def test_a_classic_queue_only_tells_that_it_was_delivered_before() -> None:
    data = write_message(Message(queue="q", properties={"delivery_mode": 2}), "")
    received = back(data, before=True)
    assert (received.count, received.inexact) == (2, True)


# --- frames -----------------------------------------------------------------------------------------


def test_bodies_are_cut_to_the_largest_frame() -> None:
    body = bytes(range(256)) * 40
    parts = frames.content_frames(3, b"pp", body, 4096)
    data, pieces, at = b"".join(parts), [], 0
    while at < len(data):
        kind, channel, size = frames.FRAME.unpack_from(data, at)
        assert channel == 3
        assert size + frames.OVERHEAD <= 4096
        pieces.append((kind, data[at + 7 : at + 7 + size]))
        assert data[at + 7 + size : at + 8 + size] == frames.END
        at += size + 8
    assert frames.read_content_header(pieces[0][1]) == (len(body), b"pp")
    assert b"".join(piece for kind, piece in pieces[1:] if kind == frames.BODY) == body


def test_an_empty_body_has_no_frame() -> None:
    assert frames.content_frames(1, b"pp", b"", 4096)[-1] == frames.END
    assert len(frames.content_frames(1, b"pp", b"", 4096)) == 4


# --- delays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 9, 10, 11, 300, 999, 1000, 9_999, 60_000, 86_399_123, int(delays.LONGEST * 1000)])
def test_a_delay_is_never_cut_short_and_hardly_prolonged(delay: int) -> None:
    path = delays.plan(delay)
    assert delay <= sum(path) <= delay + max(20, min(delay / 100, 100) + 10)
    assert list(path) == sorted(set(path), reverse=True), "no step twice: RabbitMQ takes that for a cycle"
    assert set(path) <= set(delays.STEPS)


def test_delays_that_people_write_take_few_steps() -> None:
    for seconds in (1, 2, 5, 10, 30, 60, 300, 600, 3600, 86_400):
        assert len(delays.plan(seconds * 1000)) <= 5
    assert delays.plan(60_000) == (60_000,)


def test_the_keys_lead_along_the_path() -> None:
    target = delays.Target("mail")
    path = delays.plan(70_000)
    assert path == (60_000, 10_000)
    assert target.keys(path) == ["umbel:0>60000:mail", "umbel:60000>10000:mail", "umbel:10000>0:mail"]
    assert target.queue(10_000) == "mail.delay.10000"
    assert delays.Target("mail", exchange=True).queue(10) != delays.Target("mail").queue(10)
