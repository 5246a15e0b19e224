"""The laws of the port, kept by this driver."""

from collections.abc import Callable
from pathlib import Path

import pytest

from umbel.errors import SettingsError
from umbel.testing.contracts import ResultStoreContract
from {{ cookiecutter.__package }}.result_store import {{ cookiecutter.__class }}


class Test{{ cookiecutter.__class }}(ResultStoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Callable[[], {{ cookiecutter.__class }}]:
        return lambda: {{ cookiecutter.__class }}(f"{{ cookiecutter.name }}:///{tmp_path}")


@pytest.mark.parametrize("address", ["", "/", "host/folder"])
def test_a_url_without_a_folder_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"\[results\] url"):
        {{ cookiecutter.__class }}(f"{{ cookiecutter.name }}://{address}")
