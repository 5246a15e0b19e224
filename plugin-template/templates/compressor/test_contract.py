"""The laws of the port, kept by this driver."""

from collections.abc import Callable

import pytest

from umbel.testing.contracts import CompressorContract
from {{ cookiecutter.__package }}.compressor import {{ cookiecutter.__class }}


class Test{{ cookiecutter.__class }}(CompressorContract):
    @pytest.fixture
    def make_compressor(self) -> Callable[[], {{ cookiecutter.__class }}]:
        return {{ cookiecutter.__class }}
