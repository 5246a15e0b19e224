"""Fixtures of every test in this repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests/support"))
pytest_plugins = ["servers.fixtures"]


@pytest.fixture(scope="session")
def absent() -> Callable[[str], NoReturn]:
    """What a fixture calls when the server that its tests need is not there: ``absent("no Redis at localhost:6379")``.

    Skips with the reason on a person's machine. Where ``CI=true`` it fails: there everything is to be tested.
    """

    def say(reason: str) -> NoReturn:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI leaves nothing out", pytrace=False)
        pytest.skip(reason)

    return say
