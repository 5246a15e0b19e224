"""What the JSON serializer promises: the wire's bytes, its extension forms both ways, and one error for all damage."""

from __future__ import annotations

import enum
import json
import math
from base64 import b64decode
from collections import namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from umbel.errors import DecodeError, EncodeError
from umbel.model import State
from umbel_json.serializer import JsonSerializer

JSON = JsonSerializer()
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))
CELERYS_OWN = [e for e in GOLDEN if not e["name"].startswith(("node-", "gocelery-", "celery-php"))]
modest = settings(max_examples=100, deadline=None)


def by_name(entry: dict[str, Any]) -> str:
    return str(entry["name"])


# --- what peers send ----------------------------------------------------------------------------


@pytest.mark.parametrize("entry", GOLDEN, ids=by_name)
def test_a_recorded_body_decodes_to_what_was_recorded(entry: dict[str, Any]) -> None:
    assert JSON.loads(b64decode(entry["body_base64"])) == entry["decoded"]


@pytest.mark.parametrize("entry", CELERYS_OWN, ids=by_name)
def test_what_celery_wrote_is_written_byte_for_byte(entry: dict[str, Any]) -> None:
    body = b64decode(entry["body_base64"])
    assert JSON.dumps(JSON.loads(body)) == body


def test_identity_on_the_wire() -> None:
    assert (JSON.name, JSON.content_type, JSON.content_encoding) == ("json", "application/json", "utf-8")
    assert JSON.safe


def test_text_is_escaped_to_ascii() -> None:
    assert JSON.dumps(["é", "🌼"]) == rb'["\u00e9", "\ud83c\udf3c"]'
    assert JSON.loads('["é", "🌼"]'.encode()) == ["é", "🌼"]


# --- extension forms ----------------------------------------------------------------------------

FORMS = [
    (datetime(2030, 1, 2, 3, 4, 5, 6, UTC), "datetime", "2030-01-02T03:04:05.000006+00:00"),
    (datetime(2030, 1, 2, 3, 4, 5), "datetime", "2030-01-02T03:04:05"),
    (date(2030, 1, 2), "date", "2030-01-02"),
    (time(3, 4, 5), "time", "03:04:05"),
    (Decimal("1.50"), "decimal", "1.50"),
    (UUID("12345678123456781234567812345678"), "uuid", {"hex": "12345678123456781234567812345678"}),
    (b"text", "bytes", "text"),
    ("é".encode(), "bytes", "é"),
    (b"\xff\x00", "base64", "/wA="),
]


@pytest.mark.parametrize(("value", "kind", "plain"), FORMS, ids=lambda v: None)
def test_extension_forms_are_those_of_the_wire(value: object, kind: str, plain: object) -> None:
    form = {"__type__": kind, "__value__": plain}
    assert json.loads(JSON.dumps({"a": [value]})) == {"a": [form]}
    decoded = JSON.loads(json.dumps({"a": [form]}).encode())
    assert decoded == {"a": [value]}
    assert type(decoded["a"][0]) is type(value)


@pytest.mark.parametrize(
    "document",
    [
        {"__type__": "date"},
        {"__value__": "2030-01-02"},
        {"__type__": "date", "__value__": "2030-01-02", "more": 1},
        {"__type__": "unheard-of", "other": 1},
    ],
)
def test_an_object_of_other_keys_is_left_alone(document: dict[str, Any]) -> None:
    assert JSON.loads(json.dumps(document).encode()) == document


def test_an_extension_form_is_known_however_its_keys_are_spelt() -> None:
    document = rb'{"\u005f_typ\u0065__": "bytes", "__v\u0061lue__": "x"}'
    assert JSON.loads(document) == b"x"


@pytest.mark.parametrize("kind", ["set", "", "DateTime", 1, None, [], {}, ["date"]])
def test_an_unknown_extension_type_is_refused(kind: object) -> None:
    with pytest.raises(DecodeError, match="not a JSON extension type; known are datetime, "):
        JSON.loads(json.dumps([{"__type__": kind, "__value__": "x"}]).encode())


@pytest.mark.parametrize("kind", ["datetime", "date", "time", "decimal", "uuid", "bytes", "base64"])
@pytest.mark.parametrize("plain", [None, 1, 1.5, [], [0, [1, 2], 3], {}, {"hex": 1}, {"hex": ""}, {"int": 1}, "\ud800"])
def test_a_form_of_the_wrong_value_is_refused(kind: str, plain: object) -> None:
    with pytest.raises(DecodeError, match=f"does not fit the JSON extension type '{kind}'"):
        JSON.loads(json.dumps({"__type__": kind, "__value__": plain}).encode())


@pytest.mark.parametrize("plain", ["/wA=\n", "/w!A=", "/wA", "é"])
def test_base64_is_read_strictly(plain: str) -> None:
    with pytest.raises(DecodeError, match="'base64'"):
        JSON.loads(json.dumps({"__type__": "base64", "__value__": plain}).encode())


# --- there and back -----------------------------------------------------------------------------


def unfolded(moment: Any) -> Any:
    """``fold`` is not on the wire: it chooses between two offsets of a zone, and the text holds the chosen one."""
    return moment.replace(fold=0)


