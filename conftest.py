"""Fixtures of every test in this repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

import pytest


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
