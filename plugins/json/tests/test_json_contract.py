"""The laws of the serializer port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import SerializerContract
from umbel_json.serializer import JsonSerializer


class TestJsonSerializer(SerializerContract):
    @pytest.fixture
    def make_serializer(self) -> Callable[[], JsonSerializer]:
        return JsonSerializer
