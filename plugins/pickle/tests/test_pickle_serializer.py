"""What the pickle serializer promises: protocol 4, one error each way, and that it says it is not safe."""

from __future__ import annotations

import json
import pickle
import threading
from base64 import b64decode
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.errors import DecodeError, EncodeError
from umbel_pickle.serializer import PickleSerializer

PICKLE = PickleSerializer()
GOLDEN = {e["name"]: e for e in json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))}
modest = settings(max_examples=100, deadline=None)


def body(name: str) -> bytes:
    return b64decode(GOLDEN[name]["body_base64"])


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_identity_on_the_wire() -> None:
    assert (PICKLE.name, PICKLE.content_type) == ("pickle", "application/x-python-serialize")
    assert PICKLE.content_encoding == "binary"
    assert PICKLE.safe is False


@pytest.mark.parametrize("name", [n for n in GOLDEN if n != "result-fail-pickle"])
def test_a_recorded_body_decodes_to_what_was_recorded(name: str) -> None:
    assert as_json(PICKLE.loads(body(name))) == GOLDEN[name]["decoded"]


def test_what_celery_wrote_is_written_byte_for_byte() -> None:
    body_of_a_task = ((2, 3), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    assert PICKLE.dumps(body_of_a_task) == body("serializer-pickle")


def test_a_class_that_is_not_here_is_named() -> None:
    with pytest.raises(DecodeError, match="wiretasks"):
        PICKLE.loads(body("result-fail-pickle"))


def test_protocol_4_is_written() -> None:
    assert PICKLE.dumps([1]).startswith(b"\x80\x04")


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.datetimes()
)
values = st.recursive(
    leaves | st.frozensets(st.integers()) | st.sets(st.text()),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@modest
@given(values)
def test_what_went_in_comes_out(value: Any) -> None:
    decoded = PICKLE.loads(PICKLE.dumps(value))
    assert decoded == value
    assert type(decoded) is type(value)


def test_values_that_json_lacks_come_out_as_they_were() -> None:
    value = {
        "when": datetime(2030, 1, 2, tzinfo=UTC),
        "price": Decimal("1.50"),
        ("a", 1): {1, 2},
        "error": KeyError,
    }
    assert PICKLE.loads(PICKLE.dumps(value)) == value


class Spiteful:
    def __reduce__(self) -> Any:
        raise KeyError("reduce")


class Fragile:
    def __init__(self, *args: object) -> None:
        if not args:
            raise OSError("no arguments")

    def __reduce__(self) -> Any:
        return Fragile, ()


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: lambda: None, "builtins.function"),
        (threading.Lock, "_thread.lock"),
        (lambda: (i for i in ()), "builtins.generator"),
        (Spiteful, "Spiteful.*KeyError.*reduce"),
        (deep, "RecursionError"),
    ],
    ids=["lambda", "lock", "generator", "spiteful", "deep"],
)
def test_what_cannot_be_pickled_is_refused(make: Any, named: str) -> None:
    with pytest.raises(EncodeError, match=named):
        PICKLE.dumps(make())


def test_a_constructor_that_raises_is_a_decode_error() -> None:
    with pytest.raises(DecodeError, match="OSError: no arguments"):
        PICKLE.loads(pickle.dumps(Fragile(1), protocol=4))


def test_reading_calls_what_the_bytes_name() -> None:
    """The reason for ``safe = False``: a line of text is a function call."""
    assert PICKLE.loads(b"cbuiltins\nlen\n(Vthree\ntR.") == 5


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x80\x04", b"[1]", b".", b"\x80\xff.", b"(" * 10_000, b"not a pickle"]
)
def test_what_is_not_a_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="cannot be read"):
        PICKLE.loads(data)


def test_a_truncated_pickle_is_refused_wherever_it_breaks_off() -> None:
    whole = body("result-success-pickle")
    for length in range(len(whole)):
        with pytest.raises(DecodeError):
            PICKLE.loads(whole[:length])


def survives(data: bytes) -> None:
    # Opcodes `r` and `p` (old memo puts, never written by protocol 4) reserve memory for any index they name.
    try:
        PICKLE.loads(data.replace(b"r", b"").replace(b"p", b""))
    except DecodeError:
        pass


@modest
@given(st.binary())
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes) -> None:
    survives(data)


@modest
@given(values, st.data())
def test_no_damaged_pickle_raises_anything_but_a_decode_error(value: Any, data: st.DataObject) -> None:
    document = PICKLE.dumps(value)
    start = data.draw(st.integers(0, len(document)))
    stop = data.draw(st.integers(start, min(start + 4, len(document))))
    survives(document[:start] + data.draw(st.binary(max_size=4)) + document[stop:])
