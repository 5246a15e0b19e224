"""What the msgpack serializer promises: the wire's bytes, nothing that a peer cannot read, and one error for all damage."""

from __future__ import annotations

import enum
import json
import math
import tracemalloc
from base64 import b64decode
from collections import OrderedDict, namedtuple
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgpack  # type: ignore[import-untyped]  # it ships no types
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from umbel.errors import DecodeError, EncodeError
from umbel.model import State
from umbel_msgpack.serializer import MsgpackSerializer

MSGPACK = MsgpackSerializer()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
modest = settings(max_examples=100, deadline=None)


def by_name(entry: dict[str, Any]) -> str:
    return str(entry["name"])


# --- what peers send ----------------------------------------------------------------------------


def test_identity_on_the_wire() -> None:
    assert (MSGPACK.name, MSGPACK.content_type) == ("msgpack", "application/x-msgpack")
    assert MSGPACK.content_encoding == "binary"
    assert MSGPACK.safe
    assert MsgpackSerializer.__dict__["api_version"] == (1, 0)


@pytest.mark.parametrize("entry", GOLDEN, ids=by_name)
def test_a_recorded_body_decodes_to_what_was_recorded(entry: dict[str, Any]) -> None:
    assert MSGPACK.loads(b64decode(entry["body_base64"])) == entry["decoded"]


@pytest.mark.parametrize("entry", GOLDEN, ids=by_name)
def test_what_celery_wrote_is_written_byte_for_byte(entry: dict[str, Any]) -> None:
    body = b64decode(entry["body_base64"])
    assert MSGPACK.dumps(MSGPACK.loads(body)) == body


def test_text_and_bytes_are_told_apart() -> None:
    assert MSGPACK.dumps(["é", b"\xff"]) == b"\x92\xa2\xc3\xa9\xc4\x01\xff"


def test_what_other_languages_write_comes_as_celery_gives_it() -> None:
    foreign = [msgpack.Timestamp(1, 999_999_999), msgpack.ExtType(5, b"x")]
    assert MSGPACK.loads(b"\x92\xd7\xff" + (999_999_999 << 34 | 1).to_bytes(8, "big") + b"\xd4\x05x") == foreign
    assert MSGPACK.loads(MSGPACK.dumps(foreign)) == foreign


# --- there and back -----------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
keys = st.text() | st.binary()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


@modest
@given(values)
@example([math.nan, math.inf, -math.inf, -0.0])
@example([2**64 - 1, -(2**63)])
@example(["x" * 70_000, b"x" * 70_000, list(range(70_000)), {str(n): n for n in range(70_000)}])
def test_what_went_in_comes_out(value: Any) -> None:
    # repr tells 1 from 1.0 and from True, -0.0 from 0.0, and NaN from nothing
    assert repr(MSGPACK.loads(MSGPACK.dumps(value))) == repr(value)


def test_tuples_become_lists() -> None:
    point = namedtuple("point", "x y")
    assert MSGPACK.loads(MSGPACK.dumps(((1, 2), point(3, 4)))) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("make", [bytearray, memoryview])
def test_what_holds_bytes_becomes_bytes(make: Any) -> None:
    assert MSGPACK.loads(MSGPACK.dumps(make(b"x"))) == b"x"


def test_a_subclass_goes_as_what_it_is() -> None:
    class Level(enum.IntEnum):
        HIGH = 9

    value = OrderedDict({State.SUCCESS: [State.FAILURE, Level.HIGH]})
    assert repr(MSGPACK.loads(MSGPACK.dumps(value))) == "{'SUCCESS': ['FAILURE', 9]}"


# --- what is refused ----------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Opaque:
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "builtins.set"),
        (frozenset(), "builtins.frozenset"),
        (Colour.RED, "Colour"),
        (Opaque(), "Opaque"),
        (timedelta(1), "datetime.timedelta"),
        (1j, "builtins.complex"),
        (datetime(2030, 1, 2, tzinfo=UTC), "datetime.datetime: pass it as text"),
        (date(2030, 1, 2), "datetime.date: pass it as text"),
        (time(3, 4), "datetime.time: pass it as text"),
        (Decimal("1.50"), "decimal.Decimal: pass it as text"),
        (UUID(int=1), "uuid.UUID: pass it as text"),
    ],
)
def test_a_type_without_a_form_is_named_with_the_remedy(value: object, named: str) -> None:
    with pytest.raises(EncodeError, match=rf"no form for .*{named}.*typed=True"):
        MSGPACK.dumps([{"deep": value}])


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_an_integer_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(EncodeError, match="64 bits"):
        MSGPACK.dumps([value])


