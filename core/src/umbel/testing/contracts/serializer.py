"""The laws of the serializer port."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.errors import DecodeError, EncodeError
from umbel.ports.serializer import Serializer
from umbel.testing.contracts.codecs import at_once, damaged, thorough

PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda values: st.lists(values, max_size=5) | st.dictionaries(st.text(max_size=10), values, max_size=5),
    max_leaves=20,
)
"""What every serializer carries unchanged: plain data with text for keys."""


class SerializerContract:
    """Subclass it and give the fixture ``make_serializer``: a callable that makes a serializer."""

    values: st.SearchStrategy[Any] = PLAIN
    """What must come back equal. A serializer that carries more says so here."""
    examples: int = 150
    """How many values and pieces of nonsense each law tries."""

    @pytest.fixture
    def serializer(self, make_serializer: Callable[[], Serializer]) -> Serializer:
        return make_serializer()

    def test_a_driver_says_what_it_is(self, serializer: Serializer) -> None:
        assert isinstance(serializer, Serializer)
        assert type(serializer).api_version[0] == Serializer.api_version[0]
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", serializer.name)
        assert re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", serializer.content_type)
        assert serializer.content_encoding in ("utf-8", "binary")
        assert isinstance(serializer.safe, bool)

    def test_what_went_in_comes_out(self, serializer: Serializer) -> None:
        @thorough(self.examples)
        @given(self.values)
        def check(value: Any) -> None:
            data = serializer.dumps(value)
            assert type(data) is bytes
            assert same(serializer.loads(data), value)

        check()

    def test_a_task_body_comes_back(self, serializer: Serializer) -> None:
        embed = {
            "callbacks": None,
            "errbacks": None,
            "chain": [{"task": "a.b", "args": [1], "options": {}}],
            "chord": None,
        }
        body = [[1, "ü名🌸", None, 2.5, True, [], {}], {"key": {"deep": [[["x"]]]}, "": ""}, embed]
        assert same(serializer.loads(serializer.dumps(body)), body)

    def test_text_is_text(self, serializer: Serializer) -> None:
        data = serializer.dumps(["ü", {"k": 1.5}])
        if serializer.content_encoding == "utf-8":
            data.decode("utf-8")

    def test_a_large_value_comes_back(self, serializer: Serializer) -> None:
        value = [{"n": n, "text": "x" * 100, "more": [None, True, n / 2]} for n in range(5000)]
        assert serializer.loads(serializer.dumps(value)) == value

    def test_encoding_changes_nothing(self, serializer: Serializer) -> None:
        value = {"list": [1, [2, {"a": "b"}]], "text": "ü"}
        kept = copy.deepcopy(value)
        serializer.dumps(value)
        assert value == kept

    def test_a_value_that_cannot_be_encoded_is_named_by_its_type(self, serializer: Serializer) -> None:
        for value in (threading.Lock(), [1, {"deep": threading.Lock()}]):
            with pytest.raises(EncodeError) as refused:
                serializer.dumps(value)
            assert "lock" in str(refused.value), "the error names the type that cannot be encoded"

    def test_a_value_beyond_all_depth_raises_nothing_but_an_encode_error(self, serializer: Serializer) -> None:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        try:
            assert type(serializer.dumps(value)) is bytes
        except EncodeError:
            pass

    def test_bytes_that_break_off_raise_nothing_but_a_decode_error(self, serializer: Serializer) -> None:
        data = serializer.dumps([{"key": "value", "list": [1, 2, 3]}])
        for length in range(len(data)):
            with suppress(DecodeError):
                serializer.loads(data[:length])

    def test_no_bytes_raise_anything_but_a_decode_error(self, serializer: Serializer) -> None:
        if not serializer.safe:
            return  # to read what a stranger wrote would run it

        @thorough(self.examples)
        @given(st.binary() | st.text().map(str.encode))
        def check(data: bytes) -> None:
            with suppress(DecodeError):
                serializer.loads(data)

        check()

    def test_no_damage_raises_anything_but_a_decode_error(self, serializer: Serializer) -> None:
        if not serializer.safe:
            return  # damage can make it run anything

        @thorough(self.examples)
        @given(damaged(self.values.map(serializer.dumps)))
        def check(data: bytes) -> None:
            with suppress(DecodeError):
                serializer.loads(data)

        check()

    def test_bytes_beyond_all_depth_raise_nothing_but_a_decode_error(self, serializer: Serializer) -> None:
        if not serializer.safe:
            return
        for opening in (b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"- ", b"(", b"<"):
            with suppress(DecodeError):
                serializer.loads(opening * 50_000)

    def test_threads_do_not_disturb_each_other(self, serializer: Serializer) -> None:
        def work(number: int) -> None:
            for turn in range(100):
                value = {"number": number, "turn": [turn] * 50}
                assert serializer.loads(serializer.dumps(value)) == value

        at_once(work)


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type, throughout: ``1``, ``1.0`` and ``True`` are three things."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
