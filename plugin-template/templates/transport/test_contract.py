"""The laws of the port, kept by this driver."""

from collections.abc import Callable
from pathlib import Path

import pytest

from umbel.errors import SettingsError
from umbel.testing.contracts import TransportContract
from {{ cookiecutter.__package }}.transport import {{ cookiecutter.__class }}


class Test{{ cookiecutter.__class }}(TransportContract):
    patience, time_limit, many = 30.0, 120.0, 1000  # each message is a file, and some disks take milliseconds for each

    @pytest.fixture
    def make_transport(self, tmp_path: Path) -> Callable[[], {{ cookiecutter.__class }}]:
        return lambda: {{ cookiecutter.__class }}(f"{{ cookiecutter.name }}:///{tmp_path}")


@pytest.mark.parametrize("address", ["", "/", "host/folder"])
def test_a_url_without_a_folder_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"\[broker\] url"):
        {{ cookiecutter.__class }}(f"{{ cookiecutter.name }}://{address}")
