"""The laws of the port, kept by this driver."""

from collections.abc import Callable

import pytest

from umbel.testing.contracts import SerializerContract
from {{ cookiecutter.__package }}.serializer import {{ cookiecutter.__class }}


class Test{{ cookiecutter.__class }}(SerializerContract):
    @pytest.fixture
    def make_serializer(self) -> Callable[[], {{ cookiecutter.__class }}]:
        return {{ cookiecutter.__class }}
