"""Short ways of reading give what the long way gives, however the bytes come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.model import Message
from umbel_amqp import frames
from umbel_amqp.channel import Channel, Raw
from umbel_amqp.connection import Connection
from umbel_amqp.fields import short_string
from umbel_amqp.messages import write_message
from umbel_amqp.options import ConnectionOptions, address_of
from umbel_amqp.properties import Templates, _read, make_template

HEADERS: dict[str, Any] = {
    "lang": "py", "task": "shop.mail", "id": "9a97a032", "shadow": None, "eta": None, "expires": None, "group": None,
    "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": "9a97a032", "parent_id": None,
    "argsrepr": "(2, 3)", "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": False,
    "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
}  # fmt: skip


def properties(headers: dict[str, Any] | None = None, **others: Any) -> bytes:
    id = (HEADERS | (headers or {}))["id"]
    kept = {"correlation_id": id, "reply_to": "r", "delivery_mode": 2, **others}
    return write_message(Message(queue="q", headers=HEADERS | (headers or {}), properties=kept), "")


# --- templates --------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=6) | st.binary(max_size=4)
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=2), scalars, max_size=2)
names = st.sampled_from(("id", "root_id", "argsrepr", "group", "retries", "timelimit", "stamps", "mine"))
tables = st.dictionaries(names, values | st.lists(st.lists(scalars, max_size=1), max_size=1), max_size=6)
kept = st.fixed_dictionaries(
    {},
    optional={
        "correlation_id": st.text(max_size=4),
        "reply_to": st.text(max_size=4),
        "message_id": st.text(max_size=4),
    },
)
messages = st.tuples(tables, kept, st.integers(0, 9))


@settings(max_examples=300, deadline=None)
@given(st.lists(messages, min_size=1, max_size=4))
def test_templates_give_what_the_general_way_gives(given_: list[tuple[dict[str, Any], dict[str, Any], int]]) -> None:
    templates = Templates()
    for headers, others, priority in [*given_, *given_]:
        data = write_message(Message(queue="q", headers=headers, properties=others, priority=priority), "")
        found, expected = templates.read(data), _read(data)
        assert found == expected
        assert [list(part) for part in found[:2]] == [list(part) for part in expected[:2]]
        assert [type(value) for value in found[0].values()] == [type(value) for value in expected[0].values()]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_template_leaves_broken_bytes_to_the_general_way(data: st.DataObject) -> None:
    template = make_template(properties())
    assert template is not None
    raw = bytearray(properties({"id": "another", "argsrepr": "(1,)"}))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    if (found := template.read(broken)) is not None:
        assert found == _read(broken)


def test_a_template_is_used_and_shares_nothing() -> None:
    template = make_template(properties())
    assert template is not None
    data = properties({"id": "ünï", "root_id": "other", "argsrepr": "🌸" * 300, "kwargsrepr": ""})
    found = template.read(data)
    assert found == _read(data)
    found[0]["timelimit"].append(1)
    found[0]["stamps"]["a"] = 1
    assert template.read(data) == _read(data)


def test_values_in_values_have_no_template() -> None:
    assert make_template(properties({"stamps": {"a": [1]}})) is None
    assert make_template(write_message(Message(queue="q"), "")) is None


def test_messages_that_all_differ_are_not_learned_for_ever() -> None:
    templates = Templates()
    for number in range(100):
        templates.read(properties({"origin": f"gen{number}@host"}))
    assert len(templates._known) <= 16
    assert templates._saved < 16, "no template has paid for itself"


# --- deliveries -------------------------------------------------------------------------------------


def delivered(channel: int, consumer: str, tag: int, body: bytes, *, key: str = "q", frame_max: int = 4096) -> bytes:
    payload = (
        frames.DELIVERY
        + short_string(consumer)
        + tag.to_bytes(8, "big")
        + b"\x01"
        + short_string("")
        + short_string(key)
    )
    method = frames.FRAME.pack(frames.METHOD, channel, len(payload)) + payload + frames.END
    return b"".join((method, *frames.content_frames(channel, b"\x00\x00", body, frame_max)))


STREAM = b"".join(
    (
        delivered(1, "0", 1, b"one"),
        delivered(1, "0", 2, b"two"),
        delivered(1, "1", 3, b"other consumer"),
        delivered(2, "0", 1, b"other channel", key="ü"),
        frames.HEARTBEAT_FRAME,
        delivered(1, "0", 4, b""),
        delivered(1, "0", 5, b"x" * 5000),
        delivered(1, "0", 6, b"\xce\x01\x3c\x3c"),
        delivered(7, "0", 1, b"nobody's"),
        delivered(1, "gone", 7, b"nobody's"),
        delivered(1, "0", 8, b"last"),
    )
)
EXPECTED = {
    (1, "0"): [(1, b"one"), (2, b"two"), (4, b""), (5, b"x" * 5000), (6, b"\xce\x01\x3c\x3c"), (8, b"last")],
    (1, "1"): [(3, b"other consumer")],
    (2, "0"): [(1, b"other channel")],
}


def receive(chunks: list[bytes]) -> tuple[dict[tuple[int, str], list[Raw]], Connection]:
    async def live() -> tuple[dict[tuple[int, str], list[Raw]], Connection]:
        options = ConnectionOptions()
        connection = Connection(address_of("amqp://localhost", options), options, "here")
        found: dict[tuple[int, str], list[Raw]] = {}
        for number, consumers in ((1, "01"), (2, "0")):
            channel = connection._channels[number] = Channel(connection, number)
            for consumer in consumers:
                channel.consumers[consumer] = found.setdefault((number, consumer), []).extend
        for chunk in chunks:
            connection.data_received(chunk)
        return found, connection

    return asyncio.run(live())


@pytest.mark.parametrize("size", [1, 7, 64, 100, 1000, 4099, len(STREAM)])
def test_deliveries_arrive_however_they_are_cut(size: int) -> None:
    found, connection = receive([STREAM[at : at + size] for at in range(0, len(STREAM), size)])
    assert connection.fault is None
    assert {way: [(raw[0], raw[5]) for raw in raws] for way, raws in found.items()} == EXPECTED
    assert found[2, "0"][0] == (1, True, "", "ü", b"\x00\x00", b"other channel")


def test_a_delivery_without_the_end_of_a_frame_ends_the_connection() -> None:
    one = bytearray(delivered(1, "0", 1, b"one"))
    for at in (position for position, byte in enumerate(one) if byte == frames.END_BYTE):
        broken = bytes(one[:at]) + b"\x00" + bytes(one[at + 1 :])
        found, connection = receive([delivered(1, "0", 9, b"before") + broken + delivered(1, "0", 2, b"after")])
        assert connection.fault is not None
        assert [raw[5] for raw in found[1, "0"] if raw[0] != 9] == []
