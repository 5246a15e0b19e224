"""The laws of the serializer port."""

from __future__ import annotations

import pytest

from umbel.testing.contracts import SerializerContract
from umbel_yaml.serializer import YamlSerializer


class TestYamlSerializer(SerializerContract):
    @pytest.fixture
    def make_serializer(self) -> type[YamlSerializer]:
        return YamlSerializer
