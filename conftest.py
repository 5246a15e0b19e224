"""Fixtures of every test in this repository."""

from __future__ import annotations

import ast
import functools
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests/support"))
pytest_plugins = ["servers.fixtures", "hanging", "whole_run"]


def _parse_without_collection(parse: Callable[..., Any]) -> Callable[..., Any]:
    """A collection amid the parsing may finish something whose logged traceback parses too, and on Python 3.11 that is a
    SystemError, "AST constructor recursion depth mismatch" (CPython issue 106905), in whatever was being parsed.
    """

    @functools.wraps(parse)
    def parsed(*args: Any, **kwargs: Any) -> Any:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return parse(*args, **kwargs)
        finally:
            if was_enabled:
                gc.enable()

    return parsed


if sys.version_info < (3, 12):
    ast.parse = _parse_without_collection(ast.parse)


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
