"""The laws of the port, kept by this driver."""

from collections.abc import Callable
from uuid import uuid4

import pytest

from umbel.testing.contracts import SchedulerContract
from {{ cookiecutter.__package }}.scheduler import {{ cookiecutter.__class }}


class Test{{ cookiecutter.__class }}(SchedulerContract):
    @pytest.fixture
    def make_scheduler(self) -> Callable[[], {{ cookiecutter.__class }}]:
        url = f"{{ cookiecutter.name }}://{uuid4()}"
        return lambda: {{ cookiecutter.__class }}(url)
