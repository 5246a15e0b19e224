"""Wrong serializers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from umbel.errors import DecodeError, EncodeError
from umbel.testing.contracts import SerializerContract

from ..honest.codecs import HonestSerializer
from .house import House


class SerializerCage(SerializerContract):
    driver: ClassVar[type[HonestSerializer]]
    examples = 40

    @pytest.fixture
    def make_serializer(self) -> Callable[[], HonestSerializer]:
        return self.driver


HOUSE = House(__file__, SerializerCage, HonestSerializer)


@HOUSE.breaks("a_value_that_cannot_be_encoded_is_named_by_its_type")
class NamesNoType(HonestSerializer):
    def told(self, error: Exception) -> str:
        return "it cannot be encoded"


@HOUSE.breaks(
    "no_bytes_raise_anything_but_a_decode_error",
    "no_damage_raises_anything_but_a_decode_error",
    "bytes_that_break_off_raise_nothing_but_a_decode_error",
    "bytes_beyond_all_depth_raise_nothing_but_a_decode_error",
)
class RaisesTheWrongError(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        try:
            return super().loads(data)
        except DecodeError as error:
            if isinstance(error.__cause__, RecursionError):
                raise
            raise ValueError(str(error)) from error


@HOUSE.breaks("bytes_beyond_all_depth_raise_nothing_but_a_decode_error")
class FallsIntoDepths(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        try:
            return super().loads(data)
        except DecodeError as error:
            if isinstance(error.__cause__, RecursionError):
                raise error.__cause__ from None
            raise


@HOUSE.breaks("what_went_in_comes_out", "a_task_body_comes_back")
class MakesFloatsOfNumbers(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        value = super().loads(data)
        return _floats(value)


def _floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    return float(value) if type(value) is int else value


@HOUSE.breaks("encoding_changes_nothing")
class EmptiesItsArgument(HonestSerializer):
    def dumps(self, value: Any) -> bytes:
        data = super().dumps(value)
        if isinstance(value, dict) and "list" in value:
            value["list"].clear()
        return data


@HOUSE.breaks("a_driver_says_what_it_is")
class SaysNoContentType(HonestSerializer):
    content_type = "honest"


@HOUSE.breaks("text_is_text")
class WritesUtf16AsUtf8(HonestSerializer):
    def dumps(self, value: Any) -> bytes:
        return super().dumps(value).decode().encode("utf-16")

    def loads(self, data: bytes) -> Any:
        try:
            return super().loads(data.decode("utf-16").encode())
        except UnicodeError as error:
            raise DecodeError(str(error)) from error


@HOUSE.breaks("a_large_value_comes_back")
class CutsLongLists(HonestSerializer):
    def loads(self, data: bytes) -> Any:
        value = super().loads(data)
        return value[:4096] if isinstance(value, list) else value


@HOUSE.breaks("a_value_beyond_all_depth_raises_nothing_but_an_encode_error")
class FallsIntoDeepValues(HonestSerializer):
    def dumps(self, value: Any) -> bytes:
        try:
            return super().dumps(value)
        except EncodeError as error:
            if isinstance(error.__cause__, RecursionError):
                raise error.__cause__ from None
            raise


@HOUSE.breaks("threads_do_not_disturb_each_other")
class SharesItsValue(HonestSerializer):
    def dumps(self, value: Any) -> bytes:
        self.value = value
        time.sleep(0.0001)
        return super().dumps(self.value)


globals().update(HOUSE.tests())