# whole seconds: CPython itself reads an offset below one second as UTC
offsets = st.none() | st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**63)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes(timezones=offsets).map(unfolded)
    | st.dates()
    | st.times(timezones=offsets).map(unfolded)
    | st.decimals()
    | st.uuids()
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@modest
@given(values)
@example([math.nan, math.inf, -math.inf, -0.0])
@example([2**63, -(2**63) - 1, 2**64, 10**4000])
@example("\ud800")
@example(b"\xed\xa0\x80")
def test_what_went_in_comes_out(value: Any) -> None:
    # repr tells 1 from 1.0 and from True, -0.0 from 0.0, and NaN from nothing
    assert repr(JSON.loads(JSON.dumps(value))) == repr(value)


def test_numbers_are_written_as_python_reads_them() -> None:
    assert JSON.dumps([math.nan, math.inf, -math.inf, 2**64]) == b"[NaN, Infinity, -Infinity, 18446744073709551616]"
    assert JSON.loads(b"[1e400, 123456789012345678901234567890]") == [math.inf, 123456789012345678901234567890]


def test_tuples_become_lists() -> None:
    point = namedtuple("point", "x y")
    assert JSON.loads(JSON.dumps(((1, 2), point(3, 4)))) == [[1, 2], [3, 4]]


def test_keys_that_are_not_strings_become_strings() -> None:
    assert JSON.loads(JSON.dumps({1: "a", 1.5: "b", None: "c"})) == {"1": "a", "1.5": "b", "null": "c"}
    assert JSON.loads(JSON.dumps({True: "a"})) == {"true": "a"}


def test_an_enum_that_is_a_plain_value_goes_as_that() -> None:
    class Level(enum.IntEnum):
        HIGH = 9

    assert JSON.loads(JSON.dumps({State.SUCCESS: [State.FAILURE, Level.HIGH]})) == {"SUCCESS": ["FAILURE", 9]}


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
        (bytearray(b"x"), "builtins.bytearray"),
        (timedelta(1), "datetime.timedelta"),
        (1j, "builtins.complex"),
        (int, "builtins.type"),
    ],
)
def test_a_type_without_a_form_is_named_with_the_remedy(value: object, named: str) -> None:
    with pytest.raises(EncodeError, match=rf"no form for .*{named}.*typed=True"):
        JSON.dumps([{"deep": value}])


@pytest.mark.parametrize("key", [(1, 2), b"x", date(2030, 1, 2), UUID(int=1), Colour.RED])
def test_a_key_that_json_cannot_have_is_refused(key: object) -> None:
    with pytest.raises(EncodeError, match=type(key).__name__):
        JSON.dumps({key: 1})


def test_what_contains_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append({"ring": ring})
    with pytest.raises(EncodeError, match="Circular"):
        JSON.dumps(ring)


class Spiteful(dict[str, int]):
    def items(self) -> Any:
        raise KeyError("items")


def test_a_value_whose_own_code_raises_is_refused() -> None:
    with pytest.raises(EncodeError, match="cannot be written as JSON: 'items'"):
        JSON.dumps([Spiteful(a=1)])


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: (v,)])
def test_a_value_that_nests_too_deep_is_refused(wrap: Any) -> None:
    value: Any = None
    for _ in range(100_000):
        value = wrap(value)
    with pytest.raises(EncodeError, match="too deep"):
        JSON.dumps(value)


def test_an_integer_beyond_the_interpreters_bound_is_refused_both_ways() -> None:
    with pytest.raises(EncodeError, match="4300 digits"):
        JSON.dumps(10**5000)
    with pytest.raises(DecodeError, match="4300 digits"):
        JSON.loads(b"9" * 5000)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"__value__":1,"__type__":['])
def test_a_document_that_nests_too_deep_is_refused(opening: bytes) -> None:
    with pytest.raises(DecodeError, match="nests deeper"):
        JSON.loads(opening * 100_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"[1",
        b'{"a": ',
        b'"abc',
        b"[1,]",
        b"{'a': 1}",
        b"[1] x",
        b"[1][2]",
        b"nul",
        b"\xff",
        b'"\xed\xa0\x80"',
        b'"\xc3"',
        b"\xef\xbb\xbf[1]",
        '["utf-16"]'.encode("utf-16"),
        b'"\x00"',
        b"\x80\x04K\x01.",
        b"01",
        b"+1",
        b"\xc2\xa0[1]",
    ],
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a JSON document"):
        JSON.loads(data)


def test_space_around_the_document_is_allowed() -> None:
    assert JSON.loads(b" \t\r\n[1]\n") == [1]


def test_a_lone_surrogate_is_read_as_celery_reads_it() -> None:
    assert JSON.loads(rb'"\ud800"') == "\ud800"


def survives(data: bytes) -> None:
    try:
        JSON.loads(data)
    except DecodeError:
        pass


@modest
@given(st.binary() | st.text('[]{}",:0123456789.eE-+\\u truefalsnINy_').map(str.encode))
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data)


@modest
@given(values, st.data())
def test_no_damaged_document_raises_anything_but_a_decode_error(value: Any, data: st.DataObject) -> None:
    document = JSON.dumps(value)
    start = data.draw(st.integers(0, len(document)))
    stop = data.draw(st.integers(start, min(start + 8, len(document))))
    survives(document[:start] + data.draw(st.binary(max_size=8)) + document[stop:])


@modest
@given(
    st.sampled_from([kind for _, kind, _ in FORMS]),
    values.filter(lambda v: "__type__" not in repr(v)) | st.text("0123456789-:T.+Z E"),
)
def test_no_extension_value_raises_anything_but_a_decode_error(kind: str, plain: Any) -> None:
    survives(JSON.dumps({"__type__": kind, "__value__": plain}))
