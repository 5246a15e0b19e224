"""The laws of the port, kept by this driver."""

from collections.abc import Callable

import pytest

from umbel.testing.contracts import PoolContract
from {{ cookiecutter.__package }}.pool import {{ cookiecutter.__class }}


class Test{{ cookiecutter.__class }}(PoolContract):
    @pytest.fixture
    def make_pool(self) -> Callable[[], {{ cookiecutter.__class }}]:
        return {{ cookiecutter.__class }}