@pytest.mark.parametrize("key", [1, 1.5, None, True, (1, 2), msgpack.Timestamp(1)])
def test_a_key_that_no_reader_takes_is_refused_at_the_call(key: object) -> None:
    with pytest.raises(EncodeError, match="is not allowed for map key"):
        MSGPACK.dumps([{key: 1}])
    with pytest.raises(DecodeError, match="is not allowed for map key"):
        MSGPACK.loads(msgpack.packb([{key: 1}]))


def test_what_contains_itself_or_nests_too_deep_is_refused() -> None:
    ring: list[Any] = []
    ring.append({"ring": ring})
    with pytest.raises(EncodeError, match="recursion limit"):
        MSGPACK.dumps(ring)
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(EncodeError, match="recursion limit"):
        MSGPACK.dumps(deep)


def test_a_value_that_nests_as_deep_as_is_written_is_read() -> None:
    deep: Any = None
    for _ in range(511):
        deep = [deep]
    assert MSGPACK.loads(MSGPACK.dumps(deep)) == deep


class Spiteful(dict[str, int]):
    def items(self) -> Any:
        raise KeyError("items")


def test_a_value_whose_own_code_raises_is_refused() -> None:
    with pytest.raises(EncodeError, match="cannot be written as msgpack: 'items'"):
        MSGPACK.dumps([Spiteful(a=1)])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(EncodeError, match="surrogates"):
        MSGPACK.dumps("\ud800")


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\xdc\x00\x01", b"\xde\x00\x01\xa1a"])
def test_a_document_that_nests_too_deep_is_refused(opening: bytes) -> None:
    with pytest.raises(DecodeError, match="nests too deep"):
        MSGPACK.loads(opening * 100_000 + b"\xc0")


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf"])
def test_elements_that_are_announced_and_do_not_follow_cost_nothing(header: bytes) -> None:
    size = 100_000
    key = b"" if header == b"\xdd" else b"\xa1a"
    document = (header + (size // 2).to_bytes(4, "big") + key) * 1000
    document += bytes(size - len(document))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="breaks off"):
            MSGPACK.loads(document)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "breaks off"),
        (b"\xc1", "begins no value"),
        (b"\xc0\xc0", "extra data"),
        (b"\xa1\xff", "utf-8"),
        (b"\xa3\xed\xa0\x80", "utf-8"),
        (b"\xd4\xfb\x00", "0~127"),
        (b"\xd4\xff\x00", "timestamp|Unpack failed"),
        (b"\xc7\x0c\xff" + b"\xff" * 12, "nanoseconds"),
        (b"\xdd\xff\xff\xff\xff", "breaks off|max_array_len"),
        (b"\xc6\xff\xff\xff\xff", "breaks off|max_bin_len"),
        (b"{}", "extra data"),
    ],
)
def test_what_is_not_msgpack_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=f"not a msgpack value: .*({reason})"):
        MSGPACK.loads(data)


def test_a_truncated_value_is_refused_wherever_it_breaks_off() -> None:
    whole = b64decode(GOLDEN[-1]["body_base64"])
    for length in range(len(whole)):
        with pytest.raises(DecodeError, match="breaks off"):
            MSGPACK.loads(whole[:length])


def survives(data: bytes) -> None:
    try:
        MSGPACK.loads(data)
    except DecodeError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary())
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data)


@modest
@given(values, st.data())
def test_no_damaged_document_raises_anything_but_a_decode_error(value: Any, data: st.DataObject) -> None:
    document = MSGPACK.dumps(value)
    start = data.draw(st.integers(0, len(document)))
    stop = data.draw(st.integers(start, min(start + 8, len(document))))
    survives(document[:start] + data.draw(st.binary(max_size=8)) + document[stop:])
