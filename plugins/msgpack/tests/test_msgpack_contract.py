"""The laws of the serializer port."""

from __future__ import annotations

import pytest

from umbel.testing.contracts import SerializerContract
from umbel_msgpack.serializer import MsgpackSerializer


class TestMsgpackSerializer(SerializerContract):
    @pytest.fixture
    def make_serializer(self) -> type[MsgpackSerializer]:
        return MsgpackSerializer
