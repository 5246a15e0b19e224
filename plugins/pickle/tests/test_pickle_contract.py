"""The laws of the serializer port."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from umbel.testing.contracts import SerializerContract
from umbel_pickle.serializer import PickleSerializer


class TestPickleSerializer(SerializerContract):
    @pytest.fixture
    def make_serializer(self) -> Callable[[], PickleSerializer]:
        return PickleSerializer
